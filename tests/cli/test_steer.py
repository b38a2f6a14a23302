"""`rapidfire-automl pause` and the other verbs: what is said of a mistake, before anything is sent."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from typer.testing import CliRunner, Result

from rapidfire_automl.cli import app
from rapidfire_automl.mailboxes import FolderMailbox


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), catch_exceptions=False)


def refused(*words: str) -> str:
    """What is said of a mistake: a plain line."""
    result = call(*words)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Error:" not in line and "--debug" not in line
    return line.removeprefix("error: ")


STUDY = ("--storage", "sqlite:///typo.db", "--study", "first")


@pytest.mark.parametrize(
    "words",
    [
        ("pause", "3"),
        ("resume", "3"),
        ("stop", "3"),
        ("clone", "3", "--set", "learning_rate=1e-4"),
        ("add", "--set", "learning_rate=1e-4"),
        ("extend", "3", "--chunks", "1"),
        ("set-policy", "off"),
        ("checkpoint",),
        ("cancel",),
        ("worker",),
    ],
)
def test_a_storage_that_is_not_there_is_not_made(folder: Path, words: tuple[str, ...]) -> None:
    assert "there is no file typo.db." in refused(*words, *STUDY)
    assert not list(folder.iterdir())


def test_a_study_that_is_not_there_is_told_with_those_that_are(folder: Path) -> None:
    for name in ("first", "second"):
        optuna.create_study(storage="sqlite:///study.db", study_name=name)
    for verb in (("pause", "3"), ("worker",)):
        said = refused(*verb, "--storage", "sqlite:///study.db", "--study", "thrid")
        assert "sqlite:///study.db has no study thrid; it has first, second." in said
    assert "`--study` must be given" in refused("pause", "3", "--storage", "sqlite:///study.db")


def test_a_server_that_is_not_there_is_named_once_and_without_its_password(folder: Path) -> None:
    said = refused("pause", "3", "--storage", "postgresql://me:s3cret@127.0.0.1:1/db", "--study", "first")
    assert said.count("127.0.0.1:1/db") == said.count("me:***@") == 1
    assert "s3cret" not in said


@pytest.fixture
def running(folder: Path) -> Path:
    """A run folder as of a search that runs."""
    (folder / "run").mkdir()
    (folder / "run" / "events.jsonl").touch()
    FolderMailbox(folder / "run").open()
    return folder / "run"


@pytest.mark.parametrize("verb", [("clone", "0"), ("add",), ("set-policy", "asha")])
def test_one_key_is_set_once(running: Path, verb: tuple[str, ...]) -> None:
    said = refused(*verb, "--set", "learning_rate=1e-4", "-s", " learning_rate =1e-3", "--run", "run")
    assert said == "`learning_rate` is set twice, to 1e-4 and to 1e-3. Leave one out."
    assert len(list((running / "commands").glob("*.json"))) == 1, "attempt.json; no command was sent"


def test_a_run_folder_that_cannot_be_written_to_is_told(running: Path) -> None:
    (running / "commands" / "answers").rmdir()
    (running / "commands" / "answers").touch()
    assert refused("pause", "0", "--run", "run") == "No command can be written to run: File exists."


def test_a_study_that_cannot_be_written_to_is_told(folder: Path) -> None:
    optuna.create_study(storage="sqlite:///study.db", study_name="first")
    where = "sqlite:///file:study.db?mode=ro&uri=true"
    said = refused("pause", "0", "--storage", where, "--study", "first")
    assert said == "No command can be written to study first: attempt to write a readonly database."


def test_a_policy_that_is_switched_off_takes_no_arguments(running: Path) -> None:
    said = refused("set-policy", "off", "--set", "x=1", "--run", "run")
    assert said == "A policy that is switched off takes no arguments, got `x`."
