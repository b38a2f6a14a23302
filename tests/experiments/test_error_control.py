"""The error-control experiment: its short cut agrees with `decide`, and the whole script writes what it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.policies.error_control import against_best, crossing, draw, null_looks, stops, summarise, worse_scores
from rapidfire_policies import BettingRace, History, PairedRace, Policy, TrialHistory, Wilcoxon

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "policies" / "error_control.py"
CONFIG = """
seed = 0
searches = 40
power_searches = 40
batch = 25
chunks = 2
carried = 0.8
alphas = [0.10]
trials = [2, 3]
effect_sd = 0.2
power_alpha = 0.05
power_examples = [50, 400, 800]
[kinds]
PairedRace = ["normal", "binary"]
Wilcoxon = ["normal"]
BettingRace = ["binary"]
[examples]
PairedRace = [20]
Wilcoxon = [20]
BettingRace = [5, 20]
"""


@pytest.mark.parametrize("trials", [2, 5])
@pytest.mark.parametrize("policy", [PairedRace(alpha=0.5), BettingRace(alpha=0.5), Wilcoxon(alpha=0.5)], ids=repr)
def test_the_short_cut_agrees_with_decide(policy: Policy, trials: int) -> None:
    rng = np.random.default_rng(0)
    chunks, alpha = 1, 0.5
    differences = next(null_looks("binary", "independent", (60, trials - 1, 30), chunks, 0.8, rng))
    level = alpha / (chunks * (trials - 1))
    expected = stops(type(policy).__name__, against_best(differences), level, alpha)
    decided = []
    for rivals in differences:
        scores = [np.zeros(30), *(-rivals)]
        history = tuple(TrialHistory(n, (float(s.mean()),), scores=(s,)) for n, s in enumerate(scores))
        decided.append(str(policy.decide(History(history, chunks))[0].verdict) == "stop")
    assert decided == expected.tolist()
    assert 0 < sum(decided) < len(decided)


@pytest.mark.parametrize("kind", ["normal", "t3", "binary", "exponential left", "exponential right", "beta left"])
def test_null_differences_have_mean_zero(kind: str) -> None:
    drawn = draw(kind, (200_000,), np.random.default_rng(0))
    assert abs(drawn.mean()) < 4 * drawn.std() / np.sqrt(len(drawn))
    assert (drawn.mean() - np.median(drawn) < 0) == kind.endswith("left") or "binary" in kind or "left" not in kind


@pytest.mark.parametrize("kind", ["normal", "binary"])
def test_the_effect_is_what_it_says(kind: str) -> None:
    scores = worse_scores(kind, (500, 2, 1000), 0.2, np.random.default_rng(0))
    differences = scores[:, 1] - scores[:, 0]
    assert differences.mean() / differences.std() == pytest.approx(0.2, abs=0.01)


def test_correlated_looks_keep_most_differences() -> None:
    one, two = null_looks("normal", "correlated", (4, 3, 500), 2, 0.8, np.random.default_rng(0))
    assert (one == two).mean() == pytest.approx(0.8, abs=0.05)


def test_crossing() -> None:
    assert crossing([100, 200, 300], [0.2, 0.4, 0.8], 0.5) == pytest.approx(225)
    assert crossing([100, 200], [0.2, 0.4], 0.5) is None


def test_summary_counts_the_cells_that_hold() -> None:
    cell = {"policy": "A", "alpha": 0.1, "kind": "normal", "looks": "independent", "trials": 2, "examples": 20}
    summary = summarise([{**cell, "rate": 0.05, "low_99": 0.04}, {**cell, "rate": 0.2, "low_99": 0.15}])
    assert (summary["A"]["cells"], summary["A"]["hold"], summary["A"]["worst"]["0.1"]["rate"]) == (2, 1, 0.2)


@pytest.mark.slow
def test_the_script(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG, encoding="utf-8")
    subprocess.run(
        [sys.executable, str(SCRIPT), "--config", "config.toml", "--out", "error_control.json"],
        cwd=tmp_path, check=True, timeout=300, capture_output=True, text=True, env=dict(os.environ),
    )  # fmt: skip
    results = json.loads((tmp_path / "error_control.json").read_text(encoding="utf-8"))
    assert results["status"] == "complete"
    assert {"commit", "dirty", "versions", "hardware", "wall_s", "config", "seed"} <= set(results)
    # Two looks and two numbers of trials: normal for two policies, binary for one at 20 and one at 5 and 20.
    assert len(results["cells"]) == 4 * (2 + 1 + 2)
    assert {cell["searches"] for cell in results["cells"]} == {40}
    assert (tmp_path / "error_control.png").stat().st_size > 10_000
