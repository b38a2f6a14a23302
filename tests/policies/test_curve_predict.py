"""CurvePredict: its forecasts against an independent fit, its calibration, and its verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import lsq_linear

from rapidfire_policies import CurvePredict, History, TrialHistory, TrialState, Verdict
from rapidfire_policies.power_laws import EXPONENTS, forecast


def power_laws(count: int, chunks: int, seed: int, noise: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    level, drop = rng.uniform(0, 1, (count, 1)), rng.uniform(0.2, 1, (count, 1))
    b = rng.choice([0.5, 1.0, 1.5], (count, 1))
    return level + drop * np.arange(1.0, chunks + 1) ** -b + noise * rng.normal(size=(count, chunks))


def test_power_laws_are_forecast_exactly_without_noise() -> None:
    curves = power_laws(20, 40, seed=0)
    cast = forecast(curves[:, :8], 40)
    assert cast.center == pytest.approx(curves[:, -1], abs=5e-3)
    assert (cast.spread < 0.01).all()
    assert cast.weights.sum(1) == pytest.approx(np.ones(20))


def test_each_exponents_fit_is_the_weighted_least_squares_one() -> None:
    """Against scipy's solver, exponent by exponent, on noisy falling curves."""
    curves = power_laws(5, 9, seed=1, noise=0.02)
    cast = forecast(curves, 20)
    k = np.arange(1.0, 10)
    weight = np.sqrt(k / 9)
    points = np.zeros((5, len(EXPONENTS)))
    logs = np.zeros((5, len(EXPONENTS)))
    for j, b in enumerate(EXPONENTS):
        design = np.stack([np.ones(9), k**-b], axis=1)
        for i, curve in enumerate(curves):
            fit = lsq_linear(design * weight[:, None], curve * weight)
            c, a = fit.x
            points[i, j] = c + a * 20.0**-b if a >= 0 else curve[-1]
            square = float((((design @ fit.x) - curve) ** 2 * k / 9).sum())
            logs[i, j] = -4.5 * math.log(square / 9 + 1e-12 + 1e-6 * curve.var())
    shares = np.exp(logs - logs.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    draws = cast.draws.reshape(5, len(EXPONENTS), -1)
    mean_shift = draws.mean(2) - points  # the resampled residuals' own mean
    assert cast.center == pytest.approx((shares * (points + mean_shift)).sum(1), rel=1e-6)
    assert np.abs(mean_shift).max() < 0.1


def test_a_forecast_is_a_function_of_the_curve_alone() -> None:
    curves = power_laws(6, 10, seed=2, noise=0.05)
    whole = forecast(curves, 30)
    for i in range(6):
        alone = forecast(curves[i : i + 1], 30)
        assert alone.center[0] == pytest.approx(whole.center[i], rel=1e-12)


def test_a_rising_curve_is_forecast_flat() -> None:
    cast = forecast(np.array([[0.1, 0.2, 0.3, 0.4]]), 12)
    assert cast.center[0] == pytest.approx(0.4, abs=0.1)


def lockstep(curves: np.ndarray, done: int) -> History:
    return History(
        tuple(TrialHistory(i, tuple(curve[:done].tolist())) for i, curve in enumerate(curves)), chunks=curves.shape[1]
    )


def test_it_stops_the_hopeless_and_spares_the_winner() -> None:
    curves = power_laws(32, 40, seed=3, noise=0.003)
    decisions = CurvePredict().decide(lockstep(curves, 8))
    stopped = {number for number, decision in decisions.items() if decision.verdict is Verdict.STOP}
    assert len(stopped) > 20
    assert int(curves[:, -1].argmin()) not in stopped


def test_chances_are_calibrated_on_noisy_power_laws() -> None:
    """Of the trials given a chance of about p to beat the lead at the end, about p do: over many searches."""
    given, came = [], []
    for seed in range(80):
        curves = np.minimum.accumulate(power_laws(16, 24, seed=seed, noise=0.03), axis=1)
        history = lockstep(curves, 8)
        policy = CurvePredict(threshold=0.01, keep=1)
        judged = [t for t in history.running if t.number != int(curves[:, 7].argmin())]
        leader = min(history.trials, key=lambda t: max(t.values[-2:]))
        lead = max(leader.values[-2:])
        for number, decision in policy._chances(history, judged, leader):
            given.append(decision.numbers["chance"])
            came.append(curves[number, -1] < lead)
    chances, hits = np.array(given), np.array(came)
    for low, high in [(0.0, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 1.01)]:
        inside = (chances >= low) & (chances < high)
        assert inside.sum() > 15
        assert abs(hits[inside].mean() - chances[inside].mean()) < 0.2, (low, high, hits[inside].mean())
    assert hits[chances < 0.05].mean() < 0.05


def test_late_drops_seen_in_backtests_hold_the_verdicts_back() -> None:
    """The same live trial is stopped where the past obeys power laws and goes on where curves dropped late."""
    judged = TrialHistory(0, tuple(0.6 + 0.3 / k for k in range(1, 7)))
    rival = TrialHistory(1, (0.5,) * 6)
    tame = tuple(
        TrialHistory(2 + i, tuple(0.7 + 0.01 * i + 0.3 / k for k in range(1, 13)), TrialState.STOPPED)
        for i in range(40)
    )
    wild = tuple(
        TrialHistory(2 + i, tuple(0.7 + 0.01 * i + 0.3 / k - 0.6 * (k > 9) for k in range(1, 13)), TrialState.STOPPED)
        for i in range(40)
    )
    policy = CurvePredict(keep=1)
    assert policy.decide(History((judged, rival, *tame), chunks=12))[0].verdict is Verdict.STOP
    assert policy.decide(History((judged, rival, *wild), chunks=12))[0].verdict is Verdict.CONTINUE


@pytest.mark.parametrize("arguments", [{"threshold": 0.0}, {"threshold": 1.0}, {"min_resource": 2}, {"keep": 0}])
def test_bad_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be"):
        CurvePredict(**arguments)  # type: ignore[arg-type]
