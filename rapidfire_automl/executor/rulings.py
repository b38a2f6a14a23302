"""What people decide of a trial: pause, resume, stop. What each race comes to is in `control.py`.

What is about a trial that trains is a wish, until the trial is about to begin an optimizer step, is at a chunk
boundary, or (a stop only) rolls out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rapidfire_automl.control import Command
from rapidfire_automl.executor.arm import Arm, Halt
from rapidfire_automl.executor.keeping import Keeping
from rapidfire_automl.executor.requests import Boundary, Generate, Pace
from rapidfire_automl.executor.rounds import report
from rapidfire_automl.executor.standing import ENDED, Elsewhere, Refused, Standing, Wish, at_its_end, where
from rapidfire_policies.base import Decision, TrialState, Verdict

_DONE = {Verdict.PAUSE: "paused", Verdict.CONTINUE: "resumed", Verdict.STOP: "stopped"}


class Rulings:
    """Applies pauses, resumes and stops.

    Args:
        standing: Of the trials.
        answer: Says what came of a command (command, "applied" or "refused", text).
        leave: Leaves a command to the worker that has its trial.
        tell: Emits an event (kind, arm or None, data).
    """

    def __init__(
        self,
        standing: Standing,
        answer: Callable[[Command, Any, str], None],
        leave: Callable[[Command], None],
        tell: Callable[..., None],
    ) -> None:
        self._standing = standing
        self._answer = answer
        self._leave = leave
        self._tell = tell
        self.keeping = Keeping(None)

    # -- as they come ------------------------------------------------------------------------------------------------

    def pause(self, command: Command) -> str:
        """Have a trial give up its slot at its next step; what has come of it, or "" if that is still to come."""
        arm = self._standing.arm(command)
        if arm.number in self._standing.wishes or (arm.ruling is not None and arm.ruling.verdict is Verdict.PAUSE):
            raise Refused(f"trial {arm.number} is paused by hand already")
        if arm.has_slot:
            self._standing.wishes[arm.number] = Wish(Verdict.PAUSE, command)
            return ""
        text = f"it has no slot, {where(arm)}; only resume brings it back now"
        self._rule(arm, Verdict.PAUSE, command, text)
        arm.decision = None
        return text

    def resume(self, command: Command) -> str:
        """Have a paused trial go on."""
        arm, conductor = self._standing.arm(command), self._standing.conductor
        wish = self._standing.wishes.pop(arm.number, None)
        if wish is not None:
            self._answer(wish.command, "applied", "withdrawn by a resume before it took effect")
            return f"trains on, {where(arm)}"
        if arm.has_slot:
            raise Refused(f"trial {arm.number} is training")
        if arm.ruling is not None and arm.ruling.verdict is Verdict.CONTINUE:
            raise Refused(f"trial {arm.number} has been resumed already and waits for a slot")
        assert conductor is not None
        when = "" if conductor.free_slots > 0 else " when a slot is free, before newcomers"
        text = f"goes on{when}, {where(arm)}"
        self._rule(arm, Verdict.CONTINUE, command, text)
        arm.decision = arm.ruling
        return text

    def stop(self, command: Command) -> str:
        """Prune a trial at its next step; what has come of it, or "" if that is still to come."""
        arm, wishes = self._standing.arm(command), self._standing.wishes
        pause = wishes.pop(arm.number, None)
        if pause is not None:
            self._answer(pause.command, "refused", "a stop came before it took effect")
        if arm.has_slot:
            wishes[arm.number] = Wish(Verdict.STOP, command)
            return ""
        text = _stopped(arm)
        self._rule(arm, Verdict.STOP, command, text)
        arm.decision = arm.ruling
        return text

    def end(self) -> list[Command]:
        """The search is over; returns what waits."""
        waiting = [wish.command for wish in self._standing.wishes.values()]
        self._standing.wishes.clear()
        return waiting

    # -- at safe points ----------------------------------------------------------------------------------------------

    def fulfil(self, driven: list[Arm]) -> list[Arm]:
        """Pause and stop those that have got to a safe point.

        Args:
            driven: The arms of the round that runs; who is paused leaves it.

        Returns:
            Those among them that have got an answer by that.
        """
        ready: list[Arm] = []
        for arm in list(driven):
            wish = self._standing.wishes.get(arm.number)
            if wish is None:
                continue
            try:
                fulfilled = self._fulfil(arm, wish, driven, ready)
            except Elsewhere:
                self._leave(wish.command)
                fulfilled = True
            if fulfilled:
                del self._standing.wishes[arm.number]
        return ready

    def _fulfil(self, arm: Arm, wish: Wish, driven: list[Arm], ready: list[Arm]) -> bool:
        """Pause or stop an arm if it is at a safe point; returns whether nothing is left to do.

        Raises:
            Elsewhere: Others have taken it over.
        """
        conductor = self._standing.conductor
        assert conductor is not None
        if arm.lost:
            raise Elsewhere
        stops = wish.verdict is Verdict.STOP
        text = _stopped(arm) if stops else f"paused, {where(arm)}"
        if arm.done or at_its_end(arm):
            why = ENDED.get(arm.record.state, "has ended") if arm.done else "has trained to its end"
            self._answer(wish.command, "refused", f"trial {arm.number} {why}")
            return True
        if not (isinstance(arm.request, (Boundary, Pace)) or (stops and isinstance(arm.request, Generate))):
            return False
        self._rule(arm, wish.verdict, wish.command, text)
        if isinstance(arm.request, Boundary):
            pass  # the round's end logs it like any verdict
        elif stops:
            assert arm.ruling is not None
            arm.answer = arm.ruling if isinstance(arm.request, Pace) else Halt(arm.ruling.reason)
            ready.append(arm)
        else:
            arm.record.state = TrialState.PAUSED
            conductor.take_slot(arm)
            driven.remove(arm)
        self._answer(wish.command, "applied", text)
        return True

    def leaving(self, rolling: Sequence[Arm]) -> list[Arm]:
        """Those that are stopped in the middle of their rollout."""
        wishes = self._standing.wishes
        stopped = [arm for arm in rolling if arm.number in wishes and wishes[arm.number].verdict is Verdict.STOP]
        return self.fulfil(stopped)

    def rejoin(self, driven: list[Arm]) -> list[Arm]:
        """Who was without a slot and is to go on or to end needn't wait for the round's end: it joins `driven`.

        Returns:
            Those who do, answered.
        """
        conductor = self._standing.conductor
        assert conductor is not None
        ready = []
        for arm in self._standing.arms:
            if arm.ruling is None or arm.has_slot or arm.done or arm in driven:
                continue
            if arm.ruling.verdict is Verdict.STOP:
                arm.answer, arm.decision = arm.ruling, None
            elif arm.ruling.verdict is Verdict.CONTINUE and isinstance(arm.request, Pace) and conductor.free_slots > 0:
                arm.answer = arm.decision = None
                conductor.give_slot(arm)
            else:
                continue
            driven.append(arm)
            ready.append(arm)
        driven.sort(key=lambda arm: arm.number)
        return ready

    def _rule(self, arm: Arm, verdict: Verdict, command: Command, text: str) -> None:
        """Decide; it is on disk before it takes effect, so that a search that is killed does not forget it.

        Raises:
            Elsewhere: Others have taken the trial over.
        """
        ruling = Decision(verdict, f"{_DONE[verdict]} by {command.source}", arm.record.standing)
        chunk = max(arm.judged, len(arm.record.values))
        if isinstance(arm.request, Boundary):
            report([arm])  # what is judged has been reported
        lost = self.keeping.ruled([(arm.number, chunk, str(verdict), ruling.reason)], command, text)
        arm.lost = arm.lost or arm.number in lost
        if arm.lost:
            raise Elsewhere
        if not (isinstance(arm.request, Boundary) and arm.has_slot):  # otherwise the round's end logs it
            arm.record.verdicts.append((chunk, str(verdict), ruling.reason))
            self._tell("verdict", arm, verdict=str(verdict), reason=ruling.reason, by="", numbers=dict(ruling.numbers))
        arm.judged, arm.ruling = chunk, ruling


def _stopped(arm: Arm) -> str:
    values = arm.record.values
    return f"stopped, {where(arm)}; " + (f"its value is {values[-1]:.4g}" if values else "it has reported no value")
