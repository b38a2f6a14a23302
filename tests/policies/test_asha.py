"""ASHA on worked tables, and beside Optuna's SuccessiveHalvingPruner."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import optuna
import pytest

from rapidfire_policies import ASHA, Decision, History, TrialHistory, TrialState, Verdict


def cohort(values: Sequence[Sequence[float]], chunks: int) -> History:
    return History(tuple(TrialHistory(i, tuple(row)) for i, row in enumerate(values)), chunks, slots=len(values))


def going_on(decisions: dict[int, Decision]) -> list[int]:
    return [number for number, decision in sorted(decisions.items()) if decision.verdict is Verdict.CONTINUE]


def train_together(policy: ASHA, curves: np.ndarray) -> list[list[int]]:
    """Who is still training after each round when all trials, `(trials, chunks)` curves, train in lockstep."""
    chunks = curves.shape[1]
    states = [TrialState.RUNNING] * len(curves)
    values: list[tuple[float, ...]] = [()] * len(curves)
    alive = []
    for chunk in range(chunks):
        for i, state in enumerate(states):
            if state is TrialState.RUNNING:
                values[i] = (*values[i], float(curves[i, chunk]))
        trials = tuple(TrialHistory(i, values[i], states[i]) for i in range(len(curves)))
        decisions = policy.decide(History(trials, chunks, slots=len(curves)))
        for i, decision in decisions.items():
            if decision.verdict is Verdict.STOP:
                states[i] = TrialState.STOPPED
        alive.append([i for i, state in enumerate(states) if state is TrialState.RUNNING])
    return alive


def test_worked_example_of_the_paper() -> None:
    """Li et al. 2020, figure 1: nine configurations, r = 1, R = 9, eta = 3: nine, three, one."""
    losses = [0.8, 0.3, 0.9, 0.4, 0.1, 0.7, 0.6, 0.2, 0.5]
    curves = np.array([[loss - 0.01 * chunk for chunk in range(9)] for loss in losses])
    alive = train_together(ASHA(), curves)
    assert alive == [[1, 4, 7]] * 2 + [[4]] * 7


def test_reasons_of_one_rung() -> None:
    """Eight at rung 1, each row: value, rank, verdict."""
    table = [
        (0.413, 5, "stop"),
        (0.377, 2, "continue"),
        (0.4, 4, "stop"),
        (0.5, 6, "stop"),
        (0.377, 3, "stop"),
        (0.61, 7, "stop"),
        (0.312, 1, "continue"),
        (math.nan, 8, "stop"),
    ]
    decisions = ASHA().decide(cohort([[value] for value, _, _ in table], chunks=9))
    for number, (value, rank, verdict) in enumerate(table):
        assert decisions[number].verdict == verdict
        if math.isfinite(value):
            expected = f"rung 1: {value:g} ranks {rank} of 8, the best 2 go on (cut 0.377)"
        else:
            expected = "chunk 1: the value is nan, not finite"
        assert decisions[number].reason == expected


def test_reason_where_one_goes_on() -> None:
    decisions = ASHA().decide(cohort([[0.2], [0.1]], chunks=9))
    assert decisions[0].reason == "rung 1: 0.2 ranks 2 of 2, the best goes on (cut 0.1)"


def test_between_rungs_nobody_is_judged() -> None:
    decisions = ASHA().decide(cohort([[0.1, 0.1], [9.0, 9.0], [5.0]], chunks=12))
    assert going_on(dict(decisions)) == [0, 1]
    assert decisions[1].reason == "next rung is 3"


def test_whoever_passed_a_rung_is_not_judged_there_again() -> None:
    """Trial 0 passed rung 1 alone; better values recorded there later don't touch it."""
    history = cohort([[0.9, 0.9], [0.1], [0.2], [0.3]], chunks=9)
    assert going_on(dict(ASHA().decide(history))) == [0, 1]


def test_past_the_last_rung_all_go_on() -> None:
    decisions = ASHA().decide(cohort([[0.1] * 9, [0.9] * 9], chunks=9))
    assert [decision.reason for decision in decisions.values()] == ["past the last rung"] * 2


@pytest.mark.parametrize("state", [state for state in TrialState if state is not TrialState.RUNNING])
def test_values_count_whatever_became_of_the_trial(state: TrialState) -> None:
    others = tuple(TrialHistory(i, (0.1 * i, 0.5), state) for i in range(1, 4))
    done = TrialHistory(9, (1.0,) * 9, TrialState.COMPLETE)
    history = History((*others, TrialHistory(4, (0.4,)), done), chunks=9)
    assert ASHA().decide(history)[4].reason == "rung 1: 0.4 ranks 4 of 5, the best goes on (cut 0.1)"
    assert ASHA().decide(history)[4].verdict is Verdict.STOP


def test_paused_trials_are_resumed_unjudged() -> None:
    history = History((TrialHistory(0, (0.1,)), TrialHistory(1, (0.9,), TrialState.PAUSED)), chunks=9)
    decisions = ASHA().decide(history)
    assert going_on(dict(decisions)) == [0, 1]
    assert decisions[1].reason == "next rung is 3"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.PAUSED])
