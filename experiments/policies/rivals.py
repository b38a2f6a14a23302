"""Rules that the benchmark plays back and the package does not have: the closest peer's, and the first `Auto`'s."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from rapidfire_policies import Decision, History, Policy, RisingBound, Verdict
from rapidfire_policies.survivors import is_finite, keep_one


@dataclass(frozen=True)
class RunningMedian(Policy):
    """Stop a trial whose last value is worse than the median of the last values of those that run beside it.

    RapidFire AI's automatic pruning: no memory of stopped or finished trials, last values compared whatever the chunk,
    and NaN trials neither stopped nor counted.

    Args:
        min_resource: Chunks before which a trial is not judged.
    """

    min_resource: int = 1

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Judge every running trial with a finite value against the others."""
        last = {trial.number: trial.values[-1] for trial in history.running if is_finite(trial)}
        decisions = {}
        for trial in history.running:
            value = last.get(trial.number, math.nan)
            peers = [other for number, other in last.items() if number != trial.number]
            worse = bool(peers) and trial.resource >= self.min_resource and value > median(peers)
            decisions[trial.number] = Decision(Verdict.STOP if worse else Verdict.CONTINUE)
        return keep_one(history, decisions)


@dataclass(frozen=True)
class FirstAuto(Policy):
    """What `Auto` was when the first held-out tables were played back: `RisingBound`, set by the search's size."""

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Judge every running trial."""
        window = min(3, max(1, round(history.chunks / 7)))
        return RisingBound(window=window, keep=min(4, max(1, len(history.trials) // 8))).decide(history)
