"""Calls that read before they write are one at a time, where SQLite lets two processes read before either writes.

Optuna reads a trial's state before it changes it, and asks the database to lock the row meanwhile. SQLite has no such
locks, and Python's driver begins a transaction only at the first write: two processes could both find a trial WAITING.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

Exclusively = Callable[[], AbstractContextManager[None]]


def exclusively(engine: Any) -> Exclusively:
    """What a call has to be in, so that no other process writes between its reading and its writing.

    Args:
        engine: SQLAlchemy's; those of other databases lock rows.
    """
    if engine is None or engine.dialect.name != "sqlite":
        return nullcontext
    from sqlalchemy import event

    inside = threading.local()

    def begin(connection: Any) -> None:
        if getattr(inside, "depth", 0):
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    @contextmanager
    def enter() -> Iterator[None]:
        inside.depth = getattr(inside, "depth", 0) + 1
        try:
            yield
        finally:
            inside.depth -= 1

    event.listen(engine, "begin", begin)
    return enter
