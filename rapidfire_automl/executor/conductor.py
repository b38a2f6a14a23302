"""The conductor: hands the baton round, runs joint passes, and closes rounds.

One turn: every arm that has an answer gets the baton, in trial order, until it asks for something; then whatever was
asked for is run jointly. One round: every slot-holder trains a chunk; then one judgement over the whole history.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch

from rapidfire_automl.executor import overflow
from rapidfire_automl.executor.arm import Arm, Leave
from rapidfire_automl.executor.commands import Commands
from rapidfire_automl.executor.context import TrialContext
from rapidfire_automl.executor.passes import Multiplexer, OpenPass, Part
from rapidfire_automl.executor.requests import Away, Backward, Boundary, Forward, Generate, Pace
from rapidfire_automl.executor.rolling import Rolling
from rapidfire_automl.executor.rounds import TAKEN_OVER
from rapidfire_automl.executor.seams import is_out_of_memory
from rapidfire_automl.memory import give_back
from rapidfire_automl.plan import Plan
from rapidfire_policies.base import Decision, TrialState, Verdict

logger = logging.getLogger("rapidfire_automl")

T = TypeVar("T")


class Judge(Protocol):
    """Closes a round."""

    def __call__(self, waiting: Sequence[Arm], paused: Sequence[Arm]) -> dict[int, Decision]:
        """A decision per trial number for the arms at a boundary and the paused ones."""


class Source(Protocol):
    """Where new trials come from."""

    def offer(self, free: int, *, idle: bool) -> list[Arm]:
        """At most `free` arms, in trial order, whose threads wait for the baton; `idle` if nothing else is to do."""

    @property
    def exhausted(self) -> bool:
        """Whether none will come while only paused arms are left."""

    @property
    def closed(self) -> bool:
        """Whether none will ever come again."""

    @property
    def news(self) -> bool:
        """Whether other workers' trials have come further since this was asked last."""


