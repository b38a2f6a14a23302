"""Tables of our own: what the executor records when nobody is stopped, for `replay` to play back.

    python experiments/policies/record.py                       # both tasks, about ten minutes of one core
    python experiments/policies/record.py --tasks dpo --out runs/tables.npz

The base is the tests' language model, which knows a third of one-digit addition; a trial is a LoRA adapter on it, its
hyperparameters drawn at random from the ranges in `record.toml`. SFT and DPO teach it more of its sums. All trials have
the same number of optimizer steps, so a chunk of a larger batch costs more tokens.

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

TASKS = ("sft", "dpo")


def suggest(trial: Any, space: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One value of each parameter, drawn by the study's sampler."""
    drawn: dict[str, Any] = {}
    for name, given in space.items():
        if "choices" in given:
            drawn[name] = trial.suggest_categorical(name, given["choices"])
        else:
            drawn[name] = trial.suggest_float(name, given["low"], given["high"], log=given.get("log", False))
    return drawn


def data(task: str, rows: int, held_out: int, seed: int) -> tuple[Any, Any]:
    """Training rows and held-out rows, no prompt in both."""
    from tests.tiny.data import preferences, sums

    drawn = (preferences if task == "dpo" else sums)(rows + held_out, seed)
    return drawn.select(range(held_out, rows + held_out)), drawn.select(range(held_out))


def build(executor: Any, trial: Any, task: str, config: Mapping[str, Any], sets: tuple[Any, Any], folder: Path) -> Any:
    """A trial's trainer."""
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    drawn = suggest(trial, config[task]["space"])
    r, targets = drawn.pop("r"), drawn.pop("target_modules")
    lora = LoraConfig(
        r=r,
        lora_alpha=r * drawn.pop("alpha_over_r"),
        target_modules=targets if targets == "all-linear" else targets.split(),
        task_type="CAUSAL_LM",
    )
    settings: dict[str, Any] = {
        "output_dir": str(folder / str(trial.number)),
        "max_steps": config["max_steps"],
        "logging_steps": config["max_steps"],
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": config["seed"],
        **drawn,
    }
    trainer, arguments = (DPOTrainer, DPOConfig) if task == "dpo" else (SFTTrainer, SFTConfig)
    return trainer(
        model=executor.model(trial),
        args=arguments(**settings),
        peft_config=lora,
        train_dataset=sets[0],
        eval_dataset=sets[1],
        processing_class=executor.tokenizer,
    )


def record(task: str, config: Mapping[str, Any]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Train every trial of a task to its end.

    Returns:
        Its arrays by name, and what is known of the run.
    """
    import datasets
    import optuna

    from rapidfire_automl import RapidFireExecutor
    from rapidfire_automl.plan import Plan

    datasets.disable_progress_bars()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    begin = time.monotonic()
    study = optuna.create_study(
        sampler=optuna.samplers.RandomSampler(seed=config["seed"]), pruner=optuna.pruners.NopPruner()
    )
    sets = data(task, config[task]["rows"], config["held_out"], config["seed"])
    with tempfile.TemporaryDirectory(prefix="record-") as made:
        executor = RapidFireExecutor(
            str(provenance.ROOT / config["model"]),
            slots=config["slots"],
            chunks=config["chunks"],
            metric=config[task]["metric"],
            eval_batch_size=config["eval_batch_size"],
            dtype="float32",
            device="cpu",
            seed=config["seed"],
            # A plan that is calibrated would depend on the machine and, by rounding, the curves on the plan.
            plan=Plan(budget_tokens=4096, reason="fixed, so that the tables do not depend on the machine"),
            output_dir=Path(made) / "out",
        )

        @executor.objective
        def objective(trial: optuna.Trial) -> Any:
            return build(executor, trial, task, config, sets, Path(made))

        with executor:
            executor.optimize(study, objective, n_trials=config[task]["trials"])
            records, base = dict(executor.records), executor.base_scores
    arrays = collect(list(records.values()), config["chunks"], config["held_out"])
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
    return {f"{task}_{name}": array for name, array in arrays.items()}, about


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "record.toml")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--trials", type=int, help="of each task, to try it out")
    parser.add_argument("--out", type=Path, default=HERE / "tables.npz")
    given = parser.parse_args()
    config = tomllib.loads(given.config.read_text(encoding="utf-8"))
    for task in TASKS:
        config[task]["trials"] = given.trials or config[task]["trials"]
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
    for task in given.tasks:
        made, about["tasks"][task] = record(task, config)
        arrays |= made
        partial = given.out.with_name(given.out.name + ".partial")
        with partial.open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **arrays)
        partial.replace(given.out)
        about["load"]["after"] = provenance.load()
        about["tables_sha256"] = provenance.sha256(given.out)
        about["status"] = "complete" if task == given.tasks[-1] else "running"
        provenance.write(given.out.with_suffix(".json"), about)
        print(task, about["tasks"][task], flush=True)


if __name__ == "__main__":
    main()
