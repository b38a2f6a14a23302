"""Commands through the run folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rapidfire_automl.control import LARGEST_BYTES, Command, ControlError, Effect, Sent
from rapidfire_automl.disk import write_once
from rapidfire_automl.jsonable import dumps

_log = logging.getLogger("rapidfire_automl")


class FolderMailbox:
    """`<run folder>/commands/<id>.json` a command, `answers/<id>.json` beside them, and who listens in `attempt.json`.

    Files appear whole: they are written under another name and linked, which fails where the name is taken. The folder
    is made for its owner alone (mode 0700).

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
        self.attempt = 0
        self._looked_s = -every_s
        self._stamp = -1
        self._seen: set[str] = set()

    # -- whoever steers ----------------------------------------------------------------------------------------------

    def send(self, command: Command) -> Sent:
        """Put a command there for the search that runs, or for the next one if none ever did.

        Raises:
            ControlError: The search has ended or was killed, or the folder can't be written to.
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
        try:
            self._make()
            write_once(self._folder / f"{command.id}.json", text)
        except OSError as error:
            raise ControlError(f"No command can be written to {self.run_dir}: {error.strerror}.") from None
        return Sent(command, lambda timeout_s: self._look(command.id, timeout_s))

    def _make(self) -> None:
        for folder in (self._folder, self._answers):
            folder.mkdir(mode=0o700, exist_ok=True)

    def _look(self, name: str, timeout_s: float) -> Effect | None:
        until = time.monotonic() + timeout_s
        while (found := self._answered(name)) is None and time.monotonic() < until:
            time.sleep(0.05)
        return found

    def _answered(self, name: str) -> Effect | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            told = json.loads((self._answers / f"{name}.json").read_text(encoding="utf-8"))
            return Effect(told["effect"]["state"], told["effect"]["text"], told["effect"]["when_s"])
        return None

    def listener(self) -> dict[str, Any] | None:
        """Which attempt of the search listens, or did last; None if none ever did."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            told = json.loads((self._folder / "attempt.json").read_text(encoding="utf-8"))
            if isinstance(told, dict):
                return told
        return None

    # -- the search --------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Begin an attempt."""
        self._make()
        last = (self.listener() or {}).get("attempt")
        self.attempt = (last if isinstance(last, int) else 0) + 1
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
            except Exception as error:  # whatever somebody has put there, the search goes on
                _log.warning("%s is no command: %s", path, error)
                self._say(name, {"effect": Effect("refused", f"it is no command: {error}")})
                continue
            found.append(command)
        return found

    def answer(self, command: Command, effect: Effect) -> None:
        """Write it down; a disk that is full costs the answer, not the search."""
        told = {
            "command": command.describe(),
            "source": command.source,
            "sent_s": command.when_s,
            "effect": effect,
        }
        self._say(command.id, told)

    def _say(self, name: str, told: Mapping[str, Any]) -> None:
        try:
            write_once(self._answers / f"{name}.json", dumps({"id": name, **told, "attempt": self.attempt}))
        except (OSError, ControlError) as error:
            _log.warning("The answer to command %s cannot be written: %s", name, error)

    def close(self, reason: str) -> None:
        """Answer what has come in the last moment, and say that nobody listens any more."""
        for command in self._list():
            self.answer(command, Effect("refused", reason))
        self._say_who(ended=reason)

    def _say_who(self, ended: str | None) -> None:
        told = {"attempt": self.attempt, "pid": os.getpid(), "host": socket.gethostname(), "ended": ended}
        partial = self._folder / f".attempt-{os.getpid()}.partial"
        try:
            partial.write_text(json.dumps(told), encoding="utf-8")
            partial.replace(self._folder / "attempt.json")
        except OSError as error:
            _log.warning("Commands may not find this search: %s", error)


def _is_gone(listens: Mapping[str, Any]) -> bool:
    """Whether the process that listened was on this machine and is no more."""
    pid = listens.get("pid")
    if os.name != "posix" or listens.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
