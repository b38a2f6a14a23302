"""Nop: every trial trains to its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rapidfire_policies.base import Decision, History, Policy, Verdict


@dataclass(frozen=True)
class Nop(Policy):
    """Never stop a trial: the full search, against which every other policy is measured.

    Decision rule: CONTINUE for every live trial, paused ones included. NaN and infinities change nothing: a diverged
    trial trains to its end too (it is never selected, since the selection ranks non-finite values last). What breaks
    it: the bill.

    >>> from rapidfire_policies import History, Nop, TrialHistory
    >>> history = History((TrialHistory(0, (0.5,)), TrialHistory(1, (float("nan"),))), chunks=4)
    >>> {number: str(decision.verdict) for number, decision in Nop().decide(history).items()}
    {0: 'continue', 1: 'continue'}
    """

    def decide(self, history: History) -> Mapping[int, Decision]:
        """CONTINUE for every live trial."""
        return {trial.number: Decision(Verdict.CONTINUE) for trial in history.trials if trial.is_live}
