"""`ChunkSampler`: a function of trials, seed and number; learns from whoever runs; any space, either direction."""

from __future__ import annotations

import math
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as State

from rapidfire_automl import ChunkSampler, replay
from rapidfire_automl.histories import COST_ATTR
from rapidfire_automl.samplers import chunk_scores
from rapidfire_policies import ASHA

optuna.logging.set_verbosity(optuna.logging.WARNING)

SPACE = {
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
    "r": IntDistribution(4, 64, step=4),
    "warmup": FloatDistribution(0.0, 0.3, step=0.1),
    "layers": IntDistribution(1, 128, log=True),
    "scheduler": CategoricalDistribution(("linear", "cosine", None)),
}
XY = {"x": FloatDistribution(0.0, 1.0), "y": FloatDistribution(0.0, 1.0)}


def miss(params: dict[str, Any]) -> float:
    return (params["x"] - 0.3) ** 2 + 0.3 * (params["y"] - 0.6) ** 2


def value(params: dict[str, Any]) -> float:
    """A function over SPACE, best at 1e-3."""
    return abs(math.log10(params["lr"]) + 3.0) + 0.01 * params["r"] + (params["scheduler"] == "linear")


def study_of(sampler: optuna.samplers.BaseSampler, trials: Sequence[FrozenTrial] = (), **given: Any) -> optuna.Study:
    study = optuna.create_study(sampler=sampler, **given)
    for trial in trials:
        study.add_trial(trial)
    return study


def a_search(trials: int = 20, seed: int = 0, sign: float = 1.0) -> list[FrozenTrial]:
    """Trials in every state, with values, ties, NaN and infinities among them."""
    rng = np.random.default_rng(seed)
    source = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    found = []
    for number in range(trials):
        params = source.ask(SPACE).params
        state = (State.COMPLETE, State.PRUNED, State.RUNNING, State.FAIL)[number % 4]
        chunks = 6 if state is State.COMPLETE else int(rng.integers(0 if number > 8 else 1, 6))
        values = {k: sign * round(value(params) + 1.0 / k, 1) for k in range(1, chunks + 1)}
        if number % 5 == 4 and values and state is not State.COMPLETE:
            values[chunks] = (math.nan, math.inf, -math.inf)[number % 3]
        found.append(
            create_trial(
                state=state,
                params=params,
                distributions=SPACE,
                intermediate_values=values,
                value=values[6] if state is State.COMPLETE else None,
                user_attrs={COST_ATTR: 100 + params["r"]},
            )
        )
    return found


def proposal(study: optuna.Study) -> dict[str, Any]:
    return study.ask(SPACE).params


# -- the score ---------------------------------------------------------------------------------------------------------


def slow_scores(curves: Sequence[Sequence[float]]) -> list[float]:
    """The formula of the docstring, pair by pair."""
    scores = []
    for i, one in enumerate(curves):
        wins = 0.0
        for j, other in enumerate(curves):
            if i != j:
                m = min(len(one), len(other))
                mine, theirs = (v if math.isfinite(v) else math.inf for v in (one[m - 1], other[m - 1]))
                wins += (mine < theirs) + 0.5 * (mine == theirs)
        scores.append(wins / max(1, len(curves) - 1))
    return scores


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_the_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    choices = [0.0, 0.5, 0.5, 1.0, 2.0, math.nan, math.inf, -math.inf]
    for count in (1, 2, 3, 17, 60):
        curves = [tuple(rng.choice(choices, rng.integers(1, 9))) for _ in range(count)]
        np.testing.assert_allclose(chunk_scores(curves), slow_scores(curves), atol=1e-12)


def test_who_survived_a_rung_is_ahead_of_who_was_stopped_there() -> None:
    early = [[1.0], [2.0], [3.0], [4.0]]
    survivors = [[0.5, 0.4], [0.6, 9.0]]
    scores = chunk_scores(early + survivors)
    assert scores.argsort().tolist() == [3, 2, 1, 0, 5, 4]


# -- randomness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trials", [0, 5, 20])
def test_a_proposal_is_a_function_of_trials_seed_and_number(trials: int) -> None:
    past = a_search(trials)
    expected = proposal(study_of(ChunkSampler(seed=3), past))
    used = ChunkSampler(seed=3)
    other = study_of(used, a_search(12, seed=9))
    for _ in range(3):
        proposal(other)
        used.reseed_rng()
    np.random.seed(7)  # noqa: NPY002
    random.seed(7)
    before = repr((random.getstate(), np.random.get_state()))  # noqa: NPY002
    for sampler in (used, pickle.loads(pickle.dumps(used)), ChunkSampler(seed=3)):
        assert proposal(study_of(sampler, past)) == expected
    assert repr((random.getstate(), np.random.get_state())) == before  # noqa: NPY002
    assert proposal(study_of(ChunkSampler(seed=4), past)) != expected


