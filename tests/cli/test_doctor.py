"""`rapidfire-automl doctor` and `version`."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rapidfire_automl.cli import app
from rapidfire_automl.versions import TESTED


def test_doctor_finds_what_a_search_needs() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert result.exit_code == 0
    assert {"system", "packages", "cpu", "memory", "device", "precision", "threads", "joint pass"} <= set(findings)
    assert findings["joint pass"]["grade"] == "good"


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    # The package's name `doctor` is the command; the module of that name is only in sys.modules.
    module = importlib.import_module("rapidfire_automl.cli.doctor")
    monkeypatch.setattr(module, "installed", lambda: {**dict.fromkeys(TESTED, "1"), "peft": None})
    result = CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    assert result.exit_code == 1
    assert "missing: peft. Run: pip install peft" in result.stdout


def test_tested_versions_are_those_of_the_constraints() -> None:
    text = (Path(__file__).parents[2] / "constraints.txt").read_text()
    pinned = dict(line.split("==") for line in text.splitlines() if "==" in line)
    assert {name: pinned[name] for name in TESTED} == TESTED


def test_version() -> None:
    result = CliRunner().invoke(app, ["version"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "torch " in result.stdout
