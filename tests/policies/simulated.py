"""A search over recorded curves with the executor's rounds: slots, newcomers, pauses, and the last question."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from rapidfire_policies import Decision, History, Policy, TrialHistory, TrialState, Verdict


@dataclass
class Simulated:
    """What became of each trial, and what it was told.

    Args:
        done: Chunks each trial trained.
        states: Where each trial ended.
        verdicts: `(chunk, verdict)` of each trial in order.
        widest: The most trials that trained at a time.
    """

    done: list[int]
    states: list[TrialState]
    verdicts: list[list[tuple[int, str]]] = field(default_factory=list)
    widest: int = 0

    @property
    def chunks(self) -> int:
        return sum(self.done)

    def ending(self, state: TrialState) -> set[int]:
        return {number for number, one in enumerate(self.states) if one is state}


def simulate(
    policy: Policy, curves: np.ndarray, *, slots: int, most: int | None = None, costs: np.ndarray | None = None
) -> Simulated:
    """Train curves, `(trials, chunks)`, as the executor would.

    Args:
        policy: Who judges.
        curves: The value after each chunk.
        slots: Trials that train at a time.
        most: Trials that live at a time, twice the slots by default.
        costs: Of each chunk, `(trials, chunks)`.
    """
    return _Search(policy, curves, slots, 2 * slots if most is None else most, costs).run()


class _Search:
    def __init__(self, policy: Policy, curves: np.ndarray, slots: int, most: int, costs: np.ndarray | None) -> None:
        self.policy, self.curves, self.slots, self.most, self.costs = policy, curves, slots, most, costs
        self.trials, self.chunks = curves.shape
        self.arrived = 0
        self.wants = [False] * self.trials
        self.result = Simulated([0] * self.trials, [TrialState.RUNNING] * self.trials, [[] for _ in range(self.trials)])

    def run(self) -> Simulated:
        for _ in range(4 * self.trials * self.chunks):
            running = self.fill_slots()
            paused = self.those(TrialState.PAUSED)
            if not running and not paused:
                return self.result
            for n in running:
                self.result.done[n] += 1
                if self.result.done[n] == self.chunks:
                    self.result.states[n] = TrialState.COMPLETE
            if self.those(TrialState.RUNNING, TrialState.PAUSED):
                self.hear(dict(self.policy.decide(self.history())))
            if not running and not any(self.wants):
                for n in self.those(TrialState.PAUSED):
                    self.result.states[n] = TrialState.STOPPED
        raise AssertionError("The search does not end.")

    def those(self, *states: TrialState) -> list[int]:
        return [n for n in range(self.arrived) if self.result.states[n] in states]

    def fill_slots(self) -> list[int]:
        """Paused trials that were let go come first, then newcomers."""
        free = self.slots - len(self.those(TrialState.RUNNING))
        for n in [n for n in self.those(TrialState.PAUSED) if self.wants[n]][:free]:
            self.result.states[n], self.wants[n] = TrialState.RUNNING, False
        free = self.slots - len(self.those(TrialState.RUNNING))
        room = self.most - len(self.those(TrialState.RUNNING, TrialState.PAUSED))
        self.arrived = min(self.trials, self.arrived + max(0, min(free, room)))
        running = self.those(TrialState.RUNNING)
        self.result.widest = max(self.result.widest, len(running))
        return running

    def history(self) -> History:
        done = self.result.done
        return History(
            tuple(
                TrialHistory(
                    n,
                    tuple(self.curves[n, : done[n]].tolist()),
                    self.result.states[n],
                    costs=() if self.costs is None else tuple(self.costs[n, : done[n]].tolist()),
                )
                for n in range(self.arrived)
            ),
            self.chunks,
            self.slots,
        )

    def hear(self, decisions: dict[int, Decision]) -> None:
        states = self.result.states
        for n in self.those(TrialState.RUNNING, TrialState.PAUSED):
            was_paused = states[n] is TrialState.PAUSED
            verdict = decisions[n].verdict if n in decisions else Verdict.PAUSE if was_paused else Verdict.CONTINUE
            self.wants[n] = was_paused and verdict is Verdict.CONTINUE
            if not (was_paused and verdict is Verdict.PAUSE):
                self.result.verdicts[n].append((self.result.done[n], str(verdict)))
            if verdict is Verdict.PAUSE:
                states[n] = TrialState.PAUSED
            elif verdict in (Verdict.STOP, Verdict.COMPLETE):
                states[n] = TrialState.STOPPED if verdict is Verdict.STOP else TrialState.COMPLETE
