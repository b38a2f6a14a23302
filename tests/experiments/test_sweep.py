"""What experiments/rollouts/sweep.py says of its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.rollouts import sweep


def found(seed: int, policy: str, generated: int, rewards: list[float]) -> dict[str, Any]:
    reward = float(np.mean(rewards)) if rewards else None
    return {
        "seed": seed,
        "policy": policy,
        "data": "hash",
        "generated": generated,
        "wall_s": generated / 100,
        "reward": reward,
        "scores": rewards,
    }


def test_savings_and_differences_by_seed() -> None:
    runs = [
        found(0, "nop", 1000, [1.0, 0.0, 1.0, 1.0]),
        found(0, "policy", 400, [1.0, 0.0, 1.0, 0.5]),
        found(1, "nop", 1000, [1.0, 0.0]),
        found(1, "policy", 500, [1.0, 0.0]),
        found(2, "nop", 1000, [1.0]),
    ]
    compared = sweep.compare(runs)
    assert compared is not None
    assert [(one["seed"], one["saving"], one["difference"]) for one in compared["seeds"]] == [
        (0, 2.5, -0.125),
        (1, 2.0, 0.0),
    ]
    assert (compared["least_saving"], compared["mean_difference"]) == (2.0, -0.0625)
    low, high = compared["seeds"][0]["interval"]
    assert low < -0.125 < high <= 0
    assert sweep.compare(runs[:1]) is None


def test_a_search_without_a_winner_has_no_difference() -> None:
    compared = sweep.compare([found(0, "nop", 1000, [1.0]), found(0, "policy", 500, [])])
    assert compared is not None
    assert (compared["least_saving"], compared["mean_difference"]) == (2.0, None)
    assert compared["seeds"][0]["interval"] is None


def test_results_are_written_after_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made_up(config: dict[str, Any], seed: int, policy: str, base: str) -> dict[str, Any]:
        if seed == 1:
            raise KeyboardInterrupt
        return found(seed, policy, 1000 if policy == "nop" else 400, [0.5, 1.0])

    monkeypatch.setattr(sweep, "in_process", made_up)
    out = tmp_path / "sweep.json"
    sweep.run({"seeds": [0, 1], "sweep": {}}, [0, 1], tmp_path, out)
    results = json.loads(out.read_text())
    assert results["status"] == "cancelled"
    assert [(run["seed"], run["policy"]) for run in results["runs"]] == [(0, "nop"), (0, "policy")]
    assert results["comparison"]["median_saving"] == 2.5
    assert results["data"] == {"0": "hash"}
    assert results["config"]["policies"]["policy"].startswith("NonInferior(")
