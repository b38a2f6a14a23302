"""The median rule: stop whoever does worse than the median of its peers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from rapidfire_policies.base import Decision, History, Policy, TrialHistory, Verdict
from rapidfire_policies.survivors import is_finite, keep_one


@dataclass(frozen=True)
class Median(Policy):
    """Stop a trial whose value is worse than the median of the other trials' values after equally many chunks.

    Let `r` be the chunks a running trial has done and `P` the finite values that the other trials had after `r` chunks,
    whatever became of them since. The trial is stopped if and only if

        r >= min_resource,  |P| >= min_peers,  and  value > median(P)

    Args:
        min_resource: Chunks before which nobody is judged.
        min_peers: Peers without which nobody is judged.

    Raises:
        ValueError: An argument below 1.

    A live trial whose last value is NaN or infinite is stopped; such values count in no median. If the rule would leave
    no finite trial live or complete, the most advanced one goes on (`rapidfire_policies.survivors.keep_one`).

    What breaks it: it stops about half of those that stand together at every chunk, so 16 trials in lockstep are down
    to one after four chunks however close they are; curves that cross are lost.

    Paper: Golovin et al., Google Vizier, 2017, section 3.2.2, where the peers' running averages are compared and only
    completed trials are peers. Comparing last values with everybody who got that far is RapidFire AI's variant.

    >>> from rapidfire_policies import History, TrialHistory
    >>> history = History(tuple(TrialHistory(i, (loss,)) for i, loss in enumerate([0.4, 0.3, 0.5])), chunks=4)
    >>> {number: str(decision.verdict) for number, decision in Median().decide(history).items()}
    {0: 'continue', 1: 'continue', 2: 'stop'}
    """

    min_resource: int = 1
    min_peers: int = 1

    def __post_init__(self) -> None:
        for name in ("min_resource", "min_peers"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Judge every running trial against all others."""
        running = [trial for trial in history.running if trial.values]
        return keep_one(history, {trial.number: self._judge(trial, history) for trial in running})

    def _judge(self, trial: TrialHistory, history: History) -> Decision:
        value, resource = trial.values[-1], trial.resource
        if not is_finite(trial):
            return Decision(Verdict.STOP, f"chunk {resource}: the value is {value}, not finite")
        others = (t for t in history.trials if t.number != trial.number and t.resource >= resource)
        peers = [v for t in others if math.isfinite(v := t.values[resource - 1])]
        if resource < self.min_resource or len(peers) < self.min_peers:
            return Decision(Verdict.CONTINUE, f"chunk {resource}: too early to judge")
        middle = median(peers)
        words = f"chunk {resource}: {value:.4g}, median of {len(peers)} peers {middle:.4g}"
        return Decision(Verdict.STOP if value > middle else Verdict.CONTINUE, words)
