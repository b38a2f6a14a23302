"""Several objectives: vectors through the executor, one scalar for the policy, Pareto fronts from Optuna."""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any

import numpy as np
import optuna
import pytest

from rapidfire_automl.attempts import VECTORS_ATTR
from rapidfire_policies import ASHA, TrialState
from rapidfire_policies.pareto import scalarize
from tests.executor.searches import HELD_OUT, LRS, Done, Scripted, search, study_of

pytestmark = pytest.mark.slow

TWO = ("minimize", "maximize")


def step_size(trainer: Any) -> float:
    """To be maximised: it runs against the loss."""
    return math.log10(trainer.args.learning_rate) + trainer.state.global_step / 1000


def run(lrs: tuple[float, ...] = LRS[:4], policy: Any = None, directions: Any = TWO, **given: Any) -> Done:
    given.setdefault("metric", ["nll", step_size])
    pruner = {} if policy is not None else {"pruner": optuna.pruners.NopPruner()}
    return search(lrs, study=study_of(lrs, policy, directions=directions, **pruner), **given)


@cache
def single() -> Done:
    """The search of one objective."""
    return search(LRS[:6], slots=6)


@pytest.mark.parametrize("threads", [False, True])
def test_a_policy_prunes_by_fronts_and_the_study_gets_the_vectors(threads: bool) -> None:
    done = run(LRS[:6], ASHA(reduction_factor=2), threads=threads, slots=6)
    assert done.states().count("PRUNED") >= 3
    assert done.states().count("COMPLETE") >= 1
    records = done.executor.records
    one = single()
    for trial in done.study.trials:
        record = records[trial.number]
        assert len(record.vectors) == len(record.values) == len(record.boundaries[: len(record.values)])
        assert record.values == [vector[0] for vector in record.vectors]
        np.testing.assert_allclose(record.values, one.values()[trial.number][: len(record.values)], rtol=1e-5)
        assert trial.user_attrs[VECTORS_ATTR] == [list(vector) for vector in record.vectors]
        assert trial.intermediate_values == {}
        if trial.state.name == "COMPLETE":
            assert tuple(trial.values) == record.vectors[-1]
    first = np.array([record.vectors[0] for record in records.values()]) * [1.0, -1.0]
    scalars = scalarize(first)
    kept = {number for number, record in records.items() if len(record.vectors) > 1}
    assert kept == set(np.argsort(scalars, kind="stable")[:3].tolist())
    assert {trial.number for trial in done.study.best_trials} <= kept


def test_what_the_policy_sees() -> None:
    policy = Scripted({(3, 1): "stop"})
    done = run(LRS[:4], policy)
    for history in policy.seen:
        for chunk in range(max(trial.resource for trial in history.trials)):
            there = [trial for trial in history.trials if trial.resource > chunk]
            vectors = [done.executor.records[trial.number].vectors[chunk] for trial in there]
            expected = scalarize(np.array(vectors) * [1.0, -1.0]).tolist()
            assert [trial.values[chunk] for trial in there] == expected
        assert all(trial.scores == () for trial in history.trials)
        assert all(len(trial.costs) == trial.resource for trial in history.trials)


def test_built_in_metrics_follow_their_own_direction() -> None:
    down = run(LRS[:2], metric=["nll", "nll"], directions=("minimize", "minimize"))
    mixed = run(LRS[:2], metric=["nll", "nll"], directions=TWO)
    for number in range(2):
        for both, flipped in zip(
            down.executor.records[number].vectors, mixed.executor.records[number].vectors, strict=True
        ):
            assert flipped == (both[0], -both[1])
    assert down.executor.base_vector == (down.executor.base_value,) * 2


@pytest.mark.parametrize(
    ("returned", "vector", "shape"),
    [
        ((1.0, 2.0), (1.0, 2.0), (0,)),
        ([1, 2], (1.0, 2.0), (0,)),
        ({"loss": 1.0, "length": 2.0}, (1.0, 2.0), (0,)),
        (np.array([1.0, 2.0]), (1.0, 2.0), (0,)),
        ([[1.0, 3.0], [4.0, 8.0]], (2.0, 6.0), (2, 2)),
        (np.array([[1.0, 3.0, 5.0], [4.0, 8.0, 0.0]]), (3.0, 4.0), (2, 3)),
        ([[1.0, 3.0], 5.0], (2.0, 5.0), (0,)),
    ],
)
def test_a_metric_may_return_all_at_once(returned: Any, vector: tuple[float, ...], shape: tuple[int, ...]) -> None:
    done = run(LRS[:1], metric=lambda trainer: returned, chunks=1)
    assert done.states() == ["COMPLETE"]
    record = done.executor.records[0]
    assert record.vectors == [vector]
    assert record.scores[0].shape == shape
    assert tuple(done.study.trials[0].values) == vector
    assert done.of_kind("chunk_done")[0].data["vector"] == vector


