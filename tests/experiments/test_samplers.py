"""The comparison of samplers: regret, paired differences, and the whole script on made-up curves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.policies.samplers import Table, compare, make

ROOT = Path(__file__).resolve().parents[2]


def test_regret_is_0_for_the_best_value_and_1_for_the_median_configuration() -> None:
    table = Table("t", np.array([[3.0, 2.0], [1.0, 4.0], [9.0, np.nan]]), [])
    assert [table.regret(value) for value in (1.0, 4.0, np.nan)] == [0.0, 1.0, 1.0]


def test_differences_are_paired_by_table_and_seed() -> None:
    group = {"name": "g", "tuned_on": ["a"], "budgets": {"nop": [1, 2]}}
    blocks: list[dict[str, Any]] = []
    for table, base in (("a", 0.1), ("b", 0.8)):
        for sampler, shift, seeds in (("chunk", 0.0, 4), ("random", 0.05, 4), ("gp", 0.1, 2)):
            regret = [[base + shift + 0.01 * seed, base + shift] for seed in range(seeds)]
            blocks.append({"group": "g", "table": table, "policy": "nop", "sampler": sampler, "regret": regret})
    rows = {(row["part"], row["sampler"]): row for row in compare(blocks, [group], seed=0)}
    assert rows["all", "random"]["tables"] == 2
    assert rows["all", "random"]["ours_minus_theirs"]["mean"] == pytest.approx([-0.05, -0.05])
    assert rows["all", "random"]["ours_minus_theirs"]["high"] == pytest.approx([-0.05, -0.05])
    assert rows["all", "gp"]["seeds"] == 2
    assert rows["all", "gp"]["ours_minus_theirs"]["mean"] == pytest.approx([-0.1, -0.1])
    assert rows["tuned on", "chunk"]["regret"] == pytest.approx([0.115, 0.1])
    assert rows["not tuned on", "chunk"]["regret"] == pytest.approx([0.815, 0.8])
    assert rows["all", "chunk"]["ours_minus_theirs"] is None


def test_unknown_samplers_are_refused() -> None:
    with pytest.raises(ValueError, match="`samplers` must be some of random, tpe, tpe-no-liar, gp, chunk, got 'grid'"):
        make("grid", 0)


@pytest.mark.slow
def test_the_whole_script(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hp = rng.random((40, 2))
    curve = ((hp - 0.4) ** 2).sum(1, keepdims=True) + 1 / np.arange(1, 7)
    np.savez(tmp_path / "taskset_made_up.npz", curve=curve, hp=hp, hp_names=np.array(["x", "y"]))
    out = tmp_path / "samplers.json"
    words = ["--curves", tmp_path, "--out", out, "--seeds", "2", "--samplers", "random", "chunk"]
    script = ROOT / "experiments" / "policies" / "samplers.py"
    for extra in ([], ["--resume"]):
        done = subprocess.run([sys.executable, script, *words, *extra], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        results = json.loads(out.read_text(encoding="utf-8"))
        assert results["status"] == "complete"
        assert len(results["blocks"]) == 4
        assert {row["sampler"] for row in results["compared"]} == {"random", "chunk"}
        assert done.stdout.count("chunk") == (0 if extra else 2)
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert results["data"]["taskset_made_up.npz"]