class Conductor:
    """Runs in one thread; everything below `run` is called from it, everything else says so.

    Args:
        slots: Arms that train at a time.
        most: Arms that live at a time, paused ones included.
        plan: How passes are split.
        judge: Closes a round.
        tell: Emits an event (kind, arm or None, data).
        clock: Seconds since the executor was entered.
        commands: What people want of the search.
    """

    def __init__(
        self,
        slots: int,
        most: int,
        plan: Plan,
        judge: Judge,
        tell: Callable[..., None],
        clock: Callable[[], float],
        commands: Commands,
    ) -> None:
        self.slots = slots
        self.most = most
        self.plan = plan
        self.multiplexer: Multiplexer | None = None
        self.rolling = Rolling()
        self._judge = judge
        self._tell = tell
        self._clock = clock
        self._commands = commands
        commands.attach(self)
        self._arms: list[Arm] = []
        self._idle = threading.Event()
        self._cancelled = self._leaving = False
        self._asked = 0

    @property
    def arms(self) -> Sequence[Arm]:
        """Live arms in trial order, paused ones included."""
        return self._arms

    @property
    def free_slots(self) -> int:
        """Slots nobody holds."""
        return self.slots - sum(arm.has_slot for arm in self._arms)

    def adopt(self, arms: Sequence[Arm]) -> None:
        """Take arms, new ones or such as another process has begun; paused ones without a slot."""
        for arm in arms:
            if arm.record.state is not TrialState.PAUSED:
                self.give_slot(arm)
            last = arm.trained == arm.judged or arm.record.state is TrialState.PAUSED
            if arm.final is not None and (last or arm.final.verdict is not Verdict.COMPLETE):
                arm.decision = arm.final
        self._arms = sorted([*self._arms, *arms], key=lambda arm: arm.number)

    # -- called from an arm's thread ---------------------------------------------------------------------------------

    def submit(self, arm: Arm, request: Any) -> Any:
        """File a request, give the baton back, and wait for the answer."""
        if self._leaving and isinstance(request, Boundary):
            raise Leave
        arm.request = request
        self._asked += 1
        arm.asked = self._asked
        arm.context.save()
        arm.go.clear()
        self._idle.set()
        arm.go.wait()
        if self._cancelled:
            raise Leave
        arm.context.enter()
        answer, arm.answer = arm.answer, None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def step_out(self, arm: Arm, work: Callable[[], T]) -> T:
        """Do without the baton what draws nothing and touches no model, while other arms do the same."""
        away = Away()
        arm.request = away
        arm.context.save()
        arm.go.clear()
        self._idle.set()
        begin = time.perf_counter()
        try:
            return work()
        finally:
            arm.chunk_seconds += time.perf_counter() - begin
            away.done.set()
            arm.go.wait()
            if self._cancelled:
                raise Leave
            arm.context.enter()

    def leave(self, arm: Arm) -> None:
        """The arm's thread is through; called whatever happened."""
        arm.request, arm.done = None, True
        self._idle.set()

    def cancel(self) -> None:
        """End the search: every arm leaves at its next request. Callable from any thread, signal handlers too."""
        self._cancelled = True

    def wind_up(self) -> None:
        """End the search: every arm leaves at the end of its step, its state on disk; callable where `cancel` is."""
        self._leaving = True

    def renew(self) -> None:
        """Make ready for another search after one was cancelled."""
        self._cancelled = self._leaving = False

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    @property
    def leaving(self) -> bool:
        """Whether `wind_up` was called."""
        return self._leaving

    # -- the conductor's thread --------------------------------------------------------------------------------------

    def run(self, source: Source, retire: Callable[[Arm], None], home: TrialContext) -> None:
        """Conduct until the source is closed and no arm is left, or until cancelled.

        Args:
            source: New trials.
            retire: Called once for every arm that is done, in trial order.
            home: The context to conduct in.
        """
        self._end_judged(home)  # what an earlier process has decided
        self._retire(retire)
        while not (self._cancelled or self._leaving):
            self._between_turns([])
            self._end_judged(home)
            self._retire(retire)
            self._resume_paused()
            free = self.free_slots
            room = min(free, self.most - len(self._arms))
            self.adopt(source.offer(room, idle=free == self.slots) if room > 0 else [])
            self._end_judged(home)  # what another process has decided of those it has begun
            self._retire(retire)
            holders = [arm for arm in self._arms if arm.has_slot]
            by_hand = [arm for arm in self._arms if arm.ruling is not None]
            if holders:
                self._drive(holders, home, self._between_turns)
                if not (self._cancelled or self._leaving):
                    self._close_round([arm for arm in holders if not arm.done])
            elif len(by_hand) < len(self._arms) and (source.exhausted or room <= 0):
                self._wake_or_end()
            elif len(by_hand) < len(self._arms) and source.news:
                self._close_round([])
            elif source.closed and not self._arms:
                return
            else:
                over = source.exhausted or room <= 0
                self._commands.wait(by_hand if over and all(map(_is_paused_by_hand, self._arms)) else [])
            self._end_judged(home)
            self._retire(retire)
        self.dismiss(retire)

    def dismiss(self, retire: Callable[[Arm], None]) -> None:
        """Let every thread run into `Leave`, one after the other; one that can't be retired keeps no other from it."""
        self._cancelled = True
        for arm in self._arms:
            while not arm.done:
                self._idle.clear()
                arm.go.set()
                self._idle.wait()

        def retire_each(arm: Arm) -> None:
            try:
                retire(arm)
            except Exception as error:
                logger.warning("How trial %d has ended could not be told: %s", arm.number, error)

        self._retire(retire_each)

    def _between_turns(self, driven: list[Arm]) -> list[Arm]:
        """Apply commands, and let arms whose trials others have taken over leave; returns the arms it has answered."""
        answered = self._commands.turn(driven)
        for arm in self._arms:
            if not arm.lost or arm.done or arm in answered:
                continue
            if arm in driven and isinstance(arm.request, (Pace, Boundary)):
                arm.answer = Decision(Verdict.STOP, TAKEN_OVER)
                answered = [*answered, arm]
            elif arm not in driven and not driven:
                arm.decision = Decision(Verdict.STOP, TAKEN_OVER)
        return sorted(answered, key=lambda arm: arm.number)

    def give_slot(self, arm: Arm) -> None:
        """Let it train."""
        arm.has_slot, arm.ruling = True, None
        arm.span_start_s = self._clock()
        arm.record.state = TrialState.RUNNING

    def take_slot(self, arm: Arm) -> None:
        """Let another train."""
        if arm.has_slot:
            arm.has_slot = False
            arm.record.spans.append((arm.span_start_s, self._clock()))

    def _resume_paused(self) -> None:
        """Paused arms that are wanted back get the free slots first, in trial order; a person's before the policy's."""
        free = self.free_slots
        for arm in sorted(self._arms, key=lambda arm: arm.ruling is None):
            wants = arm.decision is not None and arm.decision.verdict is Verdict.CONTINUE
            if free > 0 and not arm.has_slot and wants:
                self.give_slot(arm)
                free -= 1

    def _wake_or_end(self) -> None:
        """All arms are paused and no trial is to come: the policy resumes some, or the rest ends as pruned."""
        self._close_round([])
        if not any(arm.decision is not None and arm.decision.verdict is Verdict.CONTINUE for arm in self._arms):
            for arm in self._arms:
                if arm.ruling is None and (arm.decision is None or arm.decision.verdict is Verdict.PAUSE):
                    arm.decision = Decision(Verdict.STOP, "paused when the search ended")
                    arm.record.verdicts.append((len(arm.record.values), "stop", arm.decision.reason))
                    numbers = arm.record.standing
                    self._tell("verdict", arm, verdict="stop", reason=arm.decision.reason, by="", numbers=numbers)

    def _end_judged(self, home: TrialContext) -> None:
        """Arms with a final verdict leave before the next round, so that their slots are free for it."""
        final = (Verdict.STOP, Verdict.COMPLETE)
        ending = [arm for arm in self._arms if arm.decision is not None and arm.decision.verdict in final]
        if ending and not self._cancelled:
            self._drive(ending, home)

    def _drive(
        self, arms: list[Arm], home: TrialContext, between_turns: Callable[[list[Arm]], list[Arm]] = lambda _: []
    ) -> None:
        """Conduct these arms until each is done or waits at a boundary.

        Args:
            arms: The arms.
            home: The context to conduct in.
            between_turns: May take arms out of `arms` and put others in; returns those it has answered.
        """
        ready = list(arms)
        for arm in arms:
            arm.answer, arm.decision = arm.decision, None
        moving = ready
        while moving:
            for arm in ready:
                self._hand_baton(arm)
            answered = between_turns(arms)
            moving = [a for a in arms if not a.done and (a in answered or not isinstance(a.request, Boundary))]
            if self._cancelled:
                break
            ready = answered or (self._serve(moving) if moving else [])
            if moving and not ready and not self._cancelled:
                raise RuntimeError("The rendezvous is stuck: no request can be served.")
        home.enter()  # joint passes draw from the trials' generators only; what comes after a round may not

    def _hand_baton(self, arm: Arm) -> None:
        arm.baton_since_s = time.perf_counter()
        self._idle.clear()
        arm.go.set()
        self._idle.wait()
        arm.charge_baton()
        if arm.done:
            arm.abandon_passes()

    def _serve(self, live: Sequence[Arm]) -> list[Arm]:
        """Answer what can be answered now; returns the arms to hand the baton to, in trial order.

        What frees memory goes before what takes some: backwards before forwards, and of the forwards that a backward
        will follow one pass at a time, so that the budget of a pass bounds the activations that are alive.
        """
        away = [arm for arm in live if isinstance(arm.request, Away)]
        if away:  # waited for, so that who goes with whom does not depend on how long a judge takes
            back = [self._wait_for(arm.request.done) for arm in away]
            return away if all(back) else []
        # Nobody gets ahead of where the slowest will be after its step: so trials of 10 and of 11 steps keep in step.
        limit = min(arm.next_progress for arm in live) - 1e-9
        paced = [arm for arm in live if isinstance(arm.request, Pace) and arm.progress < limit]
        if paced:
            return paced
        done = self._backward([arm for arm in live if isinstance(arm.request, Backward)])
        if done:
            return done
        kinds: dict[tuple[Any, ...], list[Arm]] = {}
        for arm in live:
            if isinstance(arm.request, Forward):
                kinds.setdefault(arm.request.kind, []).append(arm)
        groups = [
            [waiting.arm for waiting in group]
            for arms in kinds.values()
            for group in self.plan.split([_Waiting(arm) for arm in arms])
        ]
        free = [group for group in groups if not group[0].request.grad]
        # Trials with open passes come first, for they hold memory, then those that have waited longest.
        by_need = sorted(
            (group for group in groups if group[0].request.grad),
            key=lambda group: min((not arm.open_passes, arm.asked, arm.number) for arm in group),
        )
        ready: list[Arm] = []
        for group in free or by_need[:1]:
            self._forward(group)
            ready += group
        if not ready:  # last of all, so that as many as possible roll out together
            ready = self._roll_out([arm for arm in live if isinstance(arm.request, Generate)])
        return sorted(ready, key=lambda arm: arm.number)

    def _roll_out(self, waiting: Sequence[Arm]) -> list[Arm]:
        """Roll out jointly; out of memory means fewer rows at a time."""
        if not waiting:
            return []
        assert self.multiplexer is not None
        return self.rolling.serve(
            self.multiplexer, waiting, self.plan, self._rollout_failed, lambda: self._cancelled, self._commands.listen
        )

    def _wait_for(self, done: threading.Event) -> bool:
        """Wait until it is set, or until cancelled; returns whether it is set."""
        while not done.wait(0.1):
            self._commands.listen()
            if self._cancelled:
                return False
        return True

    def _rollout_failed(self, arms: Sequence[Arm], error: Exception) -> int:
        """How many trials a failed rollout is tried with again; one that is alone has its answer."""
        size = self._failed(len(arms), error)
        if len(arms) == 1:
            arms[0].answer = self._alone(arms[0], error)
        elif is_out_of_memory(error):
            self.plan = replace(self.plan, rollout_rows=max(1, sum(arm.request.rows for arm in arms) // 2))
        return size

    def _forward(self, arms: Sequence[Arm], *, last: bool = False) -> None:
        """Run a pass, in smaller ones if it fails; a trial alone that does not fit gets a second try, the last."""
        assert self.multiplexer is not None
        begin = time.perf_counter()
        try:
            parts, opened = self.multiplexer.forward([(arm, arm.request) for arm in arms])
        except Exception as error:
            size = self._failed(len(arms), error)
            last = len(arms) == 1 and (last or not is_out_of_memory(error))
            if last:
                arms[0].answer = self._alone(arms[0], error)
        else:
            self._answer(arms, parts, opened)
            self._charge(parts, time.perf_counter() - begin)
            return
        overflow.free_memory()
        if not last:
            for start in range(0, len(arms), size):
                self._forward(arms[start : start + size], last=len(arms) == 1)

    def _answer(self, arms: Sequence[Arm], parts: Sequence[Part], opened: OpenPass | None) -> None:
        for arm, part in zip(arms, parts, strict=True):
            arm.answer = part.leaves if part.request.head is not None else part.leaves["hidden"]
            if opened is not None:
                arm.open_passes.append(opened)
            if part.request.grad:
                arm.chunk_tokens += int(
                    part.tokens if part.request.attention_mask is None else part.request.attention_mask.sum()
                )

    def _backward(self, waiting: Sequence[Arm]) -> list[Arm]:
        """Run the passes whose live members all wait; an arm goes on when all of its passes have run."""
        here = {id(arm) for arm in waiting}
        passes = dict.fromkeys(opened for arm in waiting for opened in arm.open_passes)
        for opened in passes:
            if any(part.live and id(part.member) not in here for part in opened.parts):
                continue
            begin = time.perf_counter()
            failed = self._run_backward(opened)
            self._charge([part for part in opened.parts if part.live], time.perf_counter() - begin)
            for part in opened.parts:
                arm = part.member
                assert isinstance(arm, Arm)
                if opened in arm.open_passes:
                    arm.open_passes.remove(opened)
                if part in failed:
                    arm.answer = failed[part]
        return [arm for arm in waiting if not arm.open_passes]

    def _run_backward(self, opened: OpenPass) -> dict[Part, BaseException]:
        """Run a pass's backward, in smaller passes if it fails; returns the error of each part that failed alone."""
        assert self.multiplexer is not None
        live = [part for part in opened.parts if part.live]
        if not live:
            return {}
        try:
            self.multiplexer.backward(opened)
            return {}
        except Exception as error:
            opened.hidden = torch.empty(0)
            size = self._failed(len(live), error)
        overflow.free_memory()
        return self._again(live, size, last=len(live) == 1)

    def _again(self, parts: Sequence[Part], size: int, *, last: bool = False) -> dict[Part, BaseException]:
        """Forward and backward once more in passes of `size` parts; the error of each part that failed alone."""
        assert self.multiplexer is not None
        failed: dict[Part, BaseException] = {}
        for start in range(0, len(parts), size):
            group = parts[start : start + size]
            try:
                self.multiplexer.again(group)
                continue
            except Exception as error:
                smaller, alone = self._failed(len(group), error), len(group) == 1
                if alone and (last or not is_out_of_memory(error)):
                    failed[group[0]] = self._alone(group[0].member, error)
            overflow.free_memory()
            if group[0] not in failed:
                failed.update(self._again(group, smaller, last=alone))
        return failed

    def _failed(self, trials: int, error: Exception) -> int:
        """How many trials a failed pass is tried with again; a plan that has put too many together is changed."""
        if trials > 1 and is_out_of_memory(error):
            self.plan = self.plan.halved()
            logger.warning("Out of memory in a joint pass; the budget is now %d tokens.", self.plan.budget_tokens)
            self._tell("out_of_memory", None, budget_tokens=self.plan.budget_tokens)
        return overflow.next_size(trials, error)

    def _alone(self, arm: Any, error: Exception) -> Exception:
        """What a trial hears whose pass has failed with nobody else in it."""
        if is_out_of_memory(error):
            self._tell("out_of_memory", arm, budget_tokens=self.plan.budget_tokens)
        return overflow.told_alone(error, arm.request)

    def _charge(self, parts: Sequence[Part], seconds: float) -> None:
        """Split a pass's time over its trials by tokens."""
        total = sum(part.tokens for part in parts)
        for part in parts:
            assert isinstance(part.member, Arm)
            part.member.chunk_seconds += seconds * part.tokens / total

    def _close_round(self, waiting: Sequence[Arm]) -> None:
        paused = [arm for arm in self._arms if not arm.has_slot and not arm.done]
        decisions = self._judge(waiting, paused)
        for arm in waiting:
            arm.decision = decisions.get(arm.number, Decision(Verdict.CONTINUE))
            if arm.decision.verdict is Verdict.PAUSE:
                arm.record.state = TrialState.PAUSED
                self.take_slot(arm)
        for arm in paused:
            arm.decision = decisions.get(arm.number, Decision(Verdict.PAUSE))

    def _retire(self, retire: Callable[[Arm], None]) -> None:
        done = [arm for arm in self._arms if arm.done]
        for arm in done:
            self.take_slot(arm)
            self._arms.remove(arm)
            retire(arm)
        if done:
            give_back(1)


def _is_paused_by_hand(arm: Arm) -> bool:
    return arm.ruling is not None and arm.ruling.verdict is Verdict.PAUSE


class _Waiting:
    """An arm's forward as the planner sees it."""

    __slots__ = ("arm", "rows", "width")

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self.rows, self.width = arm.request.input_ids.shape
