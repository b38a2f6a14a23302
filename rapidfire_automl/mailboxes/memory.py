"""Commands from the search's own process."""

from __future__ import annotations

import threading
from collections import deque

from rapidfire_automl.control import Command, ControlError, Effect, Sent


class MemoryMailbox:
    """Commands from the search's own process; any thread may send."""

    foreign = False
    attempt = 0

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
