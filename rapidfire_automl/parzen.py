"""A density over the unit cube from a few points: a product kernel on each, and a uniform part."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, ndtr

from rapidfire_automl.cubes import Cube

Floats = NDArray[np.float64]

_NARROWEST, _WIDEST = 0.03, 0.6


class Parzen:
    """The mixture of the uniform density and one kernel a point, each with the weight `1 / (points + 1)`.

    A kernel is a product over the parameters. For a number, a normal density around the point, cut to [0, 1], whose
    width is the points' standard deviation times `points^(-1 / (4 + parameters))` (Scott's rule), at least 0.03 and
    half the distance of neighbouring values, at most 0.6. For one of `c` choices, relative to the uniform density,
    `c (1 - w) + w` for the point's own choice and `w` for each other, with `w` half of that power.

    Args:
        points: `(points, parameters)`, positions in the cube; may be empty.
        cube: The cube.

    >>> from optuna.distributions import FloatDistribution
    >>> density = Parzen(np.array([[0.2], [0.3]]), Cube({"x": FloatDistribution(0.0, 1.0)}))
    >>> near, far = density.log_density(np.array([[0.25], [0.9]]))
    >>> bool(near > far)
    True
    """

    def __init__(self, points: Floats, cube: Cube) -> None:
        count, parameters = points.shape
        self._points = points
        self._is_choice, self._choices = cube.is_choice, cube.counts
        power = float(max(count, 1)) ** (-1.0 / (4 + parameters))
        spread = points.std(0) if count > 1 else np.full(parameters, 0.3)
        least = np.maximum(_NARROWEST, np.where(cube.counts > 0, 0.5 / np.maximum(cube.counts, 1), 0.0))
        self._width = np.clip(spread * power, least, _WIDEST)
        self._leave = 0.5 * power
        self._mass = self._width * (ndtr((1.0 - points) / self._width) - ndtr(-points / self._width))

    def log_density(self, at: Floats) -> Floats:
        """The logarithm of the density, `(positions,)`.

        Args:
            at: `(positions, parameters)`.
        """
        parts = np.concatenate([self._log_kernels(at), np.zeros((len(at), 1))], axis=1)
        total: Floats = logsumexp(parts, axis=1) - math.log(parts.shape[1])
        return total

    def nearness(self, at: Floats) -> Floats:
        """Each point's kernel at positions `(positions, parameters)`: `(positions, points)`."""
        near: Floats = np.exp(self._log_kernels(at))
        return near

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        """Positions around the points, `(count, parameters)`; needs a point.

        A number is drawn from its kernel before the cut, and anywhere in [0, 1] if that falls outside: near an edge and
        where little is known, there is more to explore than the density says.
        """
        which = rng.integers(len(self._points), size=count)
        centre = self._points[which]
        moved = centre + self._width * rng.standard_normal(centre.shape)
        anywhere, left = rng.random(centre.shape), rng.random(centre.shape) < self._leave
        moved = np.where((moved < 0.0) | (moved > 1.0), anywhere, moved)
        return np.where(self._is_choice, np.where(left, anywhere, centre), moved)

    def _log_kernels(self, at: Floats) -> Floats:
        distance = (at[:, None] - self._points[None]) / self._width
        number = -0.5 * distance**2 - np.log(math.sqrt(2 * math.pi) * self._mass)
        same = np.floor(at * self._choices)[:, None] == np.floor(self._points * self._choices)[None]
        choice = np.log(np.where(same, self._choices * (1.0 - self._leave), 0.0) + self._leave)
        kernels: Floats = np.where(self._is_choice, choice, number).sum(-1)
        return kernels
