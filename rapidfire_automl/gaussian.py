"""A Gaussian process in NumPy, small enough to be fitted anew for every proposal."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular
from scipy.optimize import minimize

Floats = NDArray[np.float64]

_NOISE = 0.1
"""Where the noise variances' prior has its middle; the targets' variance is about 1."""


class GaussianProcess:
    """Regression on targets of about unit variance, with a noise that depends on the point.

    Covariance of two points `x, x'` with `q = 5 sum_d (x_d - x'_d)^2 / l_d^2`, Matérn 5/2, and of two observations:

        k(x, x') = s^2 (1 + sqrt(q) + q / 3) exp(-sqrt(q)),      k(x_i, x_j) + [i = j] (a + b e_i)

    `l`, `s^2`, `a` and `b` maximise the posterior: log-normal priors, for `l` one that grows with the number of columns
    (Hvarfner et al., 2024, https://arxiv.org/abs/2402.02229), so that a column counts only where the data say so.

    Args:
        x: `(points, columns)`, in the unit cube.
        y: `(points,)`.
        doubt: `(points,)`, the `e` above, 0 for the most certain observations.
    """

    def __init__(self, x: Floats, y: Floats, doubt: Floats) -> None:
        self._x, self._doubt = x, doubt
        self._mean = float(y.mean())
        self._y = y - self._mean
        self._squares = _squares(x, x)
        columns = x.shape[1]
        self._middle = math.sqrt(2.0) - 1.0 + 0.5 * math.log(max(columns, 1))
        start = np.array([self._middle - 0.5] * columns + [0.0] + [math.log(_NOISE)] * 2)
        lengths, scale, noise = (math.log(0.05), math.log(30.0)), (math.log(0.05), math.log(10.0)), (-7.0, 1.4)
        bounds = [lengths] * columns + [scale, noise, noise]
        found = minimize(self._loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40})
        self._theta: Floats = found.x
        self._condition()

    def believing(self, x: Floats) -> GaussianProcess:
        """The process with more points, each observed at what is expected of it: their surroundings are known.

        Args:
            x: `(points, columns)`; may be empty.
        """
        if not len(x):
            return self
        other = object.__new__(GaussianProcess)
        other._theta, other._mean, other._middle = self._theta, self._mean, self._middle
        other._x = np.concatenate([self._x, x])
        other._y = np.concatenate([self._y, self.predict(x)[0] - self._mean])
        other._doubt = np.concatenate([self._doubt, np.zeros(len(x))])
        other._squares = _squares(other._x, other._x)
        other._condition()
        return other

    def predict(self, x: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the noiseless value at points `(points, columns)`, each `(points,)`."""
        cross = self._kernel(self._theta, _squares(x, self._x))[0]
        spread = solve_triangular(self._factor, cross.T, lower=True)
        variance = math.exp(self._theta[-3]) - (spread**2).sum(0)
        return self._mean + cross @ self._weights, np.sqrt(np.maximum(variance, 1e-12))

    @property
    def best(self) -> float:
        """The largest mean at an observed point."""
        return float(self.predict(self._x)[0].max())

    def _condition(self) -> None:
        kernel = self._kernel(self._theta, self._squares)[0] + np.diag(self._noise(self._theta))
        self._factor = np.linalg.cholesky(kernel)
        self._weights = cho_solve((self._factor, True), self._y)

    def _noise(self, theta: Floats) -> Floats:
        noise: Floats = math.exp(theta[-2]) + math.exp(theta[-1]) * self._doubt + 1e-8
        return noise

    def _kernel(self, theta: Floats, squares: Floats) -> tuple[Floats, Floats]:
        """The covariance, and its derivative by `-q / 2`."""
        root = np.sqrt(5.0 * (squares @ np.exp(-2.0 * theta[:-3])))
        decay = math.exp(theta[-3]) * np.exp(-root)
        return (1.0 + root + root**2 / 3.0) * decay, (1.0 + root) / 3.0 * decay

    def _loss(self, theta: Floats) -> tuple[float, Floats]:
        """The negative log posterior and its gradient; `theta` holds the logarithms of `l`, `s^2`, `a` and `b`."""
        kernel, slope = self._kernel(theta, self._squares)
        noise = self._noise(theta)
        try:
            factor = np.linalg.cholesky(kernel + np.diag(noise))
        except np.linalg.LinAlgError:
            return 1e10, np.zeros_like(theta)
        inverse = cho_solve((factor, True), np.eye(len(factor)))
        weights = inverse @ self._y
        loss = 0.5 * float(self._y @ weights) + float(np.log(np.diag(factor)).sum())
        pull = inverse - np.outer(weights, weights)
        gradient = np.empty_like(theta)
        by_length = np.tensordot(pull * slope, self._squares, 2)
        gradient[:-3] = 2.5 * by_length * np.exp(-2.0 * theta[:-3])
        gradient[-3] = 0.5 * (pull * kernel).sum()
        gradient[-2] = 0.5 * np.trace(pull) * math.exp(theta[-2])
        gradient[-1] = 0.5 * float(np.diag(pull) @ self._doubt) * math.exp(theta[-1])
        away = theta - np.array([self._middle] * (len(theta) - 3) + [0.0] + [math.log(_NOISE)] * 2)
        width = np.array([1.5] * (len(theta) - 3) + [1.0] * 3)
        return loss + 0.5 * float((away**2 / width).sum()), gradient + away / width


def _squares(x: Floats, other: Floats) -> Floats:
    """Squared differences by column, `(len(x), len(other), columns)`."""
    return (x[:, None] - other[None]) ** 2
