"""Spare: a wrapper that lets a policy stop nobody who has been among the best of its peers lately."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from rapidfire_policies._arguments import check_inner, check_level
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, Verdict, numbers_of
from rapidfire_policies.median import without
from rapidfire_policies.rising_bound import RisingBound
from rapidfire_policies.survivors import is_finite


@dataclass(frozen=True)
class Spare(Policy):
    """Let the inner policy stop a trial only if even its best value is behind what the best others averaged lately.

    Let `r` be the chunks done by a trial that the inner policy wants to stop, and `P` the averages over the later half
    of the first `r` chunks, `r - ceil(r / 2) + 1, ..., r`, of all others that have done as many, whatever became of
    them since. The trial is stopped if and only if

        |P| > 0   and   its best value so far  >  the `share`-quantile of P

    (with linear interpolation; 1/3: it is behind the best third) and goes on otherwise. All other verdicts of the inner
    policy pass. A trial that gets worse for a while keeps its best value, which is what it may come back to; an average
    is not carried off by one evaluation, and one of the later half has forgotten where the curves began.

    NaN and infinities count as no best value, and whoever has one in the later half is no peer. A trial whose last
    value is not finite is stopped as soon as the inner policy says so.

    Args:
        policy: The inner policy.
        share: Of the peers, whom a trial has to be among to be spared.

    Raises:
        ValueError: `policy` is no policy, or `share` is outside (0, 1).

    What breaks it: winners that were never good before the end; and inner policies that judge at rungs only, since a
    STOP that is waived there does not come back before the next rung.

    >>> from rapidfire_policies import History, RisingBound, Spare, TrialHistory
    >>> curves = [(0.9, 0.3, 0.25), (0.4, 0.6, 0.6), (0.9, 0.8, 0.75), (0.95, 0.9, 0.88)]
    >>> history = History(tuple(TrialHistory(i, curve) for i, curve in enumerate(curves)), chunks=4)
    >>> for policy in (RisingBound(keep=1), Spare(RisingBound(keep=1))):
    ...     print([str(decision.verdict) for decision in policy.decide(history).values()])
    ['continue', 'stop', 'stop', 'stop']
    ['continue', 'continue', 'stop', 'stop']
    >>> Spare(RisingBound(keep=1)).decide(history)[1].reason.partition("; ")[2]
    'but its best, 0.4, is not behind the 0.6083 that the best 33% averaged lately'
    """

    policy: Policy = field(default_factory=RisingBound)
    share: float = 1 / 3

    def __post_init__(self) -> None:
        check_inner(self.policy)
        check_level("share", self.share, fix="1/3 spares who is as good as the best third.")

    @property
    def by_age(self) -> bool:
        """As the inner policy."""
        return self.policy.by_age

    def decide(self, history: History) -> Mapping[int, Decision]:
        """The inner policy's decisions, less the STOPs on trials among the best."""
        decisions = dict(self.policy.decide(history))
        condemned = [
            trial
            for trial in history.live
            if trial.number in decisions and decisions[trial.number].verdict is Verdict.STOP and is_finite(trial)
        ]
        averages = {resource: _averages(history.trials, resource) for resource in {t.resource for t in condemned}}
        for trial in condemned:
            decisions[trial.number] = self._judge(trial, decisions[trial.number], averages[trial.resource])
        return decisions

    def _judge(self, trial: TrialHistory, said: Decision, averages: NDArray[np.float64]) -> Decision:
        """The inner policy's STOP or a CONTINUE, by the averages of all, ascending, `(trials,)` float64."""
        peers = without(averages, _average(trial.values))
        if not len(peers):
            return Decision(Verdict.CONTINUE, f"{said.reason}; but nobody has come as far")
        best, mark = min(filter(math.isfinite, trial.values)), _quantile(peers, self.share)
        if best <= mark:
            words = (
                f"but its best, {best:.4g}, is not behind the {mark:.4g} that the best {self.share:.0%} averaged lately"
            )
            return Decision(Verdict.CONTINUE, f"{said.reason}; {words}", numbers_of(trial, best=best, peers=len(peers)))
        threshold = said.numbers.get("threshold")
        easier = {"threshold": max(threshold, mark)} if isinstance(threshold, float) else {}
        return replace(said, numbers={**said.numbers, **easier})


def _average(values: Sequence[float]) -> float:
    """Over the later half, the middle one included; not finite where one of them is not."""
    return float(_mean(np.asarray(values, dtype=np.float64)[None])[0])


def _averages(trials: Sequence[TrialHistory], resource: int) -> NDArray[np.float64]:
    """The finite averages of all that have done as many chunks, ascending, `(peers,)` float64."""
    values = np.array([trial.values[:resource] for trial in trials if trial.resource >= resource], dtype=np.float64)
    averages = _mean(values)
    return np.sort(averages[np.isfinite(averages)])


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the later half of each row of `(trials, chunks)`."""
    with np.errstate(invalid="ignore", over="ignore"):
        means: NDArray[np.float64] = values[:, values.shape[1] // 2 :].mean(axis=1)
    return means


def _quantile(ascending: NDArray[np.float64], share: float) -> float:
    """With linear interpolation, as numpy's, and without its overflow."""
    place = share * (len(ascending) - 1)
    low = math.floor(place)
    part = place - low
    return float(ascending[low] * (1 - part) + ascending[min(low + 1, len(ascending) - 1)] * part)
