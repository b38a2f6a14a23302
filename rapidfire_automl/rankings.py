"""Which trial is best at equal steps, and which at equal cost: two questions where trials differ in what they generate.

A trial's cost is the tokens it generated and the tokens it trained, which are the same in every run; torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from rapidfire_automl.events import ENDED_WITH_SEARCH
from rapidfire_automl.records import TrialRecord
from rapidfire_policies.base import TrialState


@dataclass(frozen=True, slots=True)
class Place:
    """A trial in a ranking.

    Args:
        trial: Its number.
        value: What it is ranked by, in the user's sign.
        chunk: The chunk after which it had that value.
        tokens: Tokens generated and trained until then.
        cut: Whether it was stopped before it had the ranking's steps or cost, and might have got further.
    """

    trial: int
    value: float
    chunk: int
    tokens: int
    cut: bool


@dataclass(frozen=True, slots=True)
class Rankings:
    """Both orders, best first; ties go to the lower number.

    Args:
        chunks: Chunks at which steps are equal: those of a whole trial, or the most that any has done.
        equal_steps: The trials that did so many, by their value there.
        tokens: The cost that is equal: what the cheapest complete trial took in all; None without a complete trial.
        equal_cost: The trials by the best value they reached within that cost; those whose first chunk took more are
            left out.
    """

    chunks: int
    equal_steps: tuple[Place, ...]
    tokens: int | None
    equal_cost: tuple[Place, ...]


def has_failed(record: TrialRecord) -> bool:
    """Whether a trial has failed by itself, not merely ended with its search."""
    return record.state is TrialState.FAILED and record.error != ENDED_WITH_SEARCH


def best_so_far(records: Mapping[int, TrialRecord], *, maximize: bool) -> int | None:
    """The trial with the best finite last value, whatever it has come to but a failure of its own.

    Ties go to the lower number; None without any.
    """
    lasts = {
        number: record.values[-1]
        for number, record in records.items()
        if record.values and math.isfinite(record.values[-1]) and not has_failed(record)
    }
    return min(lasts, key=lambda number: (-lasts[number] if maximize else lasts[number], number), default=None)


def generates(records: Mapping[int, TrialRecord]) -> bool:
    """Whether any trial generated something to train on."""
    return any(any(record.generated) for record in records.values())


def costs(record: TrialRecord) -> list[int]:
    """Tokens generated and trained up to each chunk's end, `(chunks,)`."""
    generated = [*record.generated, *[0] * (len(record.tokens) - len(record.generated))]
    return list(accumulate(a + b for a, b in zip(generated, record.tokens)))


def rank(records: Mapping[int, TrialRecord], *, maximize: bool) -> Rankings:
    """Rank the trials of a search at equal steps and at equal cost.

    A value that is not finite ranks nowhere; failed trials don't either.

    Args:
        records: The trials.
        maximize: Whether higher is better.

    >>> short = TrialRecord(0, state=TrialState.COMPLETE, values=[0.4, 0.5], tokens=[10, 10], generated=[40, 40])
    >>> wide = TrialRecord(1, state=TrialState.COMPLETE, values=[0.5, 0.7], tokens=[40, 40], generated=[160, 160])
    >>> found = rank({0: short, 1: wide}, maximize=True)
    >>> [place.trial for place in found.equal_steps], [place.trial for place in found.equal_cost], found.tokens
    ([1, 0], [0], 100)
    """
    ranked = {n: r for n, r in sorted(records.items()) if r.values and r.state is not TrialState.FAILED}
    chunks = max((len(r.values) for r in ranked.values()), default=0)
    at_end = [_place(n, r, chunks) for n, r in ranked.items() if len(r.values) == chunks]
    whole = [costs(r)[-1] for r in ranked.values() if r.state is TrialState.COMPLETE and r.tokens]
    tokens = min(whole, default=None)
    within = [] if tokens is None else [_best_within(n, r, tokens, maximize) for n, r in ranked.items()]
    return Rankings(
        chunks, _sorted(at_end, maximize), tokens, _sorted([place for place in within if place is not None], maximize)
    )


def _best_within(number: int, record: TrialRecord, tokens: int, maximize: bool) -> Place | None:
    """The best value of the chunks that a cost pays for."""
    paid = [
        k for k, cost in enumerate(costs(record), start=1) if cost <= tokens and math.isfinite(record.values[k - 1])
    ]
    if not paid:
        return None
    sign = -1.0 if maximize else 1.0
    best = min(paid, key=lambda k: (sign * record.values[k - 1], k))
    cut = record.state is not TrialState.COMPLETE and costs(record)[-1] <= tokens
    return _place(number, record, best, cut=cut)


def _place(number: int, record: TrialRecord, chunk: int, *, cut: bool = False) -> Place:
    spent = costs(record)
    return Place(number, record.values[chunk - 1], chunk, spent[chunk - 1] if chunk <= len(spent) else 0, cut)


def _sorted(places: list[Place], maximize: bool) -> tuple[Place, ...]:
    sign = -1.0 if maximize else 1.0
    finite = [place for place in places if math.isfinite(place.value)]
    return tuple(sorted(finite, key=lambda place: (sign * place.value, place.trial)))
