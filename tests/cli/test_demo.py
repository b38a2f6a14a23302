"""`rapidfire-automl demo`, with the training made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rapidfire_automl import program
from rapidfire_automl.cli import app
from tests.fake_executor import FakeExecutor

material = pytest.importorskip("rapidfire_automl.demo")


@pytest.fixture
def faked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def write_data(folder: Path, train: int, held_out: int, seed: int) -> tuple[Path, Path]:
        paths = folder / "train.jsonl", folder / "eval.jsonl"
        for path, rows in zip(paths, (train, held_out), strict=True):
            path.write_text("\n".join(json.dumps({"prompt": f"{n}=", "completion": str(n)}) for n in range(rows)))
        return paths

    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(material, "base_path", lambda: tmp_path / "base")
    monkeypatch.setattr(material, "write_data", write_data)
    monkeypatch.setattr(material, "exact_answers", lambda base, adapter, rows, dtype: (41 if adapter else 2, len(rows)))
    monkeypatch.setattr(
        program, "build_executor", lambda p: FakeExecutor(p.settings.search.slots, p.settings.search.chunks)
    )
    monkeypatch.setattr(program, "build_objective", lambda p, executor: p.space.suggest)
    return tmp_path


def test_demo_says_by_how_much_the_best_beats_the_base(faked: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "-q"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "Exact     41 of 64 against 2 of 64" in result.stdout
    assert "below base 2.31" in result.stdout
    summary = json.loads((faked / "runs/demo/summary.json").read_text())
    assert summary["exact_answers"] == {"best": 41, "base": 2, "of": 64}
    assert (len(summary["trials"]), summary["slots"], summary["chunks"]) == (16, 8, 6)


def test_demo_as_json(faked: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--json", "--n-trials", "4"], catch_exceptions=False)
    assert json.loads(result.stdout)["exact_answers"]["best"] == 41
