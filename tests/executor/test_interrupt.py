"""Ctrl-C, SIGTERM and `executor.stop()`: threads end within seconds, finished trials are kept."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from rapidfire_automl import RapidFireExecutor
from rapidfire_policies import TrialState
from tests.executor.forking import Forked
from tests.executor.searches import LRS, Do, by_lr, make_executor, sft, study_of

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def search(how: str, storage: str) -> None:
    """A search whose first two trials are short; prints its steps, and which threads are left at its end."""

    def slow(state: Any, **_: Any) -> None:
        time.sleep(0.05)
        print("step", state.global_step, flush=True)

    executor, built = make_executor(slots=2, chunks=2), []

    @executor.objective
    def objective(trial: optuna.Trial) -> Any:
        lr = trial.suggest_float("lr", 1e-4, 1e-2, log=True)
        built.append(trial.number)
        return sft(executor, trial, lr=lr, max_steps=4 if len(built) <= 2 else 4000, callbacks=[Do(slow)])

    study = optuna.create_study(study_name="search", storage=storage, pruner=optuna.pruners.NopPruner())
    try:
        with executor:
            if how == "executor.optimize":
                executor.optimize(study, objective, n_trials=8)
            else:
                study.optimize(objective, n_trials=8, n_jobs=executor.n_jobs)
    finally:
        left = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
        print("left", [name for name in left if name.startswith(("conductor", "trial-", "ThreadPool"))], flush=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGINT, "executor.optimize"),
        (signal.SIGINT, "study.optimize"),
        (signal.SIGTERM, "study.optimize"),
    ],
)
def test_a_signal_ends_the_search_and_keeps_what_is_finished(number: int, how: str, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    process = Forked(search, how, storage)
    process.until(lambda: "step 7\n" in process.out)
    begin = time.monotonic()
    process.send(number)
    code, lines = process.wait(60), process.out.splitlines()
    assert code == 128 + number, process.err
    assert time.monotonic() - begin < 10
    assert lines.count("left []") == 1, lines[-3:]
    study = optuna.load_study(study_name="search", storage=storage)
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == 2
    assert set(states) == {"COMPLETE", "FAIL"}, "no trial is left running"
    assert study.best_trial.state.name == "COMPLETE"


def counting(
    executor: RapidFireExecutor, at: int, act: Callable[[], Any], **given: Any
) -> Callable[[optuna.Trial], float]:
    """An objective that acts once, in the middle of a search."""
    steps: list[int] = []

    def count(**_: Any) -> None:
        steps.append(1)
        if len(steps) == at:
            act()

    @executor.objective
    def objective(trial: optuna.Trial) -> Any:
        lr = trial.suggest_float("lr", 1e-5, 1.0, log=True)
        return sft(executor, trial, lr=lr, callbacks=[Do(count)], **given)

    return objective


def no_thread_is_left() -> bool:
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        names = [thread.name for thread in threading.enumerate()]
        if not [name for name in names if name == "conductor" or name.startswith(("trial-", "ThreadPool"))]:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("threads", [False, True])
def test_stop_keeps_finished_trials(threads: bool) -> None:
    study = study_of(LRS[:6])
    with make_executor(slots=2) as executor:
        objective = counting(executor, at=15, act=executor.stop)
        if threads:
            study.optimize(objective, n_trials=6, n_jobs=executor.n_jobs)
        else:
            executor.optimize(study, objective, n_trials=6)
        states = [trial.state.name for trial in study.trials]
        assert states.count("COMPLETE") == 2
        assert set(states) <= {"COMPLETE", "FAIL", "WAITING"}, "no trial is left running"
        failed = [record for record in executor.records.values() if record.state is TrialState.FAILED]
        assert len(failed) == states.count("FAIL") >= 2
        assert {record.error for record in failed} == {"the search was ended"}
    assert no_thread_is_left()


def test_after_stop_the_executor_searches_on() -> None:
    study = study_of(LRS[:4])
    with make_executor(slots=2) as executor:
        executor.optimize(study, counting(executor, at=3, act=executor.stop), n_trials=2)
        assert [trial.state.name for trial in study.trials[:2]] == ["FAIL"] * 2
        executor.optimize(study, by_lr(executor), n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * 2 + ["COMPLETE"] * 2


def test_stop_from_another_thread() -> None:
    study = study_of(LRS[:2])
    with make_executor(slots=2) as executor:
        timer = threading.Timer(1.0, executor.stop)
        timer.start()
        begin = time.monotonic()
        executor.optimize(study, by_lr(executor, max_steps=100_000), n_trials=2)
        assert time.monotonic() - begin < 10
        timer.join()
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * 2
    assert no_thread_is_left()


def test_ctrl_c_in_a_cell_leaves_an_executor_that_works(request: pytest.FixtureRequest) -> None:
    """Without `with`, as in a notebook: Python's own handler raises in the main thread."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    study = study_of(LRS[:4])
    executor = make_executor(slots=2)
    # Long trials: the main thread looks up from its wait five times a second.
    objective = counting(executor, at=3, act=lambda: signal.raise_signal(signal.SIGINT), max_steps=100_000)
    with pytest.raises(KeyboardInterrupt):
        executor.optimize(study, objective, n_trials=2)
    assert no_thread_is_left()
    executor.optimize(study, by_lr(executor), n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * 2 + ["COMPLETE"] * 2
    executor.close()
    assert no_thread_is_left()


def test_signal_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with make_executor():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_error_inside_with_ends_the_search() -> None:
    executor = make_executor()

    def cell() -> None:
        with executor:
            executor.optimize(study_of(LRS[:2]), by_lr(executor), n_trials=2)
            raise LookupError

    with pytest.raises(LookupError):
        cell()
    assert no_thread_is_left()


def test_a_study_that_takes_no_ends_lets_every_thread_go() -> None:
    """Several trials have ended when the first can't be told, and one still trains."""

    class Full(optuna.storages.InMemoryStorage):
        def set_trial_state_values(self, trial_id: int, state: Any, values: Any = None) -> bool:
            if state.is_finished():
                raise RuntimeError("it is full")
            return super().set_trial_state_values(trial_id, state, values)

    with make_executor(slots=3, chunks=1) as executor:

        @executor.objective
        def objective(trial: optuna.Trial) -> Any:
            lr = trial.suggest_float("lr", 1e-5, 1.0, log=True)
            return sft(executor, trial, lr=lr, max_steps=200 if trial.number == 2 else 1)

        study = study_of(LRS[:3], storage=Full())
        with pytest.raises(RuntimeError, match="it is full"):
            executor.optimize(study, objective, n_trials=3)
        names = [thread.name for thread in threading.enumerate()]
        assert not [name for name in names if name.startswith(("trial-", "conductor"))]


def test_close_frees_the_base_and_may_be_called_twice() -> None:
    executor = make_executor()
    with executor:
        executor.optimize(study_of(LRS[:1]), by_lr(executor), n_trials=1)
    executor.close()
    assert executor._base is None
    assert executor.records[0].state is TrialState.COMPLETE
