"""`ChunkSampler`: proposes from the curves of all trials, those that still run included."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState
from scipy.special import log_ndtr, ndtri

from rapidfire_automl.cubes import Cube
from rapidfire_automl.gaussian import GaussianProcess
from rapidfire_automl.histories import COST_ATTR

Floats = NDArray[np.float64]

_POINTS = 128
"""Trials the surrogate is fitted to at most: the better half are the best, the others are spread over the rest."""
_CANDIDATES = 768
_LEADERS = 5
"""Trials around which half of the candidates lie."""


class ChunkSampler(optuna.samplers.BaseSampler):
    """Propose what probably improves most, learning from every chunk that any trial has done.

    Stock samplers learn from finished trials (`TPESampler` from pruned ones too): as long as all trials run, they draw
    at random. Here two trials are compared after equally many chunks, at the last one that both have done. Let `v_i(k)`
    be the value of trial `i` after chunk `k`, signed such that lower is better, `r_i` the chunks it has done, and `n`
    the trials with a value, whatever became of them. A trial's score is the share of the others that it beats, ties
    count half,

        s_i = 1 / (n - 1)  sum over j != i of  [v_i(m) < v_j(m)] + 1/2 [v_i(m) = v_j(m)],      m = min(r_i, r_j)

    so that a trial that goes on after a chunk at which others were stopped for being worse stays ahead of them. A
    Gaussian process (`rapidfire_automl.gaussian`) is fitted to the normal scores

        y_i = Phi^-1((s_i (n - 1) + 1/2) / n),      noise variance  a + b (1 / r_i - 1 / max r)

    and the proposal is the candidate with the greatest expected improvement over the best fitted mean. Trials that were
    asked for and have no value yet count as observed at their expected score, so that proposals made together differ.
    Where trials' first chunks cost different amounts (the attribute "rapidfire:chunk_cost", written by the executor in
    tokens), it is expected improvement per cost, with a second process for the logarithm of the cost.

    Parameters that all trials have in common are proposed together; those that only some have (conditional ones) each
    by the same rule on their own. Until `n_startup_trials` trials have a value, the values of each parameter are drawn
    from as many equal parts of its range, each part once (Latin hypercube).

    A proposal is a function of the study's trials, the seed and the trial's number: no state is kept, `reseed_rng` has
    nothing to do, and it does not matter which worker asks.

    Args:
        seed: Of all draws.
        n_startup_trials: Trials with a value before the model is asked.
        cost_aware: Whether to divide by the cost that is expected.

    Raises:
        ValueError: A negative seed, `n_startup_trials` below 2, or (when asked) a study with several objectives.

    NaN, inf and -inf are worse than every finite value and equal to each other. A FAILED trial counts with what it has
    reported, or not at all. A COMPLETE trial's last value is the one it was told with.

    What breaks it: curves that cross late (a score can only be as good as the early chunks), and thousands of
    irrelevant parameters. Without reports it is a Gaussian process on ranks, like any other.

    Papers: Snoek et al., Practical Bayesian Optimization, 2012 (https://arxiv.org/abs/1206.2944), for improvement per
    second; Swersky et al., Freeze-Thaw, 2014 (https://arxiv.org/abs/1406.3896), for learning from curves; Salinas et
    al., 2020 (https://arxiv.org/abs/1909.13595), for normal scores.

    >>> import optuna
    >>> study = optuna.create_study(sampler=ChunkSampler(seed=0, n_startup_trials=4))
    >>> space = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}
    >>> running = [study.ask(space) for _ in range(8)]
    >>> for trial in running:  # a chunk each; nobody has finished
    ...     trial.report((trial.params["x"] - 0.3) ** 2, step=1)
    >>> abs(study.ask(space).params["x"] - 0.3) < 0.1
    True
    """

    def __init__(self, *, seed: int = 0, n_startup_trials: int = 8, cost_aware: bool = True) -> None:
        for name, value, least in (("seed", seed, 0), ("n_startup_trials", n_startup_trials, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer >= {least}, got {value!r}.")
        self.seed = seed
        self.n_startup_trials = n_startup_trials
        self.cost_aware = cost_aware
        # What was fitted last, beside what it was fitted to: those who are asked for together need one fit.
        self._fitted: tuple[bytes, GaussianProcess, GaussianProcess | None] | None = None

    def __repr__(self) -> str:
        arguments = f"seed={self.seed}, n_startup_trials={self.n_startup_trials}, cost_aware={self.cost_aware}"
        return f"ChunkSampler({arguments})"

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters that all trials with a value have in common, by name."""
        if len(study.directions) != 1:
            raise ValueError(f"`study` must have one objective for ChunkSampler, got {len(study.directions)}.")
        common: dict[str, BaseDistribution] | None = None
        for seen in _scored(study, trial.number):
            mine = seen.trial.distributions
            if common is None:
                common = dict(mine)
            elif common != mine:
                common = {name: d for name, d in common.items() if mine.get(name) == d}
        return {name: d for name, d in sorted((common or {}).items()) if not d.single()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The proposal for what all trials have in common; nothing before there are enough of them."""
        return self._propose(study, trial, search_space, np.random.default_rng([self.seed, trial.number])) or {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The proposal for one parameter; before enough trials have it, from its stratum."""
        name = crc32(param_name.encode())
        space = {param_name: param_distribution}
        rng = np.random.default_rng([self.seed, trial.number, name])
        proposed = self._propose(study, trial, space, rng)
        if proposed is not None:
            return proposed[param_name]
        turn, place = divmod(trial.number, self.n_startup_trials)
        strata = np.random.default_rng([self.seed, name, turn]).permutation(self.n_startup_trials)
        return Cube(space).decode(np.array([(strata[place] + rng.random()) / self.n_startup_trials]))[param_name]

    def _propose(
        self, study: optuna.Study, trial: FrozenTrial, space: Mapping[str, BaseDistribution], rng: np.random.Generator
    ) -> dict[str, Any] | None:
        scored = [seen for seen in _scored(study, trial.number) if _fits(seen.trial, space)]
        if not space or len(scored) < self.n_startup_trials:
            return None
        cube = Cube(space)
        positions = cube.encode([seen.trial.params for seen in scored])
        scores = chunk_scores([seen.values for seen in scored])
        process, costs = self._fit(cube.columns(positions), scores, scored)
        waiting = [other.params for other in _waiting(study, trial.number) if _fits(other, space)]
        process = process.believing(cube.columns(cube.encode(waiting)))
        candidates = _candidates(positions, scores, rng)
        columns = cube.columns(candidates)
        merit = _log_improvement(process, columns)
        if costs is not None:
            merit = merit - costs.predict(columns)[0]
        return cube.decode(candidates[int(merit.argmax())])

    def _fit(
        self, columns: Floats, scores: Floats, scored: Sequence[_Scored]
    ) -> tuple[GaussianProcess, GaussianProcess | None]:
        resource = np.array([len(seen.values) for seen in scored], dtype=np.float64)
        cost = np.array([seen.cost for seen in scored])
        key = b"".join(array.tobytes() for array in (columns, scores, resource, cost))
        fitted = self._fitted
        if fitted is None or fitted[0] != key:
            n = len(scores)
            chosen = _spread(scores)
            normal = ndtri((scores * (n - 1) + 0.5) / n)[chosen]
            doubt = (1 / resource - 1 / resource.max())[chosen]
            process = GaussianProcess(columns[chosen], normal, doubt)
            costs = self._fit_costs(columns[chosen], cost[chosen])
            fitted = self._fitted = (key, process, costs)
        return fitted[1], fitted[2]

    def _fit_costs(self, columns: Floats, cost: Floats) -> GaussianProcess | None:
        """The process for the logarithm of a chunk's cost; None where costs are unknown or alike."""
        known = cost > 0
        if not self.cost_aware or known.sum() < 2 or cost[known].max() < 1.05 * cost[known].min():
            return None
        return GaussianProcess(columns[known], np.log(cost[known]), np.zeros(int(known.sum())))


@dataclass(frozen=True)
class _Scored:
    """A trial with a value: `values[k - 1]` after chunk `k`, lower is better; `cost` of its first chunk, 0 unknown."""

    trial: FrozenTrial
    values: tuple[float, ...]
    cost: float


def _scored(study: optuna.Study, number: int) -> list[_Scored]:
    """The trials with a value, by number, without the one that is asking."""
    sign = -1.0 if study.direction is StudyDirection.MAXIMIZE else 1.0
    found = []
    for trial in sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number):
        reported = trial.intermediate_values
        values = [reported[step] for step in sorted(reported)]
        if trial.state is OptunaState.COMPLETE and trial.value is not None:
            values[-1:] = [trial.value]
        if values and trial.number != number:
            cost = float(trial.user_attrs.get(COST_ATTR, 0.0))
            found.append(_Scored(trial, tuple(sign * value for value in values), cost if math.isfinite(cost) else 0.0))
    return found


def _waiting(study: optuna.Study, number: int) -> list[FrozenTrial]:
    """The running trials that have reported nothing yet, by number, without the one that is asking."""
    trials = sorted(study.get_trials(deepcopy=False, states=(OptunaState.RUNNING,)), key=lambda trial: trial.number)
    return [trial for trial in trials if not trial.intermediate_values and trial.number != number]


def _fits(trial: FrozenTrial, space: Mapping[str, BaseDistribution]) -> bool:
    return all(trial.distributions.get(name) == distribution for name, distribution in space.items())


def chunk_scores(curves: Sequence[Sequence[float]]) -> Floats:
    """The share of the others that each trial beats at the last chunk both have done, ties count half, `(trials,)`.

    Args:
        curves: Values of each trial by chunk, one at least, lower is better. What is not finite loses to all that is.

    >>> chunk_scores([[3.0, 1.0], [2.0], [4.0, 2.0], [float("nan")]])
    array([0.66666667, 1.        , 0.33333333, 0.        ])
    """
    resource = np.array([len(curve) for curve in curves])
    table = np.full((len(curves), resource.max()), np.inf)
    for row, curve in enumerate(curves):
        table[row, : len(curve)] = curve
    table[~np.isfinite(table)] = np.inf
    wins = np.zeros(len(curves))
    for chunk in np.unique(resource):
        # Who stands here is compared here with all who came this far, and they with it.
        here, beyond = resource == chunk, resource > chunk
        column = table[:, chunk - 1]
        wins[here] += _beaten(column[here], column[here | beyond]) - 0.5
        wins[beyond] += _beaten(column[beyond], column[here])
    return wins / max(1, len(curves) - 1)


def _beaten(values: Floats, others: Floats) -> Floats:
    """How many of the others are greater than each value, ties count half."""
    ranked = np.sort(others)
    left, right = (np.searchsorted(ranked, values, side) for side in ("left", "right"))
    beaten: Floats = len(ranked) - 0.5 * (left + right)
    return beaten


def _spread(scores: Floats) -> NDArray[np.intp]:
    """Which trials the process is fitted to: all, or the best and some of the rest, evenly by rank."""
    ranking = np.argsort(-scores, kind="stable")
    if len(ranking) <= _POINTS:
        return np.arange(len(ranking))
    best, rest = ranking[: _POINTS // 2], ranking[_POINTS // 2 :]
    return np.concatenate([best, rest[np.linspace(0, len(rest) - 1, _POINTS - len(best)).astype(int)]])


def _candidates(positions: Floats, scores: Floats, rng: np.random.Generator) -> Floats:
    """Half anywhere, half around the leaders at all distances, `(candidates, parameters)`."""
    parameters = positions.shape[1]
    half = _CANDIDATES // 2
    leaders = np.argsort(-scores, kind="stable")[:_LEADERS]
    centre = positions[rng.choice(leaders, half)]
    reach = 10.0 ** rng.uniform(-2.0, -0.3, (half, 1))
    moved = rng.random((half, parameters)) < max(0.5, 2.0 / parameters)
    near = centre + np.where(moved, reach * rng.standard_normal((half, parameters)), 0.0)
    return np.concatenate([rng.random((half, parameters)), np.clip(near, 0.0, 1.0)])


def _log_improvement(process: GaussianProcess, columns: Floats) -> Floats:
    """The logarithm of the expected improvement over the best fitted mean, `(points,)`."""
    mean, deviation = process.predict(columns)
    z = (mean - process.best) / deviation
    # Far below the best the improvement is phi(z) / z^2, and the difference would be rounding error.
    far = np.minimum(z, -5.0)
    tail = -0.5 * far**2 - 0.5 * math.log(2 * math.pi) - 2.0 * np.log(-far)
    near = np.maximum(z, -5.0)
    density = np.exp(-0.5 * near**2) / math.sqrt(2 * math.pi)
    improvement = np.log(np.maximum(near * np.exp(log_ndtr(near)) + density, 1e-300))
    logged: Floats = np.log(deviation) + np.where(z < -5.0, tail, improvement)
    return logged
