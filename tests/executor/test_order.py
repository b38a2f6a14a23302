"""Neither the order of the trials nor the timing of threads changes a verdict; a search can be repeated."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import optuna
import pytest

from rapidfire_automl import RapidFireExecutor
from rapidfire_policies import ASHA
from tests.executor.searches import LRS, Do, Done, by_lr, make_executor, search, sft, study_of
from tests.executor.test_rounds import ALONE

pytestmark = pytest.mark.slow

CONFIGURATIONS = LRS[:6]
ASHA2 = ASHA(reduction_factor=2)


def story(done: Done) -> dict[float, tuple[list[tuple[int, str]], str]]:
    """By configuration: its verdicts and how it ended."""
    states = {trial.number: trial.state.name for trial in done.study.trials}
    return {
        record.params["lr"]: ([verdict[:2] for verdict in record.verdicts], states[number])
        for number, record in done.executor.records.items()
    }


def delayed(seed: int) -> Callable[[RapidFireExecutor], Callable[[optuna.Trial], float]]:
    """An objective that sleeps before it has a slot, while it builds, and at every step."""
    generator = random.Random(seed)

    def nap(most_s: float = 0.01, **_: Any) -> None:
        time.sleep(generator.uniform(0, most_s))

    def make(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
        @executor.objective
        def objective(trial: optuna.Trial) -> Any:
            nap(0.05)
            lr = trial.suggest_float("lr", 1e-5, 1.0, log=True)
            return sft(executor, trial, lr=lr, max_steps=3, per_device_train_batch_size=4, callbacks=[Do(nap)])

        def late(trial: optuna.Trial) -> float:
            nap(0.05)
            return objective(trial)

        late.__wrapped__ = objective.__wrapped__  # type: ignore[attr-defined]
        return late

    return make


def short(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
    return by_lr(executor, max_steps=3, per_device_train_batch_size=4)


def permuted(seed: int, *, threads: bool, objective: Callable[..., Any] = short) -> Done:
    """The configurations in another order."""
    order = random.Random(seed).sample(CONFIGURATIONS, len(CONFIGURATIONS))
    return search(order, ASHA2, slots=len(order), threads=threads, objective=objective)


@pytest.fixture(scope="module")
def expected() -> dict[float, tuple[list[tuple[int, str]], str]]:
    found = story(search(CONFIGURATIONS, ASHA2, slots=len(CONFIGURATIONS), objective=short))
    states = [state for _, state in found.values()]
    assert 0 < states.count("PRUNED") < len(states), "there must be something to get wrong"
    return found


@pytest.mark.parametrize("threads", [False, True])
def test_verdicts_do_not_depend_on_the_order_of_the_trials(threads: bool, expected: Any) -> None:
    assert story(permuted(1, threads=threads)) == expected


@pytest.mark.parametrize("threads", [False, True])
def test_verdicts_do_not_depend_on_delays(threads: bool, expected: Any) -> None:
    for seed in range(2):
        assert story(permuted(seed, threads=threads, objective=delayed(seed))) == expected


@pytest.mark.slow
@pytest.mark.parametrize("threads", [False, True])
def test_eight_orders_and_delays_give_the_same_verdicts(threads: bool, expected: Any) -> None:
    """All by one executor, one study after the other."""
    with make_executor(slots=len(CONFIGURATIONS)) as executor:
        for seed in range(8):
            objective = delayed(seed)(executor)
            study = study_of(random.Random(seed).sample(CONFIGURATIONS, len(CONFIGURATIONS)), ASHA2)
            if threads:
                study.optimize(objective, n_trials=len(CONFIGURATIONS), n_jobs=executor.n_jobs)
            else:
                executor.optimize(study, objective, n_trials=len(CONFIGURATIONS))
            assert story(Done(study, executor, [])) == expected


# -- repeating a search ------------------------------------------------------------------------------------------------


def everything(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [
        (trial.number, trial.state, trial.params, trial.value, trial.intermediate_values)
        for trial in study.get_trials(deepcopy=False)
    ]


def sampled(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
    """Two hyperparameters for a sampler to learn from, dropout to draw."""

    @executor.objective
    def objective(trial: optuna.Trial) -> Any:
        lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        r = trial.suggest_categorical("r", [2, 4, 8])
        return sft(executor, trial, lr=lr, r=r, max_steps=3, per_device_train_batch_size=4)

    return objective


def tpe(n_trials: int, slots: int, objective: Callable[..., Any] = sampled, **given: Any) -> Done:
    sampler = optuna.samplers.TPESampler(seed=1, n_startup_trials=4, multivariate=True, constant_liar=True)
    study = study_of(policy=ASHA2, sampler=sampler)
    return search(study=study, objective=objective, n_trials=n_trials, slots=slots, **given)


def test_a_search_can_be_repeated_refill_included() -> None:
    first, second = tpe(10, slots=3), tpe(10, slots=3)
    assert everything(first.study) == everything(second.study)
    assert {trial.state.name for trial in first.study.trials} == {"COMPLETE", "PRUNED"}
    for number, record in first.executor.records.items():
        other = second.executor.records[number]
        assert (record.values, record.verdicts, record.tokens) == (other.values, other.verdicts, other.tokens)
        assert [s.tolist() for s in record.scores] == [s.tolist() for s in other.scores]


def test_a_search_can_be_repeated_whatever_the_delays() -> None:
    def slow(executor: RapidFireExecutor) -> Callable[[optuna.Trial], Any]:
        generator = random.Random()
        objective = sampled(executor)

        def build(trial: optuna.Trial) -> Any:
            time.sleep(generator.uniform(0, 0.05))
            return objective.__wrapped__(trial)  # type: ignore[attr-defined]

        return build

    assert everything(tpe(6, slots=3).study) == everything(tpe(6, slots=3, objective=slow).study)


def test_a_failed_trial_is_repeated_too() -> None:
    def failing(executor: RapidFireExecutor) -> Callable[[optuna.Trial], Any]:
        objective = sampled(executor)

        def build(trial: optuna.Trial) -> Any:
            trainer = objective.__wrapped__(trial)  # type: ignore[attr-defined]
            return None if trial.number in (1, 4) else trainer

        return build

    first = tpe(6, slots=2, objective=failing)
    assert [trial.state.name for trial in first.study.trials].count("FAIL") == 2
    assert everything(first.study) == everything(tpe(6, slots=2, objective=failing).study)


def test_with_one_trial_a_pass_neighbours_do_not_matter_by_a_bit() -> None:
    """Neither slots nor order: each configuration's losses are its own."""
    lrs: Sequence[float] = CONFIGURATIONS[:3]
    first = search(lrs, plan=ALONE, slots=1, objective=short)
    other = search(lrs[::-1], plan=ALONE, slots=3, objective=short)
    for number in range(3):
        assert first.losses(number) == other.losses(2 - number)
        assert first.values()[number] == other.values()[2 - number]


