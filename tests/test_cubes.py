"""The unit cube: every value comes back from its position, and equal shares of a range are equal intervals."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from rapidfire_automl.cubes import Cube

SPACES: dict[str, BaseDistribution] = {
    "float": FloatDistribution(-2.0, 3.0),
    "log": FloatDistribution(1e-6, 1e-1, log=True),
    "step": FloatDistribution(0.0, 0.3, step=0.1),
    "int": IntDistribution(-3, 4),
    "even": IntDistribution(2, 8, step=2),
    "log int": IntDistribution(1, 128, log=True),
    "choice": CategoricalDistribution((None, "a", 3, 0.5, True)),
    "single": FloatDistribution(1.0, 1.0),
}


@pytest.mark.parametrize("name", SPACES)
def test_every_position_is_a_value_of_the_range_and_comes_back(name: str) -> None:
    distribution = SPACES[name]
    cube = Cube({name: distribution})
    for u in np.linspace(0.0, 1.0, 101):
        value = cube.decode(np.array([u]))[name]
        assert distribution._contains(distribution.to_internal_repr(value))
        [[back]] = cube.encode([{name: value}])
        again = cube.decode(np.array([back]))[name]
        assert type(again) is type(value)
        assert again == value or abs(again - value) < 1e-9 * abs(value) + 1e-12


@pytest.mark.parametrize("name", ["step", "int", "even", "choice"])
def test_values_have_equal_shares(name: str) -> None:
    cube = Cube({name: SPACES[name]})
    counts = Counter(cube.decode(np.array([u]))[name] for u in (np.arange(4000) + 0.5) / 4000)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_columns() -> None:
    cube = Cube(
        {"r": IntDistribution(1, 4), "x": FloatDistribution(0.0, 1.0), "c": CategoricalDistribution(("a", "b"))}
    )
    columns = cube.columns(cube.snapped(np.array([[0.0, 0.3, 0.1], [0.2, 0.3, 1.0], [0.3, 0.3, 0.9]])))
    half = 0.5**0.5
    assert columns.tolist() == [[0.125, 0.3, half, 0.0], [0.125, 0.3, 0.0, half], [0.375, 0.3, 0.0, half]]
    assert Cube({}).columns(np.zeros((2, 0))).shape == (2, 0)
    assert cube.columns(cube.encode([])).shape == (0, 4)


def test_nan_may_be_a_choice() -> None:
    choices = CategoricalDistribution((float("nan"), None, 0.5))
    assert Cube({"x": choices}).encode([{"x": float("nan")}, {"x": 0.5}]) == pytest.approx(np.array([[1 / 6], [5 / 6]]))


def test_values_outside_of_the_range_are_moved_to_its_edge() -> None:
    cube = Cube({"log": SPACES["log"], "int": SPACES["int"]})
    rows: list[dict[str, Any]] = [{"log": 1.0, "int": 9}, {"log": -1.0, "int": -9}]
    assert cube.encode(rows).tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_unknown_distributions_are_refused() -> None:
    with pytest.raises(ValueError, match="`x` must be a float, an integer or a choice"):
        Cube({"x": None})  # type: ignore[dict-item]
