"""Workers on one study, each in a process of its own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from peft import LoraConfig

from rapidfire_automl import PolicyPruner, open_storage
from rapidfire_automl.attempts import last_attempts
from rapidfire_automl.control import Sent
from rapidfire_automl.events import Event
from rapidfire_automl.plan import Plan
from tests.executor.forking import Forked
from tests.executor.resumable import POLICIES
from tests.executor.searches import make_executor, sft

HEARTBEAT_S, GRACE_S = 1, 3


def run(
    folder: Path,
    storage: str,
    *,
    name: str = "worker",
    policy: str = "nop",
    n_trials: int = 4,
    slots: int = 2,
    chunks: int = 3,
    step_s: float = 0.0,
    shared: bool = True,
    patience_s: float = 60.0,
    pauses: int | None = None,
) -> None:
    """Work until nothing is left; prints an event a line, and what has come of the study.

    Args:
        pauses: A trial that this worker's own process pauses when it hears that another has it.
    """
    study = optuna.create_study(
        study_name="search",
        storage=open_storage(storage, heartbeat_s=HEARTBEAT_S if shared else None, grace_s=GRACE_S if shared else None),
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=3, n_startup_trials=3),
        pruner=PolicyPruner(POLICIES[policy]),
    )
    executor = make_executor(
        slots=slots,
        chunks=chunks,
        plan=Plan(trials_per_pass=1, reason="a test"),
        output_dir=folder,
        storage_patience_s=patience_s,
    )

    @executor.objective
    def objective(trial: optuna.Trial) -> Any:
        lora = LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        lr = trial.suggest_float("lr", 1e-4, 1.0, log=True)
        return sft(executor, trial, lr=lr, num_train_epochs=2, peft_config=lora)

    def say(event: Event) -> None:
        told = {"kind": event.kind, "trial": event.trial, "chunk": event.chunk, "data": dict(event.data)}
        print(json.dumps({**told, "worker": name}, default=str), flush=True)
        if event.kind == "step":
            time.sleep(step_s)
        if event.kind == "elsewhere" and event.data["of"] == pauses and event.data["state"] == "running" and not sent:
            sent.append(executor.pause(event.data["of"]))
            threading.Thread(target=say_what_came, daemon=True).start()

    sent: list[Sent] = []

    def say_what_came() -> None:
        effect = sent[0].wait(60.0)
        say(Event("answered", 0.0, pauses, None, {"text": effect and effect.text}))

    executor.add_listener(say)
    with executor:
        if shared:
            executor.work(study, objective, n_trials=n_trials)
        else:
            executor.optimize(study, objective, n_trials=n_trials)


def result(storage: str) -> dict[int, dict[str, Any]]:
    """What a study has come to: the last attempt at each trial."""
    study = optuna.load_study(study_name="search", storage=open_storage(storage))
    return {
        number: {
            "state": trial.state.name,
            "value": trial.value,
            "values": [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)],
            "params": trial.params,
            "attempt": 1 + len(trial.system_attrs.get("retry_history", ())),
            "adapter": trial.user_attrs.get("rapidfire:adapter"),
            "verdicts": trial.user_attrs.get("rapidfire:ledger", {}).get("verdicts", []),
            "worker": trial.user_attrs.get("rapidfire:worker", {}).get("pid"),
        }
        for number, trial in last_attempts(study).items()
    }


class Process(Forked):
    """A worker that runs, and what it has said."""

    def __init__(self, folder: Path, storage: str, failpoints: str = "", **options: Any) -> None:
        super().__init__(run, folder, storage, failpoints=failpoints, **options)

    @property
    def events(self) -> list[dict[str, Any]]:
        lines = self.out.splitlines()
        return [json.loads(line) for line in lines if line.startswith('{"kind"') and line.endswith("}")]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    def wait_for(self, what: Callable[[Mapping[str, Any]], bool], timeout_s: float = 90.0) -> None:
        """Wait until it has said something."""
        self.until(lambda: any(map(what, self.events)), timeout_s)
        assert any(map(what, self.events)), self.err[-3000:]

    def finish(self, code: int = 0) -> None:
        """Wait for its end."""
        assert self.wait() == code, self.err[-3000:]


def of(kind: str, **wanted: Any) -> Callable[[Mapping[str, Any]], bool]:
    """Whether an event is of a kind, and of a trial, or a chunk or later."""

    def is_it(event: Mapping[str, Any]) -> bool:
        if event["kind"] != kind or ("trial" in wanted and event["trial"] != wanted["trial"]):
            return False
        return (event["chunk"] or 0) >= wanted.get("chunk", 0)

    return is_it
