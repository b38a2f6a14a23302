"""Commands are applied here, in the conductor's thread, between two turns; what each race comes to is in `control.py`.

What is about a trial that trains waits until the trial is about to begin an optimizer step, or at a chunk boundary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState as OptunaState

from rapidfire_automl import attempts
from rapidfire_automl.control import Command, ControlError, Effect, Sent
from rapidfire_automl.executor import enqueueing, seams, warmstart
from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.executor.requests import Boundary, Pace
from rapidfire_automl.executor.rounds import report
from rapidfire_automl.executor.sources import Arrivals, Asking, Claims
from rapidfire_automl.mailboxes import Mailbox, MemoryMailbox, StudyMailbox
from rapidfire_automl.pruners import PolicyPruner, policy_from_name, policy_from_outside
from rapidfire_automl.records import TrialRecord
from rapidfire_policies.base import Decision, Policy, TrialState, Verdict

if TYPE_CHECKING:
    from rapidfire_automl.executor.conductor import Conductor

logger = logging.getLogger("rapidfire_automl")

_ENDED = {
    TrialState.COMPLETE: "is complete",
    TrialState.STOPPED: "was stopped",
    TrialState.FAILED: "has failed",
    OptunaState.COMPLETE: "is complete",
    OptunaState.PRUNED: "was stopped",
    OptunaState.FAIL: "has failed",
    OptunaState.WAITING: "has not begun",
}


class Refused(Exception):
    """A command that cannot be; the message says why."""


class Elsewhere(Exception):
    """A command for a trial of another process."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A pause or a stop that waits for its trial's next safe point."""

    verdict: Verdict
    command: Command


