"""Commands through an Optuna study."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rapidfire_automl.control import Command, ControlError, Effect, Sent
from rapidfire_automl.errors_of_storages import reason_of
from rapidfire_automl.patience import StorageAway
from rapidfire_automl.workers import CANCELLED_ATTR

if TYPE_CHECKING:
    import optuna

Heard = Callable[[Command, Effect], None]
"""Is told what somebody else's answer to a command was."""

_log = logging.getLogger("rapidfire_automl")
COMMAND_ATTR, ANSWER_ATTR, ATTEMPT_ATTR = "rapidfire:command:", "rapidfire:answer:", "rapidfire:attempt"


class StudyMailbox:
    """Commands as user attributes of an Optuna study, for a search without a run folder, or on another machine.

    Args:
        study: The study; in a storage that both ends reach.
        every_s: Between two looks.
        clock: Seconds that only grow.
        shared: Whether several workers take commands from here, each what concerns its own trials, and `leave` the
            rest. Then one that joins makes no command stale and one that leaves ends nothing, all take a change of
            policy, and the first answer stays.
    """

    foreign = True

    def __init__(
        self,
        study: optuna.Study,
        *,
        every_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        shared: bool = False,
    ) -> None:
        self._study = study
        self._shared = shared
        self._every_s, self._clock = every_s, clock
        self._looked_s = -every_s
        self.attempt = 0
        self._seen: set[str] = set()
        self._left: dict[str, tuple[Command, Heard]] = {}
        self._is_away = False

    def send(self, command: Command) -> Sent:
        """Put a command there.

        Raises:
            ControlError: The search has ended, or the study can't be written to.
        """
        told = self._study.user_attrs.get(ATTEMPT_ATTR)
        if isinstance(told, Mapping):
            if told.get("ended"):
                raise ControlError(f"The search of study {self._study.study_name} runs no more: {told['ended']}.")
            command = replace(command, attempt=told.get("attempt"))
        text = command.to_json()
        if COMMAND_ATTR + command.id not in self._study.user_attrs:
            try:
                self._study.set_user_attr(COMMAND_ATTR + command.id, text)
            except StorageAway:
                raise
            except Exception as error:  # every storage has its own kinds of errors
                where = f"study {self._study.study_name}"
                raise ControlError(f"No command can be written to {where}: {reason_of(error)}.") from None
        return Sent(command, lambda timeout_s: self._look(command.id, timeout_s))

    def _look(self, name: str, timeout_s: float) -> Effect | None:
        until = time.monotonic() + timeout_s
        while True:
            effect = _effect_of(self._study.user_attrs.get(ANSWER_ATTR + name))
            if effect is not None:
                return effect
            if time.monotonic() >= until:
                return None
            time.sleep(0.1)

    def open(self) -> None:
        """Begin an attempt."""
        last = self._study.user_attrs.get(ATTEMPT_ATTR)
        self.attempt = last["attempt"] if isinstance(last, Mapping) else 0
        if not self._shared or last is None or last.get("ended"):
            self.attempt += 1
        self._study.set_user_attr(ATTEMPT_ATTR, {"attempt": self.attempt, "ended": None})

    def take(self) -> list[Command]:
        """What has come; a storage that is away for a while costs time, not the search."""
        now = self._clock()
        if now - self._looked_s < self._every_s:
            return []
        self._looked_s = now
        try:
            attributes = self._study.user_attrs
        except Exception as error:  # every storage has its own kinds of errors
            if not self._is_away:
                _log.warning("The study cannot be asked for commands: %s", error)
            self._is_away = True
            return []
        self._is_away = False
        return self._list(attributes)

    def _list(self, attributes: Mapping[str, Any]) -> list[Command]:
        found = []
        for key in sorted(key for key in attributes if key.startswith(COMMAND_ATTR)):
            name = key.removeprefix(COMMAND_ATTR)
            answered = ANSWER_ATTR + name in attributes
            if answered:
                self._hear(name, _effect_of(attributes[ANSWER_ATTR + name]))
            if name in self._seen or (answered and not self._shared):
                continue
            self._seen.add(name)
            try:
                command = Command.from_json(attributes[key])
                if command.id != name:
                    raise ControlError(f"its id is {command.id}")
                if answered and command.verb not in ("set-policy", "checkpoint"):
                    continue
            except Exception as error:  # whatever somebody has put there, the search goes on
                if not answered:
                    _log.warning("The study's attribute %s is no command: %s", key, error)
                    refused = Effect("refused", f"it is no command: {error}")
                    self._say(name, {"effect": asdict(refused)})
                continue
            found.append(command)
        return found

    def leave(self, command: Command, heard: Heard) -> None:
        """Leave a command to the worker that has its trial, or takes it over.

        It is taken again here, at every look, until somebody has answered it.

        Args:
            command: Taken from here, or come by another way: then it is put here.
            heard: Called at the look that finds an answer.

        Raises:
            ControlError: It can't be put here.
        """
        if command.id not in self._seen:
            self.send(command)
        self._seen.discard(command.id)
        self._left[command.id] = (command, heard)

    def _hear(self, name: str, effect: Effect | None) -> None:
        if name in self._left and effect is not None:
            command, heard = self._left.pop(name)
            heard(command, effect)

    def answer(self, command: Command, effect: Effect) -> None:
        """Write it down in the study."""
        told = {
            "command": command.describe(),
            "source": command.source,
            "sent_s": command.when_s,
            "effect": asdict(effect),
        }
        self._say(command.id, told)
        self._hear(command.id, effect)

    def _say(self, name: str, told: Mapping[str, Any]) -> None:
        study, key, answer = self._study, ANSWER_ATTR + name, {**told, "attempt": self.attempt}
        try:
            settle = getattr(study._storage, "settle_study_user_attr", None) if self._shared else None
            if settle is not None:
                settle(study._study_id, key, answer)
            elif not (self._shared and key in study.user_attrs):
                study.set_user_attr(key, answer)
        except Exception as error:  # every storage has its own kinds of errors
            _log.warning("The answer to command %s cannot be kept: %s", name, error)

    def close(self, reason: str) -> None:
        """Answer what has come in the last moment, and say that nobody listens any more."""
        try:
            waiting = self._list(self._study.user_attrs)
            if self._shared and self._others_go_on():
                return
            for command in waiting:
                self.answer(command, Effect("refused", reason))
            self._study.set_user_attr(ATTEMPT_ATTR, {"attempt": self.attempt, "ended": reason})
        except Exception as error:  # every storage has its own kinds of errors
            _log.warning("The study cannot be told that its search has ended: %s", error)

    def _others_go_on(self) -> bool:
        """Whether the search is neither over nor cancelled, so that a worker is there to take commands, or will be."""
        live = [trial for trial in self._study.get_trials(deepcopy=False) if not trial.state.is_finished()]
        return bool(live) and not self._study.user_attrs.get(CANCELLED_ATTR)


def _effect_of(told: Any) -> Effect | None:
    """What an answer says, or None if it is none."""
    with contextlib.suppress(KeyError, TypeError):
        return Effect(told["effect"]["state"], told["effect"]["text"], told["effect"]["when_s"])
    return None
