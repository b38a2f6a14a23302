"""Names from people: a plain one or an error with the fix, and never a file outside the folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rapidfire_automl import AutoML, Experiment, RapidFireExecutor
from rapidfire_automl.event_log import EventLog
from rapidfire_automl.lookups import run_dir_of
from rapidfire_automl.names import LONGEST, check_folder, check_name
from rapidfire_automl.refusals import FolderInUse
from rapidfire_automl.settings import SettingsError, parse_settings

pytestmark = pytest.mark.faults

EVIL = ["../../x", "/etc/x", "..", ".", "", " ", "a\0b", "a/b", "a\\b", "C:x", "x\n", ".hidden", " x", "x ", "a" * 300]
SETTINGS: dict[str, Any] = {"base": "m", "data": {"train": "a", "eval": "b"}, "space": {"r": [4, 8]}}


@pytest.mark.parametrize("name", EVIL)
def test_an_evil_name_is_refused_everywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = "must have at most 100 characters" if len(name) > LONGEST else "must be a plain name"
    for build in (
        lambda: check_name(name, "it"),
        lambda: Experiment(name),
        lambda: AutoML("m", "sft", {"r": [4, 8]}, name=name),
        lambda: parse_settings({**SETTINGS, "search": {"study": name}}),
    ):
        with pytest.raises(ValueError, match=wanted):
            build()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["search", "lora sweep-2", "über_1.5+x", "-", "a" * LONGEST])
def test_a_plain_name_is_taken(name: str) -> None:
    assert check_name(name, "it") == name
    assert parse_settings({**SETTINGS, "search": {"study": name}}).search.study == name


@pytest.mark.parametrize("path", ["", "  ", "a\0b", "runs/a\nb", "x" * 300, "a/" * 3000])
def test_a_folder_that_can_not_be_is_refused(path: str) -> None:
    """A run folder may lie anywhere, since whoever names it means it."""
    for build in (
        lambda: check_folder(path, "it"),
        lambda: RapidFireExecutor("m", output_dir=path),
        lambda: Experiment("x", experiments_path=path),
        lambda: parse_settings({**SETTINGS, "output": {"dir": path}}),
    ):
        with pytest.raises(ValueError, match=r"must (name a folder|be a (folder's path|shorter path))"):
            build()
    assert check_folder("../../runs/x", "it") == "../../runs/x"


@pytest.mark.parametrize("name", ["..", "...", "a\x1bb", "x" * 200])
def test_a_search_file_that_can_not_name_its_run_folder(name: str) -> None:
    with pytest.raises(SettingsError, match=r"Rename it, or give `output\.dir`"):
        run_dir_of(None, name, {})


# -- which run folder ---------------------------------------------------------------------------------------------------

FACTS = {"search.chunks": 4, "search.seed": 0}
OTHERS = {"search.chunks": 8, "search.seed": 0}


def began(folder: Path, facts: Mapping[str, Any], status: str | None = None) -> Path:
    """A search was begun in a folder, and has ended so; None for a kill."""
    folder.mkdir(parents=True)
    (folder / "search.json").write_text(json.dumps(facts))
    (folder / "events.jsonl").write_text('{"kind": "search_started"}\n')
    if status is not None:
        (folder / "summary.json").write_text(json.dumps({"status": status}))
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.WARNING, "rapidfire_automl")
    return Path("runs")


@pytest.mark.parametrize("status", [None, "interrupted", "crashed"])
def test_the_newest_run_of_the_same_search_that_has_not_ended_is_taken(
    runs: Path, status: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert run_dir_of(None, "s", FACTS) == runs / "s"
    began(runs / "s", FACTS, status)
    assert run_dir_of(None, "s", FACTS) == runs / "s"
    began(runs / "s-2", FACTS, "complete")
    assert run_dir_of(None, "s", FACTS) == runs / "s"
    began(runs / "s-3", FACTS, status)
    began(runs / "s-4", FACTS, "failed")
    assert run_dir_of(None, "s", FACTS) == runs / "s-3"
    assert not caplog.text
    (runs / "s-2" / "search.json").unlink()
    (runs / "s-2" / "summary.json").unlink()
    (runs / "s-2" / "events.jsonl").unlink()
    (runs / "s-2").rmdir()
    assert run_dir_of(None, "s", FACTS) == runs / "s-3", "a gap in the numbers hides nothing"
    began(runs / "s-10", FACTS, status)
    assert run_dir_of(None, "s", FACTS) == runs / "s-10"


@pytest.mark.parametrize("status", ["complete", "failed", "cancelled"])
def test_what_has_ended_is_not_gone_on_with(runs: Path, status: str) -> None:
    began(runs / "s", FACTS, status)
    assert run_dir_of(None, "s", FACTS) == runs / "s-2"
    with pytest.raises(SettingsError, match=r"runs/s already holds a search; name another folder\."):
        run_dir_of("runs/s", "s", FACTS)


def test_a_run_that_is_passed_over_is_told_with_how_to_go_on_with_it(
    runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    began(runs / "s", OTHERS, "interrupted")
    assert run_dir_of(None, "s", FACTS) == runs / "s-2"
    assert caplog.messages == [
        "The search in runs/s has not come to its end and is another one (`search.chunks` was 8, is 4), so this one takes "
        "runs/s-2. To go on with it set that back and name it: `-o runs/s`."
    ]
    caplog.clear()
    began(runs / "s-2", FACTS)
    assert run_dir_of(None, "s", FACTS) == runs / "s-2"
    assert not caplog.text, "it was said when the newer one was begun"
    began(runs / "s-3", OTHERS)
    assert run_dir_of(None, "s", FACTS) == runs / "s-2"
    assert "The search in runs/s-3 has not come to its end" in caplog.text
    assert "this one goes on in runs/s-2" in caplog.text


def test_a_folder_in_which_a_search_is_under_way_is_left_alone(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By its own, another is begun; where it is named, it is refused."""
    began(runs / "s", FACTS)
    began(runs / "s-2", FACTS)
    with EventLog(runs / "s-2" / "events.jsonl"):
        assert run_dir_of(None, "s", FACTS) == runs / "s"
        with EventLog(runs / "s" / "events.jsonl"):
            assert run_dir_of(None, "s", FACTS) == runs / "s-3"
            assert run_dir_of(None, "s", OTHERS) == runs / "s-3"
            assert not caplog.text
        with pytest.raises(FolderInUse, match="A search is under way in runs/s-2"):
            run_dir_of("runs/s-2", "s", FACTS)


def test_a_folder_of_somebody_else_with_a_number_is_no_run(runs: Path) -> None:
    began(runs / "s", FACTS, "complete")
    began(runs / "s-x", FACTS)
    began(runs / "s-1", FACTS)
    began(runs / "s-02", FACTS)
    (runs / "s-2").write_text("a file")
    assert run_dir_of(None, "s", FACTS) == runs / "s-3"
