"""The throughput experiment, end to end on a toy base: what it writes, and how its ratios are made."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.measuring import merge, paired_ratio
from experiments.throughput.figure import draw
from experiments.throughput.run import parse

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "throughput" / "run.py"
CONFIG = """
seed = 3
rounds = 4
min_rounds = 2
steps = 2
serial_factor = 2
warmup = 2
batch_size = 1
rows = 16
dtype = "float32"
gradient_checkpointing = false
cell_limit_s = 120.0
time_limit_s = 600.0
[lora]
r = 2
target_modules = ["q_proj", "v_proj"]
[grids.small]
trials = [1, 3]
tokens = [8]
[bases.toy]
device = "cpu"
[bases.toy.llama]
vocab_size = 64
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 2
tie_word_embeddings = true
"""


def measure(folder: Path, *words: str) -> dict[str, Any]:
    (folder / "config.toml").write_text(CONFIG, encoding="utf-8")
    paths = [str(ROOT), str(ROOT / "policies"), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, str(SCRIPT), "--config", "config.toml", "--threads", "1", "--out", "results.json", *words],
        cwd=folder, check=True, timeout=500, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_ratios_are_of_paired_rounds() -> None:
    """A machine that slows down tenfold each round changes no ratio."""
    serial, joint = [1.0, 10.0, 100.0, 1000.0], [0.5, 5.0, 50.0, 500.0]
    assert set(paired_ratio(serial, joint, seed=0).values()) == {2.0}
    shuffled = paired_ratio(serial, joint[::-1], seed=0)
    assert shuffled["min"] <= shuffled["low"] < shuffled["median"] <= shuffled["high"] <= shuffled["max"]


def test_interval_covers_the_median_and_is_repeatable() -> None:
    serial = [1.0, 1.2, 0.9, 1.1, 1.05, 1.3, 0.95, 1.0]
    first, again = (paired_ratio(serial, [0.5] * 8, seed=1) for _ in range(2))
    assert first == again
    assert first["min"] <= first["low"] < first["median"] < first["high"] <= first["max"]
    assert first["median"] == pytest.approx(statistics.median(serial) / 0.5)


def test_the_committed_configuration_is_read() -> None:
    settings, bases, grid, _ = parse(["--grid", "1,8x16,64", "--bases", "random-35m", "--rounds", "2"])
    assert grid == {"trials": [1, 8], "tokens": [16, 64]}
    assert list(bases) == ["random-35m"]
    assert settings.config["rounds"] == settings.config["min_rounds"] == 2
    _, cuda, full, _ = parse(["--device", "cuda", "--grid", "full"])
    assert len(cuda) == 3
    assert full == {"trials": [1, 2, 4, 8, 16, 32], "tokens": [16, 32, 64, 128, 256, 512, 1024]}


@pytest.mark.parametrize("words", [["--grid", "8"], ["--grid", "0x16"], ["--bases", "none"], ["--rounds", "0"]])
def test_bad_options_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(words)


@pytest.mark.slow
def test_end_to_end(tmp_path: Path) -> None:
    results = measure(tmp_path)
    assert results["status"] == "complete"
    assert results["wall_s"] > 0
    assert results["config"]["rounds"] == 4
    assert results["seed"] == 3
    assert set(results) >= {"commit", "dirty", "versions", "hardware", "load", "bases", "data", "started"}
    assert results["bases"]["toy"]["parameters"] > 1000
    assert len(results["bases"]["toy"]["sha256"]) == 64
    assert [(cell["trials"], cell["tokens"], cell["status"]) for cell in results["cells"]] == [
        (1, 8, "complete"), (3, 8, "complete"),
    ]  # fmt: skip
    for cell in results["cells"]:
        rounds = cell["rounds"]
        assert len(rounds) == 4
        ratios = [one["serial_s"] / one["joint_s"] for one in rounds]
        assert cell["speedup"]["median"] == pytest.approx(statistics.median(ratios))
        assert cell["speedup"]["min"] == pytest.approx(min(ratios))
        against_sliced = [one["sliced_s"] / one["joint_s"] for one in rounds]
        assert cell["joint_over_sliced"]["median"] == pytest.approx(statistics.median(against_sliced))
        for way in ("serial", "joint", "sliced"):
            assert cell[way]["step_s"]["median"] == pytest.approx(statistics.median(one[f"{way}_s"] for one in rounds))
            assert cell[way]["busy"] is None
            assert cell[way]["first_step_s"] > 0
        if sys.platform == "linux":
            assert cell["joint"]["peak_bytes"] > 10**8
        assert cell["serial"]["host_s"] is None
        assert 0 < cell["joint"]["host_s"] < cell["joint"]["step_s"]["max"]
        assert cell["joint"]["fused"] is True
        assert cell["sliced"]["plan"]["trials_per_pass"] == 1
        assert cell["sliced"]["passes_per_step"] == cell["trials"]
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    results = measure(tmp_path, "--time-limit", "0")
    assert results["status"] == "time limit"
    for cell in results["cells"]:
        assert cell["status"] == "missing"
        assert "time limit" in cell["reason"]
        assert cell["joint"] is cell["speedup"] is None
    assert draw(results, tmp_path / "none.png") is None
    assert not (tmp_path / "figure.png").exists()


def test_a_later_run_fills_the_cells_that_are_missing() -> None:
    def results(**changed: Any) -> dict[str, Any]:
        facts = {"experiment": "throughput", "seed": 0, "commit": "a", "dirty": False, "versions": {}, "hardware": {}}
        return {**facts, "wall_s": 1.0, "config": {"steps": 2, "rounds": 10}, **changed}

    def cell(tokens: int, status: str, speedup: float | None) -> dict[str, Any]:
        return {"base": "toy", "trials": 1, "tokens": tokens, "status": status, "speedup": speedup}

    old = results(cells=[cell(8, "complete", 1.0), cell(16, "missing", None), cell(32, "missing", None)])
    new = results(cells=[cell(8, "complete", 9.0), cell(16, "complete", 2.0)], config={"steps": 2, "rounds": 3})
    merged = merge(old, new, "tokens")
    assert [one["speedup"] for one in merged["cells"]] == [1.0, 2.0, None]
    assert merged["wall_s"] == 2.0
    for name, value in (("commit", "b"), ("hardware", {"cpus": 2}), ("config", {"steps": 3})):
        with pytest.raises(ValueError, match="can't be merged"):
            merge(old, {**new, name: value}, "tokens")
