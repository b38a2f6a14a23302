"""Names from people: a plain one or an error with the fix, and never a file outside the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rapidfire_automl import AutoML, Experiment, RapidFireExecutor
from rapidfire_automl.lookups import run_dir_of
from rapidfire_automl.names import LONGEST, check_folder, check_name
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
