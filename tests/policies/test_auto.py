"""Auto: its settings follow from the search, and a budget is kept; its quality on recorded curves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rapidfire_automl.replay import hold_last, replay
from rapidfire_policies import Auto, History, RisingBound, TrialHistory, Verdict

CURVES = Path(__file__).resolve().parents[3] / "shared" / "data" / "curves"


@pytest.mark.parametrize(
    ("trials", "chunks", "window", "keep"), [(64, 50, 3, 4), (48, 20, 3, 4), (16, 12, 2, 2), (8, 6, 1, 1)]
)
def test_the_settings_follow_from_the_search(trials: int, chunks: int, window: int, keep: int) -> None:
    rng = np.random.default_rng(trials)
    curves = np.cumsum(-rng.exponential(size=(trials, chunks)), axis=1) + rng.normal(size=(trials, 1))
    for done in range(1, chunks):
        history = History(tuple(TrialHistory(i, tuple(c[:done].tolist())) for i, c in enumerate(curves)), chunks=chunks)
        assert Auto().decide(history) == RisingBound(window=window, keep=keep).decide(history)


@pytest.mark.parametrize("slots", [8, 32])
@pytest.mark.parametrize("budget", [64, 100, 150])
def test_a_budget_is_kept_and_spent_on_the_best(budget: int, slots: int) -> None:
    rng = np.random.default_rng(7)
    curves = rng.uniform(size=(32, 1)) + rng.uniform(0.1, 1, size=(32, 1)) / np.arange(1.0, 21)
    free, bound = replay(curves, Auto(), slots=slots), replay(curves, Auto(budget=budget), slots=slots)
    assert bound.chunks <= max(budget, 32 + 20) < free.chunks
    assert bound.selected is not None
    regret = curves[bound.selected, -1] - curves[:, -1].min()
    assert regret < np.median(curves[:, -1]) - curves[:, -1].min()


def test_a_budget_that_cannot_carry_one_trial_still_ends_with_one() -> None:
    result = replay(np.linspace(1, 0, 12).reshape(3, 4), Auto(budget=1), slots=3)
    assert result.selected is not None
    assert result.chunks == 3 + 3


def test_bad_budget() -> None:
    with pytest.raises(ValueError, match="`budget` must be an integer >= 1, got 0"):
        Auto(budget=0)


@pytest.mark.skipif(not CURVES.exists(), reason="the recorded curves lie outside the repository")
@pytest.mark.parametrize("slots", [8, 64])
def test_quality_on_recorded_curves(slots: int) -> None:
    """Five seeds a table; experiments/policies has the whole comparison."""
    regrets, shares = [], []
    for path in sorted(CURVES.glob("taskset_*.npz")):
        table = np.fmin.accumulate(hold_last(np.load(path)["curve"]), axis=1)
        for seed in range(5):
            curves = table[np.random.default_rng(seed).choice(len(table), 64, replace=False)]
            finals = curves[np.isfinite(curves[:, -1]), -1]
            result = replay(curves, Auto(), slots=slots)
            regrets.append((curves[result.selected, -1] - finals.min()) / (np.median(finals) - finals.min()))
            shares.append(result.chunks / curves.size)
    assert np.mean(regrets) <= 0.012
    assert 1 / np.mean(shares) >= 5.5
    assert Verdict.STOP in {verdict.verdict for verdict in result.verdicts}


def test_the_settings_are_those_that_tune_reports() -> None:
    path = Path(__file__).resolve().parents[2] / "experiments" / "policies" / "tune.json"
    chosen = json.loads(path.read_text(encoding="utf-8"))["chosen"]
    curves = np.random.default_rng(0).normal(size=(64, 30)).cumsum(axis=1)
    history = History(tuple(TrialHistory(i, tuple(c.tolist())) for i, c in enumerate(curves)), chunks=50)
    assert Auto().decide(history) == RisingBound(**chosen).decide(history)
