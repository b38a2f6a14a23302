"""Rollouts as the conductor serves them: who rolls out with whom, and who goes on when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.executor.passes import Multiplexer
from rapidfire_automl.executor.rollouts import Counts, Decoding, Rollout
from rapidfire_automl.executor.seams import is_out_of_memory
from rapidfire_automl.plan import Plan


class Rolling:
    """Serves the rollouts that arms ask for.

    All that ask roll out together, and go on together when the last of them is done: then they train in one pass, too.
    With `joining`, whoever is done goes on at once, and rolls out again beside those that are still at it.

    Args:
        joining: Whether arms go on as soon as they are done.
    """

    def __init__(self, *, joining: bool = False) -> None:
        self.counts = Counts()
        self._joining = joining
        self._running: list[Decoding] = []

    def serve(
        self,
        multiplexer: Multiplexer,
        waiting: Sequence[Arm],
        plan: Plan,
        fewer: Callable[[int], Plan],
        cancelled: Callable[[], bool],
    ) -> list[Arm]:
        """Roll out until somebody is done.

        Args:
            multiplexer: The shared base.
            waiting: Arms that ask for a rollout, in trial order; some may be under way.
            plan: How many rows go together.
            fewer: Called with the rows of a rollout that did not fit; returns the plan to go on with.
            cancelled: Whether to leave off.

        Returns:
            The arms that have their answer, in trial order.
        """
        self._running = [decoding for decoding in self._running if decoding.rollouts]
        busy = {id(rollout.member) for decoding in self._running for rollout in decoding.rollouts}
        served: list[Arm] = []
        for group in _groups([arm for arm in waiting if id(arm) not in busy], plan):
            served += self._start(multiplexer, group, plan, fewer, cancelled)
        if self._joining and not served:
            served = [arm for decoding in self._running for arm in self._until_one_is_done(decoding)]
        return sorted(served, key=lambda arm: arm.number)

    def _start(
        self,
        multiplexer: Multiplexer,
        arms: Sequence[Arm],
        plan: Plan,
        fewer: Callable[[int], Plan],
        cancelled: Callable[[], bool],
    ) -> list[Arm]:
        """Begin a rollout, to its end unless arms may join; again in smaller ones if it fails."""
        requests = [(arm, arm.request) for arm in arms]
        decoding: Decoding | None = None
        try:
            room = self._with_room(arms, plan) if self._joining else None
            if room is not None:
                room.join(requests)
                return []
            decoding = Decoding(multiplexer, requests, self.counts)
            if self._joining:
                self._running.append(decoding)
                return []
            done: list[Rollout] = []
            while decoding.rollouts:
                if cancelled():
                    return []
                done += decoding.advance()
        except Exception as error:
            if decoding is not None:
                decoding.restore()
            if is_out_of_memory(error):
                plan = fewer(sum(request.rows for _, request in requests))
            if len(arms) == 1:
                arms[0].answer = error
                return list(arms)
            size = max(1, len(arms) // 2) if is_out_of_memory(error) else 1
            groups = [arms[start : start + size] for start in range(0, len(arms), size)]
            return [arm for group in groups for arm in self._start(multiplexer, group, plan, fewer, cancelled)]
        return [_answered(rollout, self.counts) for rollout in done]

    def _with_room(self, arms: Sequence[Arm], plan: Plan) -> Decoding | None:
        rows, kind = sum(arm.request.rows for arm in arms), arms[0].request.autocast
        for decoding in self._running:
            if decoding.can_join and decoding.autocast == kind and decoding.rows + rows <= plan.rollout_rows:
                return decoding
        return None

    def _until_one_is_done(self, decoding: Decoding) -> list[Arm]:
        while decoding.rollouts:
            if done := decoding.advance():
                return [_answered(rollout, self.counts) for rollout in done]
        return []


def _groups(arms: Sequence[Arm], plan: Plan) -> list[list[Arm]]:
    """Arms that roll out together: of one autocast dtype, and not too many rows."""
    groups: dict[Any, list[list[Arm]]] = {}
    for arm in arms:
        of_kind = groups.setdefault(arm.request.autocast, [[]])
        rows = sum(other.request.rows for other in of_kind[-1])
        full = of_kind[-1] and rows + arm.request.rows > plan.rollout_rows
        if full or len(of_kind[-1]) == plan.trials_per_pass:
            of_kind.append([])
        of_kind[-1].append(arm)
    return [group for of_kind in groups.values() for group in of_kind if group]


def _answered(rollout: Rollout, counts: Counts) -> Arm:
    arm = rollout.member
    assert isinstance(arm, Arm)
    arm.answer = rollout.answer if rollout.error is None else rollout.error
    arm.chunk_seconds += rollout.seconds
    counts.tokens += rollout.tokens
    if rollout.request.training:
        arm.chunk_generated += rollout.tokens
    return arm
