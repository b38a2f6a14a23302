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

from rapidfire_automl.cubes import Cube
from rapidfire_automl.histories import COST_ATTR
from rapidfire_automl.parzen import Parzen

Floats = NDArray[np.float64]

_GOOD = 0.1
"""Share of the trials that count as good,"""
_LEAST_GOOD, _MOST_GOOD = 3, 25
"""but no fewer and no more than these."""
_CANDIDATES = 48


class ChunkSampler(optuna.samplers.BaseSampler):
    """Propose what is most typical of good trials, learning from every chunk that any trial has done.

    Stock samplers learn from finished trials (`TPESampler` from pruned ones too): as long as all trials run, they draw
    at random. Here two trials are compared after equally many chunks, at the last one that both have done. Let `v_i(k)`
    be the value of trial `i` after chunk `k`, signed such that lower is better, `r_i` the chunks it has done, and `n`
    the trials with a value, whatever became of them. A trial's score is the share of the others that it beats, ties
    count half,

        s_i = 1 / (n - 1)  sum over j != i of  [v_i(m) < v_j(m)] + 1/2 [v_i(m) = v_j(m)],      m = min(r_i, r_j)

    so that a trial that goes on after a chunk at which others were stopped for being worse stays ahead of them. With
    `g` the density of the `min(25, max(3, ceil(n / 10)))` trials with the highest scores and `b` that of the others
    (`rapidfire_automl.parzen`), the proposal is, of 48 candidates drawn from `g` and a few from anywhere, the one with
    the greatest

        g(x) / (b(x) cost(x))

    which grows with the expected improvement per cost. Trials that were asked for and have no value yet count among the
    others, so that proposals made together differ. `cost(x)` is the mean of what the trials' first chunks cost (the
    attribute "rapidfire:chunk_cost", written by the executor in tokens), weighted by their nearness to `x`, of
    logarithms; 1 where the costs are unknown.

    Parameters that all trials have in common are proposed together; those that only some have (conditional ones) each
    by the same rule on their own. Until `n_startup_trials` trials have a value, the values of each parameter are drawn
    from as many equal parts of its range, each part once (Latin hypercube).

    A proposal is a function of the study's trials, the seed and the trial's number: no state is kept, `reseed_rng` has
    nothing to do, and it does not matter which worker asks.

    Args:
        seed: Of all draws.
        n_startup_trials: Trials with a value before the densities are asked.
        cost_aware: Whether to divide by the cost that is expected.

    Raises:
        ValueError: A negative seed, `n_startup_trials` below 2, or (when asked) a study with several objectives.

    NaN, inf and -inf are worse than every finite value and equal to each other. A FAILED trial counts with what it has
    reported, or not at all. A COMPLETE trial's last value is the one it was told with.

    What breaks it: curves that cross late, since a score can only be as good as the chunks done; a good region that is
    narrow in many parameters at once; and, under policies that compare with all past trials, its own success: better
    proposals survive longer, so that fewer of them fit into a budget. Where no policy stops trials and all of a batch
    end together, TPE knows as much and may do better (`experiments/LOG.md`).

    Papers: Bergstra et al., Algorithms for Hyper-Parameter Optimization, 2011, for the ratio of densities; Falkner et
    al., BOHB, 2018 (https://arxiv.org/abs/1807.01774), for densities of partly trained configurations, there of one
    resource at a time.

    >>> import optuna
    >>> study = optuna.create_study(sampler=ChunkSampler(seed=0))
    >>> space = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}
    >>> running = [study.ask(space) for _ in range(8)]
    >>> for trial in running:  # a chunk each; nobody has finished
    ...     trial.report((trial.params["x"] - 0.3) ** 2, step=1)
    >>> abs(study.ask(space).params["x"] - 0.3) < 0.15
    True
    """

    def __init__(self, *, seed: int = 0, n_startup_trials: int = 8, cost_aware: bool = True) -> None:
        for name, value, least in (("seed", seed, 0), ("n_startup_trials", n_startup_trials, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer >= {least}, got {value!r}.")
        self.seed = seed
        self.n_startup_trials = n_startup_trials
        self.cost_aware = cost_aware

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
        waiting = [other.params for other in _waiting(study, trial.number) if _fits(other, space)]
        positions = cube.encode([seen.trial.params for seen in scored])
        scores = chunk_scores([seen.values for seen in scored])
        ranking = np.argsort(-scores, kind="stable")
        count = min(_MOST_GOOD, max(_LEAST_GOOD, math.ceil(_GOOD * len(scored))))
        good = Parzen(positions[ranking[:count]], cube)
        bad = Parzen(np.concatenate([positions[ranking[count:]], cube.encode(waiting)]), cube)
        anywhere = rng.random((max(4, _CANDIDATES // (count + 1)), positions.shape[1]))
        candidates = cube.snapped(np.concatenate([good.draw(_CANDIDATES, rng), anywhere]))
        merit = good.log_density(candidates) - bad.log_density(candidates)
        if self.cost_aware:
            merit -= _log_cost(candidates, positions, np.array([seen.cost for seen in scored]), cube)
        return cube.decode(candidates[int(merit.argmax())])


def _log_cost(candidates: Floats, positions: Floats, cost: Floats, cube: Cube) -> Floats:
    """The expected logarithm of a chunk's cost, `(candidates,)`; 0 where costs are unknown or alike."""
    known = cost > 0
    if not known.any() or cost[known].max() < 1.05 * cost[known].min():
        return np.zeros(len(candidates))
    logs = np.log(cost[known])
    weights = Parzen(positions[known], cube).nearness(candidates)
    expected: Floats = (weights @ logs + logs.mean()) / (weights.sum(1) + 1.0)
    return expected


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
    left, right = np.searchsorted(ranked, values, "left"), np.searchsorted(ranked, values, "right")
    return np.asarray(len(ranked) - 0.5 * (left + right), dtype=np.float64)
