"""FixedStep's table, Patience beside Optuna's PatientPruner, WarmUp."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import optuna
import pytest

from rapidfire_policies import (
    ASHA,
    Decision,
    FixedStep,
    History,
    Median,
    Patience,
    Policy,
    SuccessiveHalving,
    TrialHistory,
    TrialState,
    Verdict,
    WarmUp,
)


def said(policy: Policy, *trials: TrialHistory, chunks: int = 12) -> dict[int, str]:
    return {n: str(decision.verdict) for n, decision in policy.decide(History(trials, chunks=chunks)).items()}


@dataclass(frozen=True)
class StopsAll(Policy):
    """Wants every trial stopped, so that a wrapper's own rule shows."""

    def decide(self, history: History) -> Mapping[int, Decision]:
        return {trial.number: Decision(Verdict.STOP, "all") for trial in history.live}


# -- FixedStep --------------------------------------------------------------------------------------------------------


def test_the_best_three_after_one_chunk() -> None:
    losses = [0.5, 0.2, math.nan, 0.4, 0.2, 0.3]
    trials = [TrialHistory(i, (loss,)) for i, loss in enumerate(losses)]
    assert said(FixedStep(), *trials) == {
        0: "stop", 1: "continue", 2: "stop", 3: "stop", 4: "continue", 5: "continue",
    }  # fmt: skip


def test_nobody_is_judged_before_or_at_the_end() -> None:
    trials = [TrialHistory(i, (0.1 * i,)) for i in range(6)]
    assert set(said(FixedStep(chunks=2, keep=1), *trials).values()) == {"continue"}
    assert set(said(FixedStep(chunks=1, keep=1), *trials, chunks=1).values()) == {"continue"}


def test_a_later_trial_is_compared_with_all_and_overtakes() -> None:
    """In whatever order they come, the best two of all go on in the end."""
    early = [TrialHistory(0, (0.3, 0.2)), TrialHistory(1, (0.4, 0.1)), TrialHistory(2, (0.9,), TrialState.STOPPED)]
    rule = FixedStep(chunks=1, keep=2)
    assert said(rule, *early) == {0: "continue", 1: "continue"}
    assert said(rule, *early, TrialHistory(3, (0.5,))) == {0: "continue", 1: "continue", 3: "stop"}
    assert said(rule, *early, TrialHistory(3, (0.2,))) == {0: "continue", 1: "stop", 3: "continue"}


@pytest.mark.parametrize("name", ["chunks", "keep"])
def test_bad_fixed_step(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be an integer >= 1, got 0"):
        FixedStep(**{name: 0})


# -- Patience ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize("min_delta", [0.0, 0.25])
@pytest.mark.filterwarnings("ignore:PatientPruner is experimental")
def test_patience_is_optuna_s(patience: int, min_delta: float) -> None:
    """Decision for decision, on curves with ties."""
    rng = np.random.default_rng(0)
    stops = []
    for _ in range(60):
        pruner = optuna.pruners.PatientPruner(None, patience=patience, min_delta=min_delta)
        study = optuna.create_study(pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0))
        stock = study.ask()
        values: tuple[float, ...] = ()
        for step, value in enumerate(rng.choice(np.arange(8) / 8.0, size=10).tolist()):
            values = (*values, value)
            stock.report(value, step=step)
            stops.append(stock.should_prune())
            decision = Patience(StopsAll(), patience, min_delta).decide(History((TrialHistory(0, values),), chunks=99))
            assert (decision[0].verdict is Verdict.STOP) == stops[-1]
    assert 10 < sum(stops) < len(stops) - 10


def test_patience_waives_only_stops_and_only_while_the_trial_improves() -> None:
    rule = Patience(Median(average=False), patience=1)
    best = TrialHistory(0, (0.1,) * 4)
    assert said(rule, best, TrialHistory(1, (0.9, 0.8, 0.7, 0.6)))[1] == "continue"
    assert said(rule, best, TrialHistory(1, (0.5, 0.8, 0.8, 0.6)))[1] == "stop"
    waived = rule.decide(History((best, TrialHistory(1, (0.9, 0.8, 0.7, 0.6))), chunks=12))[1]
    assert waived.reason == "chunk 4: 0.6, median of 1 peer 0.1; still improving in the last 2 chunks"
    waiting = (TrialHistory(0, (0.1,)), TrialHistory(1, (0.2,)))
    assert set(said(Patience(SuccessiveHalving()), *waiting).values()) == {"pause"}


def test_patience_with_nan() -> None:
    rule = Patience(StopsAll(), patience=1)
    assert said(rule, TrialHistory(0, (0.5, math.nan))) == {0: "stop"}
    assert said(rule, TrialHistory(0, (math.nan, math.nan, 0.5, 0.6))) == {0: "continue"}
    assert said(rule, TrialHistory(0, (0.5, -math.inf, math.nan, 0.6))) == {0: "stop"}
    assert said(rule, TrialHistory(0, ())) == {0: "stop"}


# -- WarmUp -----------------------------------------------------------------------------------------------------------


def test_warm_up() -> None:
    rule = WarmUp(StopsAll(), chunks=3)
    assert said(rule, TrialHistory(0), TrialHistory(1, (0.5,) * 2), TrialHistory(2, (0.5,) * 3)) == {
        0: "continue",
        1: "continue",
        2: "stop",
    }
    assert said(rule, TrialHistory(0, (math.nan,)), TrialHistory(1, (0.5,), TrialState.PAUSED)) == {
        0: "stop",
        1: "continue",
    }


def test_nobody_waits_while_it_warms_up() -> None:
    trials = (TrialHistory(0, (0.1,)), TrialHistory(1, (0.2,)), TrialHistory(2, (0.3,), TrialState.PAUSED))
    assert set(said(WarmUp(SuccessiveHalving(), chunks=2), *trials).values()) == {"continue"}


@pytest.mark.parametrize("cls", [Patience, WarmUp])
def test_bad_inner_policy(cls: type[Patience] | type[WarmUp]) -> None:
    with pytest.raises(ValueError, match=r"`policy` must be a policy, got .*\. Write `ASHA\(\)`"):
        cls(ASHA)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`policy` must be a policy, got 'asha'"):
        cls("asha")  # type: ignore[arg-type]


def test_bad_numbers() -> None:
    with pytest.raises(ValueError, match="`patience` must be an integer >= 0, got -1"):
        Patience(patience=-1)
    with pytest.raises(ValueError, match="`min_delta` must be a number >= 0, got -1"):
        Patience(min_delta=-1)
    with pytest.raises(ValueError, match="`chunks` must be an integer >= 1, got 0"):
        WarmUp(chunks=0)
