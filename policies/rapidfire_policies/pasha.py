"""PASHA: promotion with a cap on the resource that grows only while rankings are unstable."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rapidfire_policies._arguments import check_number
from rapidfire_policies.base import Decision, History, Policy
from rapidfire_policies.promotion import promote
from rapidfire_policies.rungs import bounded, check_rungs, rungs
from rapidfire_policies.survivors import keep_one

MOST_COMPARED = 64
"""Trials of a rung that the ranking looks at: the best ones. More would cost the square of their number."""


@dataclass(frozen=True)
class PASHA(Policy):
    """Promote as ASHA does, but only up to a cap that rises while the top two rungs disagree about the ranking.

    Rungs lie at `min_resource * reduction_factor**k` chunks, below the last chunk. A trial that stands at `r` goes on
    if and only if

        r < cap   and   rank of its value at r  <=  floor(n / reduction_factor)

    among the `n` values ever recorded at `r`, and waits otherwise (PAUSE; at most `slots` trials wait,
    `rapidfire_policies.promotion.promote`). The cap is the second rung at first. While the rankings at the cap and at
    the rung below disagree it is the next rung, at last a whole trial (no cap). The trials `1, ..., m` that have a
    value at the cap, in the order of their values there, agree with the rung below if

        |value below of trial i  -  i-th smallest value below|  <=  epsilon   for every i:

    trials that are within epsilon of one another below may swap. Epsilon is the `percentile` of `|a - b|` over the
    pairs of trials that have crossed twice, i.e. that ranked one way, then the other, then the first way again, noise
    being the likely reason; `a` and `b` are their values at the last chunk, between the two rungs, that both have done.
    Without such a pair it is 0.

    When nobody trains and nobody can be promoted, the best trial at the cap trains to its end (the paper trains its
    winner again) and the rest is stopped: what is handed over is a whole trial, and the cap has saved what the others
    would have cost above it.

    A live trial whose last value is NaN, inf or -inf is stopped at once, its values rank last, and it takes no part in
    the comparison of rungs. If the rule would leave no finite trial live or complete, the most advanced one goes on
    (`rapidfire_policies.survivors.keep_one`). The best 64 of a rung are compared, which bounds the cost.

    Args:
        min_resource: The first rung, in chunks (the paper's `r`).
        reduction_factor: One in so many goes on, and the ratio of two rungs (eta).
        percentile: Of the differences of trials that crossed twice, between 0 and 100 (the paper's N).

    Raises:
        ValueError: `min_resource` is below 1, `reduction_factor` below 2, or `percentile` outside [0, 100].

    What breaks it: rankings that agree early and change late, which is when most is saved and most is lost; few rungs,
    since with fewer than two of them there is no cap at all. The cap is computed from the whole history, so a new trial
    can lower it again; the paper's never falls.

    Paper: Bohdal et al., PASHA: Efficient HPO and NAS with Progressive Resource Allocation, 2023
    (https://arxiv.org/abs/2207.06940).

    >>> from rapidfire_policies import PASHA, History, TrialHistory
    >>> def at_rungs(*pairs):
    ...     return History(tuple(TrialHistory(i, (v1, v1, v3)) for i, (v1, v3) in enumerate(pairs)), chunks=27)
    >>> PASHA().cap(at_rungs((0.5, 0.3), (0.6, 0.4))), PASHA().cap(at_rungs((0.5, 0.4), (0.6, 0.3)))
    (3, 9)
    """

    min_resource: int = 1
    reduction_factor: int = 3
    percentile: float = 90.0

    def __post_init__(self) -> None:
        check_rungs(self.min_resource, self.reduction_factor)
        check_number("percentile", self.percentile, at_least=0)
        if self.percentile > 100:
            raise ValueError(f"`percentile` must be a number <= 100, got {self.percentile!r}.")

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Promote below the cap, wait at it."""
        ladder = rungs(self.min_resource, self.reduction_factor, history.chunks)
        return keep_one(history, promote(history, ladder, self.reduction_factor, self.cap(history)))

    def cap(self, history: History) -> int:
        """The resource above which nobody is promoted, in chunks."""
        ladder = rungs(self.min_resource, self.reduction_factor, history.chunks)
        for below, cap in itertools.pairwise(ladder):
            if agree(history, below, cap, self.percentile):
                return cap
        return history.chunks


def agree(history: History, below: int, cap: int, percentile: float) -> bool:
    """Whether two neighbouring rungs rank the trials that stood at both alike, up to epsilon."""
    pairs = [(t.values[cap - 1], t.number, t.values[below - 1]) for t in history.trials if t.resource >= cap]
    finite = sorted(pair for pair in pairs if math.isfinite(pair[0]) and math.isfinite(pair[2]))[:MOST_COMPARED]
    at_below = bounded([value for *_, value in finite])
    if len(at_below) < 2:
        return True
    tolerance = epsilon(_between(history, below, cap), percentile)
    return bool((np.abs(at_below - np.sort(at_below)) <= tolerance).all())


def epsilon(curves: NDArray[np.float64], percentile: float) -> float:
    """The `percentile` of the differences between trials that crossed twice; 0 without such a pair.

    Args:
        curves: Values by trial and chunk up to the cap, `(trials, chunks)` float64, NaN where a trial was not trained.
        percentile: Between 0 and 100.
    """
    one, other = np.triu_indices(len(curves), k=1)
    difference = curves[one] - curves[other]
    length = np.isfinite(difference).sum(axis=1)
    at_last = difference[np.arange(len(length)), length - 1]
    ahead = difference * np.sign(at_last)[:, None]
    first_ahead = np.argmax(ahead > 0, axis=1)
    last_behind = ahead.shape[1] - 1 - np.argmax(ahead[:, ::-1] < 0, axis=1)
    twice = (ahead > 0).any(axis=1) & (ahead < 0).any(axis=1) & (first_ahead < last_behind)
    return float(np.percentile(np.abs(at_last[twice]), percentile)) if twice.any() else 0.0


def _between(history: History, below: int, cap: int) -> NDArray[np.float64]:
    """The curves up to the cap of the best trials that have passed the rung below, `(trials, chunks)` float64."""
    passed = (trial.values[:cap] for trial in history.trials if trial.resource > below)
    finite = (values for values in passed if all(map(math.isfinite, values)))
    rows = sorted(finite, key=lambda values: (values[below - 1], values))[:MOST_COMPARED]
    curves = np.full((len(rows), cap), np.nan)
    for row, values in enumerate(rows):
        curves[row, : len(values)] = bounded(values)
    return curves
