"""How commands reach a search: through memory, the run folder, or the Optuna study. Torch-free.

A mailbox has two ends. Whoever steers calls `send`; the search calls `open`, then `take` between its turns, `answer`,
and `close`. What was answered stays answered: a command is applied once, also over restarts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rapidfire_automl.control import LARGEST_BYTES, Command, ControlError, Effect, Sent
from rapidfire_automl.jsonable import dumps
from rapidfire_automl.workers import CANCELLED_ATTR

if TYPE_CHECKING:
    import optuna

_log = logging.getLogger("rapidfire_automl")
COMMAND_ATTR, ANSWER_ATTR, ATTEMPT_ATTR = "rapidfire:command:", "rapidfire:answer:", "rapidfire:attempt"


class Mailbox(Protocol):
    """What a search needs of a source of commands."""

    @property
    def foreign(self) -> bool:
        """Whether others than this process can send."""

    def open(self) -> None:
        """Begin an attempt: commands to earlier ones that were not answered are stale."""

    def take(self) -> list[Command]:
        """Commands that have come since, in the order they were made; cheap."""

    def answer(self, command: Command, effect: Effect) -> None:
        """Say what came of one."""

    def close(self, reason: str) -> None:
        """No command will be taken any more."""


class MemoryMailbox:
    """Commands from the search's own process; any thread may send."""

    foreign = False

    def __init__(self) -> None:
        self._waiting: deque[Command] = deque()
        self._known: set[str] = set()
        self._effects: dict[str, Effect] = {}
        self._news = threading.Condition()
        self._closed = "no search runs"

    def send(self, command: Command) -> Sent:
        """Send a command.

        Raises:
            ControlError: No search runs.
        """
        with self._news:
            if self._closed:
                raise ControlError(f"`{command.verb}` steers a search that runs: {self._closed}.")
            if command.id not in self._known:
                self._known.add(command.id)
                self._waiting.append(command)
                self._news.notify_all()
        return Sent(command, lambda timeout_s: self._look(command.id, timeout_s))

    def _look(self, name: str, timeout_s: float) -> Effect | None:
        with self._news:
            self._news.wait_for(lambda: name in self._effects, timeout_s)
            return self._effects.get(name)

    def open(self) -> None:
        """Take commands from now on."""
        with self._news:
            self._closed = ""

    def take(self) -> list[Command]:
        """What has been sent."""
        if not self._waiting:
            return []
        with self._news:
            taken = list(self._waiting)
            self._waiting.clear()
            return taken

    def wait(self, timeout_s: float) -> None:
        """Wait until something has been sent, at most so long."""
        with self._news:
            self._news.wait_for(lambda: bool(self._waiting), timeout_s)

    def answer(self, command: Command, effect: Effect) -> None:
        """Wake whoever waits for it."""
        with self._news:
            self._effects.setdefault(command.id, effect)
            self._news.notify_all()

    def close(self, reason: str) -> None:
        """Refuse what comes."""
        with self._news:
            self._closed = reason
            waiting, self._waiting = list(self._waiting), deque()
        for command in waiting:
            self.answer(command, Effect("refused", reason))


