"""Calls that read before they write are one at a time, and what is decided once for all is.

Optuna reads a trial's state before it changes it, and asks the database to lock the row meanwhile. SQLite has no such
locks, and Python's driver begins a transaction only at the first write: two processes could both find a trial WAITING.
A study's attributes it reads without a lock in any database, and whoever writes last has written.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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


def insert_study_user_attr(engine: Any, study_id: int, key: str, value: Any) -> None:
    """Give a study an attribute, unless it has it: the database lets one of several do so.

    Args:
        engine: SQLAlchemy's, of an Optuna storage.
        study_id: The study's.
        key: Of the attribute.
        value: Must have a JSON form.
    """
    from optuna.storages._rdb.models import StudyUserAttributeModel
    from sqlalchemy import insert
    from sqlalchemy.exc import IntegrityError

    row = {"study_id": study_id, "key": key, "value_json": json.dumps(value)}
    with suppress(IntegrityError), engine.begin() as connection:
        connection.execute(insert(StudyUserAttributeModel).values(row))