def test_one_executor_searches_twice_alike() -> None:
    """Nothing of a search is left in the executor that the next could notice."""
    found = []
    with make_executor(slots=2) as executor:
        for _ in range(2):
            study = study_of(CONFIGURATIONS[:3], ASHA2)
            executor.optimize(study, short(executor), n_trials=3)
            found.append(everything(study))
            assert sorted(executor.records) == [0, 1, 2]
    assert found[0] == found[1]


# -- stock pruners -----------------------------------------------------------------------------------------------------

PRUNERS: dict[str, optuna.pruners.BasePruner] = {
    "nop": optuna.pruners.NopPruner(),
    "median": optuna.pruners.MedianPruner(n_startup_trials=1),
    "percentile": optuna.pruners.PercentilePruner(25.0, n_startup_trials=1),
    "halving": optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    "halving, auto": optuna.pruners.SuccessiveHalvingPruner(),
    "hyperband": optuna.pruners.HyperbandPruner(min_resource=1, max_resource=3, reduction_factor=2),
    "hyperband, auto": optuna.pruners.HyperbandPruner(),
    "threshold": optuna.pruners.ThresholdPruner(upper=5.7),
    "patient": optuna.pruners.PatientPruner(optuna.pruners.MedianPruner(n_startup_trials=1), patience=1),
    "wilcoxon": optuna.pruners.WilcoxonPruner(p_threshold=0.1),
}


@pytest.mark.parametrize("name", PRUNERS)
def test_stock_pruners(name: str) -> None:
    study = optuna.create_study(pruner=PRUNERS[name], sampler=optuna.samplers.RandomSampler(seed=0))
    for lr in CONFIGURATIONS:
        study.enqueue_trial({"lr": lr})
    done = search(CONFIGURATIONS, study=study, slots=2, objective=short)
    assert set(done.states()) <= {"COMPLETE", "PRUNED"}
    assert "COMPLETE" in done.states()
    for trial in study.trials:
        record = done.executor.records[trial.number]
        assert list(trial.intermediate_values.values()) == record.values
        if trial.state is optuna.trial.TrialState.PRUNED:
            assert record.verdicts[-1][2] == f"{type(PRUNERS[name]).__name__} says so"
    if name in ("median", "percentile", "halving", "threshold"):
        assert "PRUNED" in done.states()


def test_the_threshold_pruner_judges_by_value_alone() -> None:
    study = study_of(CONFIGURATIONS, pruner=optuna.pruners.ThresholdPruner(upper=5.7))
    done = search(CONFIGURATIONS, study=study, slots=6, objective=short)
    for number, values in done.values().items():
        high = next((chunk for chunk, value in enumerate(values[:2], start=1) if value > 5.7), None)
        assert (done.states()[number] == "PRUNED") == (high is not None)
        assert high is None or len(values) == high


def test_stock_pruners_see_a_whole_round_before_they_are_asked() -> None:
    """In plain Optuna a trial is judged before its neighbours have reported."""
    seen: list[list[int]] = []

    class Watching(optuna.pruners.BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            seen.append([len(t.intermediate_values) for t in study.get_trials(deepcopy=False)])
            return False

    search(CONFIGURATIONS[:3], study=study_of(CONFIGURATIONS[:3], pruner=Watching()), objective=short)
    assert seen == [[1, 1, 1]] * 3 + [[2, 2, 2]] * 3


@pytest.mark.parametrize("name", ["median", "halving, auto", "hyperband, auto"])
def test_what_stock_pruners_do_not_do_and_asha_does(name: str, expected: Any) -> None:
    """While all trials run together these prune nothing: they need a complete one. ASHA is in `expected`."""
    pruner = {
        "median": optuna.pruners.MedianPruner(),
        "halving, auto": optuna.pruners.SuccessiveHalvingPruner(),
        "hyperband, auto": optuna.pruners.HyperbandPruner(),
    }[name]
    done = search(CONFIGURATIONS, study=study_of(CONFIGURATIONS, pruner=pruner), slots=6, objective=short)
    assert done.states() == ["COMPLETE"] * 6
    assert "PRUNED" in [state for _, state in expected.values()]
