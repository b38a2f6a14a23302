"""A search in a process of its own, to be killed and run again: `python -m tests.executor.resumable FOLDER ...`."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import optuna
from peft import LoraConfig

from rapidfire_automl import PolicyPruner, RapidFireExecutor
from rapidfire_automl.attempts import last_attempts
from rapidfire_automl.events import Event
from rapidfire_automl.plan import Plan
from rapidfire_policies import ASHA, Nop
from tests.executor.scripts import Script
from tests.executor.searches import PLAN, make_executor, sft

POLICIES: dict[str, Any] = {
    "nop": Nop(),
    "asha": ASHA(reduction_factor=2),
    "promotion": ASHA(reduction_factor=2, form="promote"),
}


def run(
    folder: Path,
    storage: str,
    *,
    policy: str = "asha",
    n_trials: int = 6,
    alone: bool = True,
    chunks: int = 3,
    train_rows: int = 12,
    lowest: float = 1e-4,
    hidden: int = 32,
    term_at: int | None = None,
    steered: bool = False,
) -> dict[str, Any]:
    """Search, or go on; what came of it, in plain JSON types."""
    from tests.executor.searches import sums, tiny_model

    study = optuna.create_study(
        study_name="search",
        storage=storage,
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=3, n_startup_trials=3),
        pruner=PolicyPruner(POLICIES[policy]),
    )
    plan = Plan(trials_per_pass=1, reason="a test") if alone else PLAN
    executor: RapidFireExecutor = make_executor(
        slots=2, chunks=chunks, plan=plan, output_dir=folder, model=tiny_model(hidden)
    )

    @executor.objective
    def objective(trial: optuna.Trial) -> Any:
        return sft(
            executor,
            trial,
            lr=trial.suggest_float("lr", lowest, 1.0, log=True),
            num_train_epochs=2,
            train_dataset=sums(train_rows),
            peft_config=LoraConfig(
                r=trial.suggest_categorical("r", [2, 4]),
                lora_dropout=0.1,
                target_modules=["q_proj", "v_proj"],
                task_type="CAUSAL_LM",
            ),
        )

    script = Script(executor)
    if steered:
        executor.add_listener(script)
    events = []
    executor.add_listener(lambda event: events.append((event.kind, event.trial, dict(event.data))))
    steps = itertools.count(1)

    def term(event: Event) -> None:
        if event.kind == "step" and next(steps) == term_at:
            os.kill(os.getpid(), signal.SIGTERM)

    executor.add_listener(term)
    with executor:
        executor.optimize(study, objective, n_trials=n_trials)
        records = executor.records
    return {
        "trials": {
            str(number): {
                "state": record.state.name,
                "params": record.params,
                "values": record.values,
                "verdicts": [list(verdict) for verdict in record.verdicts],
                "adapter": _sha256(record.adapter),
                "error": record.error,
            }
            for number, record in records.items()
        },
        "optuna": [trial.state.name for trial in last_attempts(study).values()],
        "attempts": len(study.trials),
        "events": [kind for kind, _, _ in events],
        "trained": sum(kind == "chunk_done" for kind, _, _ in events),
        "commands": script.effects(),
        "judges": sorted({data["by"] for kind, _, data in events if kind == "verdict"}),
    }


def _sha256(adapter: str | None) -> str | None:
    if adapter is None:
        return None
    return hashlib.sha256((Path(adapter) / "adapter_model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("storage")
    parser.add_argument("options", type=json.loads)
    given = parser.parse_args()
    print(json.dumps(run(given.folder, given.storage, **given.options)))


if __name__ == "__main__":
    sys.exit(main())