@pytest.mark.parametrize("returned", [1.0, (1.0,), (1.0, 2.0, 3.0), "ab", None, {"loss": 1.0}, ("a", "b")])
def test_a_metric_that_returns_something_else_says_so(returned: Any) -> None:
    with pytest.raises(RuntimeError, match="`metric` must return "):
        run(LRS[:1], metric=lambda trainer: returned)


@pytest.mark.parametrize(
    ("metric", "directions", "message"),
    [
        (None, TWO, "`metric` must give 2 values for a study with 2 directions: .* got None"),
        ("nll", TWO, "`metric` must give 2 values for a study with 2 directions: .* got 'nll'"),
        (["nll"], TWO, r"`metric` must give 2 values for a study with 2 directions: .* got \['nll'\]"),
        (["nll", "nll"], ("minimize",), r"`study` must have 2 directions for `metric` \['nll', 'nll'\], got 1"),
    ],
)
def test_the_wrong_number_of_metrics_is_found_before_a_trial_is_asked_for(
    metric: Any, directions: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(LRS[:1], metric=metric, directions=directions)


def test_a_list_of_one_metric_is_one_metric() -> None:
    done = search(LRS[:1], metric=["nll"])
    assert done.values() == search(LRS[:1]).values()
    assert done.executor.records[0].vectors == []
    assert done.executor.records[0].scores[0].shape == (len(HELD_OUT),)


@pytest.mark.parametrize("threads", [False, True])
def test_a_last_vector_that_is_not_finite_fails_the_trial(threads: bool) -> None:
    def metric(trainer: Any) -> tuple[float, float]:
        last = trainer.state.global_step == 6 and trainer.args.learning_rate == LRS[0]
        return 1.0, math.nan if last else trainer.args.learning_rate

    done = run(LRS[:3], metric=metric, threads=threads)
    assert done.states() == ["FAIL", "COMPLETE", "COMPLETE"]
    assert "the last value is [1.0, nan]" in (done.executor.records[0].error or "")
    assert {trial.number for trial in done.study.best_trials} == {1}


def test_a_diverged_vector_is_stopped() -> None:
    def metric(trainer: Any) -> tuple[float, float]:
        return math.inf if trainer.args.learning_rate == LRS[1] else trainer.args.learning_rate, 1.0

    done = run(LRS[:4], ASHA(reduction_factor=2), metric=metric)
    assert done.executor.records[1].state is TrialState.STOPPED
    assert "not finite" in done.executor.records[1].verdicts[-1][2]


def test_a_stock_pruner_is_not_asked_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    study = study_of(LRS[:3], directions=TWO, pruner=optuna.pruners.MedianPruner(n_startup_trials=0))
    with caplog.at_level(logging.WARNING, "rapidfire_automl"):
        done = search(LRS[:3], study=study, metric=["nll", step_size], slots=1)
    assert done.states() == ["COMPLETE"] * 3
    said = [event.data["message"] for event in done.of_kind("warning")]
    assert said == ["MedianPruner isn't asked in a study with several objectives; a PolicyPruner would be."]


def test_paused_trials_resume_with_a_stock_pruner_or_a_policy() -> None:
    done = run(LRS[:3], Scripted({(0, 1): "pause"}, resume={(0, 3): "continue"}), slots=2)
    assert done.states() == ["COMPLETE"] * 3


def test_a_sampler_for_several_objectives_learns_from_the_vectors() -> None:
    study = study_of(
        directions=TWO,
        sampler=optuna.samplers.NSGAIISampler(seed=0, population_size=2),
        policy=ASHA(reduction_factor=2),
    )
    done = search(study=study, metric=["nll", step_size], n_trials=6, slots=2)
    assert len(done.study.trials) == 6
    assert set(done.states()) <= {"COMPLETE", "PRUNED"}
    assert done.study.best_trials
