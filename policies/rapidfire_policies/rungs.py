"""Rungs: the resources at which trials are compared, and the cut that keeps the best of them.

A rung is named by its resource, in chunks: rung 3 is where trials stand after their third chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rapidfire_policies._arguments import check_int
from rapidfire_policies.base import History, Number, TrialHistory

MOST_AHEAD = 8
"""Trials that a verdict names as ahead; all of them, for every trial of a rung, would be the square of their number."""


def check_rungs(min_resource: int, reduction_factor: int) -> None:
    """Raise ValueError unless both are integers that make a geometric ladder."""
    check_int("min_resource", min_resource, at_least=1, fix="It is the first rung, in chunks.")
    check_int("reduction_factor", reduction_factor, at_least=2, fix="3 keeps the best third at each rung.")


def rungs(min_resource: int, reduction_factor: int, chunks: int) -> tuple[int, ...]:
    """The geometric rungs `min_resource * reduction_factor**k` below `chunks`.

    `chunks` itself is no rung: a trial that stands there has nothing left to train, so a cut could save nothing
    and would only take its result away.

    Args:
        min_resource: The first rung, in chunks.
        reduction_factor: The ratio of two neighbouring rungs.
        chunks: Chunks of a whole trial.

    Raises:
        ValueError: `min_resource` is below 1 or `reduction_factor` below 2.

    >>> rungs(1, 3, chunks=12)
    (1, 3, 9)
    >>> rungs(1, 3, chunks=9)
    (1, 3)
    >>> rungs(4, 2, chunks=4)
    ()
    """
    check_rungs(min_resource, reduction_factor)
    ladder = []
    rung = min_resource
    while rung < chunks:
        ladder.append(rung)
        rung *= reduction_factor
    return tuple(ladder)


def values_at(history: History, rung: int) -> dict[int, float]:
    """The value each trial recorded at a rung, by trial number, whatever became of the trial since."""
    return {trial.number: trial.values[rung - 1] for trial in history.trials if len(trial.values) >= rung}


@dataclass(frozen=True)
class Cut:
    """The outcome of a rung: who ranks where, and how many go on.

    Args:
        ranks: Rank by trial number, 1 is best; every rank occurs once, in this order.
        keep: The best `keep` of them go on.
        value: The worst value that goes on.
        last: The trial that has it.
    """

    ranks: Mapping[int, int]
    keep: int
    value: float
    last: int

    def keeps(self, number: int) -> bool:
        """Whether the trial is among the best `keep`."""
        return self.ranks[number] <= self.keep

    def words(self, rung: int, trial: TrialHistory) -> str:
        """The line a person reads beside the verdict on a trial that is judged at the rung."""
        best = "the best goes on" if self.keep == 1 else f"the best {self.keep} go on"
        place = f"{trial.values[rung - 1]:.4g} ranks {self.ranks[trial.number]} of {len(self.ranks)}"
        return f"rung {rung}: {place}, {best} (cut {self.value:.4g})"

    def numbers(self, rung: int, trial: TrialHistory) -> dict[str, Number]:
        """What `words` says, as a decision's numbers."""
        return {
            "resource": trial.resource,
            "rung": rung,
            "value": trial.values[rung - 1],
            "rank": self.ranks[trial.number],
            "of": len(self.ranks),
            "keep": self.keep,
            "threshold": self.value,
            "rival": self.last,
            "ahead": tuple(islice(self.ranks, min(self.keep, MOST_AHEAD))),
        }


def top_fraction(values: Mapping[int, float], reduction_factor: int) -> Cut:
    """Keep the best `max(1, floor(n / reduction_factor))` of `n` values.

    Equal values rank by trial number, the older trial first. NaN, inf and -inf all rank behind every finite value
    (a diverged trial can report -inf, which is no achievement) and among themselves by trial number. They count in
    `n`: a configuration that diverged has been tried.

    Args:
        values: Value by trial number, lower is better; not empty.
        reduction_factor: One in so many goes on.

    Raises:
        ValueError: There are no values.

    >>> cut = top_fraction({0: 0.4, 1: 0.3, 2: float("-inf"), 3: 0.3, 4: 0.5, 5: 0.1}, reduction_factor=3)
    >>> cut.ranks
    {5: 1, 1: 2, 3: 3, 0: 4, 4: 5, 2: 6}
    >>> cut.keep, cut.value, cut.keeps(1), cut.keeps(3)
    (2, 0.3, True, False)
    """
    return top(values, max(1, len(values) // reduction_factor))


def top(values: Mapping[int, float], keep: int) -> Cut:
    """Keep the best `keep` values, or all where there are fewer, in the ranking of `top_fraction`.

    Args:
        values: Value by trial number, lower is better; not empty.
        keep: So many go on.

    Raises:
        ValueError: There are no values.

    >>> cut = top({0: 0.4, 1: 0.3, 2: 0.5}, keep=2)
    >>> cut.keep, cut.value, cut.keeps(0), cut.keeps(2)
    (2, 0.4, True, False)
    """
    if not values:
        raise ValueError("`values` must hold at least one value, got none.")
    numbers = np.fromiter(values.keys(), np.int64, len(values))
    column = np.fromiter(values.values(), np.float64, len(values))
    finite = np.isfinite(column)
    # The order of `rank_key`; of thousands of trials, thousands of times a search.
    ranking = numbers[np.lexsort((numbers, np.where(finite, column, 0.0), ~finite))].tolist()
    keep = min(keep, len(ranking))
    ranks = dict(zip(ranking, range(1, len(ranking) + 1), strict=True))
    last = ranking[keep - 1]
    return Cut(ranks=ranks, keep=keep, value=values[last], last=last)


def bounded(values: ArrayLike) -> NDArray[np.float64]:
    """The values moved into [-1e100, 1e100], NaN left as it is, in the shape given.

    Where a loss explodes before it is infinite, squares and differences of its values would overflow.

    >>> bounded([0.5, -1e300, float("nan")]).tolist()
    [0.5, -1e+100, nan]
    """
    return np.clip(np.asarray(values, dtype=np.float64), -1e100, 1e100)


def rank_key(value: float, number: int) -> tuple[bool, float, int]:
    """The sort key of every ranking: finite before non-finite, then by value, then by trial number."""
    finite = math.isfinite(value)
    return (not finite, value if finite else 0.0, number)
