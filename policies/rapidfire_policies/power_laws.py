"""Forecasts of learning curves by an ensemble of power laws, linear in the values: all trials at once."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EXPONENTS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""The exponents `b` of `v(k) = c + a * k**-b`; 0.1 falls nearly like a logarithm, 3 is flat almost at once."""

DRAWS = 48
"""Resampled curves a forecast, for each exponent."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Forecast:
    """What some curves may come to.

    Args:
        center: `(trials,)`, the ensemble's mean.
        spread: `(trials,)`, its standard deviation, over exponents and resampled residuals.
        draws: `(trials, exponents * DRAWS)`, the forecasts of resampled curves.
        weights: `(trials, exponents * DRAWS)`, their weights, summing to 1 over a row.
    """

    center: Array
    spread: Array
    draws: Array
    weights: Array


@functools.lru_cache(maxsize=4096)
def _plan(done: int, target: int, seed: int) -> tuple[Array, Array, NDArray[np.int64]]:
    """For curves of `done` values: smoother `(exponents, done, done)`, predictor `(exponents, done)`, resampled places.

    The fit is weighted: a value counts by `k / done`, so that the first chunks, which are of another regime, count
    less.
    """
    k = np.arange(1.0, done + 1)
    weight = k / done
    hats, predictors = [], []
    for b in EXPONENTS:
        design = np.stack([np.ones(done), k**-b], axis=1)
        solve = np.linalg.pinv(design * np.sqrt(weight)[:, None]) * np.sqrt(weight)
        hats.append(design @ solve)
        predictors.append(np.array([1.0, float(target) ** -b]) @ solve)
    places = np.random.default_rng((seed, done, target)).integers(0, done, size=(DRAWS, done))
    return np.array(hats), np.array(predictors), places


def forecast(curves: Array, target: int, *, seed: int = 0) -> Forecast:
    """Forecast the value at chunk `target` of curves that have done equally many chunks.

    For each exponent a weighted least-squares fit; the exponents' weights are their Gaussian likelihoods with the
    residual variance profiled out; residuals are resampled with the same places for every curve, which makes the
    forecast a pure function of the curve. A curve that would rise (`a < 0`) is forecast flat at its last value.

    Args:
        curves: `(trials, chunks done)`, finite, at least 3 chunks.
        target: The chunk to forecast, at least the chunks done.
        seed: Of the resampled places.

    Returns:
        The forecast of each curve.
    """
    done = curves.shape[1]
    hats, predictors, places = _plan(done, target, seed)
    fitted = np.einsum("eij,nj->nei", hats, curves)
    residual = curves[:, None, :] - fitted
    k = np.arange(1.0, done + 1)
    square = (residual**2 * (k / done)).sum(-1)
    floor = 1e-12 + 1e-6 * curves.var(axis=1, keepdims=True)
    logs = -0.5 * done * np.log(square / done + floor)
    weights = np.exp(logs - logs.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    leverage = np.clip(1 - np.einsum("eii->ei", hats), 0.1, 1.0)
    noise = residual / np.sqrt(leverage)
    point = np.einsum("ei,nei->ne", predictors, fitted)
    rises = fitted[:, :, 0] < fitted[:, :, -1]
    point = np.where(rises, curves[:, -1:], point)
    shift = np.einsum("ei,nedi->ned", predictors, noise[:, :, places])
    last = noise[:, :, places[:, 0]]
    shift = np.where(rises[:, :, None], last, shift)
    draws = point[:, :, None] + shift
    flat = draws.reshape(len(curves), -1)
    spread_weights = np.repeat(weights, DRAWS, axis=1) / DRAWS
    center = (flat * spread_weights).sum(1)
    spread = np.sqrt((spread_weights * (flat - center[:, None]) ** 2).sum(1))
    return Forecast(center, spread, flat, spread_weights)
