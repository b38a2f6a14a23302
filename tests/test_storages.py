"""Storages by name, their passwords, and what a broken connection leaves in doubt."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import OperationalError

from rapidfire_automl import attempts
from rapidfire_automl.errors_of_storages import is_away, reason_of, redacted
from rapidfire_automl.patience import PatientStorage, StorageAway
from rapidfire_automl.storages import NoSuchStudy, StorageError, load_study, open_storage, shown
from tests import postgres
from tests.executor.forking import Forked

SECRETS = [
    "postgresql+psycopg://me:s3cret@host:5432/db",
    "postgresql+psycopg://me:s3cr@t-s3cret@host/db",
    "postgresql+psycopg://me@host/db?password=s3cret&sslmode=require",
    "mysql+pymysql://me:s3cret@host/db",
    "error at 'postgresql://me:s3cret@host/db' now",
    "postgresql://me@host/db?sslpassword=s3cret",
]


@pytest.mark.parametrize("text", SECRETS)
def test_passwords_are_not_shown(text: str) -> None:
    assert "s3cr" not in shown(text)
    assert "host" in shown(text)
    assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nosuch://me:s3cret@host/db", "cannot be opened"),
        ("postgresql+psycopg://me:s3cret@127.0.0.1:1/db", "cannot be opened"),
        ("sqlite:////no/such/folder/study.db", "unable to open database file"),
        ("postgresql+nosuch://me:s3cret@host/db", "cannot be opened"),
    ],
)
def test_a_storage_that_cannot_be_opened_says_why_without_its_password(url: str, says: str) -> None:
    with pytest.raises(StorageError, match=says) as caught:
        open_storage(url)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize("url", ["sqlite:///{}/typo.db", "{}/typo.db", "journal://{}/typo.log", "{}/deep/typo.log"])
def test_who_looks_for_a_study_makes_no_storage(tmp_path: Path, url: str) -> None:
    with pytest.raises(StorageError, match=rf"^there is no file {tmp_path}/[\w/]*typo\.(db|log)\.$"):
        load_study(url.format(tmp_path), "first")
    assert not list(tmp_path.iterdir())


def test_who_looks_for_a_study_makes_no_tables(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    with pytest.raises(StorageError, match=r"empty\.db holds no studies\.$"):
        load_study(str(tmp_path / "empty.db"), "first")
    assert (tmp_path / "empty.db").stat().st_size == 0


@pytest.mark.parametrize("file", ["study.db", "study.log"])
def test_a_study_that_is_not_there_is_told_with_some_that_are(tmp_path: Path, file: str) -> None:
    storage = open_storage(str(tmp_path / file))
    with pytest.raises(NoSuchStudy, match=r"has no study first; it has none\.$"):
        load_study(str(tmp_path / file), "first")
    for name in "bcdefga":
        optuna.create_study(storage=storage, study_name=name)
    with pytest.raises(NoSuchStudy, match=r"has no study first; it has a, b, c, d, e and 2 more\.$"):
        load_study(str(tmp_path / file), "first")
    assert load_study(str(tmp_path / file), "c").study_name == "c"


def test_a_journal_file_has_no_heartbeat(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="can't say that it lives"):
        open_storage(str(tmp_path / "study.log"), heartbeat_s=1)
    study = optuna.create_study(storage=open_storage(str(tmp_path / "study.log")))
    study.tell(study.ask(), 1.0)
    assert (tmp_path / "study.log").stat().st_size > 0


def _tells(path: str, trials: int, limit_bytes: int = 0) -> None:
    """Tell of trials in a journal file; with a limit on files, which is lifted after a while."""
    study = optuna.create_study(storage=open_storage(path), study_name="it", load_if_exists=True)
    if limit_bytes:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
        lift = threading.Timer(1.0, resource.setrlimit, (resource.RLIMIT_FSIZE, (hard, hard)))
        lift.start()
    for number in range(trials):
        study.tell(study.ask(), float(number))


@pytest.mark.slow
@pytest.mark.parametrize("limit_bytes", [2000, 2001, 2100])
def test_a_journal_file_waits_for_room(tmp_path: Path, limit_bytes: int) -> None:
    """Half of a line is on the disk when it is full: it is taken back, and nothing is told twice."""
    path = str(tmp_path / "study.log")
    Forked(_tells, path, 30, limit_bytes).result()
    trials = optuna.load_study(storage=open_storage(path), study_name="it").trials
    assert [trial.values for trial in trials] == [[float(number)] for number in range(30)]


@pytest.mark.parametrize("left", [b"{", b'{"op_code":4,"worker_id":"' + b"x" * 5000])
def test_a_journal_file_survives_half_a_line(tmp_path: Path, left: bytes) -> None:
    """Of a process that was killed as it wrote."""
    path = tmp_path / "study.log"
    _tells(str(path), 2)
    with path.open("ab") as file:
        file.write(left)
    _tells(str(path), 2)
    study = optuna.load_study(storage=open_storage(str(path)), study_name="it")
    assert [trial.values for trial in study.trials] == [[0.0], [1.0], [0.0], [1.0]]


def broken() -> Exception:
    error = optuna.exceptions.StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = OperationalError("COMMIT", {}, Exception("server closed the connection\n\tunexpectedly"))
    return error


class Breaks:
    """A database whose connection breaks, before or after a call is committed.

    Args:
        inner: The database.
        when: The calls that break, by name: "before" or "after"; each once.
    """

    def __init__(self, inner: Any, **when: str) -> None:
        self._inner, self._when = inner, when

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._inner, name)
        when = self._when.get(name)
        if when is None:
            return call

        def breaks(*args: Any, **kwargs: Any) -> Any:
            del self._when[name]
            if when == "after":
                call(*args, **kwargs)
            raise broken()

        return breaks


def study_that(tmp_path: Path, *, alone: bool = True, **when: str) -> optuna.Study:
    path = f"sqlite:///{tmp_path / 'study.db'}"
    optuna.create_study(storage=path, study_name="s", load_if_exists=True)
    inner: Any = Breaks(optuna.storages.get_storage(path), **when)
    return optuna.load_study(study_name="s", storage=PatientStorage(inner, alone=alone))


@pytest.mark.parametrize("when", ["before", "after"])
def test_whether_a_broken_call_was_committed_makes_no_difference(tmp_path: Path, when: str) -> None:
    calls = ("create_new_trial", "set_trial_param", "set_trial_intermediate_value", "set_trial_user_attr")
    study = study_that(tmp_path, **dict.fromkeys((*calls, "set_trial_state_values"), when))
    trial = study.ask()
    trial.suggest_float("x", 0.0, 1.0)
    trial.report(2.0, step=1)
    trial.set_user_attr("kept", 7)
    study.tell(trial, 3.0)
    assert [(t.state, t.value) for t in study.get_trials()] == [(TrialState.COMPLETE, 3.0)]
    assert (study.trials[0].intermediate_values, study.trials[0].user_attrs) == ({1: 2.0}, {"kept": 7})


@pytest.mark.parametrize("alone", [True, False])
def test_a_trial_that_may_have_been_taken(tmp_path: Path, alone: bool) -> None:
    """Alone it can only have been us; among others it is left to its heartbeat, which it has none of."""
    study = study_that(tmp_path, alone=alone, set_trial_state_values="after")
    study.enqueue_trial({"x": 0.5})
    taken = attempts.take(study, study.get_trials()[0])
    assert (taken is not None) is alone


def test_an_end_that_is_not_ours_is_not_taken_for_ours(tmp_path: Path) -> None:
    study = study_that(tmp_path)
    trial = study.ask()
    other = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 'study.db'}")
    other.tell(trial.number, state=TrialState.FAIL)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        study._storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0])


def test_patience_has_an_end(tmp_path: Path) -> None:
    heard: list[str] = []

    class Gone(Breaks):
        def __getattr__(self, name: str) -> Any:
            def breaks(*args: Any, **kwargs: Any) -> Any:
                raise broken()

            return breaks

    storage = PatientStorage(Gone(None), patience_s=0.3, say_after_s=0.1)  # type: ignore[arg-type]
    storage.listen(lambda what, away_s, reason: heard.append(f"{what}: {reason}"))
    with pytest.raises(StorageAway, match="server closed the connection"):
        storage.get_trial(0)
    assert heard == ["away: server closed the connection"]


def test_what_does_not_pass_is_not_waited_for() -> None:
    for message, away in (("no such table: trials", False), ("attempt to write a readonly database", False)):
        assert is_away(OperationalError("x", {}, Exception(message))) is away
    assert is_away(OperationalError("x", {}, Exception("database is locked")))
    assert not is_away(ValueError("no"))
    assert reason_of(broken()) == "server closed the connection"


@pytest.mark.skipif(postgres.binaries() is None, reason="no PostgreSQL here")
def test_who_looks_for_a_study_makes_no_tables_on_a_server() -> None:
    with postgres.server() as server:
        with pytest.raises(StorageError, match=r"holds no studies\.$"):
            load_study(server.url(), "first")
        optuna.create_study(storage=open_storage(server.url()), study_name="second")
        with pytest.raises(NoSuchStudy, match=r"has no study first; it has second\.$"):
            load_study(server.url(), "first")


@pytest.mark.slow
@pytest.mark.skipif(postgres.binaries() is None, reason="no PostgreSQL here")
def test_a_connection_that_breaks_where_optuna_tries_again_by_itself() -> None:
    """Optuna takes it for a statement that is too long, and asks again in the transaction that is lost."""
    pytest.importorskip("psycopg")
    with postgres.server() as server:
        storage = open_storage(server.url())
        study = optuna.create_study(storage=storage, study_name="s")
        study.enqueue_trial({})
        assert len(study.get_trials(deepcopy=False)) == 1
        engine, broken = storage.inner._backend.engine, []  # type: ignore[attr-defined]

        def breaks(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            if "trials" in statement and not broken:
                broken.append(statement)
                pid = cursor.connection.info.backend_pid
                with create_engine(server.url()).connect() as other:
                    other.execute(text(f"SELECT pg_terminate_backend({pid}, 5000)"))

        event.listen(engine, "before_cursor_execute", breaks)
        assert len(study.get_trials(deepcopy=False)) == 1
        assert broken