class FolderMailbox:
    """`<run folder>/commands/<id>.json` a command, `answers/<id>.json` beside them, and who listens in `attempt.json`.

    Files appear whole: they are written under another name and linked, which fails where the name is taken.

    Args:
        run_dir: The run folder.
        every_s: Between two looks at the folder's time stamp.
        clock: Seconds that only grow.

    Raises:
        ControlError: There is no such folder.
    """

    foreign = True

    def __init__(
        self, run_dir: str | os.PathLike[str], *, every_s: float = 0.2, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.run_dir = Path(run_dir)
        if not self.run_dir.is_dir():
            raise ControlError(f"There is no run folder {self.run_dir}.")
        self._folder = self.run_dir / "commands"
        self._answers = self._folder / "answers"
        self._every_s, self._clock = every_s, clock
        self._attempt = 0
        self._looked_s = -every_s
        self._stamp = -1
        self._seen: set[str] = set()

    # -- whoever steers ----------------------------------------------------------------------------------------------

    def send(self, command: Command) -> Sent:
        """Put a command there for the search that runs, or for the next one if none ever did.

        Raises:
            ControlError: The search has ended or was killed.
        """
        listens = self.listener()
        if listens is not None:
            if listens.get("ended"):
                raise ControlError(f"The search in {self.run_dir} runs no more: {listens['ended']}.")
            if _is_gone(listens):
                raise ControlError(
                    f"The search in {self.run_dir} runs no more: its process {listens['pid']} is gone. Resume it first."
                )
            command = replace(command, attempt=listens.get("attempt"))
        text = command.to_json()
        self._answers.mkdir(parents=True, exist_ok=True)
        _write(self._folder / f"{command.id}.json", text)
        return Sent(command, lambda timeout_s: self._look(command.id, timeout_s))

    def _look(self, name: str, timeout_s: float) -> Effect | None:
        until = time.monotonic() + timeout_s
        while (found := self._answered(name)) is None and time.monotonic() < until:
            time.sleep(0.05)
        return found

    def _answered(self, name: str) -> Effect | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads((self._answers / f"{name}.json").read_text(encoding="utf-8"))
            return Effect(told["effect"]["state"], told["effect"]["text"], told["effect"]["when_s"])
        return None

    def listener(self) -> dict[str, Any] | None:
        """Which attempt of the search listens, or did last; None if none ever did."""
        with contextlib.suppress(OSError, ValueError):
            told = json.loads((self._folder / "attempt.json").read_text(encoding="utf-8"))
            if isinstance(told, dict):
                return told
        return None

    # -- the search --------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Begin an attempt."""
        self._answers.mkdir(parents=True, exist_ok=True)
        last = (self.listener() or {}).get("attempt")
        self._attempt = (last if isinstance(last, int) else 0) + 1
        self._say_who(ended=None)

    def take(self) -> list[Command]:
        """What has come; at most one stat every `every_s`."""
        now = self._clock()
        if now - self._looked_s < self._every_s:
            return []
        self._looked_s = now
        try:
            stamp = self._folder.stat().st_mtime_ns
        except OSError:
            return []
        if stamp == self._stamp:
            return []
        # A file that comes in the same tick of the file system's clock would not change the stamp again.
        self._stamp = stamp if abs(time.time_ns() - stamp) > 2_000_000_000 else -1
        return self._list()

    def _list(self) -> list[Command]:
        found = []
        for path in sorted(self._folder.glob("*.json")):
            name = path.stem
            if name in self._seen or name == "attempt":
                continue
            self._seen.add(name)
            if self._answered(name) is not None:
                continue
            try:
                if path.is_symlink() or path.stat().st_size > LARGEST_BYTES:
                    raise ControlError("it is no plain small file")
                command = Command.from_json(path.read_bytes())
                if command.id != name:
                    raise ControlError(f"its id is {command.id}")
            except (ControlError, OSError, TypeError) as error:
                _log.warning("%s is no command and is ignored: %s", path, error)
                continue
            if command.attempt is not None and command.attempt < self._attempt:
                self.answer(command, _stale(command.attempt, self._attempt))
                continue
            found.append(command)
        return found

    def answer(self, command: Command, effect: Effect) -> None:
        """Write it down; a disk that is full costs the answer, not the search."""
        told = {
            "id": command.id,
            "command": command.describe(),
            "source": command.source,
            "sent_s": command.when_s,
            "attempt": self._attempt,
            "effect": effect,
        }
        try:
            _write(self._answers / f"{command.id}.json", dumps(told))
        except (OSError, ControlError) as error:
            _log.warning("The answer to %s cannot be written: %s", command.describe(), error)

    def close(self, reason: str) -> None:
        """Answer what has come in the last moment, and say that nobody listens any more."""
        for command in self._list():
            self.answer(command, Effect("refused", reason))
        self._say_who(ended=reason)

    def _say_who(self, ended: str | None) -> None:
        told = {"attempt": self._attempt, "pid": os.getpid(), "host": socket.gethostname(), "ended": ended}
        partial = self._folder / f".attempt-{os.getpid()}.partial"
        try:
            partial.write_text(json.dumps(told), encoding="utf-8")
            partial.replace(self._folder / "attempt.json")
        except OSError as error:
            _log.warning("Commands may not find this search: %s", error)


class StudyMailbox:
    """Commands as user attributes of an Optuna study, for a search without a run folder, or on another machine.

    Args:
        study: The study; in a storage that both ends reach.
        every_s: Between two looks.
        clock: Seconds that only grow.
        shared: Whether several workers take commands from here, each what concerns its own trials. Then one that joins
            makes no command stale and one that leaves ends nothing, and all take a change of policy.
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
        self._attempt = 0
        self._seen: set[str] = set()

    def send(self, command: Command) -> Sent:
        """Put a command there.

        Raises:
            ControlError: The search has ended.
        """
        told = self._study.user_attrs.get(ATTEMPT_ATTR)
        if isinstance(told, Mapping):
            if told.get("ended"):
                raise ControlError(f"The search of study {self._study.study_name} runs no more: {told['ended']}.")
            command = replace(command, attempt=told.get("attempt"))
        if COMMAND_ATTR + command.id not in self._study.user_attrs:
            self._study.set_user_attr(COMMAND_ATTR + command.id, command.to_json())
        return Sent(command, lambda timeout_s: self._look(command.id, timeout_s))

    def _look(self, name: str, timeout_s: float) -> Effect | None:
        until = time.monotonic() + timeout_s
        while True:
            told = self._study.user_attrs.get(ANSWER_ATTR + name)
            if isinstance(told, Mapping):
                return Effect(told["effect"]["state"], told["effect"]["text"], told["effect"]["when_s"])
            if time.monotonic() >= until:
                return None
            time.sleep(0.1)

    def open(self) -> None:
        """Begin an attempt."""
        last = self._study.user_attrs.get(ATTEMPT_ATTR)
        self._attempt = last["attempt"] if isinstance(last, Mapping) else 0
        if not self._shared or last is None or last.get("ended"):
            self._attempt += 1
        self._study.set_user_attr(ATTEMPT_ATTR, {"attempt": self._attempt, "ended": None})

    def take(self) -> list[Command]:
        """What has come; a storage that is away for a while costs time, not the search."""
        now = self._clock()
        if now - self._looked_s < self._every_s:
            return []
        self._looked_s = now
        try:
            attributes = self._study.user_attrs
        except Exception as error:  # every storage has its own kinds of errors
            _log.warning("The study cannot be asked for commands: %s", error)
            return []
        return self._list(attributes)

    def _list(self, attributes: Mapping[str, Any]) -> list[Command]:
        found = []
        for key in sorted(key for key in attributes if key.startswith(COMMAND_ATTR)):
            name = key.removeprefix(COMMAND_ATTR)
            answered = ANSWER_ATTR + name in attributes
            if name in self._seen or (answered and not self._shared):
                continue
            self._seen.add(name)
            try:
                command = Command.from_json(attributes[key])
                if command.id != name:
                    raise ControlError(f"its id is {command.id}")
                if answered and command.verb != "set-policy":
                    continue
            except (ControlError, TypeError) as error:
                _log.warning("The study's attribute %s is no command and is ignored: %s", key, error)
                continue
            if command.attempt is not None and command.attempt < self._attempt:
                self.answer(command, _stale(command.attempt, self._attempt))
                continue
            found.append(command)
        return found

    def answer(self, command: Command, effect: Effect) -> None:
        """Write it down in the study."""
        told = {
            "command": command.describe(),
            "source": command.source,
            "sent_s": command.when_s,
            "attempt": self._attempt,
            "effect": {"state": effect.state, "text": effect.text, "when_s": effect.when_s},
        }
        try:
            self._study.set_user_attr(ANSWER_ATTR + command.id, told)
        except Exception as error:  # every storage has its own kinds of errors
            _log.warning("The answer to %s cannot be kept: %s", command.describe(), error)

    def close(self, reason: str) -> None:
        """Answer what has come in the last moment, and say that nobody listens any more."""
        try:
            if self._shared and self._others_go_on():
                return
            for command in self._list(self._study.user_attrs):
                self.answer(command, Effect("refused", reason))
            self._study.set_user_attr(ATTEMPT_ATTR, {"attempt": self._attempt, "ended": reason})
        except Exception as error:  # every storage has its own kinds of errors
            _log.warning("The study cannot be told that its search has ended: %s", error)

    def _others_go_on(self) -> bool:
        """Whether the search is neither over nor cancelled, so that a worker is there to take commands, or will be."""
        live = [trial for trial in self._study.get_trials(deepcopy=False) if not trial.state.is_finished()]
        return bool(live) and not self._study.user_attrs.get(CANCELLED_ATTR)


def _stale(sent_to: int, now: int) -> Effect:
    return Effect(
        "refused", f"stale: it was sent to attempt {sent_to} of this search, this is attempt {now}; send it again"
    )


def _is_gone(listens: Mapping[str, Any]) -> bool:
    """Whether the process that listened was on this machine and is no more."""
    pid = listens.get("pid")
    if os.name != "posix" or listens.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _write(path: Path, text: str) -> None:
    """Write a file whole, under a name that nobody has; one that is there already stays as it is."""
    partial = path.with_name(f".{path.stem}-{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
