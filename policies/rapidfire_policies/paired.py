"""Paired comparison: the per-example scores of all trials at one chunk, and the loop that the races share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rapidfire_policies.base import Decision, History, Number, TrialHistory, TrialState, Verdict, numbers_of
from rapidfire_policies.survivors import diverged, is_finite, keep_one

Judge = Callable[[NDArray[np.float64]], Iterable[tuple[bool, str, dict[str, Number]]]]
"""Differences to a rival, `(trials, examples)` float64, positive where the trial is worse -> per trial whether it is
worse than the rival, the reason in words, and in numbers."""


@dataclass(frozen=True)
class Look:
    """The scores that can be compared at one chunk.

    Args:
        chunk: The number of chunks done.
        numbers: Trial numbers, ascending.
        scores: Shape `(trials, examples)` float64, all finite.
        means: Shape `(trials,)` float64.
    """

    chunk: int
    numbers: tuple[int, ...]
    scores: NDArray[np.float64]
    means: NDArray[np.float64]


def look_at(trials: Iterable[TrialHistory], chunk: int) -> Look:
    """Collect the scores at a chunk of every trial that has them, whatever became of it since.

    A trial without scores there, or with a NaN or an infinity among them, is left out.

    Args:
        trials: The trials.
        chunk: The number of chunks done.

    Raises:
        ValueError: The trials were scored on sets of different sizes.

    >>> trials = [TrialHistory(n, (0.5,), scores=(np.full(4 + n, 0.5),)) for n in (1, 0)]
    >>> look_at(trials, 1)
    Traceback (most recent call last):
        ...
    ValueError: `scores` must hold the same examples for every trial, at chunk 1 they hold 4 (trial 0), 5 (trial 1).
    """
    rows: dict[int, NDArray[np.float64]] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        if trial.resource >= chunk and len(trial.scores) >= chunk:
            row = np.asarray(trial.scores[chunk - 1], dtype=np.float64).ravel()
            if row.size:
                rows[trial.number] = row
    if len({row.size for row in rows.values()}) > 1:
        sizes: dict[int, list[str]] = defaultdict(list)
        for number, row in rows.items():
            sizes[row.size].append(str(number))
        held = (f"{size} (trial{'s'[: len(who) > 1]} {', '.join(who)})" for size, who in sorted(sizes.items()))
        raise ValueError(
            f"`scores` must hold the same examples for every trial, at chunk {chunk} they hold {', '.join(held)}."
        )
    if not rows:
        return Look(chunk, (), np.empty((0, 0)), np.empty(0))
    scores = np.stack(list(rows.values()))
    finite: NDArray[np.bool_] = np.all(np.isfinite(scores), axis=1)
    scores = scores[finite]
    numbers = tuple(number for number, usable in zip(rows, finite, strict=True) if usable)
    return Look(chunk, numbers, scores, scores.mean(axis=1))


def spent(alpha: float, history: History) -> float:
    """The level of one test: `alpha / (chunks * (K - 1))`, `K` the trials that have reported a value.

    Chunks are the looks: the same examples are scored again at each, so the looks depend on each other in a way
    nobody knows, and Bonferroni's inequality holds under any. `K` counts trials that never came as far as the chunk:
    who comes as far was decided on these examples too.

    >>> spent(0.05, History((TrialHistory(0, (0.5,)), TrialHistory(1, (0.4,)), TrialHistory(2)), chunks=10))
    0.005
    """
    reported = sum(trial.resource > 0 for trial in history.trials)
    return alpha / (history.chunks * max(1, reported - 1))


def unjudged(history: History) -> dict[int, Decision]:
    """What needs no test: STOP for live trials whose last value is not finite, CONTINUE for other paused ones."""
    decisions = {}
    for trial in sorted((t for t in history.trials if t.is_live), key=lambda trial: trial.number):
        if trial.values and not is_finite(trial):
            decisions[trial.number] = diverged(trial)
        elif trial.state is TrialState.PAUSED:
            decisions[trial.number] = Decision(Verdict.CONTINUE, "judged after its next chunk")
    return decisions


def race(history: History, judge: Judge) -> dict[int, Decision]:
    """Compare every running trial with the one whose mean score is best at its chunk; stop who is worse.

    Equal means rank by trial number. One rival each keeps the cost linear in trials. It is chosen by the same scores,
    so a test's level has to pay for all rivals that could have been it (`spent`).

    Args:
        history: All trials.
        judge: The test.

    Raises:
        ValueError: The trials were scored on sets of different sizes.
    """
    decisions = unjudged(history)
    running = [trial for trial in history.running if is_finite(trial)]
    for chunk in sorted({trial.resource for trial in running}):
        look = look_at(history.trials, chunk)
        place = {number: row for row, number in enumerate(look.numbers)}
        best = int(np.argmin(look.means)) if look.numbers else -1
        compared = []
        for trial in (trial for trial in running if trial.resource == chunk):
            row = place.get(trial.number)
            if row is None:
                words = "no finite scores to compare"
            elif len(look.numbers) == 1:
                words = "no other trial's scores to compare with"
            elif row == best:
                words = f"best of {len(look.numbers)}"
            else:
                compared.append((row, trial))
                continue
            decisions[trial.number] = Decision(Verdict.CONTINUE, f"chunk {chunk}: {words}")
        if compared:
            rival = look.numbers[best]
            judged = judge(look.scores[[row for row, _ in compared]] - look.scores[best])
            for (_, trial), (is_worse, reason, numbers) in zip(compared, judged, strict=True):
                verdict = Verdict.STOP if is_worse else Verdict.CONTINUE
                words = f"chunk {chunk}: against trial {rival}, {reason}"
                decisions[trial.number] = Decision(verdict, words, numbers_of(trial, rival=rival, **numbers))
    return keep_one(history, decisions)
