"""Auto: its rule is the formula, and a budget is kept; its quality on recorded curves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rapidfire_automl.replay import hold_last, replay
from rapidfire_policies import Auto, History, RisingBound, Spare, TrialHistory, TrialState, Verdict
from rapidfire_policies.auto import RULE

CURVES = Path(__file__).resolve().parents[3] / "shared" / "data" / "curves"


def stopped_by_the_formula(history: History) -> set[int]:
    """The docstring of `Auto`, trial by trial, for finite values."""
    live = [t for t in history.trials if t.state in (TrialState.RUNNING, TrialState.PAUSED, TrialState.COMPLETE)]
    leader = min(live, key=lambda t: (max(t.values[-2:]), t.number))
    top = min(live, key=lambda t: (t.values[-1], t.number))
    stopped = set()
    for trial in history.running:
        r, values = trial.resource, trial.values
        if r <= 3 or trial is top:
            continue
        w = min(r - 1, max(3, r // 3))
        best, before = min(values), min(values[: r - w])
        s = np.std(trial.scores[-1] - leader.scores[-1], ddof=1) / np.sqrt(len(trial.scores[-1])) if trial.scores else 0
        bound = best - (history.chunks - r) * (before - best) / w - 2 * s
        later = [np.mean(t.values[r // 2 : r]) for t in history.trials if t is not trial and t.resource >= r]
        if bound > max(leader.values[-2:]) and later and best > np.quantile(later, 1 / 3):
            stopped.add(trial.number)
    return stopped


@pytest.mark.parametrize("with_scores", [False, True])
def test_the_rule_is_the_formula(with_scores: bool) -> None:
    rng = np.random.default_rng(int(with_scores))
    seen = 0
    for _ in range(150):
        count, chunks = int(rng.integers(2, 20)), int(rng.integers(5, 30))
        level, noise = rng.exponential(size=count), rng.choice((0.0, 0.05, 0.5))
        trials = []
        for number in range(count):
            done = int(rng.integers(1, chunks))
            state = rng.choice((TrialState.RUNNING, TrialState.RUNNING, TrialState.STOPPED, TrialState.PAUSED))
            examples = rng.normal(level[number] + 1 / np.arange(1, done + 1)[:, None], noise, (done, 16))
            values = tuple(examples.mean(axis=1).tolist())
            scores = tuple(examples) if with_scores else ()
            trials.append(TrialHistory(number, values, TrialState(str(state)), scores=scores))
        history = History(tuple(trials), chunks=chunks)
        if not history.live:
            continue
        expected = stopped_by_the_formula(history)
        said = Auto().decide(history)
        assert {n for n, decision in said.items() if decision.verdict is Verdict.STOP} == expected
        seen += len(expected)
    assert seen > 50


def test_what_falls_back_for_a_while_is_spared_and_what_is_noise_too() -> None:
    good = [TrialHistory(n, (0.9, 0.6, 0.5, 0.4 + n / 50)) for n in range(2)]
    falls_back = TrialHistory(2, (0.55, 0.65, 0.65, 0.65))
    stuck = [TrialHistory(n, (0.7 + n / 50,) * 4) for n in range(3, 7)]
    rule = RisingBound(window=3, keep=1, errors=2.0)
    history = History((*good, falls_back, *stuck), chunks=8)
    stops = [{n for n, d in policy.decide(history).items() if d.verdict is Verdict.STOP} for policy in (rule, Auto())]
    assert stops == [{2, 3, 4, 5, 6}, {3, 4, 5, 6}]

    # .7 and more against the leader's .5 for sure, on ten examples that were all better by .2 or on ones that differ.
    theirs = np.linspace(0, 1, 10)
    for mine, stopped in ((theirs + 0.2, {3, 4, 5, 6}), (theirs[::-1] + 0.2, set())):
        scored = [
            TrialHistory(t.number, t.values, scores=(theirs if t.number < 2 else mine,) * 4) for t in history.trials
        ]
        said = Auto().decide(History(tuple(scored), chunks=8))
        assert {n for n, decision in said.items() if decision.verdict is Verdict.STOP} == stopped


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
    inner = RisingBound(window=chosen["window"], keep=1, errors=chosen["errors"])
    assert Spare(inner, share=RULE.share) == RULE
    assert chosen["share"] == pytest.approx(RULE.share, abs=1e-4)
