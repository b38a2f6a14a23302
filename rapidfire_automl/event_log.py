"""`events.jsonl`: every event of a search as one line of JSON, appended; and how it is read back."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeGuard

from rapidfire_automl.disk import Appender, lock, unlock
from rapidfire_automl.events import Event, Listener
from rapidfire_automl.jsonable import dumps
from rapidfire_automl.refusals import FolderInUse

_log = logging.getLogger("rapidfire_automl")

FILE = "events.jsonl"
"""Its name in the run folder."""
WORKERS = "workers"
"""Where several workers on one search have a folder each."""

_BLOCK_BYTES = 65536


class EventLog:
    """The listener that keeps `events.jsonl`, and what only events tell, and passes every event on.

    A line is an event with `seq`, which counts up through all searches in the file, and `time`, the wall clock in UTC.
    Each is handed to the system as it happens, and a verdict is on the disk before anyone acts on it. What a killed
    search left of a last line is cut off when the next one goes on. Lines that can't be written, since the disk is
    full, wait in memory for the next event. A search that goes on tells its last verdicts again, since the kill may
    have come before they were written here; those that were are dropped. While it is open no other process can open it.

    Args:
        path: The file; made when missing.
        listeners: Called with every event, after it is in the file.

    Raises:
        FolderInUse: Another process has it open; nothing was changed.
    """

    def __init__(self, path: Path, listeners: Iterable[Listener] = ()) -> None:
        self._lines = Appender(path)
        if not lock(self._lines.file, path):
            self._lines.file.close()
            raise FolderInUse(path.parent)
        whole, self._seq = _end_of(self._lines.file)
        self._lines.file.truncate(whole)
        self._is_full = False
        self._verdicts: set[tuple[Any, ...]] | None = None
        self._listeners = tuple(listeners)
        self._lock = threading.RLock()
        self.start_s = time.monotonic()
        self.first_verdict_s: float | None = None
        self.chunk_ends_s: dict[int, list[float]] = {}

    def __call__(self, event: Event) -> None:
        """Write the event down and pass it on; an event that comes after the end is dropped."""
        with self._lock:
            if self._lines.closed or self._knows(event):
                return
            if event.kind == "verdict" and self.first_verdict_s is None:
                self.first_verdict_s = self.elapsed_s
            if event.kind == "chunk_done" and event.trial is not None:
                self.chunk_ends_s.setdefault(event.trial, []).append(event.time_s)
            self._seq += 1
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = dumps(
                {
                    "seq": self._seq,
                    "time": now,
                    "kind": event.kind,
                    "time_s": event.time_s,
                    "trial": event.trial,
                    "chunk": event.chunk,
                    "data": event.data,
                }
            )
            self._write(line.encode() + b"\n", sync=event.kind == "verdict")
            for listener in self._listeners:
                try:
                    listener(event)
                except Exception:
                    _log.exception("A listener failed on %s; the search goes on.", event.kind)

    def _write(self, line: bytes, *, sync: bool) -> None:
        error = self._lines.append(line, sync=sync)
        if error is not None and not self._is_full:
            _log.warning("%s cannot be written (%s); its lines are kept for later.", self._lines.path, error)
        self._is_full = error is not None

    def _knows(self, event: Event) -> bool:
        """Whether an earlier process has written down a verdict that is told again."""
        if event.kind != "verdict" or not event.data.get("again"):
            return False
        if self._verdicts is None:
            self._lines.file.seek(0)
            lines = map(_parse, (self._lines.file.read() or b"").split(b"\n"))
            self._verdicts = {_of_verdict(line.event) for line in lines if line is not None}
        return _of_verdict(event) in self._verdicts

    def add_listeners(self, listeners: Iterable[Listener]) -> None:
        """Have more listeners called, after those there are."""
        with self._lock:
            self._listeners = (*self._listeners, *listeners)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the log was opened."""
        return time.monotonic() - self.start_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if not self._lines.closed:
                self._write(b"", sync=True)
                unlock(self._lines.file)
                self._lines.close()


@dataclass(frozen=True)
class Line:
    """One line of `events.jsonl`.

    Args:
        seq: Its number; 0 where the line has none.
        time: The wall clock, ISO 8601 in UTC; "" where the line has none.
        event: The event. Its `data` is plain JSON: NaN and infinities are text.
        worker: The worker that tells it, where there are several.
    """

    seq: int
    time: str
    event: Event
    worker: str = ""


