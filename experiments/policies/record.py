"""Tables of our own: what the executor records when nobody is stopped, for `replay` to play back.

    python experiments/policies/record.py                       # both tasks, about ten minutes of one core
    python experiments/policies/record.py --tasks dpo --out runs/tables.npz
    python experiments/policies/record.py --config experiments/policies/heldout.toml \
        --out experiments/policies/heldout_tables.npz

The base is the tests' language model, which knows a third of one-digit addition; a trial is a LoRA adapter on it, its
hyperparameters drawn at random from the ranges in `record.toml`. SFT and DPO teach it more of its sums. All trials have
the same number of optimizer steps, so a chunk of a larger batch costs more tokens.

Every table of the configuration is a task; what stands above them holds for all, and a task may give its own.

`tables.npz` has, for each task, `<task>_scores` `(trials, chunks, examples)` float32, per-example scores after every
chunk on the same held-out examples, lower is better, NaN where a trial had failed before; `<task>_tokens`
`(trials, chunks)`; `<task>_base` `(examples,)`, the untrained base's scores; `<task>_params`, the hyperparameters as a
JSON string, one mapping a trial. A value is the mean over its examples. `tables.json` says where they come from.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import provenance  # noqa: E402

SETTINGS = {
    "model", "trainer", "data", "rows", "held_out", "seed", "trials", "slots", "space", "max_steps", "chunks", "metric",
    "eval_batch_size",
}  # fmt: skip
OPTIONAL: dict[str, Any] = {"arguments": {}, "significant_bits": 24}
"""`arguments` of every trial's trainer; the bits of a score's mantissa that are kept."""
LORA = ("r", "alpha_over_r", "target_modules", "lora_dropout")


def tasks_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The configuration's tasks, each with the settings that hold for all.

    Raises:
        ValueError: A task lacks a setting, or has one that does not exist.
    """
    common = {name: value for name, value in config.items() if not isinstance(value, Mapping)}
    tasks = {name: {**OPTIONAL, **common, **own} for name, own in config.items() if isinstance(own, Mapping)}
    for name, task in tasks.items():
        if missing := sorted(SETTINGS - set(task)):
            raise ValueError(f"`{missing[0]}` must be given, for {name} or for all tasks.")
        if unknown := sorted(set(task) - SETTINGS - set(OPTIONAL)):
            raise ValueError(f"{name} has a setting {unknown[0]!r}, which does not exist.")
        if task["trainer"] not in ("sft", "dpo"):
            raise ValueError(f"`trainer` must be 'sft' or 'dpo', got {task['trainer']!r}.")
    return tasks


