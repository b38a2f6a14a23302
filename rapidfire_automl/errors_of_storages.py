"""Which errors of a storage will pass: a server that restarts, a lock that is held, a full disk.

Optuna wraps what SQLAlchemy raises, SQLAlchemy what the driver raises. Whatever is not known to pass is not waited for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import threading
from collections.abc import Callable
from typing import Any

import optuna

from rapidfire_automl.disk import is_full

_FOR_GOOD = (
    "no such table",
    "no such column",
    "readonly database",
    "read-only",
    "too many SQL variables",
    "file is not a database",
    "malformed",
)
"""What SQLite calls operational errors, too, and no patience mends."""
_PASSING_ERRNOS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENETUNREACH)
_LOST_TRANSACTION = "8s2b"
"""SQLAlchemy's code of "Can't reconnect until invalid transaction is rolled back"."""
_count = threading.local()


def is_away(error: BaseException) -> bool:
    """Whether an error means that the storage can't be reached now, and may be again."""
    cause = _cause(error)
    if isinstance(cause, OSError):
        return cause.errno in _PASSING_ERRNOS or is_full(cause)
    try:
        from sqlalchemy import exc
    except ImportError:
        return False
    if isinstance(cause, exc.TimeoutError):  # no connection of the pool got free
        return True
    if not isinstance(cause, exc.DBAPIError):
        return False
    passing = cause.connection_invalidated or isinstance(cause, (exc.OperationalError, exc.InterfaceError))
    return passing and not any(words in str(cause.orig) for words in _FOR_GOOD)


def reason_of(error: BaseException) -> str:
    """In a line, without statements, parameters or passwords."""
    cause = _cause(error)
    text = str(getattr(cause, "orig", None) or cause).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return redacted(lines[0] if lines else type(cause).__name__).rstrip(".")


def redacted(text: str) -> str:
    """A text with the passwords of all URLs in it left out.

    >>> redacted("at postgresql+psycopg://me:secret@host/db?password=secret&x=1")
    'at postgresql+psycopg://me:***@host/db?password=***&x=1'
    """
    text = re.sub(r"(\w[\w+.-]*://[^\s:/@'\"]*):[^\s'\"]*@", r"\1:***@", text)
    return re.sub(r"(?i)\b((?:ssl)?password|passwd|pwd)=[^\s&'\"]*", r"\1=***", text)


def watch(engine: Any, tell: Callable[[BaseException], None]) -> None:
    """Count the errors of an SQLAlchemy engine, by thread, and tell of each: Optuna tries some calls again."""
    from sqlalchemy import event

    def failed(context: Any) -> None:
        _count.failures = failures() + 1
        tell(context.sqlalchemy_exception or context.original_exception)

    event.listen(engine, "handle_error", failed)


def hanging_up(engine: Any) -> Callable[[], None]:
    """What breaks the connections of an SQLAlchemy engine, where the driver tells their sockets."""
    from sqlalchemy import event

    opened: dict[int, Any] = {}

    def connected(connection: Any, record: Any) -> None:
        if connection is not None:
            opened[id(connection)] = connection

    def closed(connection: Any, record: Any) -> None:
        opened.pop(id(connection), None)

    def hang_up() -> None:
        for connection in list(opened.values()):
            with contextlib.suppress(Exception):  # closed in this moment, or a driver without sockets
                socket.socket(fileno=os.dup(connection.fileno())).shutdown(socket.SHUT_RDWR)

    for happening in ("connect", "checkin"):  # those that were opened before are known when they are given back
        event.listen(engine, happening, connected)
    event.listen(engine, "close", closed)
    return hang_up


def failures() -> int:
    """Errors of watched engines that this thread has met."""
    found: int = getattr(_count, "failures", 0)
    return found


def _cause(error: BaseException) -> BaseException:
    """What was behind an error that Optuna has wrapped.

    Where a query meets an operational error, Optuna asks once more, in a transaction that may be lost with its
    connection: what counts is the first error.
    """
    cause = error
    if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ is not None:
        cause = error.__cause__
    first = cause.__context__
    lost = getattr(cause, "code", None) == _LOST_TRANSACTION
    return first if lost and first is not None else cause
