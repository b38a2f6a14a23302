"""GRPO and RLOO from every way in, through the real executor on the tests' tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rapidfire_automl import (
    AutoML,
    Experiment,
    List,
    Range,
    RFGridSearch,
    RFGRPOConfig,
    RFLoraConfig,
    RFModelConfig,
    RFRLOOConfig,
    Sampling,
    reasoning_rows,
)
from rapidfire_automl.cli import app

pytestmark = pytest.mark.slow

MODEL = str(Path(__file__).parent / "tiny" / "model")
ARGS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "max_completion_length": 6,
    "num_train_epochs": 1,
    "gradient_checkpointing": False,
    "bf16": False,
}
TASK = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
LINES = ("Best", "Ranked", "Generated")


def digits(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """The share of digits among the letters."""
    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in completions]


async def brief(completions: Any, **columns: Any) -> list[float]:
    return [-0.01 * len(text) for text in completions]


@pytest.mark.parametrize(("trainer_type", "args_class"), [("GRPO", RFGRPOConfig), ("RLOO", RFRLOOConfig)])
def test_a_grid_over_group_sizes(trainer_type: str, args_class: Any, tmp_path: Path) -> None:
    config = RFModelConfig(
        MODEL,
        peft_config=RFLoraConfig(r=4, target_modules="all-linear"),
        training_args=args_class(num_generations=List([2, 4, 8]), learning_rate=1e-3, beta=0.02, **ARGS),
        reward_funcs=[digits, brief],
    )
    train, held_out = reasoning_rows("chain_sum", 16, 4, template="{question} =", **TASK)
    with Experiment("rl", experiments_path=tmp_path) as experiment:
        group = RFGridSearch(config, trainer_type)
        fit = experiment.run_fit(group, train_dataset=train, eval_dataset=held_out, num_chunks=2)
    assert (fit[0].direction, fit[0].metric) == ("maximize", "reward")
    assert fit.best is not None
    assert fit.best.best_value == max(values[-1] for values in fit.best.values.values())
    runs = fit.runs()
    assert all(row["status"] == "complete" and row["generated"] > 0 for row in runs)
    assert {place["trial"] for place in fit.best.summary["rankings"]["equal_steps"]} == {0, 1, 2}
    assert (fit.best.run_dir / "generated.png").is_file()
    assert (fit.best_adapter / "adapter_model.safetensors").is_file()  # type: ignore[operator]


def test_automl_over_weights_of_rewards(tmp_path: Path) -> None:
    space = {
        **ARGS,
        "num_generations": List([2, 4]),
        "learning_rate": Range(1e-4, 1e-2, log=True),
        "temperature": List([0.7, 1.0]),
        "reward_weights": List([[1.0, 0.0], [1.0, 1.0]]),
        "reward_funcs": [digits, brief],
        "r": 4,
    }
    train, held_out = reasoning_rows("chain_sum", 16, 4, template="{question} =", **TASK)
    sampling = Sampling(num_generations=2, max_completion_length=6, reward_weights=(1.0, 0.0))
    search = AutoML(
        MODEL, "grpo", space, n_trials=4, slots=4, chunks=2, eval_sampling=sampling, experiments_path=tmp_path
    )
    fit = search.fit(train, held_out)
    assert all(0 <= values[-1] <= 1 for values in fit.best.values.values())  # type: ignore[union-attr]


def test_a_reward_that_raises_fails_its_trial_and_names_itself(tmp_path: Path) -> None:
    def picky(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        raise KeyError("no such answer")

    space = {**ARGS, "num_generations": 4, "learning_rate": List([1e-3, 1e-4]), "reward_funcs": picky, "r": 4}
    train, held_out = reasoning_rows("chain_sum", 16, 4, **TASK)
    from rapidfire_automl.search import SearchFailed

    with pytest.raises(SearchFailed, match="picky"):
        AutoML(MODEL, "grpo", space, sampler="grid", chunks=2, experiments_path=tmp_path).fit(train, held_out)


def test_a_search_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "search.toml").write_text(f"""
base = '{MODEL}'
trainer = "grpo"
reward = ["reasoning_gym", "my_reward_of_digits:digits"]
[data.reasoning_gym]
tasks = {{ task = "chain_sum", min_terms = 2, max_terms = 2, max_digits = 1 }}
size = 16
eval_size = 4
[args]
per_device_train_batch_size = 8
max_completion_length = 6
num_train_epochs = 1
gradient_checkpointing = false
bf16 = false
reward_weights = [1.0, 0.1]
[lora]
r = 4
[space]
num_generations = [2, 4, 8]
[evaluation]
num_generations = 2
[search]
n_trials = 3
sampler = "grid"
policy = "nop"
chunks = 2
""")
    (tmp_path / "my_reward_of_digits.py").write_text(
        "def digits(completions, **_):\n"
        "    return [float(any(letter.isdigit() for letter in text)) for text in completions]\n"
    )
    result = CliRunner().invoke(app, ["run", "search.toml"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert all(f"\n{label}" in result.stdout for label in LINES)
    summary = json.loads((tmp_path / "runs/search/summary.json").read_text())
    assert [trial["state"] for trial in summary["trials"]] == ["complete"] * 3
    assert math.isfinite(summary["best_value"])
    generated = [sum(trial["generated"]) for trial in summary["trials"]]
    tokens = [sum(trial["tokens"]) for trial in summary["trials"]]
    assert min(generated) > 0
    assert summary["rankings"]["tokens"] == min(map(sum, zip(generated, tokens)))