def suggest(trial: Any, space: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One value of each parameter, drawn by the study's sampler."""
    drawn: dict[str, Any] = {}
    for name, given in space.items():
        if "choices" in given:
            drawn[name] = trial.suggest_categorical(name, given["choices"])
        else:
            drawn[name] = trial.suggest_float(name, given["low"], given["high"], log=given.get("log", False))
    return drawn


def data(name: str, rows: int, held_out: int, seed: int) -> tuple[Any, Any]:
    """Training rows and held-out rows, no prompt in both."""
    from datasets import Dataset

    from experiments.policies.tasks import rows_of

    drawn = Dataset.from_list(rows_of(name, rows + held_out, seed))
    return drawn.select(range(held_out, rows + held_out)), drawn.select(range(held_out))


def build(executor: Any, trial: Any, task: Mapping[str, Any], sets: tuple[Any, Any], folder: Path) -> Any:
    """A trial's trainer."""
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    drawn = suggest(trial, task["space"])
    given = {name: drawn.pop(name) for name in LORA if name in drawn}
    targets = given["target_modules"]
    lora = LoraConfig(
        r=given["r"],
        lora_alpha=given["r"] * given["alpha_over_r"],
        lora_dropout=given.get("lora_dropout", 0.0),
        target_modules=targets if targets == "all-linear" else targets.split(),
        task_type="CAUSAL_LM",
    )
    settings: dict[str, Any] = {
        "output_dir": str(folder / str(trial.number)),
        "max_steps": task["max_steps"],
        "logging_steps": task["max_steps"],
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": task["seed"],
        **task["arguments"],
        **drawn,
    }
    trainer, arguments = (DPOTrainer, DPOConfig) if task["trainer"] == "dpo" else (SFTTrainer, SFTConfig)
    return trainer(
        model=executor.model(trial),
        args=arguments(**settings),
        peft_config=lora,
        train_dataset=sets[0],
        eval_dataset=sets[1],
        processing_class=executor.tokenizer,
    )


def record(name: str, task: Mapping[str, Any]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Train every trial of a task to its end.

    Returns:
        Its arrays by name, and what is known of the run.
    """
    import datasets
    import optuna

    from experiments.policies.tasks import METRICS
    from rapidfire_automl import RapidFireExecutor
    from rapidfire_automl.plan import Plan

    datasets.disable_progress_bars()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    begin = time.monotonic()
    study = optuna.create_study(
        sampler=optuna.samplers.RandomSampler(seed=task["seed"]), pruner=optuna.pruners.NopPruner()
    )
    sets = data(task["data"], task["rows"], task["held_out"], task["seed"])
    with tempfile.TemporaryDirectory(prefix="record-") as made:
        executor = RapidFireExecutor(
            str(provenance.ROOT / task["model"]),
            slots=task["slots"],
            chunks=task["chunks"],
            metric=METRICS.get(task["metric"], task["metric"]),
            eval_batch_size=task["eval_batch_size"],
            dtype="float32",
            device="cpu",
            seed=task["seed"],
            # A plan that is calibrated would depend on the machine and, by rounding, the curves on the plan.
            plan=Plan(budget_tokens=4096, reason="fixed, so that the tables do not depend on the machine"),
            output_dir=Path(made) / "out",
        )

        @executor.objective
        def objective(trial: optuna.Trial) -> Any:
            return build(executor, trial, task, sets, Path(made))

        with executor:
            executor.optimize(study, objective, n_trials=task["trials"])
            records, base = dict(executor.records), executor.base_scores
    arrays = collect(list(records.values()), task["chunks"], task["held_out"])
    arrays["scores"] = shortened(arrays["scores"], task["significant_bits"])
    assert base is not None
    arrays["base"] = np.asarray(base, dtype=np.float32)
    about = {
        "trials": len(records),
        "failed": {str(n): r.error for n, r in records.items() if r.error},
        "states": sorted({str(r.state) for r in records.values()}),
        "fused": sum(r.fused for r in records.values()),
        "tokens": int(np.nansum(arrays["tokens"])),
        "wall_s": time.monotonic() - begin,
    }
    return {f"{name}_{which}": array for which, array in arrays.items()}, about


def collect(records: Sequence[Any], chunks: int, examples: int) -> dict[str, NDArray[Any]]:
    """Arrays of records of `chunks` values and `(examples,)` scores each; NaN where a trial had ended before."""
    scores = np.full((len(records), chunks, examples), np.nan, dtype=np.float32)
    tokens = np.zeros((len(records), chunks), dtype=np.int32)
    for row, one in enumerate(records):
        for k, of_chunk in enumerate(one.scores):
            scores[row, k] = of_chunk
        tokens[row, : len(one.tokens)] = one.tokens
    params = json.dumps([dict(one.params) for one in records], sort_keys=True)
    return {"scores": scores, "tokens": tokens, "params": np.array(params)}


def shortened(scores: NDArray[Any], bits: int) -> NDArray[Any]:
    """Scores with so many bits in the mantissa, rounded: fewer are smaller files.

    >>> shortened(np.array([1.2345, -1e30, np.inf]), 4).tolist()
    [1.25, -1.0299661126854364e+30, inf]
    """
    mantissa, exponent = np.frexp(scores)
    return np.ldexp(np.round(mantissa * 2.0**bits) / 2.0**bits, exponent).astype(scores.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "record.toml")
    parser.add_argument("--tasks", nargs="+", help="names in the configuration; all by default")
    parser.add_argument("--trials", type=int, help="of each task, to try it out")
    parser.add_argument("--out", type=Path, default=HERE / "tables.npz")
    given = parser.parse_args()
    config = tomllib.loads(given.config.read_text(encoding="utf-8"))
    for task in tasks_of(config) if given.trials else ():
        config[task]["trials"] = given.trials
    tasks = tasks_of(config)
    chosen = given.tasks or list(tasks)
    if unknown := [name for name in chosen if name not in tasks]:
        parser.error(f"`--tasks` must be of {', '.join(tasks)}, got {unknown[0]}.")
    about: dict[str, Any] = {
        "experiment": "policies/record",
        "status": "running",
        "seed": config["seed"],
        "config": config,
        **provenance.provenance(),
        "load": {"before": provenance.load(), "after": None},
        "model_sha256": provenance.sha256(provenance.ROOT / config["model"]),
        "tasks": {},
    }
    arrays: dict[str, NDArray[Any]] = {}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for task in chosen:
        made, about["tasks"][task] = record(task, tasks[task])
        arrays |= made
        partial = given.out.with_name(given.out.name + ".partial")
        with partial.open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **arrays)
        partial.replace(given.out)
        about["load"]["after"] = provenance.load()
        about["tables_sha256"] = provenance.sha256(given.out)
        about["status"] = "complete" if task == chosen[-1] else "running"
        provenance.write(given.out.with_suffix(".json"), about)
        print(task, about["tasks"][task], flush=True)


if __name__ == "__main__":
    main()