def test_non_finite_stops_off_a_rung_too(bad: float, state: TrialState) -> None:
    history = History((TrialHistory(0, (0.1, bad), state), TrialHistory(1, (0.9, 0.9))), chunks=9)
    decisions = ASHA().decide(history)
    assert (decisions[0].verdict, decisions[1].verdict) == (Verdict.STOP, Verdict.CONTINUE)
    assert decisions[0].reason == f"chunk 2: the value is {bad}, not finite"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_never_takes_a_finite_trial_s_place(bad: float) -> None:
    decisions = ASHA().decide(cohort([[bad], [5.0], [bad], [7.0]], chunks=9))
    assert going_on(dict(decisions)) == [1]


def test_all_diverged_all_stop() -> None:
    decisions = ASHA().decide(cohort([[math.nan], [-math.inf], [math.inf]], chunks=9))
    assert going_on(dict(decisions)) == []


def test_the_early_values_of_a_failed_trial_do_not_end_the_search() -> None:
    failed = TrialHistory(0, (0.1,), TrialState.FAILED)
    history = History((failed, TrialHistory(1, (0.5,)), TrialHistory(2, (0.4,))), chunks=9)
    decisions = ASHA().decide(history)
    assert going_on(dict(decisions)) == [2]
    assert decisions[2].reason.endswith("the best goes on (cut 0.1); kept as the last finite trial")


@pytest.mark.parametrize("arguments", [{"reduction_factor": 1}, {"reduction_factor": 2.5}, {"reduction_factor": True}])
def test_bad_reduction_factor(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="`reduction_factor` must be an integer >= 2, got "):
        ASHA(**arguments)


@pytest.mark.parametrize("value", [0, -1, "1"])
def test_bad_min_resource(value: int) -> None:
    with pytest.raises(ValueError, match="`min_resource` must be an integer >= 1, got "):
        ASHA(min_resource=value)


def ask_all(pruner: optuna.pruners.BasePruner, values: Sequence[float]) -> list[int]:
    """Sixteen trials report in lockstep, then each asks; who may go on."""
    study = optuna.create_study(pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in values]
    for trial, value in zip(trials, values, strict=True):
        trial.report(value, step=1)
    return [trial.number for trial in trials if not trial.should_prune()]


def test_lockstep_order_plays_no_part_unlike_in_optuna() -> None:
    ladder = [i / 16 for i in range(16)]
    for values in (ladder, ladder[::-1]):
        decisions = ASHA(reduction_factor=3).decide(cohort([[value] for value in values], chunks=9))
        assert sorted(values[number] for number in going_on(dict(decisions))) == ladder[:5]
    stock = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    assert len(ask_all(stock, ladder)) == 1
    stock = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    assert len(ask_all(stock, ladder[::-1])) == 16


def test_lockstep_survivors_are_the_same_in_every_order() -> None:
    rng = np.random.default_rng(0)
    curves = rng.choice(np.arange(400) / 400, size=(16, 12), replace=False)
    expected = {tuple(curves[i]) for i in train_together(ASHA(), curves)[-1]}
    for _ in range(20):
        shuffled = curves[rng.permutation(16)]
        assert {tuple(shuffled[i]) for i in train_together(ASHA(), shuffled)[-1]} == expected


@pytest.mark.parametrize("reduction_factor", [2, 3, 4])
@pytest.mark.parametrize("min_resource", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_one_after_the_other_it_is_optuna_s_pruner(reduction_factor: int, min_resource: int, seed: int) -> None:
    """No ties, no NaN, no rung at the last chunk: decision for decision the same."""
    chunks = 10 if reduction_factor != 2 or min_resource != 1 else 11
    rng = np.random.default_rng(seed)
    curves = rng.permutation(40 * chunks).reshape(40, chunks) / 8.0
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=min_resource, reduction_factor=reduction_factor)
    study = optuna.create_study(pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0))
    policy = ASHA(min_resource=min_resource, reduction_factor=reduction_factor)
    past: list[TrialHistory] = []
    ends = set()
    for number, curve in enumerate(curves):
        stock = study.ask()
        state = TrialState.RUNNING
        values: tuple[float, ...] = ()
        for chunk, value in enumerate(curve.tolist(), start=1):
            values = (*values, value)
            stock.report(value, step=chunk)
            decisions = policy.decide(History((*past, TrialHistory(number, values)), chunks))
            stopped = decisions[number].verdict is Verdict.STOP
            assert stopped == stock.should_prune()
            if stopped:
                state = TrialState.STOPPED
                break
        else:
            state = TrialState.COMPLETE
        pruned = optuna.trial.TrialState.PRUNED if state is TrialState.STOPPED else None
        study.tell(stock, state=pruned, values=None if pruned else values[-1])
        past.append(TrialHistory(number, values, state))
        ends.add(len(values))
    assert len(ends) > 2
