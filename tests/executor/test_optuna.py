"""Any storage, sampler and direction of Optuna's, through `study.optimize` and `executor.optimize`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from rapidfire_automl import PolicyPruner, RapidFireExecutor
from rapidfire_policies import ASHA, TrialState
from tests.executor.searches import LRS, Scripted, by_lr, make_executor, search, sft, study_of

pytestmark = pytest.mark.slow


def short(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
    return by_lr(executor, max_steps=3, per_device_train_batch_size=4)


def storage_of(kind: str, folder: Path) -> Any:
    if kind == "sqlite":
        return f"sqlite:///{folder / 'study.db'}"
    if kind == "journal":
        return optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.log")))
    return None


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("kind", ["memory", "sqlite", "journal"])
def test_storages(kind: str, threads: bool, tmp_path: Path) -> None:
    policy = Scripted({(1, 1): "stop"})
    # Nothing is enqueued: threads that take enqueued trials from SQLite can miss one, in plain Optuna too.
    study = study_of(policy=policy, storage=storage_of(kind, tmp_path), study_name="search")
    done = search(study=study, n_trials=3, objective=short, slots=2, threads=threads)
    if kind != "memory":
        study = optuna.load_study(study_name="search", storage=storage_of(kind, tmp_path))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    for trial in study.trials:
        record = done.executor.records[trial.number]
        assert trial.params == record.params
        assert 1e-5 <= trial.params["lr"] <= 1.0
        assert list(trial.intermediate_values.values()) == record.values
        assert trial.value == record.values[-1]
        assert trial.user_attrs.get("rapidfire:adapter") == record.adapter
        assert all(name.startswith("rapidfire:") for name in trial.user_attrs)


def space(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
    @executor.objective
    def objective(trial: optuna.Trial) -> Any:
        lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        warmup = trial.suggest_int("warmup", 0, 1)
        return sft(executor, trial, lr=lr, warmup_steps=warmup, max_steps=2, per_device_train_batch_size=4)

    return objective


SAMPLERS: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
    "random": lambda: optuna.samplers.RandomSampler(seed=0),
    "tpe": lambda: optuna.samplers.TPESampler(seed=0, n_startup_trials=2),
    "gp": lambda: optuna.samplers.GPSampler(seed=0, n_startup_trials=2),
    "cmaes": lambda: optuna.samplers.CmaEsSampler(seed=0, n_startup_trials=2),
    "qmc": lambda: optuna.samplers.QMCSampler(seed=0),
    "nsga": lambda: optuna.samplers.NSGAIISampler(seed=0, population_size=2),
    "partly fixed": lambda: optuna.samplers.PartialFixedSampler({"warmup": 1}, optuna.samplers.RandomSampler(seed=0)),
}


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(name: str, threads: bool) -> None:
    if name == "cmaes":
        pytest.importorskip("cmaes")
    study = optuna.create_study(sampler=SAMPLERS[name](), pruner=PolicyPruner(ASHA()))
    done = search(study=study, objective=space, n_trials=4, slots=2, chunks=2, threads=threads)
    assert len(study.trials) == 4
    assert set(done.states()) <= {"COMPLETE", "PRUNED"}
    assert len({trial.params["lr"] for trial in study.trials}) == 4
    for trial in study.trials:
        assert 1e-4 <= trial.params["lr"] <= 1e-1
        assert done.executor.records[trial.number].params == trial.params


@pytest.mark.parametrize("name", ["grid", "brute force"])
def test_samplers_that_run_out_end_the_search(name: str) -> None:
    """More trials are asked for than there are points."""

    def objective(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
        def build(trial: optuna.Trial) -> Any:
            lr = trial.suggest_categorical("lr", [1e-3, 1e-2])
            warmup = trial.suggest_int("warmup", 0, 1)
            return sft(executor, trial, lr=lr, warmup_steps=warmup, max_steps=2, per_device_train_batch_size=4)

        return executor.objective(build)

    points = {"lr": [1e-3, 1e-2], "warmup": [0, 1]}
    sampler = (
        optuna.samplers.GridSampler(points, seed=0) if name == "grid" else optuna.samplers.BruteForceSampler(seed=0)
    )
    done = search(study=optuna.create_study(sampler=sampler), objective=objective, n_trials=12, slots=1, chunks=2)
    found = [tuple(trial.params.values()) for trial in done.study.trials]
    assert sorted(set(found)) == [(1e-3, 0), (1e-3, 1), (1e-2, 0), (1e-2, 1)]
    assert len(found) == 4
    assert set(done.states()) == {"COMPLETE"}


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_directions(direction: str, threads: bool) -> None:
    """The same trials are stopped and the same one is best, whichever way the metric's sign runs."""
    sign = 1.0 if direction == "minimize" else -1.0

    def metric(trainer: Any) -> float:
        return sign * abs(trainer.args.learning_rate - 1e-3)

    study = study_of(LRS[:4], ASHA(reduction_factor=2), direction=direction)
    done = search(LRS[:4], study=study, objective=short, metric=metric, threads=threads)
    assert study.best_trial.params["lr"] == 1e-3
    assert done.states() == ["PRUNED", "COMPLETE", "COMPLETE", "PRUNED"] or done.states().count("PRUNED") == 3
    assert study.best_value == done.executor.records[study.best_trial.number].values[-1]


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_both_directions_stop_the_same_trials(direction: str) -> None:
    sign = 1.0 if direction == "minimize" else -1.0
    order = {lr: rank for rank, lr in enumerate(LRS[:4])}
    study = study_of(LRS[:4], ASHA(reduction_factor=2), direction=direction)
    done = search(LRS[:4], study=study, objective=short, metric=lambda t: sign * order[t.args.learning_rate])
    assert done.states() == ["COMPLETE", "PRUNED", "PRUNED", "PRUNED"]


