"""The default: `RisingBound` where it is beyond the noise and `Spare` agrees, and a budget if there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rapidfire_policies._arguments import check_int
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, Verdict, numbers_of
from rapidfire_policies.rising_bound import RisingBound
from rapidfire_policies.rungs import rank_key
from rapidfire_policies.spare import Spare
from rapidfire_policies.survivors import is_finite, keep_one
from rapidfire_policies.wording import counted

RULE = Spare(RisingBound(window=3, keep=1, errors=2.0), share=1 / 3)
"""What `Auto` is without a budget; its settings were chosen on recorded curves (`experiments/policies/tune.py`)."""


@dataclass(frozen=True)
class Auto(Policy):
    """Stop who could not catch up even at its recent pace, unless it has been among the best or that may be noise.

    The rule is `Spare(RisingBound(window=3, keep=1, errors=2), share=1/3)`. After chunk `r` of `T`, let `m(k)` be the
    best of a trial's first `k` values, `w` its last three chunks or a third of `r`, whichever is longer, and `s` the
    standard error of the mean difference between its last scores and the leader's, example by example, 0 without
    scores. The trial is stopped if and only if `r > 3`, it does not have the best last value,

        m(r) - (T - r) * (m(r - w) - m(r)) / w - 2 * s  >  what the leader has surely reached,

    and `m(r)` is behind the best third of the averages that the others have over the later half of their first `r`
    chunks. The pace is quick to see who has got stuck, and is wrong of those who fall back for a while; averages of the
    others are slow, and forgive that.

    With a `budget`, let `spent` be the chunks that all trials have done. While `spent` plus what the live trials still
    have to their end exceeds `budget`, the one with the worst last value is stopped, until one is left. A budget that
    is too small for the trials that come is thus spent on the best of them as they stand; each new trial still gets a
    chunk.

    Args:
        budget: Chunks that the whole search may spend, or None for as many as the rule above takes.

    Raises:
        ValueError: `budget` below 1.

    A live trial whose last value is NaN or infinite is stopped. If the rule would leave no finite trial live or
    complete, the most advanced one goes on (`rapidfire_policies.survivors.keep_one`).

    What breaks it: a plateau longer than a third of what the trial has done, outside the best third, before a late
    drop; noisy values without per-example scores, where nothing says how noisy they are. Where scores say so it stops
    next to nobody. A budget that binds ranks by last values, and so breaks where curves cross.

    Why this rule: `experiments/policies` holds it against the others; `policies/README.md` has the table.

    >>> from rapidfire_policies import Auto, History, TrialHistory
    >>> curves = [(0.9, 0.6, 0.5, 0.4), (0.9, 0.8, 0.7, 0.6), (0.72, 0.7, 0.69, 0.68)]
    >>> history = History(tuple(TrialHistory(i, curve) for i, curve in enumerate(curves)), chunks=6)
    >>> [str(decision.verdict) for decision in Auto().decide(history).values()]
    ['continue', 'continue', 'stop']
    >>> Auto(budget=14).decide(history)[1].reason
    'budget: 12 chunks spent and 4 to come are more than 14; 0.6 is the worst of 2'
    """

    budget: int | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            check_int("budget", self.budget, at_least=1, fix="It counts the chunks of all trials.")

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Judge every running trial."""
        decisions = dict(RULE.decide(history))
        if self.budget is not None:
            decisions.update(self._over_budget(history, decisions))
        return keep_one(history, decisions)

    def _over_budget(self, history: History, decisions: Mapping[int, Decision]) -> dict[int, Decision]:
        """Whom the budget can't carry, worst first; a trial without a value is not judged yet."""
        assert self.budget is not None
        spent = sum(trial.resource for trial in history.trials)
        live = [t for t in history.trials if t.is_live and is_finite(t) and not _stops(decisions, t)]
        live.sort(key=lambda t: rank_key(t.values[-1], t.number))
        left = sum(history.chunks - trial.resource for trial in live)
        over = {}
        while len(live) > 1 and spent + left > self.budget:
            worst = live.pop()
            words = f"{counted(spent, 'chunk')} spent and {left} to come are more than {self.budget}"
            reason = f"budget: {words}; {worst.values[-1]:.4g} is the worst of {len(live) + 1}"
            numbers = numbers_of(worst, spent=spent, to_come=left, budget=self.budget, peers=len(live))
            over[worst.number] = Decision(Verdict.STOP, reason, numbers)
            left -= history.chunks - worst.resource
        # A stopped trial would have stayed in the place of the worst that does.
        cut = {"threshold": live[-1].values[-1], "rival": live[-1].number} if over else {}
        return {number: replace(said, numbers={**said.numbers, **cut}) for number, said in over.items()}


def _stops(decisions: Mapping[int, Decision], trial: TrialHistory) -> bool:
    decision = decisions.get(trial.number)
    return decision is not None and decision.verdict is Verdict.STOP
