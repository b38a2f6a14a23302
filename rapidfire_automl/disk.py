"""Files that a full disk, a kill or a power cut leaves whole: lines that wait for room, names and contents synced.

What matters most is smallest: verdicts, events, the study, adapters. So checkpoints, which are large and only a
convenience, stop while some of the disk is still free, and lines that can't be written wait in memory.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import time
from contextlib import suppress
from io import RawIOBase
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: nobody keeps a second process out
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger("rapidfire_automl")

_ERRNOS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_WORDS = tuple(os.strerror(number).lower() for number in _ERRNOS)
_RESERVE_BYTES = 64 << 20
_RESERVE_SHARE = 0.05
_sync = getattr(os, "fdatasync", os.fsync)


def is_full(error: BaseException) -> bool:
    """Whether something could not be written because the disk, a quota or a limit on files is used up.

    >>> is_full(OSError(errno.ENOSPC, "")), is_full(OSError(errno.EIO, ""))
    (True, False)
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _ERRNOS
    return any(words in str(error).lower() for words in _WORDS)  # safetensors has errors of its own


def has_room(folder: Path, needed_bytes: int) -> bool:
    """Whether a checkpoint of so many bytes may be written to a folder, or to what of it exists.

    5% of the disk, and at most 64 MiB, stay free for what matters more.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return True  # the write itself will tell
    return usage.free >= needed_bytes + min(_RESERVE_BYTES, int(_RESERVE_SHARE * usage.total))


def sync(path: Path) -> None:
    """Have a file's contents, or the names in a folder, on the disk when this returns: a power cut leaves them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Have all that is in a folder on the disk when this returns."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where missing; the names of new ones are on the disk when this returns."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in new:
        sync(each.parent)


def claim(path: Path) -> IO[str] | None:
    """Lock a file for this process, until it is closed; None where another process has it."""
    file = path.open("a", encoding="utf-8")
    if lock(file, path):
        return file
    file.close()
    return None


def lock(file: IO[Any] | RawIOBase, path: Path) -> bool:
    """Lock an open file for this process, until it is unlocked or closed.

    Where the file system has no locks nobody is kept out, and the log says so.

    Args:
        file: Open for writing.
        path: Its path.

    Returns:
        Whether it is locked now; else another process has it.
    """
    if fcntl is None:
        return True
    for wait_s in (0.05, 0.0):  # whoever only looks has it for a moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(wait_s)
        except OSError as error:
            _log.warning("%s can't be locked (%s): nothing keeps a second search out.", path, error.strerror)
            return True
        else:
            return True
    return False


def unlock(file: IO[Any] | RawIOBase) -> None:
    """Unlock a file before it is closed: a forked process, which has it open too, would keep it locked."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def is_locked(path: Path) -> bool:
    """Whether a process has locked a file; a missing one nobody has."""
    if fcntl is None:
        return False
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def write_once(path: Path, text: str) -> None:
    """Write a file, which appears whole; one that is there already stays as it is."""
    partial = path.with_name(f".{path.stem}-{secrets.token_hex(8)}.partial")
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


def cut_half_line(file: RawIOBase) -> int:
    """Remove what stands behind a file's last line break; returns how long it is then."""
    end = size = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - 4096)
        file.seek(begin)
        found = (file.read(end - begin) or b"").rfind(b"\n")
        if found >= 0:
            end = begin + found + 1
            break
        end = begin
    if end < size:
        file.truncate(end)
    return end


class Appender:
    """Appends lines to a file; what can't be written waits in memory and goes first the next time.

    Args:
        path: Made when missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: RawIOBase = path.open("ab+", buffering=0)
        self._waiting = b""

    def append(self, lines: bytes = b"", *, sync: bool) -> OSError | None:
        """Append lines.

        Args:
            lines: Whole ones.
            sync: Whether they are to be on the disk when this returns, not only with the system.

        Returns:
            Why they wait, or None.
        """
        self._waiting += lines
        try:
            while self._waiting:
                self._waiting = self._waiting[self.file.write(self._waiting) or 0 :]
            if sync:
                _sync(self.file.fileno())
        except OSError as error:
            return error
        return None

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.file.closed

    def close(self) -> OSError | None:
        """Try once more, and close; what still waits is lost, and why is returned."""
        if self.file.closed:
            return None
        error = self.append(sync=True)
        self.file.close()
        return error
