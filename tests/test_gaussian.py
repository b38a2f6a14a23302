"""The Gaussian process: its gradient, its predictions against the textbook, and what it makes of noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from rapidfire_automl.gaussian import GaussianProcess

Floats = NDArray[np.float64]


def data(points: int = 24, columns: int = 3, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    rng = np.random.default_rng(seed)
    x = rng.random((points, columns))
    y = np.sin(6 * x[:, 0]) + 0.1 * rng.standard_normal(points)
    return x, y, rng.random(points)


def test_the_gradient_is_that_of_the_loss() -> None:
    process = GaussianProcess(*data())
    rng = np.random.default_rng(1)
    for _ in range(5):
        theta = rng.normal(-0.5, 0.5, 6)
        gradient = process._loss(theta)[1]
        for i in range(6):
            step = np.zeros(6)
            step[i] = 1e-5
            numeric = (process._loss(theta + step)[0] - process._loss(theta - step)[0]) / 2e-5
            assert gradient[i] == pytest.approx(numeric, rel=1e-4, abs=1e-4)


def test_predictions_are_the_textbooks() -> None:
    x, y, doubt = data()
    process = GaussianProcess(x, y, doubt)
    *lengths, scale, noise, extra = np.exp(process._theta)

    def kernel(one: Floats, other: Floats) -> Floats:
        r = np.sqrt((((one[:, None] - other[None]) / np.array(lengths)) ** 2).sum(-1))
        return scale * (1 + math.sqrt(5) * r + 5 * r**2 / 3) * np.exp(-math.sqrt(5) * r)

    at = np.random.default_rng(2).random((7, 3))
    inverse = np.linalg.inv(kernel(x, x) + np.diag(noise + extra * doubt + 1e-8))
    mean = y.mean() + kernel(at, x) @ inverse @ (y - y.mean())
    variance = scale - np.einsum("ij,jk,ik->i", kernel(at, x), inverse, kernel(at, x))
    np.testing.assert_allclose(process.predict(at)[0], mean, atol=1e-8)
    np.testing.assert_allclose(process.predict(at)[1], np.sqrt(variance), atol=1e-6)


def test_it_finds_the_column_that_matters() -> None:
    process = GaussianProcess(*data(60))
    lengths = process._theta[:3]
    assert lengths[0] < min(lengths[1:]) - 1.0


def test_belief_moves_no_mean_and_takes_doubt_away() -> None:
    x, y, doubt = data()
    process = GaussianProcess(x, y, doubt)
    at = np.full((1, 3), 0.95)
    believing = process.believing(at)
    assert process.believing(np.zeros((0, 3))) is process
    grid = np.random.default_rng(3).random((50, 3))
    np.testing.assert_allclose(believing.predict(grid)[0], process.predict(grid)[0], atol=1e-6)
    assert believing.predict(at)[1] < 0.8 * process.predict(at)[1]
    assert len(process._y) == 24


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.zeros((3, 2)), np.array([1.0, 2.0, 3.0])),  # the same point over and over
        (np.random.default_rng(0).random((5, 2)), np.zeros(5)),  # equal targets
        (np.zeros((2, 0)), np.array([0.0, 1.0])),  # no column
    ],
)
def test_degenerate_data(x: Floats, y: Floats) -> None:
    mean, deviation = GaussianProcess(x, y, np.zeros(len(y))).predict(x)
    assert np.isfinite(mean).all()
    assert (deviation > 0).all()
