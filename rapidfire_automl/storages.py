"""Where studies are kept: a URL becomes an Optuna storage that is patient and has a heartbeat."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from rapidfire_automl.disk import cut_half_line, make_folder
from rapidfire_automl.errors_of_storages import hanging_up, reason_of, redacted, watch
from rapidfire_automl.exclusive import exclusively
from rapidfire_automl.patience import PATIENCE_S, PatientStorage

HEARTBEAT_S, GRACE_S = 30, 120
"""How often a worker says that it lives, and after how long a silence it is taken for dead."""
_FEW = 5
"""Studies that are named where one is not found."""
JOURNAL = "journal://"
"""What the URL of a journal file begins with."""


class StorageError(ValueError):
    """A storage that cannot be opened; the message says which, without its password, and why."""


class NoSuchStudy(StorageError):
    """A storage that can be opened and does not have the study; the message names some that it has."""


def shown(storage: str) -> str:
    """A storage as it may be shown to anybody: without its password.

    >>> shown("postgresql+psycopg://me:secret@host/db")
    'postgresql+psycopg://me:***@host/db'
    """
    return redacted(storage)


def url_of(text: str) -> str:
    """The URL that a storage's name stands for: a file is a journal if it ends in .log, else SQLite.

    >>> url_of("study.db"), url_of("/runs/study.log"), url_of("postgresql://host/db")
    ('sqlite:///study.db', 'journal:///runs/study.log', 'postgresql+psycopg://host/db')
    """
    if "://" not in text:
        return f"{JOURNAL}{text}" if text.endswith(".log") else f"sqlite:///{text}"
    for bare in ("postgresql://", "postgres://"):
        if text.startswith(bare):
            return "postgresql+psycopg://" + text.removeprefix(bare)
    return text


def open_storage(
    text: str,
    *,
    patience_s: float = PATIENCE_S,
    heartbeat_s: int | None = None,
    grace_s: int | None = None,
    make: bool = True,
) -> PatientStorage:
    """Open a storage.

    Args:
        text: A URL (`sqlite:///study.db`, `journal:///shared/study.log`, `postgresql+psycopg://user@host/db`), or a
            file: a journal if it ends in .log, else SQLite.
        patience_s: How long the storage may be away while it is in use.
        heartbeat_s: How often a worker says that it lives; None where no other process works on the study.
        grace_s: After how long a silence others take its trials over.
        make: Whether a file or tables that are not there yet are made.

    Raises:
        StorageError: It cannot be opened, it is not there and not to be made, or `heartbeat_s` is given and it has no
            heartbeat.
    """
    url = url_of(text)
    if not make and (file := _file(url)) is not None and not file.exists():
        raise StorageError(f"there is no file {file}.")
    if url.startswith(JOURNAL):
        if heartbeat_s is not None:
            raise StorageError(
                f"{shown(url)} is a journal file, in which a worker can't say that it lives. For several workers take "
                "postgresql+psycopg://..., or sqlite:///... on one machine."
            )
        return PatientStorage(_journal(url), patience_s=patience_s)
    backend = _database(url, heartbeat_s, grace_s, make)
    inner = optuna.storages.get_storage(backend)
    storage = PatientStorage(
        inner,
        patience_s=patience_s,
        alone=heartbeat_s is None,
        hang_up=hanging_up(backend.engine),
        exclusively=exclusively(backend.engine),
    )
    watch(backend.engine, storage.failed)
    return storage


def load_study(storage: str | BaseStorage, name: str) -> optuna.Study:
    """A study that is there already; nothing is made.

    Args:
        storage: As of `open_storage`, or an open one.
        name: The study's.

    Raises:
        StorageError: The storage cannot be opened, or is not there.
        NoSuchStudy: It does not have the study.
    """
    where = shown(storage) if isinstance(storage, str) else type(storage).__name__
    opened = open_storage(storage, make=False) if isinstance(storage, str) else storage
    try:
        return optuna.load_study(study_name=name, storage=opened)
    except KeyError:
        names = sorted(study.study_name for study in optuna.get_all_study_summaries(opened, include_best_trial=False))
        more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
        has = f"it has {', '.join(names[:_FEW])}{more}" if names else "it has none"
        raise NoSuchStudy(f"{where} has no study {name}; {has}.") from None
    except Exception as error:  # every storage has its own kinds of errors
        raise StorageError(f"{where} cannot be read: {reason_of(error)}.") from None


def _file(url: str) -> Path | None:
    """The file a URL means; None where that is a server's, or memory."""
    if url.startswith(JOURNAL):
        return Path(url.removeprefix(JOURNAL))
    if not url.startswith("sqlite"):
        return None
    name = url.partition("://")[2].removeprefix("/").partition("?")[0]
    return None if not name or name.startswith((":memory:", "file:")) else Path(name)


