"""Commands are taken and applied here, in the conductor's thread; what each race comes to is in `control.py`.

`rulings.py` pauses, resumes and stops; `newcomers.py` adds and clones; `extending.py` extends; what they do is on disk
first (`keeping.py`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages import InMemoryStorage

from rapidfire_automl.control import OWN_SOURCE, Command, ControlError, Effect, Sent
from rapidfire_automl.events import warn
from rapidfire_automl.executor import extending, warmstart
from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.executor.keeping import Keeping
from rapidfire_automl.executor.newcomers import Newcomers
from rapidfire_automl.executor.rulings import Rulings
from rapidfire_automl.executor.sources import Arrivals, Asking, Claims
from rapidfire_automl.executor.standing import Elsewhere, NotYet, Refused, Standing
from rapidfire_automl.mailboxes import Mailbox, MemoryMailbox, StudyMailbox
from rapidfire_automl.pruners import PolicyPruner, name_of_policy, policy_from_name, policy_from_outside
from rapidfire_automl.records import TrialRecord
from rapidfire_automl.steering import sender
from rapidfire_policies.base import Policy

if TYPE_CHECKING:
    from rapidfire_automl.executor.conductor import Conductor

logger = logging.getLogger("rapidfire_automl")


@dataclass(slots=True)
class _Known:
    """A command that has come: from where, what it came to, and whether it is to be done when it is taken next."""

    boxes: list[Mailbox] = field(default_factory=list)
    effect: Effect | None = None
    is_due: bool = True


class Commands:
    """Takes commands from mailboxes and applies them.

    Args:
        records: Of all trials, by number.
        chunks: Of a whole trial.
        tell: Emits an event (kind, arm or None, data).
        cancel: Ends the search.
    """

    def __init__(
        self,
        records: Mapping[int, TrialRecord],
        chunks: int,
        tell: Callable[..., None],
        cancel: Callable[[], None],
    ) -> None:
        self._chunks = chunks
        self._tell = tell
        self._cancel = cancel
        self._memory = MemoryMailbox()
        self._more: list[Mailbox] = []
        self._boxes: tuple[Mailbox, ...] = ()
        self._shared: StudyMailbox | None = None
        self._early: list[Command] = []
        self._known: dict[str, _Known] = {}
        self._before: Mapping[str, str] = {}
        self._allowed: frozenset[type] = frozenset()
        self._study: optuna.Study | None = None
        self._said_all_paused = False
        self._keeping = Keeping(None)
        self._standing = Standing(records)
        self._rulings = Rulings(self._standing, self._answer, self._leave, tell)
        self._newcomers = Newcomers(self._standing)

    # -- from any thread ---------------------------------------------------------------------------------------------

    def send(self, command: Command) -> Sent:
        """Take a command from this process."""
        return self._memory.send(command)

    def add_mailbox(self, mailbox: Mailbox) -> None:
        """Listen to one more, in the next search."""
        self._more.append(mailbox)

    def warm_start(self, arm: Arm) -> warmstart.WarmStart | None:
        """What a clone begins with; called in its thread.

        Raises:
            ValueError: It is no longer there.
        """
        return self._newcomers.warm_start(arm)

    # -- beginning and ending ----------------------------------------------------------------------------------------

    def attach(self, conductor: Conductor) -> None:
        """Steer what it conducts."""
        self._standing.conductor = conductor

    def detach(self) -> None:
        """Let go of what has been conducted."""
        self._standing.conductor = self._standing.source = None

    def begin(self, study: optuna.Study, source: Asking | Arrivals | Claims, keeping: Keeping) -> None:
        """A search begins, or goes on.

        Args:
            study: Its study; judged from here on by the policy that a person has set before.
            source: Asked for the trials that people add.
            keeping: Keeps what commands do.
        """
        self._study = self._standing.study = study
        self._standing.source = source
        self._keeping = self._rulings.keeping = self._newcomers.keeping = keeping
        self._before = keeping.applied_before(study)
        self._allowed = classes_of(study.pruner)
        self._set_policy_again()
        for box in self._boxes[1:]:
            box.close("another study is searched now")
        boxes: list[Mailbox] = [self._memory, *self._more]
        self._more = []
        self._shared = StudyMailbox(study, shared=True) if isinstance(source, Claims) else None
        if self._shared is not None:
            boxes.append(self._shared)
        elif not isinstance(getattr(study, "_storage", None), InMemoryStorage):
            boxes.append(StudyMailbox(study))
        for box in boxes:
            try:
                box.open()
            except Exception as error:  # a search that can't be steered is still a search
                logger.warning("The search can't be steered from outside: %s", error)
        self._boxes = tuple(boxes)

    def end(self, reason: str, *, cancelled: bool = False) -> None:
        """The search is over, or others go on with it: whatever waits is refused, or left to them."""
        waiting = [*self._rulings.end(), *self._early]
        self._early = []
        for command in waiting:
            if self._shared is not None and not cancelled:
                self._leave(command)
            else:
                self._answer(command, "refused", reason)
        for box in self._boxes:
            box.close(reason)
        self._boxes = ()
        self._newcomers.end()

    # -- the conductor's thread --------------------------------------------------------------------------------------

    def turn(self, driven: list[Arm]) -> list[Arm]:
        """Take what has come and apply what can be.

        Args:
            driven: The arms of the round that runs, empty between rounds; who is paused leaves it, who resumes joins.

        Returns:
            Those among them that have got an answer by that.
        """
        self.listen()
        ready = self._rulings.fulfil(driven) if self._standing.wishes and driven else []
        return ready + self._rulings.rejoin(driven) if driven else ready

    def listen(self, rolling: Sequence[Arm] = ()) -> list[Arm]:
        """Take what has come, where the conductor is busy for long: what needs a safe point waits for `turn`.

        Args:
            rolling: Arms in the middle of a rollout.

        Returns:
            Those among them that are stopped there, answered.
        """
        early, self._early = self._early, []
        for command in early:
            self._apply(command)
        for box in self._boxes:
            if taken := box.take():
                self._standing.look_again()
            for command in taken:
                self._receive(box, command)
        return self._rulings.leaving(rolling) if self._standing.wishes and rolling else []

    def wait(self, paused: Sequence[Arm]) -> None:
        """Nothing can go on: wait a moment for a command.

        Args:
            paused: By hand, where that is all that is left of the search.
        """
        if paused and not self._said_all_paused:
            self._said_all_paused = True
            numbers = ", ".join(str(arm.number) for arm in paused)
            message = f"All that is left was paused by hand ({numbers}); the search waits for resume, stop or cancel."
            warn(self._tell, message)
        self._memory.wait(0.1)

    def _receive(self, box: Mailbox, command: Command) -> None:
        known = self._known.setdefault(command.id, _Known())
        if known.effect is not None:  # it has come by another way, too: one effect, and each way has its answer
            box.answer(command, known.effect)
            return
        if box not in known.boxes:
            known.boxes.append(box)
        if not known.is_due:
            return
        known.is_due = False
        if command.id in self._before:
            self._answer(command, "applied", f"{self._before[command.id]} (before the search was resumed)")
            return
        if command.attempt is not None and command.attempt < box.attempt:
            sent, now = command.attempt, box.attempt
            text = f"stale: it was sent to attempt {sent} of this search, this is attempt {now}; send it again"
            self._answer(command, "refused", text)
            return
        self._apply(command)

    def _apply(self, command: Command) -> None:
        verbs: dict[str, Callable[[Command], str]] = {
            "pause": self._rulings.pause,
            "resume": self._rulings.resume,
            "stop": self._rulings.stop,
            "clone": self._newcomers.clone,
            "add": self._newcomers.add,
            "extend": lambda command: extending.extend(self._standing.arm(command), command, self._keeping),
            "set-policy": self._set_policy,
            "checkpoint": self._checkpoint,
            "cancel": self._end_search,
        }
        try:
            if (before := self._standing.applied_elsewhere(command)) is not None:
                text = f"{before} (by another worker)"
            else:
                text = verbs[command.verb](command)
        except Elsewhere:
            self._leave(command)
        except NotYet:
            self._early.append(command)
        except (Refused, ControlError) as refused:
            self._answer(command, "refused", str(refused))
        except Exception as error:  # a command must not end the search
            logger.exception("%s failed; the search goes on.", command.describe())
            self._answer(command, "refused", f"{type(error).__name__}: {error}")
        else:
            if text:
                self._answer(command, "applied", text)
            self._said_all_paused = self._said_all_paused and command.verb != "resume"

    def _leave(self, command: Command) -> None:
        """Leave it to the worker that has its trial, or takes it over; all workers take commands from the study."""
        known = self._known[command.id]
        if self._shared is None:
            if not any(box.foreign for box in known.boxes):
                name = "" if self._study is None else self._study.study_name
                reach = f"Search(study={name!r}, storage=...) reaches it"
                self._answer(command, "refused", f"trial {command.trial} trains in another process: {reach}")
            return
        own = command.source == OWN_SOURCE
        try:
            self._shared.leave(replace(command, source=sender(OWN_SOURCE)) if own else command, self._heard)
        except Exception as error:
            self._answer(command, "refused", f"it can't be left to trial {command.trial}'s worker: {error}")
            return
        known.is_due = True
        if self._shared not in known.boxes:
            known.boxes.append(self._shared)

    def _heard(self, command: Command, effect: Effect) -> None:
        """What another worker has answered, whichever way the command came."""
        known = self._known[command.id]
        known.effect = effect
        for box in known.boxes:
            if box is not self._shared:
                box.answer(command, effect)

    def _answer(self, command: Command, state: Any, text: str) -> None:
        known = self._known[command.id]
        known.effect = Effect(state, text)
        logger.info("%s (%s): %s: %s", command.describe(), command.source, state, text)
        data = {"id": command.id, "verb": command.verb, "source": command.source, "sent_s": command.when_s}
        arguments = {name: value for name, value in command.arguments.items() if value not in ({}, False)}
        arm = None if command.trial is None else self._standing.live(command.trial)
        self._tell("command", arm, of=command.trial, arguments=arguments, effect=state, text=text, **data)
        for box in known.boxes:
            box.answer(command, known.effect)

    # -- about the whole search --------------------------------------------------------------------------------------

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
                elif self._known[command.id].boxes[0].foreign:
                    policy = policy_from_outside(name, self._allowed, arguments)
                else:
                    policy = policy_from_name(name, **arguments)
                pruner = PolicyPruner(policy, chunks=self._chunks)
            except ValueError as error:
                raise Refused(str(error)) from error
        said = [getattr(one, "policy", type(one).__name__) for one in (pruner, self._study.pruner)]
        text = f"from the next round on {said[0]} judges instead of {said[1]}"
        if name is None or isinstance(name, str):
            self._keeping.policy(name, arguments, command, text)
        elif (named := _named(pruner)) is not None:
            self._keeping.policy(*named, command, text)
        else:
            text += "; a search that is killed and goes on forgets it, since it has no name"
        self._study.pruner = pruner
        return text

    def _set_policy_again(self) -> None:
        """Have the policy judge that a person has set before the search was killed."""
        before = self._keeping.policy_before()
        if before is None:
            return
        assert self._study is not None
        name, arguments = before
        try:
            self._study.pruner = (
                optuna.pruners.NopPruner()
                if name is None
                else PolicyPruner(policy_from_outside(name, self._allowed, arguments), chunks=self._chunks)
            )
        except ValueError as error:
            message = f"The policy that was set by hand can't be set again, the search's own judges: {error}"
            warn(self._tell, message)

    def _checkpoint(self, command: Command) -> str:
        if not self._keeping.is_on:
            raise Refused("this search keeps no checkpoints: it needs an output folder and a study that is stored")
        arms = [arm for arm in self._standing.arms if arm.has_slot and not arm.done]
        for arm in arms:
            arm.save_due = True
        if not arms:
            return "no trial trains: all are on disk as of their last chunk"
        numbers = ", ".join(str(arm.number) for arm in arms)
        return f"on disk at the end of their step: {numbers}; others are as of their last chunk"

    def _end_search(self, command: Command) -> str:
        self._cancel()
        return "the search ends now; what has finished stays, and so do the adapters of trials under way"


def classes_of(pruner: optuna.pruners.BasePruner) -> frozenset[type]:
    """The classes of a pruner's policy and of those it wraps."""
    found: set[type] = set()
    policy = getattr(pruner, "policy", None)
    while isinstance(policy, Policy):
        found.add(type(policy))
        policy = getattr(policy, "policy", None)
    return frozenset(found)


def _named(pruner: optuna.pruners.BasePruner) -> tuple[str, Mapping[str, Any]] | None:
    """Name and arguments that make a pruner's policy again, as JSON has them; None if there are none."""
    policy = getattr(pruner, "policy", None)
    if type(pruner) is not PolicyPruner or policy is None:
        return None
    try:
        name, arguments = name_of_policy(policy)
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError):
        return None
    return name, arguments