class Commands:
    """Takes commands from mailboxes and applies them.

    Args:
        records: Of all trials, by number.
        chunks: Of a whole trial.
        tell: Emits an event (kind, arm or None, data).
        cancel: Ends the search.
        keep: Puts verdicts, `(trial, chunk, verdict, reason)` each, on disk before they take effect.
    """

    def __init__(
        self,
        records: Mapping[int, TrialRecord],
        chunks: int,
        tell: Callable[..., None],
        cancel: Callable[[], None],
        keep: Callable[..., None] = lambda verdicts, by_hand: None,
    ) -> None:
        self._records = records
        self._chunks = chunks
        self._tell = tell
        self._cancel = cancel
        self._keep = keep
        self._memory = MemoryMailbox()
        self._more: list[Mailbox] = []
        self._boxes: tuple[Mailbox, ...] = ()
        self._known: dict[str, Mailbox] = {}
        self._wishes: dict[int, Wish] = {}
        self._warm: dict[int, warmstart.WarmStart] = {}
        self._allowed: frozenset[type] = frozenset()
        self._study: optuna.Study | None = None
        self._source: Asking | Arrivals | Claims | None = None
        self._said_all_paused = False
        self.conductor: Conductor | None = None

    # -- from any thread ---------------------------------------------------------------------------------------------

    def send(self, command: Command) -> Sent:
        """Take a command from this process."""
        return self._memory.send(command)

    def add_mailbox(self, mailbox: Mailbox) -> None:
        """Listen to one more, in the next search."""
        self._more.append(mailbox)

    def begin(self, study: optuna.Study, source: Asking | Arrivals | Claims) -> None:
        """A search begins."""
        self._study, self._source = study, source
        self._allowed = classes_of(study.pruner)
        for box in self._boxes[1:]:
            box.close("another study is searched now")
        boxes: list[Mailbox] = [self._memory, *self._more]
        self._more = []
        if not isinstance(getattr(study, "_storage", None), InMemoryStorage):
            boxes.append(StudyMailbox(study, shared=isinstance(source, Claims)))
        for box in boxes:
            try:
                box.open()
            except Exception as error:  # a search that can't be steered is still a search
                logger.warning("The search can't be steered from outside: %s", error)
        self._boxes = tuple(boxes)

    def end(self, reason: str) -> None:
        """The search is over: whatever waits is refused."""
        for wish in self._wishes.values():
            self._answer(wish.command, "refused", reason)
        for box in self._boxes:
            box.close(reason)
        self._wishes, self._boxes = {}, ()
        self._warm.clear()

    # -- the conductor's thread --------------------------------------------------------------------------------------

    def turn(self, driven: list[Arm]) -> list[Arm]:
        """Take what has come and apply what can be.

        Args:
            driven: The arms of the round that runs, empty between rounds; who is paused leaves it, who resumes joins.

        Returns:
            Those among them that have got an answer by that.
        """
        for box in self._boxes:
            for command in box.take():
                self._receive(box, command)
        ready = self._fulfil(driven) if self._wishes and driven else []
        return ready + self._rejoin(driven) if driven else ready

    def wait(self, paused: Sequence[Arm]) -> None:
        """Nothing can go on: wait a moment for a command."""
        if paused and not self._said_all_paused:
            self._said_all_paused = True
            numbers = ", ".join(str(arm.number) for arm in paused)
            message = f"All that is left was paused by hand ({numbers}); the search waits for resume, stop or cancel."
            logger.warning(message)
            self._tell("warning", None, message=message)
        self._memory.wait(0.1)

    def warm_start(self, arm: Arm) -> warmstart.WarmStart | None:
        """What a clone begins with; called in its thread, once.

        Raises:
            ValueError: It is no longer there.
        """
        if not arm.trial.user_attrs.get(enqueueing.WARM_ATTR):
            return None
        warm = self._warm.pop(arm.number, None)
        if warm is None:
            source = arm.trial.user_attrs.get(enqueueing.CLONE_ATTR)
            raise ValueError(
                f"What trial {source} left to its clone is gone with the process that kept it. Clone again."
            )
        return warm

    def _receive(self, box: Mailbox, command: Command) -> None:
        if command.id in self._known:
            return
        self._known[command.id] = box
        verbs: dict[str, Callable[[Command], str]] = {
            "pause": self._pause,
            "resume": self._resume,
            "stop": self._stop,
            "clone": self._clone,
            "add": self._add,
            "extend": self._extend,
            "set-policy": self._set_policy,
            "cancel": self._end_search,
        }
        try:
            text = verbs[command.verb](command)
        except Elsewhere:
            return
        except (Refused, ControlError) as refused:
            self._answer(command, "refused", str(refused))
        except Exception as error:  # a command must not end the search
            logger.exception("%s failed; the search goes on.", command.describe())
            self._answer(command, "refused", f"{type(error).__name__}: {error}")
        else:
            if text:
                self._answer(command, "applied", text)

    def _answer(self, command: Command, state: Any, text: str) -> None:
        logger.info("%s (%s): %s: %s", command.describe(), command.source, state, text)
        data = {"id": command.id, "verb": command.verb, "source": command.source, "sent_s": command.when_s}
        arguments = {name: value for name, value in command.arguments.items() if value not in ({}, False)}
        arm = None if command.trial is None else self._live(command.trial)
        self._tell("command", arm, of=command.trial, arguments=arguments, effect=state, text=text, **data)
        self._known[command.id].answer(command, Effect(state, text))

    # -- finding the trial -------------------------------------------------------------------------------------------

    @property
    def _arms(self) -> Sequence[Arm]:
        return () if self.conductor is None else self.conductor.arms

    def _live(self, number: int) -> Arm | None:
        return next((arm for arm in self._arms if arm.number == number and not arm.done), None)

    def _arm(self, command: Command) -> Arm:
        """The live arm a command is about."""
        assert command.trial is not None
        arm = self._live(command.trial)
        if arm is None:
            raise Refused(f"trial {command.trial} {self._why_not_live(command.trial)}")
        wish = self._wishes.get(arm.number)
        stopping = wish is not None and wish.verdict is Verdict.STOP
        final = [
            d for d in (arm.ruling, arm.decision) if d is not None and d.verdict in (Verdict.STOP, Verdict.COMPLETE)
        ]
        if stopping or final:
            raise Refused(f"trial {arm.number} is being stopped")
        if isinstance(arm.request, Boundary) and arm.request.chunk >= len(arm.record.boundaries):
            raise Refused(f"trial {arm.number} has trained to its end")
        return arm

    def _why_not_live(self, number: int) -> str:
        record = self._records.get(number)
        if record is not None and (record.state in _ENDED or not isinstance(self._source, Claims)):
            return _ENDED.get(record.state, "has not begun")
        trials = self._trials()
        if number not in trials:
            known = f"there are 0 to {max(trials)}" if trials else "there is none yet"
            return f"is unknown: {known}"
        if trials[number].state is OptunaState.RUNNING:
            raise Elsewhere
        return _ENDED[trials[number].state]

    def _trials(self) -> dict[int, optuna.trial.FrozenTrial]:
        assert self._study is not None
        return attempts.last_attempts(self._study)

    # -- pause, resume, stop -----------------------------------------------------------------------------------------

    def _pause(self, command: Command) -> str:
        arm = self._arm(command)
        if arm.number in self._wishes or (arm.ruling is not None and arm.ruling.verdict is Verdict.PAUSE):
            raise Refused(f"trial {arm.number} is paused by hand already")
        if arm.has_slot:
            self._wishes[arm.number] = Wish(Verdict.PAUSE, command)
            return ""
        self._rule(arm, Verdict.PAUSE, command)
        arm.decision = None
        return f"it has no slot, {_where(arm)}; only resume brings it back now"

    def _resume(self, command: Command) -> str:
        arm = self._arm(command)
        wish = self._wishes.pop(arm.number, None)
        if wish is not None:
            self._answer(wish.command, "applied", "withdrawn by a resume before it took effect")
            return f"trains on, {_where(arm)}"
        if arm.has_slot:
            raise Refused(f"trial {arm.number} is training")
        if arm.ruling is not None and arm.ruling.verdict is Verdict.CONTINUE:
            raise Refused(f"trial {arm.number} has been resumed already and waits for a slot")
        self._rule(arm, Verdict.CONTINUE, command)
        arm.decision = arm.ruling
        self._said_all_paused = False
        assert self.conductor is not None
        when = "" if self.conductor.free_slots > 0 else " when a slot is free, before newcomers"
        return f"goes on{when}, {_where(arm)}"

    def _stop(self, command: Command) -> str:
        arm = self._arm(command)
        pause = self._wishes.get(arm.number)
        if pause is not None:
            self._answer(pause.command, "refused", "a stop came before it took effect")
        self._wishes[arm.number] = Wish(Verdict.STOP, command)
        if not arm.has_slot:
            del self._wishes[arm.number]
            self._rule_stop(arm, command)
            arm.decision = arm.ruling
            return _stopped(arm)
        return ""

    def _rule(self, arm: Arm, verdict: Verdict, command: Command) -> None:
        """Decide; it is on disk before it takes effect, so that a search that is killed does not forget it."""
        done = {Verdict.PAUSE: "paused", Verdict.CONTINUE: "resumed", Verdict.STOP: "stopped"}[verdict]
        ruling = Decision(verdict, f"{done} by {command.source}", arm.record.standing)
        chunk = max(arm.judged, len(arm.record.values))
        if isinstance(arm.request, Boundary):
            report([arm])  # what is judged has been reported
        self._keep([(arm.number, chunk, str(verdict), ruling.reason)], by_hand=True)
        arm.judged, arm.ruling = chunk, ruling

    def _rule_stop(self, arm: Arm, command: Command, *, log: bool = True) -> None:
        self._rule(arm, Verdict.STOP, command)
        assert arm.ruling is not None
        if log:
            reason, numbers = arm.ruling.reason, dict(arm.ruling.numbers)
            arm.record.verdicts.append((len(arm.record.values), "stop", reason))
            self._tell("verdict", arm, verdict="stop", reason=reason, by="", numbers=numbers)

    def _fulfil(self, driven: list[Arm]) -> list[Arm]:
        """Pause and stop those that have got to a safe point."""
        assert self.conductor is not None
        ready = []
        for arm in list(driven):
            wish = self._wishes.get(arm.number)
            if wish is None:
                continue
            at_end = isinstance(arm.request, Boundary) and arm.request.chunk >= len(arm.record.boundaries)
            if arm.done or at_end:
                why = _ENDED.get(arm.record.state, "has ended") if arm.done else "has trained to its end"
                self._answer(wish.command, "refused", f"trial {arm.number} {why}")
            elif isinstance(arm.request, Boundary):  # the round's end logs it like any verdict
                if wish.verdict is Verdict.STOP:
                    self._rule_stop(arm, wish.command, log=False)
                    self._answer(wish.command, "applied", _stopped(arm))
                else:
                    self._rule(arm, Verdict.PAUSE, wish.command)
                    self._answer(wish.command, "applied", f"paused, {_where(arm)}")
            elif isinstance(arm.request, Pace):
                if wish.verdict is Verdict.STOP:
                    self._rule_stop(arm, wish.command)
                    arm.answer = arm.ruling
                    ready.append(arm)
                    self._answer(wish.command, "applied", _stopped(arm))
                else:
                    self._rule(arm, Verdict.PAUSE, wish.command)
                    arm.record.state = TrialState.PAUSED
                    self.conductor.take_slot(arm)
                    driven.remove(arm)
                    self._answer(wish.command, "applied", f"paused, {_where(arm)}")
            else:
                continue
            del self._wishes[arm.number]
        return ready

    def _rejoin(self, driven: list[Arm]) -> list[Arm]:
        """Who was without a slot and is to go on or to end needn't wait for the round's end."""
        assert self.conductor is not None
        ready = []
        for arm in self._arms:
            if arm.ruling is None or arm.has_slot or arm.done or arm in driven:
                continue
            if arm.ruling.verdict is Verdict.STOP:
                arm.answer, arm.decision = arm.ruling, None
            elif (
                arm.ruling.verdict is Verdict.CONTINUE
                and isinstance(arm.request, Pace)
                and self.conductor.free_slots > 0
            ):
                arm.answer = arm.decision = None
                self.conductor.give_slot(arm)
            else:
                continue
            driven.append(arm)
            ready.append(arm)
        driven.sort(key=lambda arm: arm.number)
        return ready

    # -- new trials --------------------------------------------------------------------------------------------------

    def _add(self, command: Command) -> str:
        known = {name: d for trial in self._trials().values() for name, d in trial.distributions.items()}
        params, notes = enqueueing.fit(command.arguments["set"], known, "the search", strict=bool(known))
        return self._enqueue(params, notes, {enqueueing.ADD_ATTR: True}, command)

    def _clone(self, command: Command) -> str:
        assert command.trial is not None
        trials = self._trials()
        if command.trial not in trials:
            raise Refused(f"trial {command.trial} {self._why_not_live(command.trial)}")
        source = trials[command.trial]
        if not source.params:
            raise Refused(f"trial {command.trial} has not begun: it has no configuration yet")
        who = f"trial {command.trial}"
        changes, notes = enqueueing.fit(command.arguments["set"], source.distributions, who, strict=True)
        warm = self._inheritance(command.trial, source, changes) if command.arguments["warm_start"] else None
        attributes = {enqueueing.CLONE_ATTR: command.trial, enqueueing.WARM_ATTR: warm is not None}
        if warm is not None and warm.optimizer is None:
            notes.append(f"trial {command.trial} has no optimizer state any more, the clone's begins empty")
        return self._enqueue({**source.params, **changes}, notes, attributes, command, warm)

    def _inheritance(
        self, number: int, source: optuna.trial.FrozenTrial, changes: Mapping[str, Any]
    ) -> warmstart.WarmStart:
        enqueueing.check_warm(number, source.params, changes)
        arm = self._live(number)
        if arm is not None:
            if arm.trainer is None or not arm.record.boundaries:
                raise Refused(f"trial {number} has not begun to train")
            return warmstart.take(number, arm.trainer)
        folder = source.user_attrs.get("rapidfire:adapter")
        if folder is None or not (Path(folder) / "adapter_model.safetensors").is_file():
            why = self._why_not_live(number)
            raise Refused(f"trial {number} {why} and its adapter was not saved. Clone it without warm start.")
        return warmstart.read(number, Path(folder))

    def _enqueue(
        self,
        params: Mapping[str, Any],
        notes: list[str],
        attributes: Mapping[str, Any],
        command: Command,
        warm: warmstart.WarmStart | None = None,
    ) -> str:
        assert self._study is not None and self._source is not None
        if why := self._source.over:
            raise Refused(f"no trial is started any more: {why}")
        trial, number = enqueueing.enqueue(self._study, params, attributes, command.id)
        if warm is not None:
            self._warm[number] = warm
        notes = [f"trial {number} is next in line for a slot", *notes]
        if isinstance(self._source, (Asking, Claims)):
            self._source.ask_for(trial)
        else:
            notes.append("it is one of `n_trials`, which study.optimize counts by itself")
        return "; ".join(notes)

    # -- the rest ----------------------------------------------------------------------------------------------------

    def _extend(self, command: Command) -> str:
        arm, more = self._arm(command), int(command.arguments["chunks"])
        ends, trainer = arm.record.boundaries, arm.trainer
        if trainer is None or not ends:
            raise Refused(f"trial {arm.number} has not begun to train")
        before = trainer.state.max_steps
        if trainer.state.global_step >= before:
            raise Refused(f"trial {arm.number} has trained to its end")
        length = ends[-1] - (ends[-2] if len(ends) > 1 else 0)
        if why := seams.why_no_longer(trainer, length * more):
            raise Refused(f"trial {arm.number} can't train longer: {why}")
        was = trainer.lr_scheduler.get_last_lr()[0]
        seams.lengthen(trainer, length * more)
        last = ends[-1]
        ends.extend(last + length * k for k in range(1, more + 1))
        now = trainer.lr_scheduler.get_last_lr()[0]
        return (
            f"{len(ends)} chunks, {trainer.state.max_steps} steps instead of {before}; "
            f"its learning rate follows a schedule of that length (now {was:.3g} -> {now:.3g})"
        )

    def _set_policy(self, command: Command) -> str:
        assert self._study is not None
        name, arguments = command.arguments["name"], command.arguments["arguments"]
        pruner: optuna.pruners.BasePruner
        if name is None:
            pruner = optuna.pruners.NopPruner()
        elif isinstance(name, optuna.pruners.BasePruner):
            pruner = name
        else:
            try:
                if isinstance(name, Policy):
                    policy = name
                elif self._known[command.id].foreign:
                    policy = policy_from_outside(name, self._allowed, arguments)
                else:
                    policy = policy_from_name(name, **arguments)
                pruner = PolicyPruner(policy, chunks=self._chunks)
            except ValueError as error:
                raise Refused(str(error)) from error
        before, self._study.pruner = self._study.pruner, pruner
        said = [getattr(one, "policy", type(one).__name__) for one in (pruner, before)]
        return f"from the next round on {said[0]} judges instead of {said[1]}"

    def _end_search(self, command: Command) -> str:
        self._cancel()
        return "the search ends now; what has finished stays"


def classes_of(pruner: optuna.pruners.BasePruner) -> frozenset[type]:
    """The classes of a pruner's policy and of those it wraps."""
    found: set[type] = set()
    policy = getattr(pruner, "policy", None)
    while isinstance(policy, Policy):
        found.add(type(policy))
        policy = getattr(policy, "policy", None)
    return frozenset(found)


def _where(arm: Arm) -> str:
    ends, done = arm.record.boundaries, len(arm.record.values)
    if isinstance(arm.request, Boundary):
        return f"at the end of chunk {arm.request.chunk} of {len(ends)}"
    return f"at step {arm.step} of {ends[-1]}, in chunk {done + 1} of {len(ends)}" if ends else "before its first step"


def _stopped(arm: Arm) -> str:
    values = arm.record.values
    return f"stopped, {_where(arm)}; " + (f"its value is {values[-1]:.4g}" if values else "it has reported no value")