def _journal(url: str) -> BaseStorage:
    path = Path(url.removeprefix(JOURNAL))
    try:
        make_folder(path.parent)
        return optuna.storages.JournalStorage(_WholeLines(str(path)))
    except (OSError, ValueError) as error:
        raise StorageError(f"{shown(url)} cannot be opened: {reason_of(error)}.") from None


class _WholeLines(JournalFileBackend):
    """Optuna's journal file, in which a full disk or a killed process leaves no half line.

    Optuna itself reads over half a line at the end, and nothing more once another is put behind it.
    """

    def __init__(self, path: str) -> None:
        self._path, self._turn = path, JournalFileSymlinkLock(path)
        super().__init__(path, self._turn)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append entries, all or none; see `JournalFileBackend`."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        self._turn.acquire()
        try:
            with Path(self._path).open("rb+", buffering=0) as file:
                end = cut_half_line(file)
                try:
                    file.seek(end)
                    while lines:
                        lines = lines[file.write(lines) :]
                    os.fsync(file.fileno())
                except BaseException:
                    file.truncate(end)
                    raise
        finally:
            self._turn.release()


def _database(url: str, heartbeat_s: int | None, grace_s: int | None, make: bool) -> RDBStorage:
    beating: dict[str, Any] = {}
    if heartbeat_s is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            retry = RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)
        beating = {"heartbeat_interval": heartbeat_s, "grace_period": grace_s, "heartbeat_stale_trial_callback": retry}
    arguments: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        arguments["connect_args"] = {"timeout": 60}
    elif url.startswith("postgresql"):
        # A server that is cut off would else be waited for by the kernel, for hours.
        keep = {"keepalives": 1, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
        arguments["connect_args"] = {"connect_timeout": 10, **keep}
        if heartbeat_s is not None and "options=" not in url:  # a worker that is frozen must not keep its locks
            held_ms = 500 * (grace_s or 2 * heartbeat_s)
            arguments["connect_args"]["options"] = f"-c idle_in_transaction_session_timeout={held_ms}"
    for attempt in range(5):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return RDBStorage(url, engine_kwargs=dict(arguments), skip_table_creation=not make, **beating)
        except Exception as error:  # SQLAlchemy, its drivers and alembic have their own kinds of errors
            if not make and _has_no_tables(error):
                raise StorageError(f"{shown(url)} holds no studies.") from None
            if attempt == 4 or not _is_race(error):
                raise StorageError(f"{shown(url)} cannot be opened: {_said(error)}.") from None
            time.sleep(0.3)
    raise AssertionError("unreachable")


def _is_race(error: Exception) -> bool:
    """Whether another process has made the tables at the same moment."""
    text = str(error)
    return any(words in text for words in ("already exists", "UNIQUE constraint", "duplicate key", "is locked"))


def _has_no_tables(error: Exception) -> bool:
    text = str(error.__cause__ or error)
    return "version_info" in text and ("no such table" in text or "does not exist" in text)


def _said(error: Exception) -> str:
    missing = isinstance(error.__cause__, ImportError) or isinstance(error, ImportError)
    if missing:
        cause = str(error.__cause__ or error)
        named = "psycopg" in cause
        fix = " Run `pip install 'rapidfire_automl[postgresql]'`" if named else " Install the database's driver"
        return f"{redacted(cause)}.{fix}"
    return reason_of(error)
