"""Infinity and NaN as values never become the best: whatever the direction, whoever looks, from every way in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest

from rapidfire_automl import Experiment, List, RFGridSearch, RFLoraConfig, RFModelConfig, RFSFTConfig
from rapidfire_automl.cli.view import SearchView
from rapidfire_policies import History
from tests.cli.test_end_to_end import base, command, folder
from tests.cli.test_interrupts import SMALL, _cli
from tests.executor.forking import Forked
from tests.executor.searches import LRS, Scripted, search, study_of
from tests.test_experiment_engine import QUESTIONS, chat
from tests.test_experiment_engine import base as chat_base

__all__ = ["base", "chat_base", "folder"]
pytestmark = [pytest.mark.faults, pytest.mark.slow]

RATES = (1e-4, 1e-3, 1e-2, 3e-2)
BAD = {RATES[0]: -math.inf, RATES[1]: math.inf, RATES[3]: math.nan}


def metric(trainer: Any) -> float:
    """Finite for one learning rate alone."""
    rate = trainer.args.learning_rate
    return BAD.get(rate, 0.5)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_through_an_experiment(chat_base: str, tmp_path: Path, direction: str) -> None:
    config = RFModelConfig(
        model_name=chat_base,
        peft_config=RFLoraConfig(r=2, target_modules=["q_proj"]),
        training_args=RFSFTConfig(
            learning_rate=List(list(RATES)), per_device_train_batch_size=4, max_steps=4, bf16=False, use_cpu=True
        ),
        formatting_func=chat,
    )
    view = SearchView(4, 2, maximize=direction == "maximize")
    with Experiment(
        "x", experiments_path=tmp_path, metric=metric, direction=direction, listeners=[view], policy="asha"
    ) as experiment:
        fit = experiment.run_fit(RFGridSearch(config, "SFT"), None, QUESTIONS, QUESTIONS[:8], num_chunks=2)
    assert fit.best is not None
    assert (fit.best_value, fit.best_params["learning_rate"]) == (0.5, RATES[2])
    runs = {row["learning_rate"]: row for row in fit.runs()}
    assert [rate for rate, row in runs.items() if row["best"]] == [RATES[2]]
    assert {row["status"] for rate, row in runs.items() if rate != RATES[2]} <= {"stopped", "failed"}
    assert view.best is not None and view.best.value == 0.5
    study = fit.searches[0].study
    assert study.best_value == 0.5
    reported = [value for trial in study.trials for value in trial.intermediate_values.values()]
    assert not any(map(math.isinf, reported)), "samplers take an infinity for the best there is"


def test_on_the_command_line(folder: Path) -> None:
    out = folder / "out"
    space = f"space={{learning_rate = {list(RATES)}}}"
    words = command(
        folder, "sft", *SMALL, "-s", space, "-s", "search.sampler=grid", "-s", "search.n_trials=4", "--json"
    )
    words += ["-s", "search.metric=tests.test_not_finite:metric", "-s", "search.direction=maximize", "--out", str(out)]
    process = Forked(_cli, words[words.index("run") :])
    assert process.wait() == 0, process.err
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["best_value"], summary["best_params"]) == (0.5, {"learning_rate": RATES[2]})
    assert json.loads(process.out)["best_trial"] == summary["best_trial"]
    errors = {trial["params"]["learning_rate"]: trial["error"] for trial in summary["trials"]}
    assert errors == {
        rate: None if rate == RATES[2] else f"ValueError: the last value is {BAD[rate]}" for rate in RATES
    }


@pytest.mark.parametrize("down", [True, False])
def test_with_several_objectives_and_in_the_policys_view(down: bool) -> None:
    """A policy sees what is not finite as it is, and the front has no such trial."""
    worst = {LRS[0]: -math.inf, LRS[1]: math.inf, LRS[2]: math.nan}
    directions = ["minimize", "minimize"] if down else ["maximize", "minimize"]
    policy = Scripted()
    study = study_of(LRS[:4], directions=directions, policy=policy)

    def two(trainer: Any) -> tuple[float, float]:
        return worst.get(trainer.args.learning_rate, 1.0), 1.0

    done = search(study=study, n_trials=4, metric=two)
    assert done.states() == ["FAIL", "FAIL", "FAIL", "COMPLETE"]
    assert [trial.number for trial in done.study.best_trials] == [3]
    seen: History = policy.seen[0]
    value = {trial.number: trial.values[0] for trial in seen.trials}
    assert all(not math.isfinite(value[number]) or value[number] >= value[3] for number in range(3))
    assert not any(math.isfinite(v) and v < value[3] for v in value.values())
    assert optuna.trial.TrialState.COMPLETE not in {trial.state for trial in study.trials[:3]}
