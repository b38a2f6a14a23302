"""People who steer a search at known moments, the same in every attempt, and who send again what may not have been
heard: each command has an id of its own, so that it is applied once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rapidfire_automl import RapidFireExecutor
from rapidfire_automl.control import Command, Sent
from rapidfire_automl.events import Event

AT: tuple[tuple[str, int, Mapping[str, Any], tuple[Command, ...]], ...] = (
    (
        "step",
        0,
        {"step": 3},
        (
            Command("extend", 0, {"chunks": 1}, id="extend"),
            Command("clone", 0, {"set": {"lr": 3e-3}, "warm_start": True}, id="clone"),
            Command("pause", 0, id="pause"),
        ),
    ),
    (
        "chunk_done",
        1,
        {"chunk": 1},
        (
            Command("set-policy", None, {"name": "patience", "arguments": {"policy": "nop"}}, id="policy"),
            Command("add", None, {"set": {"lr": 2e-3, "r": 2}}, id="add"),
        ),
    ),
    ("chunk_done", 1, {"chunk": 2}, (Command("resume", 0, id="resume"),)),
    ("step", 2, {"step": 5}, (Command("stop", 2, id="stop"),)),
)


class Script:
    """A listener that sends them: once in each attempt, at their moment or, when the attempt begins after it, at the
    first of that kind. A command that had no answer when the process was killed may be lost with it."""

    def __init__(self, executor: RapidFireExecutor) -> None:
        self._executor = executor
        self._left = list(AT)
        self.sent: list[Sent] = []

    def __call__(self, event: Event) -> None:
        known = {**event.data, "chunk": event.chunk}
        for moment in list(self._left):
            kind, trial, data, commands = moment
            if (event.kind, event.trial) == (kind, trial) and all(known[name] >= least for name, least in data.items()):
                self._left.remove(moment)
                self.sent += [self._executor._send(command) for command in commands]

    def effects(self) -> dict[str, str]:
        return {sent.command.id: sent.effect.text for sent in self.sent if sent.effect is not None}
