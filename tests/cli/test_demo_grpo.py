"""`rapidfire-automl demo-grpo`, with the training made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rapidfire_automl import demo, demo_grpo, executor
from rapidfire_automl.cli import app
from rapidfire_automl.demo_grpo import Sweep, prompts
from tests.fake_executor import FakeExecutor

# By num_generations, learning rate and beta, as the grid goes.
LOW, HIGH = [0.3, 0.35, 0.4, 0.45, 0.5], [0.6, 0.8, 0.9, 0.95, 0.95]
VALUES = {trial: (LOW if trial % 4 < 2 else HIGH) for trial in range(12)}


@pytest.fixture
def faked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    given: dict[str, Any] = {}

    def fake(model: str, **options: Any) -> FakeExecutor:
        given.update(options)
        return FakeExecutor(options["slots"], options["chunks"], options["seed"], values=VALUES, generates=100)

    def suggest(sweep: Sweep, *_: Any) -> Any:
        choices = {name: list(dict.fromkeys(point[name] for point in sweep.points)) for name in sweep.points[0]}
        return lambda trial: [trial.suggest_categorical(name, values) for name, values in choices.items()]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "base_path", lambda: tmp_path)
    monkeypatch.setattr(demo_grpo, "base_path", lambda: tmp_path)
    monkeypatch.setattr(demo_grpo, "build_objective", suggest)
    monkeypatch.setattr(executor, "RapidFireExecutor", fake)
    return tmp_path


def test_it_ends_with_the_table_and_the_answer(faked: Path) -> None:
    result = CliRunner().invoke(app, ["demo-grpo", "-q"], catch_exceptions=False, env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith(tuple("0123456789 "))]
    trials = [row for row in rows if row[:1] in (["4"], ["8"], ["16"])]
    assert [row[:3] for row in trials[:2]] == [["4", "0.0001", "0"], ["4", "0.0001", "0.04"]]
    assert len(trials) == 12
    assert "Which num_generations is worth its cost here?" in result.stdout
    assert result.stdout.rstrip().endswith("and is no better for it.")
    summary = json.loads((faked / "runs/demo-grpo/summary.json").read_text())
    assert summary["num_generations"]["per_step"] == summary["num_generations"]["per_token"] == 4
    assert summary["sweep"]["groups"] == [4, 8, 16]
    assert (len(summary["trials"]), summary["slots"], summary["chunks"]) == (12, 12, 5)


def test_as_json_and_another_seed(faked: Path) -> None:
    result = CliRunner().invoke(app, ["demo-grpo", "--json", "--seed", "3"], catch_exceptions=False)
    summary = json.loads(result.stdout)
    assert summary["seed"] == summary["sweep"]["seed"] == 3
    assert len(summary["num_generations"]["answer"]) == 3


def test_the_grid_and_its_prompts() -> None:
    pytest.importorskip("reasoning_gym")
    points = Sweep().points
    assert len(points) == 12
    assert points[0] == {"num_generations": 4, "learning_rate": 1e-4, "beta": 0.0}
    train, held_out = prompts(Sweep())
    assert (len(train), len(held_out)) == (128, 64)
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert train["prompt"][0].startswith("State the final answer to the following arithmetic problem: ")