def test_other_processes_and_hash_seeds_propose_the_same() -> None:
    code = (
        "import optuna; from rapidfire_automl import ChunkSampler; from optuna.distributions import FloatDistribution as F\n"
        "study = optuna.create_study(sampler=ChunkSampler(seed=1)); s = {'a': F(0, 1), 'b': F(0, 1)}\n"
        "for i in range(10): t = study.ask(s); t.report(t.params['a'], 1)\n"
        "print([t.params for t in study.trials])"
    )
    seen = set()
    for hash_seed in ("0", "1"):
        environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        seen.add(done.stdout)
    assert len(seen) == 1


def test_proposals_made_together_differ_from_each_other() -> None:
    study = study_of(ChunkSampler(seed=0), a_search(20))
    together = [proposal(study) for _ in range(8)]
    assert len({repr(params) for params in together}) == 8
    rates = [math.log10(params["lr"]) for params in together]
    assert max(rates) - min(rates) > 0.1


def test_the_first_proposals_share_the_range() -> None:
    study = study_of(ChunkSampler(seed=2, n_startup_trials=6))
    for _ in range(2):  # while nobody has a value
        trials = [study.ask(XY | {"c": CategoricalDistribution(("a", "b", "c"))}).params for _ in range(6)]
        for name in XY:
            assert sorted(int(6 * params[name]) for params in trials) == list(range(6))
        assert sorted(params["c"] for params in trials) == ["a", "a", "b", "b", "c", "c"]


# -- what it learns from -----------------------------------------------------------------------------------------------


def proposals(sampler: Callable[[int], optuna.samplers.BaseSampler], state: State, seeds: int = 12) -> list[float]:
    """What the next eight trials of a study with eight in a state are worth, by seed."""
    found = []
    for seed in range(seeds):
        study = optuna.create_study(sampler=sampler(seed))
        for _ in range(8):
            trial = study.ask(XY)
            for k in (1, 2):
                trial.report(miss(trial.params) + 1.0 / k, step=k)
            if state is not State.RUNNING:
                study.tell(trial, miss(trial.params) if state is State.COMPLETE else None, state=state)
        found += [miss(study.ask(XY).params) for _ in range(8)]
    return found


@pytest.mark.parametrize("state", [State.RUNNING, State.PRUNED, State.COMPLETE])
def test_it_learns_from_trials_in_any_state(state: State) -> None:
    ours = proposals(lambda seed: ChunkSampler(seed=seed), state)
    chance = proposals(lambda seed: optuna.samplers.RandomSampler(seed=seed), state)
    assert np.mean(ours) < 0.6 * np.mean(chance)


def test_stock_tpe_learns_nothing_from_running_trials() -> None:
    tpe = proposals(lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=8), State.RUNNING)
    ours = proposals(lambda seed: ChunkSampler(seed=seed), State.RUNNING)
    assert np.mean(ours) < 0.6 * np.mean(tpe)


def test_directions_mirror_each_other() -> None:
    down = study_of(ChunkSampler(seed=5), a_search(20))
    up = study_of(ChunkSampler(seed=5), a_search(20, sign=-1.0), direction="maximize")
    assert [proposal(down) for _ in range(3)] == [proposal(up) for _ in range(3)]


def test_a_trial_of_which_only_bad_is_known_is_avoided() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        study = study_of(ChunkSampler(seed=0))
        for x in np.linspace(0.02, 0.98, 25):
            trial = create_trial(
                state=State.FAIL if x > 0.5 else State.PRUNED, params={"x": x}, distributions={"x": XY["x"]},
                intermediate_values={1: bad if x > 0.5 else 1.0 + 0.01 * x},
            )  # fmt: skip
            study.add_trial(trial)
        assert study.ask({"x": XY["x"]}).params["x"] < 0.55


def test_nothing_but_diverged_trials() -> None:
    study = study_of(ChunkSampler(seed=0))
    for _ in range(12):
        trial = study.ask(SPACE)
        trial.report(math.nan, step=1)
        study.tell(trial, state=State.FAIL)


def test_cost_counts() -> None:
    """Two choices are equally good, and one costs ten times as much."""
    space = {"x": XY["x"], "size": CategoricalDistribution(("small", "large"))}

    def share(aware: bool) -> float:
        small = 0
        for seed in range(10):
            study = optuna.create_study(sampler=ChunkSampler(seed=seed, cost_aware=aware))
            for _ in range(8):
                trial = study.ask(space)
                trial.report((trial.params["x"] - 0.5) ** 2, step=1)
                trial.set_user_attr(COST_ATTR, {"small": 10, "large": 100}[trial.params["size"]])
            small += sum(study.ask(space).params["size"] == "small" for _ in range(4))
        return small / 40

    assert share(aware=True) > share(aware=False) + 0.2


def test_values_without_reports_count_as_one_chunk() -> None:
    study = optuna.create_study(sampler=ChunkSampler(seed=0))
    study.optimize(lambda trial: miss({name: trial.suggest_float(name, 0.0, 1.0) for name in XY}), n_trials=30)
    assert study.best_value < 0.01