def test_an_objective_may_use_what_else_a_trial_offers() -> None:
    def objective(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
        def build(trial: optuna.Trial) -> Any:
            kind = trial.suggest_categorical("kind", ["a", "b"])
            trial.set_user_attr("kind", kind)
            assert trial.should_prune() is False
            return sft(executor, trial, lr=1e-3, max_steps=3, per_device_train_batch_size=4)

        return executor.objective(build)

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.set_user_attr("mine", 1)
    search(study=study, objective=objective, n_trials=2)
    assert [trial.user_attrs["kind"] for trial in study.trials] == [trial.params["kind"] for trial in study.trials]
    assert study.user_attrs["mine"] == 1


def test_a_function_that_is_not_decorated_will_do_for_executor_optimize() -> None:
    def objective(executor: RapidFireExecutor) -> Callable[[optuna.Trial], Any]:
        return lambda trial: sft(executor, trial, lr=1e-3, max_steps=3, per_device_train_batch_size=4)

    assert search(study=optuna.create_study(), objective=objective, n_trials=2).states() == ["COMPLETE"] * 2


def test_a_study_is_continued_with_another_executor(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    first = search(LRS[:2], study=study_of(LRS[:2], storage=storage, study_name="search"), objective=short)
    study = optuna.load_study(study_name="search", storage=storage, pruner=PolicyPruner(ASHA()))
    for lr in LRS[2:4]:
        study.enqueue_trial({"lr": lr})
    second = search(LRS[2:4], study=study, objective=short)
    assert sorted(first.executor.records) == [0, 1]
    assert sorted(second.executor.records) == [2, 3]
    assert len(study.trials) == 4
    assert study.trials[0].state.name == "COMPLETE"
    assert study.trials[0].value == first.values()[0][-1]


def test_trials_of_an_earlier_executor_count_for_the_policy() -> None:
    policy = Scripted()
    study = study_of(LRS[:2], policy)
    first = search(LRS[:2], study=study, objective=short)
    policy.seen.clear()
    study.enqueue_trial({"lr": LRS[2]})
    search(LRS[2:3], study=study, objective=short)
    history = policy.seen[-1]
    assert [trial.number for trial in history.trials] == [0, 1, 2]
    assert history.trials[0].state is TrialState.COMPLETE
    assert list(history.trials[0].values) == first.values()[0]
    assert history.trials[0].params == {"lr": LRS[0]}


def test_an_earlier_executors_other_chunks_do_not_count() -> None:
    """The third of three chunks and the third of four are not the same stage."""
    policy = Scripted()
    study = study_of(LRS[:1], policy)
    search(LRS[:1], study=study, objective=short, chunks=3)
    study.enqueue_trial({"lr": LRS[1]})
    search(LRS[1:2], study=study, objective=short, chunks=2)
    assert [trial.number for trial in policy.seen[-1].trials] == [1]


def test_study_optimize_may_be_called_again() -> None:
    study = study_of(LRS[:4])
    with make_executor() as executor:
        for _ in range(2):
            study.optimize(short(executor), n_trials=2, n_jobs=executor.n_jobs)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4


def test_study_optimize_in_one_thread() -> None:
    study = study_of(LRS[:2])
    with make_executor() as executor:
        study.optimize(short(executor), n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2


def test_callbacks_of_optuna_are_called() -> None:
    seen: list[int] = []
    study = study_of(LRS[:2])
    with make_executor() as executor:
        study.optimize(
            short(executor),
            n_trials=2,
            n_jobs=executor.n_jobs,
            callbacks=[lambda study, trial: seen.append(trial.number)],
        )
    assert sorted(seen) == [0, 1]


def test_a_time_limit_keeps_new_trials_from_starting() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    with make_executor(slots=1) as executor:
        executor.optimize(study, by_lr(executor), n_trials=50, timeout_s=0.01)
    assert [trial.state.name for trial in study.trials] in ([], ["COMPLETE"], ["COMPLETE"] * 2)
