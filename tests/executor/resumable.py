"""A search in a process of its own, to be killed and run again: `python -m tests.executor.resumable FOLDER ...`."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import torch
from peft import LoraConfig

from rapidfire_automl import PolicyPruner, RapidFireExecutor, failpoints
from rapidfire_automl.attempts import last_attempts
from rapidfire_automl.event_log import FILE, EventLog, read_events
from rapidfire_automl.events import Event
from rapidfire_automl.plan import Plan
from rapidfire_policies import ASHA, Nop
from tests.executor.scripts import Script
from tests.executor.searches import PLAN, Do, make_executor, sft, sums, tiny_model

POLICIES: dict[str, Any] = {
    "nop": Nop(),
    "asha": ASHA(reduction_factor=2),
    "promotion": ASHA(reduction_factor=2, form="promote"),
}


def run(
    folder: Path,
    storage: str,
    *,
    study_name: str = "search",
    policy: str = "asha",
    n_trials: int = 6,
    alone: bool = True,
    chunks: int = 3,
    train_rows: int = 12,
    lowest: float = 1e-4,
    hidden: int = 32,
    term_at: int | None = None,
    terms: int = 1,
    checkpoint_at: int | None = None,
    steered: bool = False,
    more: bool = False,
    wide: bool = False,
    file_limit_bytes: int = 0,
    lifted_at: int | None = None,
    poisoned: int | None = None,
    raising: int | None = None,
) -> dict[str, Any]:
    """Search, or go on; what came of it, in plain JSON types."""
    begin_s = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=study_name,
        storage=storage,
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=3, n_startup_trials=3),
        pruner=PolicyPruner(POLICIES[policy]),
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if file_limit_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit_bytes, hard))
    plan = Plan(trials_per_pass=1, reason="a test") if alone else PLAN
    executor: RapidFireExecutor = make_executor(
        slots=2, chunks=chunks, plan=plan, output_dir=folder, model=tiny_model(hidden)
    )

    @executor.objective
    def objective(trial: optuna.Trial) -> Any:
        lr = trial.suggest_float("lr", lowest, 1.0, log=True)
        failpoints.hit("objective")

        def harm(model: Any, state: Any, **_: Any) -> None:
            if state.global_step == 5 and trial.number == raising:
                raise ZeroDivisionError("on purpose")
            if state.global_step == 5 and trial.number == poisoned:
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter.fill_(float("nan"))

        return sft(
            executor,
            trial,
            lr=lr,
            callbacks=[Do(harm)],
            num_train_epochs=2,
            train_dataset=sums(train_rows),
            peft_config=LoraConfig(
                r=trial.suggest_categorical("r", [256, 260] if wide else [2, 4]),
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
    moments: dict[int | None, Callable[[], Any]] = {
        term_at: lambda: _terminate(terms),
        lifted_at: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
        checkpoint_at: executor.checkpoint,
    }
    executor.add_listener(_at_steps(moments))
    executor.add_listener(_killer(checkpoints=0 if checkpoint_at is None else 2))
    with EventLog(folder / FILE) as log:
        executor.add_listener(log)
        with executor:
            executor.optimize(study, objective, n_trials=n_trials, more=more)
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
        "adapters": {str(number): record.adapter for number, record in records.items()},
        "log": _log(folder),
        "optuna": [trial.state.name for trial in last_attempts(study).values()],
        "attempts": len(study.trials),
        "seconds": time.monotonic() - begin_s,
        "events": [kind for kind, _, _ in events],
        "trained": sum(kind == "chunk_done" for kind, _, _ in events),
        "commands": script.effects(),
        "judges": sorted({data["by"] for kind, _, data in events if kind == "verdict"}),
    }


def _at_steps(moments: Mapping[int | None, Callable[[], Any]]) -> Callable[[Event], None]:
    """A listener that does something at the search's n-th step."""
    steps = itertools.count(1)

    def do(event: Event) -> None:
        if event.kind == "step" and (what := moments.get(next(steps))) is not None:
            what()

    return do


def _terminate(times: int) -> None:
    """SIGTERM, so often: the step from which it comes is not at its end before the last is heard."""
    for again in range(times):
        time.sleep(0.2 if again else 0.0)
        os.kill(os.getpid(), signal.SIGTERM)


def _killer(checkpoints: int) -> Callable[[Event], None]:
    """A listener that kills the process when so many checkpoints of trials are written."""
    written = itertools.count(1)

    def kill(event: Event) -> None:
        of_trial = event.kind == "checkpoint" and "trials" in event.data["folder"]
        if of_trial and next(written) == checkpoints:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def _sha256(adapter: str | None) -> str | None:
    if adapter is None:
        return None
    return hashlib.sha256((Path(adapter) / "adapter_model.safetensors").read_bytes()).hexdigest()


def _log(folder: Path) -> dict[str, list[Any]]:
    """The verdict log: by trial, every verdict of `events.jsonl` with the rule's numbers."""
    told: dict[str, list[Any]] = {}
    for line in read_events(folder).lines:
        if line.event.kind == "verdict":
            data = {name: value for name, value in line.event.data.items() if name != "again"}
            told.setdefault(str(line.event.trial), []).append([line.event.chunk, data])
    return told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("storage")
    parser.add_argument("options", type=json.loads)
    given = parser.parse_args()
    print(json.dumps(run(given.folder, given.storage, **given.options)))


if __name__ == "__main__":
    sys.exit(main())
