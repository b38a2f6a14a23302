"""WarmUp: a wrapper that gives every trial some chunks before a policy may judge it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rapidfire_policies._arguments import check_inner, check_int
from rapidfire_policies.asha import ASHA
from rapidfire_policies.base import Decision, History, Policy, Verdict
from rapidfire_policies.survivors import is_finite
from rapidfire_policies.wording import counted


@dataclass(frozen=True)
class WarmUp(Policy):
    """Let every trial train for `chunks` chunks before the inner policy's verdicts on it count.

    Decision rule: CONTINUE for a live trial that has done fewer than `chunks` chunks, paused ones included; the inner
    policy's decision for all others. The inner policy sees the whole history, warming trials included.

    A warming trial whose last value is NaN or infinite is stopped if the inner policy stops it: there is nothing to
    warm. All else about NaN is the inner policy's rule.

    Args:
        policy: The inner policy.
        chunks: Chunks of a trial before which no verdict on it counts.

    Raises:
        ValueError: `policy` is no policy, or `chunks` is below 1.

    What breaks it: the bill of a long warm-up; and inner policies that judge a trial only once. A rung before `chunks`
    is passed unjudged, so with `ASHA` a larger `min_resource` does the same.

    >>> from rapidfire_policies import ASHA, History, TrialHistory, WarmUp
    >>> policy = WarmUp(ASHA(min_resource=1, reduction_factor=2), chunks=2)
    >>> for row in [(0.4,), (0.5,)], [(0.4, 0.3), (0.5, 0.4)]:
    ...     history = History(tuple(TrialHistory(i, values) for i, values in enumerate(row)), chunks=9)
    ...     print([str(decision.verdict) for decision in policy.decide(history).values()])
    ['continue', 'continue']
    ['continue', 'stop']
    """

    policy: Policy = field(default_factory=ASHA)
    chunks: int = 2

    def __post_init__(self) -> None:
        check_inner(self.policy)
        check_int("chunks", self.chunks, at_least=1, fix="It is what every trial gets.")

    @property
    def by_age(self) -> bool:
        """As the inner policy."""
        return self.policy.by_age

    def decide(self, history: History) -> Mapping[int, Decision]:
        """The inner policy's decisions on trials that are warm, CONTINUE for the rest."""
        decisions = dict(self.policy.decide(history))
        for trial in history.live:
            decision = decisions.get(trial.number)
            diverged = bool(trial.values) and not is_finite(trial)
            if trial.resource < self.chunks and not (diverged and decision and decision.verdict is Verdict.STOP):
                decisions[trial.number] = Decision(Verdict.CONTINUE, f"warms up for {counted(self.chunks, 'chunk')}")
        return decisions
