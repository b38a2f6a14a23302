"""Each of Guard's rules on its own, and Guard around another policy."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rapidfire_policies import ASHA, Guard, History, SuccessiveHalving, TrialHistory, TrialState, Verdict

FINE = TrialHistory(0, (2.0, 1.9, 1.8, 1.7))


def verdict(guard: Guard, *values: float, others: tuple[TrialHistory, ...] = (FINE,), **metrics: Any) -> str:
    """What becomes of trial 9 beside others."""
    trial = TrialHistory(9, values, metrics=metrics)
    decision = guard.decide(History((*others, trial), chunks=12)).get(9)
    return "" if decision is None else str(decision.verdict)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stops_at_once(bad: float) -> None:
    assert verdict(Guard(), 2.0, bad) == "stop"
    assert verdict(Guard(), bad) == "stop"
    assert verdict(Guard(), bad, 2.0) == "continue"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((2.0, 20.0), "continue"),
        ((2.0, 20.5), "stop"),
        ((2.0, 20.5, 19.0), "continue"),
        ((math.nan, 2.0, 20.5), "stop"),
        # A first value below zero: the same rise, nine times its size; and larger than values usually are.
        ((-1.0, 7.5), "continue"),
        ((-1.0, 8.5), "stop"),
        ((-0.01, 0.5), "continue"),
        ((-0.01, 2.5), "stop"),
        # A reward or an accuracy, the sign flipped, is never above zero.
        ((-0.9, -0.001), "continue"),
        ((0.0, 1.0), "continue"),
        ((0.0, 2.5), "stop"),
        ((0.0, 0.0), "continue"),
    ],
)
def test_divergence(values: tuple[float, ...], expected: str) -> None:
    """Beside trials that start at 2."""
    others = (FINE, TrialHistory(1, (2.0,)))
    assert verdict(Guard(patience=None), *values, others=others) == expected
    assert verdict(Guard(divergence=None, patience=None), *values, others=others) == "continue"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1.0, 1.1, 1.1, 1.1), "complete"),
        ((1.0, 1.1, 1.1), "continue"),
        ((1.0, 1.1, 1.02, 1.1), "continue"),
        ((1.0, 1.1, 1.021, 1.1), "complete"),
        ((3.0, 2.0, 1.0, 1.5, 1.4, 1.3), "complete"),
        ((-1.0, -0.9, -0.9, -0.9), "complete"),
        ((-1.0, -0.99, -0.99, -0.99), "continue"),
        ((math.inf, 1.0, 1.1, 1.1), "continue"),
        ((math.nan, 1.0, 1.1, 1.1, 1.1), "complete"),
        ((1.0, 1.1, math.nan, 1.1), "continue"),
    ],
)
def test_overfitting_completes(values: tuple[float, ...], expected: str) -> None:
    assert verdict(Guard(), *values) == expected
    assert verdict(Guard(patience=None), *values) == "continue"


def test_kl() -> None:
    assert verdict(Guard(), 1.0, 0.9, kl=(0.1, 10.0)) == "continue"
    assert verdict(Guard(), 1.0, 0.9, kl=(0.1, 10.5)) == "stop"
    assert verdict(Guard(), 1.0, 0.9, kl=(10.5, 0.1)) == "continue"
    assert verdict(Guard(), 1.0, 0.9, kl=(10.5, math.nan)) == "continue"
    assert verdict(Guard(max_kl=0.5), 1.0, 0.9, kl=(0.1, 0.6)) == "stop"
    assert verdict(Guard(max_kl=None), 1.0, 0.9, kl=(0.1, 99.0)) == "continue"


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"reward_std": (0.0, 0.0, 0.0)}, "stop"),
        ({"reward_std": (0.5, 0.0, 0.0, 0.0)}, "stop"),
        ({"reward_std": (0.0, 0.0)}, "continue"),
        ({"reward_std": (0.0, 0.1, 0.0)}, "continue"),
        ({"reward_std": (0.0, math.nan, 0.0)}, "continue"),
        ({"reward_std": (0.3, 0.3, 0.3), "frac_reward_zero_std": (1.0, 1.0, 1.0)}, "stop"),
        ({"reward_std": (0.3, 0.3, 0.3), "frac_reward_zero_std": (1.0, 0.9, 1.0)}, "continue"),
    ],
)
def test_reward_without_variance(metrics: dict[str, tuple[float, ...]], expected: str) -> None:
    assert verdict(Guard(), 1.0, 1.0, 1.0, 1.0, **metrics) == expected
    assert verdict(Guard(flat=None), 1.0, 1.0, 1.0, 1.0, **metrics) == "continue"


def test_guard_first_then_the_inner_policy() -> None:
    """The inner policy does not wait for the ended, and ranks their values all the same."""
    paused = tuple(TrialHistory(i, (0.5 + 0.1 * i,), TrialState.PAUSED) for i in range(3))
    diverged = TrialHistory(3, (math.nan,))
    alone = SuccessiveHalving().decide(History((*paused, diverged), chunks=9))
    assert {str(alone[i].verdict) for i in range(3)} == {"pause"}
    guarded = Guard(SuccessiveHalving()).decide(History((*paused, diverged), chunks=9))
    assert {i: str(guarded[i].verdict) for i in range(4)} == {0: "continue", 1: "stop", 2: "stop", 3: "stop"}


def test_overfitting_wins_over_the_inner_policy_s_stop() -> None:
    good = TrialHistory(0, (0.1, 0.1, 0.1))
    overfits = TrialHistory(1, (1.0, 1.5, 1.5))
    policy = ASHA(min_resource=3)
    history = History((good, overfits), chunks=9)
    assert policy.decide(history)[1].verdict is Verdict.STOP
    assert Guard(policy, patience=2).decide(history)[1].verdict is Verdict.COMPLETE


def test_the_last_finite_trial_goes_on_though_it_has_diverged() -> None:
    history = History((TrialHistory(0, (1.0, 50.0)), TrialHistory(1, (1.0, math.nan))), chunks=9)
    decisions = Guard().decide(history)
    assert {i: str(decisions[i].verdict) for i in (0, 1)} == {0: "continue", 1: "stop"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": ASHA}, r"`policy` must be a policy, got .*\. Write `ASHA\(\)`"),
        ({"divergence": 1.0}, "`divergence` must be a number > 1, got 1.0"),
        ({"divergence": math.nan}, "`divergence` must be a number > 1, got nan"),
        ({"patience": 0}, "`patience` must be an integer >= 1, got 0"),
        ({"margin": -0.1}, "`margin` must be a number >= 0, got -0.1"),
        ({"max_kl": 0}, "`max_kl` must be a number > 0, got 0"),
        ({"flat": 0}, "`flat` must be an integer >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guard(**arguments)
