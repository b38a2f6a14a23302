"""The panel without a search and without a browser; clicks that steer a real one are in test_kernel.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from rapidfire_automl.cli.view import SearchView
from rapidfire_automl.control import Command, Controls, Effect
from rapidfire_automl.events import Event
from rapidfire_automl.mailboxes import StudyMailbox
from rapidfire_automl.notebook import _values, panel, table
from rapidfire_automl.steering import Search


class Recorder(Controls):
    """Takes commands and events."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.listeners: list[Any] = []
        self.chunks = 4

    def _send(self, command: Command) -> Any:
        self.commands.append(command)
        return type("Sent", (), {"command": command})()

    def add_listener(self, listener: Any) -> None:
        self.listeners.append(listener)


def test_without_ipywidgets_the_pip_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r"pip install 'rapidfire_automl\[notebook\]'"):
        panel(Recorder())


def test_every_button_sends_its_verb() -> None:
    pytest.importorskip("ipywidgets", reason="the notebook's panel needs ipywidgets")
    search = Recorder()
    shown = panel(search)
    shown.buttons["pause"].click()
    assert "No trial has begun yet." in shown.message.value
    (hear,) = search.listeners
    for number in (0, 1):
        hear(Event("trial_started", 0.0, number, 0, {"params": {"lr": 1e-3}, "boundaries": [2, 4, 6, 8]}))
    shown.trial.value = 1
    shown.changes.value = 'lr=1e-4, target_modules=["q_proj", "v_proj"]'
    shown.chunks.value = 3
    shown.policy.value = "asha"
    for button in shown.buttons.values():
        button.click()
    changes = {"lr": 1e-4, "target_modules": ["q_proj", "v_proj"]}
    assert [(c.verb, c.trial, dict(c.arguments)) for c in search.commands] == [
        ("pause", 1, {}),
        ("resume", 1, {}),
        ("stop", 1, {}),
        ("clone", 1, {"set": changes, "warm_start": True}),
        ("add", None, {"set": changes}),
        ("extend", 1, {"chunks": 3}),
        ("set-policy", None, {"name": "asha", "arguments": changes}),
        ("checkpoint", None, {}),
        ("cancel", None, {}),
    ]
    shown.changes.value = "nonsense"
    shown.buttons["add"].click()
    assert "Values must look like" in shown.message.value


def test_a_panel_on_a_study_shows_what_the_study_tells(tmp_path: Path) -> None:
    pytest.importorskip("ipywidgets", reason="the notebook's panel needs ipywidgets")
    study = optuna.create_study(study_name="s", storage=f"sqlite:///{tmp_path / 'study.db'}")
    study.set_user_attr("rapidfire:chunks", 3)
    box = StudyMailbox(study, every_s=0)
    box.open()
    shown = panel(Search(study="s", storage=f"sqlite:///{tmp_path / 'study.db'}"), every_s=0)
    assert list(shown.trial.options) == []
    first, second = study.ask(), study.ask()
    first.suggest_float("lr", 1e-4, 1e-2)
    second.suggest_float("lr", 1e-4, 1e-2)
    first.report(0.75, step=1)
    first.report(0.5, step=2)
    shown.refresh()
    assert list(shown.trial.options) == [0, 1]
    assert "<td>2/3<td>0.5" in shown.table.value
    shown.trial.value = 0
    shown.buttons["pause"].click()
    (command,) = box.take()
    assert (command.verb, command.trial) == ("pause", 0)
    assert command.source.startswith("notebook panel, ")
    box.answer(command, Effect("applied", "paused, at step 4 of 6"))
    study.tell(second, state=optuna.trial.TrialState.FAIL)
    shown.refresh()
    assert "pause 0 (applied): paused, at step 4 of 6" in shown.message.value
    assert shown.table.value.count(">paused<") == shown.table.value.count(">failed<") == 1


def test_the_table_escapes_what_comes_from_outside() -> None:
    view = SearchView(1, 4)
    view(Event("trial_started", 0.0, 0, 0, {"params": {"<b>": "<script>"}, "boundaries": [2]}))
    drawn = table(view.rows.values(), 4, best=None)
    assert "<script>" not in drawn
    assert "&lt;script&gt;" in drawn


def test_values() -> None:
    assert _values("a=1, b=[1, 2, 3], c=all-linear,") == {"a": 1, "b": [1, 2, 3], "c": "all-linear"}
    assert _values("  ") == {}


def test_the_view_shows_what_people_do(tmp_path: Path) -> None:
    view = SearchView(1, 4)
    view(Event("trial_started", 0.0, 0, 0, {"params": {}, "boundaries": [2, 4]}))

    def command(verb: str, effect: str = "applied", text: str = "done") -> None:
        data = {"verb": verb, "of": 0, "effect": effect, "text": text, "source": "a test"}
        view(Event("command", 0.0, 0, 0, data))

    command("pause", "refused")
    assert view.rows[0].state == "running"
    command("pause")
    assert view.rows[0].state == "paused"
    command("resume")
    assert view.rows[0].state == "running"
    command("clone")
    assert view.n_trials == 2
    assert view.commands[-1] == "clone 0 (applied): done"