# -- spaces ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trials", [0, 8, 40, 300])
def test_every_distribution_is_kept_in_range(trials: int) -> None:
    study = study_of(ChunkSampler(seed=1), a_search(trials))
    for _ in range(4):
        params = proposal(study)
        for name, distribution in SPACE.items():
            assert distribution._contains(distribution.to_internal_repr(params[name]))  # type: ignore[attr-defined]


def test_conditional_parameters() -> None:
    def objective(trial: optuna.Trial) -> float:
        if trial.suggest_categorical("kind", ["lora", "full"]) == "lora":
            lost = abs(trial.suggest_int("r", 1, 64, log=True) - 16) / 16
        else:
            lost = 1.0 + trial.suggest_float("lr", 0.0, 1.0)
        trial.report(lost, step=1)
        return lost

    study = optuna.create_study(sampler=ChunkSampler(seed=0))
    study.optimize(objective, n_trials=40)
    late = study.trials[20:]
    assert sum(trial.params["kind"] == "lora" for trial in late) > 12
    assert study.best_value < 0.2
    assert set(study.sampler.infer_relative_search_space(study, late[0])) == {"kind"}


def test_enqueued_constant_and_new_parameters() -> None:
    study = optuna.create_study(sampler=ChunkSampler(seed=0, n_startup_trials=2))
    study.enqueue_trial({"x": 0.25})
    for number in range(8):
        trial = study.ask()
        x = trial.suggest_float("x", 0.0, 1.0)
        assert trial.suggest_categorical("only", ["one"]) == "one"
        assert trial.suggest_float("constant", 0.5, 0.5) == 0.5
        if number > 4:
            trial.suggest_float("new", 0.0, 1.0)
        trial.report(x, step=10 * number)
    assert study.trials[0].params["x"] == 0.25


# -- in use ------------------------------------------------------------------------------------------------------------


def test_ask_and_tell_with_slots_as_the_executor_does_it() -> None:
    def search(sampler: optuna.samplers.BaseSampler) -> optuna.Study:
        study = optuna.create_study(sampler=sampler)
        live: list[optuna.Trial] = []
        while len(study.trials) < 40:
            live += [study.ask(XY) for _ in range(8 - len(live))]
            for trial in live:
                done = len(study.trials[trial.number].intermediate_values)
                trial.report(miss(trial.params) + 1.0 / (done + 1), step=done + 1)
            live.sort(key=lambda trial: miss(trial.params))
            for trial in live[4:]:
                study.tell(trial, state=State.PRUNED)
            live = live[:4]
        return study

    one, other = search(ChunkSampler(seed=0)), search(ChunkSampler(seed=0))
    assert [t.params for t in one.trials] == [t.params for t in other.trials]
    ours = np.mean([miss(trial.params) for trial in one.trials[20:]])
    chance = np.mean([miss(trial.params) for trial in search(optuna.samplers.RandomSampler(seed=0)).trials[20:]])
    assert ours < 0.3 * chance


@pytest.mark.parametrize("storage", [None, "sqlite:///{}/study.db"])
def test_several_workers(storage: str | None, tmp_path: Any) -> None:
    def objective(trial: optuna.Trial) -> float:
        params = {name: trial.suggest_float(name, 0.0, 1.0) for name in XY}
        for k in (1, 2):
            trial.report(miss(params) + 1.0 / k, step=k)
            if trial.should_prune():
                raise optuna.TrialPruned
        return miss(params)

    url = storage and storage.format(tmp_path)
    study = optuna.create_study(sampler=ChunkSampler(seed=0), pruner=optuna.pruners.NopPruner(), storage=url)
    study.optimize(objective, n_trials=24, n_jobs=2)
    assert len(study.trials) == 24
    assert all(trial.state is State.COMPLETE for trial in study.trials)
    assert study.best_value < 0.02


def test_in_a_replay() -> None:
    rng = np.random.default_rng(0)
    params = [{"x": float(x), "y": float(y)} for x, y in rng.random((300, 2))]
    curves = np.array([[miss(row) + 1.0 / k for k in range(1, 10)] for row in params])
    result = replay(curves, ASHA(), slots=8, sampler=ChunkSampler(seed=0), params=params, n_trials=60)
    assert curves[list(result.order[30:]), -1].mean() < 0.4 * curves[:, -1].mean() + 0.6 / 9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": -1}, "`seed` must be an integer >= 0, got -1"),
        ({"seed": None}, "`seed` must be an integer >= 0, got None"),
        ({"n_startup_trials": 1}, "`n_startup_trials` must be an integer >= 2, got 1"),
    ],
)
def test_bad_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChunkSampler(**given)


def test_several_objectives_are_refused() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=ChunkSampler())
    with pytest.raises(ValueError, match="one objective for ChunkSampler, got 2"):
        study.ask(XY)


def test_by_name() -> None:
    from rapidfire_automl.strategies import make_sampler

    assert repr(make_sampler("chunk", 7)) == repr(ChunkSampler(seed=7))
    with pytest.raises(ValueError, match="Did you mean 'chunk'"):
        make_sampler("chunks", 0)
