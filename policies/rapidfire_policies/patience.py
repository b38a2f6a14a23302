"""Patience: a wrapper that lets a policy stop a trial only once the trial has ceased to improve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from rapidfire_policies._arguments import check_inner, check_int, check_number
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, Verdict
from rapidfire_policies.median import Median
from rapidfire_policies.survivors import is_finite


@dataclass(frozen=True)
class Patience(Policy):
    """Let the inner policy stop a trial only when the trial has not improved for `patience` chunks.

    Let `v[1], ..., v[r]` be the values of a trial that the inner policy wants to stop. It is stopped if and only if

        r > patience + 1   and   min(v[1 .. r - patience - 1]) + min_delta  <  min(v[r - patience .. r])

    (the last `patience + 1` values are all worse than the best before them) and goes on otherwise. All other verdicts
    of the inner policy pass. This is the rule of Optuna's `PatientPruner`, decision for decision.

    NaN and infinities count as no value in either minimum; where one side has no finite value the trial goes on. A
    trial whose last value is not finite is stopped as soon as the inner policy says so: it has nothing to be patient
    with.

    Args:
        policy: The inner policy.
        patience: Chunks without an improvement, 0 or more.
        min_delta: What counts as getting worse, in units of the value.

    Raises:
        ValueError: `policy` is no policy, or a number is negative.

    What breaks it: inner policies that judge at rungs only. A STOP that is waived there does not come back before the
    next rung; wrap policies that judge at every chunk, such as `Median`. Noise looks like an improvement.

    >>> from rapidfire_policies import History, Median, Patience, TrialHistory
    >>> good = TrialHistory(0, (0.5, 0.4, 0.3, 0.2))
    >>> for values in [(0.9, 0.8, 0.7, 0.6), (0.9, 0.8, 0.85, 0.9)]:
    ...     history = History((good, TrialHistory(1, values)), chunks=9)
    ...     print(Patience(Median(), patience=1).decide(history)[1].verdict)
    continue
    stop
    """

    policy: Policy = field(default_factory=Median)
    patience: int = 1
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        check_inner(self.policy)
        check_int("patience", self.patience, at_least=0, fix="It is in chunks.")
        check_number("min_delta", self.min_delta, at_least=0)

    @property
    def by_age(self) -> bool:
        """As the inner policy."""
        return self.policy.by_age

    def decide(self, history: History) -> Mapping[int, Decision]:
        """The inner policy's decisions, less the STOPs on trials that still improve."""
        decisions = dict(self.policy.decide(history))
        for trial in history.live:
            decision = decisions.get(trial.number)
            if decision is not None and decision.verdict is Verdict.STOP and not self._is_over(trial):
                words = f"{decision.reason}; still improving in the last {self.patience + 1} chunks"
                decisions[trial.number] = Decision(Verdict.CONTINUE, words)
        return decisions

    def _is_over(self, trial: TrialHistory) -> bool:
        if not is_finite(trial):
            return True
        turn = max(0, trial.resource - self.patience - 1)
        before = min(filter(math.isfinite, trial.values[:turn]), default=math.inf)
        return before + self.min_delta < min(filter(math.isfinite, trial.values[turn:]))
