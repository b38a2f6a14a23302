"""The journal of a search: what was decided, on disk before anything follows from it.

`journal.jsonl` in the search's folder, one entry a line: what is searched, every round's verdicts, every verdict of a
person, every trial's end. Curves and weights stand in the trials' checkpoints. A line that a kill has cut short is
dropped: what it would have said is decided again, and decided alike. Any other line that can't be read is damaged.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rapidfire_automl.disk import Appender, claim, cut_half_line, is_full, make_folder, sync, unlock
from rapidfire_automl.jsonable import dumps
from rapidfire_automl.refusals import FolderInUse
from rapidfire_policies.base import Decision, Verdict

NAME = "journal.jsonl"


@dataclass(slots=True)
class Past:
    """What a journal says of a search that was begun before.

    Args:
        facts: What is searched.
        asked: Trials that were begun, in order.
        verdicts: Per trial `(chunk, verdict, reason)`, in order.
        judged: Per trial, the chunks that were judged.
        by_hand: Trials whose last verdict was a person's.
        ended: Per trial, how it has ended.
        rounds: Rounds that were closed.
        over: Whether the search has come to its end.
        sampler_seed: What proposals are drawn from.
        commands: What people's commands have come to, by id.
        extended: Per trial, at which step it was extended, and where its chunks end since.
        policy: Name and arguments of the policy that a person has put in the place of the study's; the name is None
            where nobody judges.
        asking: Whether Optuna was being asked for a trial.
        built: Trials that had all of their parameters.
        said: Of the last round, `(trial, chunk, data)` of the events that tell of its verdicts.
        damaged: Numbers of the lines that can't be read, from 1.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)
    verdicts: dict[int, list[tuple[int, str, str]]] = field(default_factory=dict)
    judged: dict[int, int] = field(default_factory=dict)
    by_hand: set[int] = field(default_factory=set)
    ended: dict[int, dict[str, Any]] = field(default_factory=dict)
    rounds: int = 0
    over: bool = False
    sampler_seed: int = 0
    commands: dict[str, str] = field(default_factory=dict)
    extended: dict[int, list[tuple[int, list[int]]]] = field(default_factory=dict)
    policy: tuple[str | None, dict[str, Any]] | None = None
    asking: bool = False
    built: set[int] = field(default_factory=set)
    said: list[tuple[int, int, dict[str, Any]]] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)

    def is_paused(self, number: int) -> bool:
        """Whether a trial was paused and has not trained since."""
        verdicts = self.verdicts.get(number, [])
        chunk = self.judged.get(number, 0)
        return any(verdict == "pause" and at == chunk for at, verdict, _ in verdicts)

    def final(self, number: int) -> Decision | None:
        """The last verdict on a trial, if that has ended it, or let it go on after a pause."""
        verdicts = self.verdicts.get(number)
        if not verdicts:
            return None
        _, verdict, reason = verdicts[-1]
        ends = verdict in (Verdict.STOP, Verdict.COMPLETE)
        return (
            Decision(Verdict(verdict), reason) if ends or (self.is_paused(number) and verdict == "continue") else None
        )

    def ruling(self, number: int) -> Decision | None:
        """What a person has decided of a paused trial: that it stays paused, or goes on."""
        if number not in self.by_hand or not self.is_paused(number):
            return None
        _, verdict, reason = self.verdicts[number][-1]
        return None if verdict == Verdict.STOP else Decision(Verdict(verdict), reason)


class Kept(NamedTuple):
    """What has come of an entry.

    Args:
        lost: Numbers of the trials that other workers have taken over; nothing was written of them.
        waits: Why it is not on the disk yet; empty if it is.
    """

    lost: frozenset[int] = frozenset()
    waits: str = ""


class Journal:
    """Appends to a folder's journal, and keeps other processes out of the folder meanwhile.

    Args:
        folder: Made when missing.

    Raises:
        FolderInUse: Another process has it.
    """

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        lock = claim(folder / "lock")
        if lock is None:
            raise FolderInUse(folder)
        self._lock = lock
        self._lines = Appender(folder / NAME)
        sync(folder)
        cut_half_line(self._lines.file)  # else it would look like damage once others follow it
        self._writing = threading.Lock()

    @property
    def past(self) -> Past:
        """What stands in it by now."""
        return read(self._lines.path)

    def write(self, kind: str, **data: Any) -> Kept:
        """Append an entry; it is on disk when this returns, unless the disk is full.

        Then it waits in memory and goes before the next one: should the process be killed before that, it is decided
        again what it says.

        Raises:
            OSError: It could not be written, and not because the disk is full.
        """
        with self._writing:
            if self._lines.closed:
                return Kept()
            line = dumps({"kind": kind, **data}).encode() + b"\n"
            error = self._lines.append(line, sync=True)
        if error is not None and not is_full(error):
            raise error
        return Kept(waits="" if error is None else str(error.strerror))

    def close(self) -> None:
        """Let others in."""
        with self._writing:
            self._lines.close()
            if not self._lock.closed:
                unlock(self._lock)
                self._lock.close()


def read(path: Path) -> Past:
    """What a journal says of the last search in it; nothing where there is none."""
    past = Past()
    for entry in _entries(path, past.damaged):
        kind = entry.get("kind")
        if kind == "search":
            if entry.get("anew"):
                past = Past(damaged=past.damaged)
            past.facts, past.over, past.sampler_seed = dict(entry["facts"]), False, entry["sampler_seed"]
        elif kind == "asking":
            past.asking = True
        elif kind == "asked":
            past.asked.append(entry["trial"])
            past.asking = past.over = False  # though the line that began the search may be damaged
        elif kind == "built":
            past.built.add(entry["trial"])
        elif kind in ("round", "ruled"):
            _judge(past, entry)
        elif kind == "ended":
            past.ended[entry["trial"]] = dict(entry)
        elif kind == "extended":
            past.extended.setdefault(entry["trial"], []).append((entry["step"], list(entry["boundaries"])))
        elif kind == "policy":
            past.policy = (entry["name"], dict(entry["arguments"]))
        elif kind == "over":
            past.over, past.policy = True, None
        if "command" in entry:
            past.commands[entry["command"]] = entry["text"]
    return past


def _judge(past: Past, entry: Mapping[str, Any]) -> None:
    by_hand = entry["kind"] == "ruled"
    if not by_hand:
        past.rounds += 1
        past.said = [(number, chunk, dict(data)) for number, chunk, data in entry.get("said", ())]
    for number, chunk, verdict, reason in entry["verdicts"]:
        past.judged[number] = max(chunk, past.judged.get(number, 0))
        if verdict:
            past.verdicts.setdefault(number, []).append((chunk, verdict, reason))
            (past.by_hand.add if by_hand else past.by_hand.discard)(number)


def _entries(path: Path, damaged: list[int]) -> Iterator[Mapping[str, Any]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    whole = content[: content.rfind(b"\n") + 1]  # what follows is cut short by a kill
    for number, line in enumerate(whole.decode(errors="replace").split("\n"), start=1):  # texts may hold others
        try:
            entry = json.loads(line) if line else {}
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            yield entry
        else:
            damaged.append(number)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between what was searched and what is to be, in words; what only one has is no difference."""
    return [
        f"`{name}` was {_short(before[name])}, is {_short(now[name])}"
        for name in before
        if name in now and before[name] != now[name]
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
