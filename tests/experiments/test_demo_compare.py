"""The comparison with plain TRL: when a side had a trial as good, and the whole script on the tests' model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.demo_compare.compare import compare
from tests.tiny.data import MODEL, sums

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "demo_compare" / "run.py"
SEARCH = """
base = "{model}"
[data]
train = "train.jsonl"
eval = "eval.jsonl"
[args]
per_device_train_batch_size = 4
num_train_epochs = 1
bf16 = false
[space]
learning_rate = {{ low = 1e-4, high = 3e-2, log = true }}
r = [2, 4]
[search]
n_trials = 3
slots = 2
chunks = 3
policy = "nop"
"""


def sides(direction: str = "minimize") -> tuple[dict[str, Any], dict[str, Any]]:
    """Ours reaches 1.005 after 5 s and ends a trial at 1.0 after 9 s; plain TRL's best is 1.0, its second trial."""
    sign = -1 if direction == "maximize" else 1
    reached = [(2.0, 0, 1, 2.0), (5.0, 1, 2, 1.005), (8.0, 1, 3, 1.0)]
    ours = {
        "direction": direction, "wall_s": 10.0, "base_value": sign * 3.0,
        "reached": [{"time_s": t, "trial": n, "chunk": c, "value": sign * v} for t, n, c, v in reached],
        "finished": [{"time_s": 9.0, "trial": 1, "value": sign * 1.0}],
    }  # fmt: skip
    serial = {
        "configurations": "same", "wall_s": 60.0,
        "trials": [
            {"number": n, "value": None if v is None else sign * v, "values": [{"time_s": t, "value": v and sign * v}]}
            for n, t, v in ((0, 20.0, 2.0), (1, 40.0, 1.0), (2, 60.0, None))
        ],
    }  # fmt: skip
    return ours, serial


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_as_good(direction: str) -> None:
    found = compare(*sides(direction))
    assert found["wall_ratio"] == 6.0
    exact, near = found["as_good"][:2]
    assert (exact["ours_reached_s"], exact["ours_finished_s"], exact["serial_reached_s"]) == (8.0, 9.0, 40.0)
    assert (near["tolerance"], near["ours_reached_s"], near["ours_trial"], near["ours_chunk"]) == (0.01, 5.0, 1, 2)
    assert near["full_serial_over_reached"] == 12.0
    assert found["final_values_differ_by"] == 0.0


def test_never_as_good_is_null() -> None:
    ours, serial = sides()
    ours["reached"], ours["finished"] = ours["reached"][:1], []
    exact = compare(ours, serial)["as_good"][0]
    assert exact["ours_reached_s"] is exact["ours_finished_s"] is exact["full_serial_over_reached"] is None
    assert exact["serial_reached_s"] == 40.0


@pytest.mark.slow
def test_end_to_end(tmp_path: Path) -> None:
    sums(24).to_json(tmp_path / "train.jsonl")
    sums(8, seed=1).to_json(tmp_path / "eval.jsonl")
    (tmp_path / "search.toml").write_text(SEARCH.format(model=MODEL), encoding="utf-8")
    paths = [str(ROOT), str(ROOT / "policies"), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, str(SCRIPT), "--search", "search.toml", "--out", "results.json", "--chunk-evals"],
        cwd=tmp_path, check=True, timeout=500, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    ours, serial = results["ours"], results["serial"]
    assert results["status"] == "complete"
    assert len(ours["trials"]) == len(serial["trials"]) == 3
    assert [t["params"] for t in ours["trials"]] == [t["params"] for t in serial["trials"]]
    for mine, plain in zip(ours["trials"], serial["trials"], strict=True):
        assert mine["values"] == pytest.approx([point["value"] for point in plain["values"]], rel=1e-3)
    assert results["comparison"]["final_values_differ_by"] < 1e-3
    assert results["comparison"]["as_good"][1]["ours_reached_s"] < ours["wall_s"]
    assert serial["wall_s"] == serial["trials"][-1]["end_s"]
    assert str(ROOT) not in json.dumps(results)
    assert str(tmp_path) not in json.dumps(results)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
