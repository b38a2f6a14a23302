"""The Optuna side of a replay: a study in memory in which stock pruners and samplers find what they look for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from rapidfire_automl.cubes import Cube
from rapidfire_automl.histories import COST_ATTR
from rapidfire_policies.base import Decision, History, TrialHistory, TrialState, Verdict

_ENDS = {
    TrialState.COMPLETE: OptunaState.COMPLETE,
    TrialState.STOPPED: OptunaState.PRUNED,
    TrialState.FAILED: OptunaState.FAIL,
}


class StudyMirror:
    """Keeps a study in step with a replay: arrivals, reports, ends.

    Args:
        pruner: Asked in `judge`; None where a policy judges.
        sampler: Proposes which row comes next; None for the order of rows.
        params: Hyperparameters by row; may be empty without a sampler.
        order: Rows in the order in which they come without a sampler.
        n_trials: Trials that come.
    """

    def __init__(
        self,
        pruner: optuna.pruners.BasePruner | None,
        sampler: optuna.samplers.BaseSampler | None,
        params: Sequence[Mapping[str, Any]],
        order: Sequence[int],
        n_trials: int,
    ) -> None:
        self._sampler = RowSampler(sampler, params, order)
        self.study = _quiet_study(self._sampler, pruner)
        self._left = n_trials
        self._trials: list[optuna.Trial] = []

    def next_row(self) -> int | None:
        """The row to train next, taken; None when enough have come."""
        if self._left == 0:
            return None
        self._left -= 1
        if not self._sampler.space:  # Optuna does not ask a sampler for nothing
            self._sampler.sample_relative(self.study, None, {})
        self._trials.append(self.study.ask(self._sampler.space))
        return self._sampler.taken

    def report(self, trial: TrialHistory) -> None:
        """Report a trial's newest value, and after its first chunk what that cost."""
        optuna_trial = self._trials[trial.number]
        optuna_trial.report(trial.values[-1], step=trial.resource)
        if trial.resource == 1:
            optuna_trial.set_user_attr(COST_ATTR, trial.costs[0])

    def end(self, trial: TrialHistory) -> None:
        """Tell the study how a trial ended; a COMPLETE trial's value is its last."""
        state = _ENDS[trial.state]
        value = trial.values[-1] if state is OptunaState.COMPLETE else None
        self.study.tell(self._trials[trial.number], value, state=state)

    def judge(self, history: History) -> Mapping[int, Decision]:
        """Ask the pruner about every running trial, in trial order; all of the round have reported."""
        name = type(self.study.pruner).__name__
        return {
            trial.number: Decision(Verdict.STOP, f"{name} says so")
            for trial in history.running
            if self._trials[trial.number].should_prune()
        }


class RowSampler(optuna.samplers.BaseSampler):
    """Snaps a sampler's proposals to the nearest recorded configuration that has not come yet.

    Distances are Euclidean in the unit cube (`rapidfire_automl.cubes`); choices that differ count 1.

    Args:
        sampler: The sampler; None takes the rows as they come.
        params: Hyperparameters by row.
        order: Rows in the order in which they come without a sampler.
    """

    def __init__(
        self, sampler: optuna.samplers.BaseSampler | None, params: Sequence[Mapping[str, Any]], order: Sequence[int]
    ) -> None:
        self.space = space_of(params)
        self.taken = -1
        self._inner = sampler
        self._params = params
        self._order = order
        self._free = np.ones(len(order), dtype=bool)
        self._cube = Cube(self.space)
        self._table = self._columns(params)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The whole space: a row is taken as a whole."""
        return self.space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial | None, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of the row that is taken."""
        row = self.taken = self._next(study, trial)
        self._free[row] = False
        return {name: self._params[row][name] for name in self.space}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never called: every parameter is in the relative space."""
        raise RuntimeError(f"`{param_name}` is no parameter of the recorded configurations.")

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Pass it on."""
        if self._inner is not None:
            self._inner.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: OptunaState, values: Sequence[float] | None
    ) -> None:
        """Pass it on."""
        if self._inner is not None:
            self._inner.after_trial(study, trial, state, values)

    def _next(self, study: optuna.Study, trial: FrozenTrial | None) -> int:
        if self._inner is None or trial is None:
            return next(row for row in self._order if self._free[row])
        space = self._inner.infer_relative_search_space(study, trial)
        point = dict(self._inner.sample_relative(study, trial, space))
        for name, distribution in self.space.items():
            if name not in point:
                point[name] = self._inner.sample_independent(study, trial, name, distribution)
        distance = ((self._table - self._columns([point])) ** 2).sum(1)
        distance[~self._free] = np.inf
        return int(distance.argmin())

    def _columns(self, rows: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        return self._cube.columns(self._cube.encode(rows))


def space_of(params: Sequence[Mapping[str, Any]]) -> dict[str, BaseDistribution]:
    """The box around recorded hyperparameters.

    Numbers get a range; a logarithmic one if they are all positive and span more than a factor of 50. What is constant
    is left out; anything else is a choice.

    Raises:
        ValueError: Rows have different hyperparameters.

    >>> space_of([{"lr": 1e-4, "r": 4, "name": "a"}, {"lr": 1e-2, "r": 8, "name": "b"}])
    ... # doctest: +NORMALIZE_WHITESPACE
    {'lr': FloatDistribution(high=0.01, log=True, low=0.0001, step=None),
     'r': IntDistribution(high=8, log=False, low=4, step=1),
     'name': CategoricalDistribution(choices=('a', 'b'))}
    """
    space: dict[str, BaseDistribution] = {}
    for row in params:
        if row.keys() != params[0].keys():
            raise ValueError(f"`params` must all have the keys of the first, {sorted(params[0])}, got {sorted(row)}.")
    for name in params[0] if params else ():
        values = [row[name] for row in params]
        if len(set(values)) < 2:
            continue
        if all(isinstance(value, Real) and not isinstance(value, (bool, np.bool_)) for value in values):
            low, high = min(values), max(values)
            log = low > 0 and high > 50 * low
            if all(isinstance(value, Integral) for value in values):
                space[name] = IntDistribution(int(low), int(high), log=log)
            else:
                space[name] = FloatDistribution(float(low), float(high), log=log)
        else:
            space[name] = CategoricalDistribution(sorted(set(values), key=repr))
    return space


def _quiet_study(sampler: optuna.samplers.BaseSampler, pruner: optuna.pruners.BasePruner | None) -> optuna.Study:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        return optuna.create_study(sampler=sampler, pruner=pruner or optuna.pruners.NopPruner(), study_name="replay")
    finally:
        optuna.logging.set_verbosity(verbosity)
