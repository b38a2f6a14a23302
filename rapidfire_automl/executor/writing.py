"""The writer of checkpoints: a thread of its own, so that the disk is no trial's concern."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rapidfire_automl.disk import has_room, is_full
from rapidfire_automl.executor.checkpoints import Snapshot, chunk_of, pack, thin, write, write_adapter

logger = logging.getLogger("rapidfire_automl")


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be written.

    Args:
        folder: Where to.
        bytes: Of its tensors.
        write: Writes it; returns the bytes of all files.
        matters: Whether it may use up the disk: a checkpoint is a convenience, a finished adapter is not.
    """

    folder: Path
    bytes: int
    write: Callable[[], int]
    matters: bool = False


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint is on the disk.

    Args:
        folder: Where.
        bytes: Of its files.
        seconds: It took to write, beside training.
        removed: Names of older ones that were thinned out.
    """

    folder: Path
    bytes: int
    seconds: float
    removed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Trouble:
    """A checkpoint is not, or not yet, on the disk.

    Args:
        kind: "paused": the disk is full, it is tried again; "resumed": that has come to an end; "failed": this one is
            given up, the trial's next is tried; "lost": the search ended before it could be written.
        folder: Where it was to go.
        reason: In words.
    """

    kind: Literal["paused", "resumed", "failed", "lost"]
    folder: Path
    reason: str


class Writer:
    """Writes checkpoints in the order in which they were submitted, one at a time; adapters that are done go first.

    At most one checkpoint a trial waits: a newer one takes the place of one that has not been begun, so that memory
    stays bounded when the disk is slow or full. When it is full, or nearly so (`disk.has_room`), writing pauses, which
    is said once, and is tried again after `retry_s`, twice as long after every failure up to `max_retry_s`; training
    goes on. Any other error gives up that checkpoint and is reported. Nothing is ever raised in a trial's thread but
    what can't be written at all.

    Args:
        keep: Checkpoints of a trial that stay; older ones are removed after a newer one is safe.
        on_written: Called in the writer's thread.
        on_trouble: Called in the writer's thread.
        retry_s: See above.
        max_retry_s: See above.
    """

    def __init__(
        self,
        *,
        keep: int = 2,
        on_written: Callable[[Written], None] | None = None,
        on_trouble: Callable[[Trouble], None] | None = None,
        retry_s: float = 1.0,
        max_retry_s: float = 60.0,
    ) -> None:
        if keep < 1:
            raise ValueError(f"`keep` must be >= 1, got {keep}.")
        self._keep = keep
        self._on_written = on_written
        self._on_trouble = on_trouble
        self._retry_s, self._max_retry_s = retry_s, max_retry_s
        self._pending: OrderedDict[Path, _Job] = OrderedDict()
        self._changed = threading.Condition()
        self._busy = self._closing = self._paused = self._hurry = False
        self._at: Path | None = None
        self._thread: threading.Thread | None = None

    @property
    def paused(self) -> bool:
        """Whether the disk is full."""
        return self._paused

    @property
    def pending_bytes(self) -> int:
        """Bytes of memory that waiting checkpoints take."""
        with self._changed:
            return sum(job.bytes for job in self._pending.values())

    def submit(self, folder: Path, snapshot: Snapshot) -> None:
        """Copy a snapshot to the CPU and have it written to `folder`, a trial's `chunk-0003`.

        Raises:
            CheckpointError: The folder is not named like a checkpoint.
            RuntimeError: The writer is closed.
            TypeError: Something in the snapshot can't be written without pickle; its path is named.
        """
        chunk_of(folder)
        packed = pack(snapshot)
        self._put(folder.parent, _Job(folder, packed.nbytes, lambda: write(folder, packed)))

    def submit_adapter(self, folder: Path, snapshot: Snapshot) -> None:
        """Copy a finished adapter to the CPU and have it written to a folder of its own, in PEFT's layout.

        Raises:
            RuntimeError: The writer is closed.
        """
        packed = pack(snapshot)
        self._put(folder, _Job(folder, packed.nbytes, lambda: write_adapter(folder, packed), matters=True))

    def _put(self, place: Path, job: _Job) -> None:
        with self._changed:
            if self._closing:
                raise RuntimeError("The writer is closed.")
            self._pending[place] = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rapidfire-checkpoints", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all is written; says whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending and not self._busy, timeout)

    def catch_up(self, place: Path, timeout_s: float = 60.0) -> None:
        """Wait until nothing waits to be written below a folder; not for a disk that is full, or that hangs."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._paused or self._closing or (place not in self._pending and place != self._at), timeout_s
            )

    def drop(self, place: Path) -> None:
        """Forget what waits to be written below a folder."""
        with self._changed:
            self._pending.pop(place, None)

    def settle(self) -> list[Path]:
        """Write what waits now, full as the disk was; returns what can't be written yet, and still waits."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._hurry or self._thread is None or self._closing)
            return [job.folder for job in self._pending.values()]

    def close(self, timeout: float | None = None) -> bool:
        """Write what waits, each tried once more, and end; says whether the thread has ended."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        wait_s = self._retry_s
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing or self._hurry)
                hurried, self._busy = self._hurry, True
                places = sorted(self._pending, key=lambda place: not self._pending[place].matters)
            full = False
            for place in places:
                full = self._next(place) or full
            if self._paused and places and not full:
                self._paused = False
                self._tell(Trouble("resumed", places[-1], "there is room on the disk again"))
            with self._changed:
                self._busy = False
                self._hurry = self._hurry and not hurried
                self._changed.notify_all()
                if self._closing and not self._pending:
                    return
                if full:
                    self._changed.wait_for(lambda: self._closing or self._hurry, wait_s)
            wait_s = min(2 * wait_s, self._max_retry_s) if full else self._retry_s

    def _next(self, place: Path) -> bool:
        """Write what waits for a place; says whether the disk is full."""
        with self._changed:
            job = self._pending.pop(place, None)
            if job is None:
                return False
            self._at = place
        full = self._write(job)
        with self._changed:
            if full and not self._closing and place not in self._pending:
                self._pending[place] = job
            self._at = None
            self._changed.notify_all()
            lost = full and self._closing
        if lost:
            self._tell(Trouble("lost", job.folder, "the search ended while the disk was full"))
        return full

    def _write(self, job: _Job) -> bool:
        """Write one; says whether the disk is full."""
        start = time.perf_counter()
        folder = job.folder
        try:
            if not (job.matters or has_room(folder, job.bytes)):
                raise OSError(errno.ENOSPC, "too little of it is free")
            written = job.write()
            removed = () if job.matters else tuple(thin(folder.parent, self._keep))
        except BaseException as error:
            if not is_full(error):
                self._tell(Trouble("failed", folder, f"{type(error).__name__}: {error}"))
                return False
            if not self._paused:
                with self._changed:
                    self._paused = True
                    self._changed.notify_all()
                self._tell(Trouble("paused", folder, f"the disk is full ({getattr(error, 'strerror', error)})"))
            return True
        self._call(self._on_written, Written(folder, written, time.perf_counter() - start, removed))
        return False

    def _tell(self, trouble: Trouble) -> None:
        log = logger.info if trouble.kind == "resumed" else logger.warning
        log("Checkpoints: writing %s %s: %s.", trouble.folder, trouble.kind, trouble.reason.rstrip("."))
        self._call(self._on_trouble, trouble)

    def _call(self, listener: Callable[[Any], None] | None, what: Any) -> None:
        if listener is None:
            return
        try:
            listener(what)
        except Exception:
            logger.exception("A listener of the checkpoint writer failed.")
