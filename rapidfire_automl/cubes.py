"""Optuna's parameters as numbers: positions in the unit cube, and columns between which distances mean something."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

Floats = NDArray[np.float64]


class Cube:
    """A search space as the cube `[0, 1]^parameters`, of which each value of a parameter has an equal share.

    On a logarithmic scale equal ratios have equal shares. Whole numbers, steps and choices have an interval each, and
    stand at its middle.

    Args:
        space: Float, integer and categorical distributions by name.

    Attributes:
        is_choice: `(parameters,)`.
        counts: `(parameters,)`, how many values there are with an equal share each; 0 for all others.

    Raises:
        ValueError: A distribution of another kind.

    >>> cube = Cube({"r": IntDistribution(1, 4), "lr": FloatDistribution(1e-4, 1e-2, log=True)})
    >>> cube.encode([{"r": 1, "lr": 1e-3}])
    array([[0.125, 0.5  ]])
    >>> cube.decode(np.array([0.99, 1.0]))
    {'r': 4, 'lr': 0.01}
    """

    def __init__(self, space: Mapping[str, BaseDistribution]) -> None:
        for name, distribution in space.items():
            if not isinstance(distribution, (FloatDistribution, IntDistribution, CategoricalDistribution)):
                raise ValueError(f"`{name}` must be a float, an integer or a choice, got {distribution!r}.")
        self.space = dict(space)
        self.is_choice = np.array([isinstance(d, CategoricalDistribution) for d in space.values()], dtype=bool)
        self.counts = np.array([_count(d) or 0 for d in space.values()], dtype=np.int64)

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> Floats:
        """Positions of configurations, `(rows, parameters)`; what lies outside of its range is moved to its edge."""
        columns = [[_position(d, row[name]) for row in rows] for name, d in self.space.items()]
        return np.clip(np.array(columns, dtype=np.float64).reshape(len(columns), len(rows)).T, 0.0, 1.0)

    def decode(self, position: Floats) -> dict[str, Any]:
        """The configuration at a position `(parameters,)`."""
        return {name: _value(d, float(u)) for (name, d), u in zip(self.space.items(), position, strict=True)}

    def snapped(self, positions: Floats) -> Floats:
        """The positions of the values at positions `(positions, parameters)`: the middles of their intervals."""
        count = np.maximum(self.counts, 1)
        middles = (np.minimum(np.floor(positions * count), count - 1) + 0.5) / count
        return np.where(self.counts > 0, middles, positions)

    def columns(self, positions: Floats) -> Floats:
        """What distances are measured between, `(positions, columns)`.

        A number is its position, a choice one-hot with height `sqrt(1/2)`: two choices that differ are 1 apart.

        Args:
            positions: `(positions, parameters)`, of values.
        """
        blocks = [np.zeros((len(positions), 0))]
        for column, is_choice, count in zip(positions.T, self.is_choice, self.counts, strict=True):
            if is_choice:
                blocks.append(math.sqrt(0.5) * np.eye(count)[(column * count).astype(int)])
            else:
                blocks.append(column[:, None])
        return np.concatenate(blocks, axis=1)


def _count(distribution: BaseDistribution) -> int | None:
    """How many values there are, equal in their shares; None for a continuum and on a logarithmic scale."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    if distribution.log or distribution.step is None:
        return None
    return round((distribution.high - distribution.low) / distribution.step) + 1


def _log_range(distribution: FloatDistribution | IntDistribution) -> tuple[float, float]:
    margin = 0.5 if isinstance(distribution, IntDistribution) else 0.0
    return math.log(distribution.low - margin), math.log(distribution.high + margin)


def _position(distribution: BaseDistribution, value: Any) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return (distribution.to_internal_repr(value) + 0.5) / len(distribution.choices)  # finds a NaN among the choices
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    count = _count(distribution)
    if count is not None:
        assert distribution.step is not None
        return ((float(value) - distribution.low) / distribution.step + 0.5) / count
    if distribution.log:
        low, high = _log_range(distribution)
        value = math.log(max(float(value), float(distribution.low)))
    else:
        low, high = distribution.low, distribution.high
    return (float(value) - low) / (high - low) if high > low else 0.5


def _value(distribution: BaseDistribution, u: float) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[min(int(u * len(distribution.choices)), len(distribution.choices) - 1)]
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    count = _count(distribution)
    if count is not None:
        assert distribution.step is not None
        value = distribution.low + min(int(u * count), count - 1) * distribution.step
    elif distribution.log:
        low, high = _log_range(distribution)
        value = math.exp(low + u * (high - low))
    else:
        value = distribution.low + u * (distribution.high - distribution.low)
    if isinstance(distribution, IntDistribution):
        value = round(value)
    return min(max(value, distribution.low), distribution.high)
