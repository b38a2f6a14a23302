"""Rollouts as the conductor serves them: who rolls out with whom."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from rapidfire_automl.executor import overflow
from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.executor.passes import Multiplexer
from rapidfire_automl.executor.rollouts import Counts, Decoding, Rollout
from rapidfire_automl.plan import Plan

Failed = Callable[[Sequence[Arm], Exception], int]

logger = logging.getLogger("rapidfire_automl")


class Rolling:
    """Serves the rollouts that arms ask for: all that ask decode together, and go on together.

    That those who are done sooner should go on, and roll out again beside the others, was tried and gains nothing
    (experiments/LOG.md): they would train in smaller passes.
    """

    def __init__(self) -> None:
        self.counts = Counts()

    def serve(
        self,
        multiplexer: Multiplexer,
        waiting: Sequence[Arm],
        plan: Plan,
        failed: Failed,
        cancelled: Callable[[], bool],
        leaving: Callable[[Sequence[Arm]], list[Arm]] = lambda arms: [],
    ) -> list[Arm]:
        """Roll out; in smaller batches where it does not fit.

        Args:
            multiplexer: The shared base.
            waiting: Arms that ask for a rollout, in trial order.
            plan: How many rows go together.
            failed: Called with the arms of a rollout that has failed; says how many go together next, and answers one
                that was alone.
            cancelled: Whether to leave off.
            leaving: Called between tokens with those that roll out; those it returns leave, with the answer they have.

        Returns:
            The arms that have their answer, in trial order.
        """
        served: list[Arm] = []
        for group in _groups(waiting, plan):
            served += self._run(multiplexer, group, failed, cancelled, leaving)
        return sorted(served, key=lambda arm: arm.number)

    def _run(
        self,
        multiplexer: Multiplexer,
        arms: Sequence[Arm],
        failed: Failed,
        cancelled: Callable[[], bool],
        leaving: Callable[[Sequence[Arm]], list[Arm]],
    ) -> list[Arm]:
        done: list[Rollout] = []
        left: list[Arm] = []
        try:
            self._decode(multiplexer, arms, done, left, cancelled, leaving)
        except Exception as error:
            size = failed(arms, error)
            if len(arms) == 1:
                return list(arms)
            logger.warning(
                "A rollout of %d trials failed (%s: %s); it is tried again in smaller ones.",
                len(arms),
                type(error).__name__,
                error,
            )
        else:
            return [] if cancelled() else [self._answered(rollout) for rollout in done] + left
        overflow.free_memory()
        # A trial that was done has its generator back; the others' have drawn nothing that counts.
        finished = {id(rollout.member) for rollout in done} | {id(arm) for arm in left}
        rest = [arm for arm in arms if id(arm) not in finished]
        groups = [rest[start : start + size] for start in range(0, len(rest), size)]
        again = [arm for group in groups for arm in self._run(multiplexer, group, failed, cancelled, leaving)]
        return [self._answered(rollout) for rollout in done] + left + again

    def _decode(
        self,
        multiplexer: Multiplexer,
        arms: Sequence[Arm],
        done: list[Rollout],
        left: list[Arm],
        cancelled: Callable[[], bool],
        leaving: Callable[[Sequence[Arm]], list[Arm]],
    ) -> None:
        """Decode until all are done or the search is cancelled.

        Whatever is raised, `done` has those who are, and `left` those who have left.
        """
        decoding = Decoding(multiplexer, [(arm, arm.request) for arm in arms], self.counts)
        while decoding.rollouts and not cancelled():
            done += decoding.advance()
            rolling = [rollout.member for rollout in decoding.rollouts]
            if gone := leaving([arm for arm in rolling if isinstance(arm, Arm)]):
                decoding.drop(gone)
                left += gone

    def _answered(self, rollout: Rollout) -> Arm:
        arm = rollout.member
        assert isinstance(arm, Arm)
        arm.answer = rollout.answer if rollout.error is None else rollout.error
        arm.chunk_seconds += rollout.seconds
        self.counts.tokens += rollout.tokens
        if rollout.request.training:
            arm.chunk_generated += rollout.tokens
        return arm


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