@dataclass(frozen=True)
class Log:
    """What `events.jsonl` holds.

    Args:
        lines: In the order of the file.
        torn: The last line is cut off, as a kill leaves it (or it is just being written).
        damaged: Other lines that are no events, counted from 1.
    """

    lines: tuple[Line, ...]
    torn: bool
    damaged: tuple[int, ...]


def read_events(run_dir: str | os.PathLike[str]) -> Log:
    """Read the events of a run folder; a search may be writing them. Those of several workers come in order of time.

    Args:
        run_dir: The run folder.

    Raises:
        ValueError: There is no such folder, or no events in it.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise ValueError(f"`run_dir` must be a run folder, there is no folder {folder}.")
    shared = sorted((folder / WORKERS).glob(f"*/{FILE}"))
    if shared and not (folder / FILE).exists():
        logs = [_read(path, path.parent.name) for path in shared]
        lines = sorted((line for log in logs for line in log.lines), key=lambda line: line.time)
        damaged = tuple(number for log in logs for number in log.damaged)
        return Log(tuple(lines), torn=any(log.torn for log in logs), damaged=damaged)
    return _read(folder / FILE)


def _read(path: Path, worker: str = "") -> Log:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"`run_dir` must hold {FILE}, {path.parent} has none that can be read: {error.strerror}."
        ) from error
    lines, damaged = [], []
    *whole, rest = text.split(b"\n")
    for number, raw in enumerate(whole, start=1):
        line = _parse(raw, worker)
        if line is not None:
            lines.append(line)
        elif raw.strip():
            damaged.append(number)
    return Log(tuple(lines), torn=bool(rest), damaged=tuple(damaged))


class Follower:
    """Reads the events of a run folder as they come.

    Args:
        run_dir: The run folder.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self._folder = Path(run_dir)
        self._at: dict[Path, int] = {}

    def read(self) -> list[Event]:
        """What has been written since the last call; a line that is half written is left for the next."""
        files = [self._folder / FILE, *sorted((self._folder / WORKERS).glob(f"*/{FILE}"))]
        lines = [line for path in files for line in self._read(path)]
        return [line.event for line in (sorted(lines, key=lambda line: line.time) if len(files) > 1 else lines)]

    def _read(self, path: Path) -> list[Line]:
        at = self._at.get(path, 0)
        try:
            with path.open("rb") as file:
                file.seek(at)
                whole = file.read().rpartition(b"\n")[0]
        except OSError:
            return []
        if not whole:
            return []
        self._at[path] = at + len(whole) + 1
        return [line for line in map(_parse, whole.split(b"\n")) if line is not None]


def _parse(raw: bytes, worker: str = "") -> Line | None:
    """The line, or None where it is no event."""
    try:
        entry = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        return None
    trial, chunk, data = (entry.get(name) for name in ("trial", "chunk", "data"))
    seq, at, time_s = (entry.get(name) for name in ("seq", "time", "time_s"))
    try:
        seconds = float(time_s) if isinstance(time_s, (int, float)) else 0.0
    except OverflowError:
        return None
    return Line(
        seq if _is_int(seq) else 0,
        at if isinstance(at, str) else "",
        Event(
            entry["kind"],
            seconds,
            trial if _is_int(trial) else None,
            chunk if _is_int(chunk) else None,
            data if isinstance(data, dict) else {},
        ),
        worker,
    )


def _of_verdict(event: Event) -> tuple[Any, ...]:
    return event.kind, event.trial, event.chunk, str(event.data.get("verdict")), event.data.get("reason")


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _end_of(file: RawIOBase) -> tuple[int, int]:
    """Bytes of the whole lines in a file, and the last sequence number in them."""
    size, block = file.seek(0, os.SEEK_END), _BLOCK_BYTES
    while True:
        start = max(0, size - block)
        file.seek(start)
        tail = file.read(size - start) or b""
        whole = tail.rfind(b"\n") + 1
        # The first line of a block that does not start the file may be the end of one.
        for raw in reversed(tail[:whole].split(b"\n")[bool(start) :]):
            line = _parse(raw)
            if line is not None and line.seq:
                return start + whole, line.seq
        if not start:
            return whole, 0
        block *= 16
