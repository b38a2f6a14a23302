"""The default: `RisingBound`, set by the search's own size, and a budget if there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rapidfire_policies._arguments import check_int
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, Verdict, numbers_of
from rapidfire_policies.rising_bound import RisingBound
from rapidfire_policies.rungs import rank_key
from rapidfire_policies.survivors import is_finite, keep_one


@dataclass(frozen=True)
class Auto(Policy):
    """Stop whoever could not catch up even at its recent pace; with a budget, also whoever it can't carry to the end.

    The rule is that of `RisingBound(window, growth=1/3, keep)`, where for `T` chunks and `n` trials seen so far

        window = min(3, max(1, round(T / 7)))        keep = min(4, max(1, n // 8))

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

    What breaks it: what breaks `RisingBound`, above all a plateau longer than a third of what the trial has done,
    before a late drop. A budget that binds ranks by last values, and so breaks where curves cross.

    Why this rule: `experiments/policies` holds it against the others; `policies/README.md` has the table.

    >>> from rapidfire_policies import Auto, History, TrialHistory
    >>> curves = [(0.9, 0.5, 0.4), (0.9, 0.8, 0.6), (0.7, 0.69, 0.68)]
    >>> history = History(tuple(TrialHistory(i, curve) for i, curve in enumerate(curves)), chunks=6)
    >>> [str(decision.verdict) for decision in Auto().decide(history).values()]
    ['continue', 'continue', 'stop']
    >>> Auto(budget=12).decide(history)[1].reason
    'budget: 9 chunks spent and 6 to come are more than 12; 0.6 is the worst of 2'
    """

    budget: int | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            check_int("budget", self.budget, at_least=1, fix="It counts the chunks of all trials.")

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Judge every running trial."""
        window = min(3, max(1, round(history.chunks / 7)))
        keep = min(4, max(1, len(history.trials) // 8))
        decisions = dict(RisingBound(window=window, keep=keep).decide(history))
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
            words = f"{spent} chunks spent and {left} to come are more than {self.budget}"
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
