"""The density over the cube: it integrates to one, its draws follow it, and choices and grids have their share."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from rapidfire_automl.cubes import Cube
from rapidfire_automl.parzen import Parzen

CUBE = Cube(
    {"x": FloatDistribution(0.0, 1.0), "c": CategoricalDistribution(("a", "b", "d")), "r": IntDistribution(1, 4)}
)


def points(count: int) -> NDArray[np.float64]:
    return CUBE.snapped(np.random.default_rng(count).random((count, 3)))


@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_it_integrates_to_one(count: int) -> None:
    at = np.random.default_rng(0).random((200_000, 3))
    # Between a grid's points the kernel goes on: it is a density over the cube, not over values.
    at[:, 1] = CUBE.snapped(at)[:, 1]
    total = np.exp(Parzen(points(count), CUBE).log_density(at)).mean()
    assert total == pytest.approx(1.0, abs=0.02)


def test_draws_lie_around_the_points_and_what_falls_outside_anywhere() -> None:
    at = CUBE.snapped(np.array([[0.02, 0.1, 0.9]] * 4 + [[0.06, 0.1, 0.9]]))
    drawn = Parzen(at, CUBE).draw(20_000, np.random.default_rng(0))
    assert drawn.min() >= 0.0
    assert drawn.max() <= 1.0
    assert 0.1 < (drawn[:, 0] > 0.2).mean() < 0.35  # a kernel of width 0.03 at 0.02 has a quarter outside
    choices = np.bincount((CUBE.snapped(drawn)[:, 1] * 3).astype(int)) / len(drawn)
    left = 0.5 * 5 ** (-1 / 7)
    assert choices == pytest.approx([1 - left * 2 / 3, left / 3, left / 3], abs=0.02)


def test_one_value_of_a_grid_or_of_a_choice_does_not_shut_the_others_out() -> None:
    same = CUBE.snapped(np.full((25, 3), 0.4))
    drawn = CUBE.snapped(Parzen(same, CUBE).draw(2000, np.random.default_rng(0)))
    assert len(np.unique(drawn[:, 1])) == 3
    assert (drawn[:, 2] != same[0, 2]).mean() > 0.1
    assert drawn[:, 0].std() < 0.05


def test_nearness_is_the_kernel_of_each_point() -> None:
    here = points(4)
    density = Parzen(here, CUBE)
    near = density.nearness(here)
    assert near.shape == (4, 4)
    assert np.log((near.sum(1) + 1.0) / 5) == pytest.approx(density.log_density(here))
