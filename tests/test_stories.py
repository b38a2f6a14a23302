"""What `why` says of each kind of end, from the events of real searches."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from rapidfire_automl import RapidFireExecutor
from rapidfire_automl.event_log import FILE, EventLog
from rapidfire_automl.events import Event
from rapidfire_automl.stories import why
from rapidfire_policies import ASHA, Guard, Nop, Policy
from tests.executor.searches import Do, search, sft

pytestmark = pytest.mark.slow


def make(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
    """Trial 3 turns into NaN, 4 raises, 5 does not fit into memory."""

    @executor.objective
    def objective(trial: optuna.Trial) -> Any:
        def misbehave(model: Any, state: Any, **_: Any) -> None:
            if state.global_step < 3:
                return
            if trial.number == 3:
                with torch.no_grad():
                    next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
            if trial.number == 4:
                raise RuntimeError("the disk of the tokenizer is on fire")
            if trial.number == 5:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

        return sft(executor, trial, lr=trial.suggest_float("lr", 1e-5, 1.0, log=True), callbacks=[Do(misbehave)])

    return objective


def run(folder: Path, lrs: list[float], policy: Policy, at: Callable[[RapidFireExecutor, Event], None]) -> None:
    def prepare(executor: RapidFireExecutor) -> None:
        executor.add_listener(log)
        executor.add_listener(lambda event: at(executor, event))

    with EventLog(folder / FILE) as log:
        log(Event("search_started", 0.0, data={"study": "s", "direction": "minimize", "chunks": 3}))
        search(lrs, policy, objective=make, slots=8, prepare=prepare, output_dir=folder)


def test_each_kind_of_end(tmp_path: Path) -> None:
    def at(executor: RapidFireExecutor, event: Event) -> None:
        if event.kind == "step" and (event.trial, event.data["step"]) == (2, 3):
            executor.stop(2)
        if event.kind == "step" and (event.trial, event.data["step"]) == (0, 3):
            executor.clone(0, set={"lr": "/2"}, warm_start=True)
            executor.add({"lr": 0.09})
        if event.kind == "step" and (event.trial, event.data["step"]) == (6, 1):
            executor.extend(6, 2)

    run(tmp_path, [1e-1, 1e-5, 3e-2, 1e-2, 1e-2, 1e-2], Guard(ASHA(reduction_factor=4, min_resource=2)), at)
    value = "[0-9]+[.][0-9]+"
    sentences = [
        rf"Trial 0 is complete after chunk 3 of 3 at {value}, [12].. of 2 complete trials[.]",
        rf"Trial 1 was stopped by Guard\(ASHA\) after chunk 2 of 3: its value {value} was .* of [0-9] at that rung, and "
        rf"only the best goes on; it needed less than {value} \(trial [06]'s\)[.]",
        rf"Trial 2 was stopped by the command `stop` from Python after chunk 1 of 3 at {value}[.] "
        r"Guard\(ASHA\) had said continue \(next rung is 2\)[.]",
        r"Trial 3 was stopped by Guard\(ASHA\) after chunk 2 of 3: its value was NaN; it needed any finite value[.]",
        rf"Trial 4 failed after chunk 1 of 3 at {value}: RuntimeError: the disk of the tokenizer is on fire[.]",
        rf"Trial 5 failed after chunk 1 of 3 at {value}: it did not fit into memory, even alone: OutOfMemoryError: CUDA .*",
        rf"Trial 6, a warm clone of trial 0, is complete after chunk 5 of 5 \(extended by 2\) at {value}, .* trials[.]",
        rf"Trial 7, added by hand, was stopped by Guard\(ASHA\) after chunk 2 of 3: its value {value} was .*[.]",
    ]
    for trial, sentence in enumerate(sentences):
        assert re.fullmatch(sentence, why(trial, tmp_path)), why(trial, tmp_path)


def test_a_search_that_is_cancelled(tmp_path: Path) -> None:
    def at(executor: RapidFireExecutor, event: Event) -> None:
        if event.kind == "step" and (event.trial, event.data["step"]) == (0, 3):
            executor.cancel()

    run(tmp_path, [1e-1], Nop(), at)
    said = why(0, tmp_path)
    head = r"Trial 0 was ended with the search by the command `cancel` from Python after chunk 1 of 3 at [0-9.]+; its adapter"
    assert re.fullmatch(rf"{head} is in {re.escape(str(tmp_path))}.*adapter[.] Nop had said continue[.]", said), said
