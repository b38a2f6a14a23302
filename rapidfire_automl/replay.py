"""Recorded curves instead of training: judge a policy, a pruner or a sampler in milliseconds.

The rounds are the executor's: every slot-holder trains a chunk, then one verdict over all trials; paused trials that
the policy wants back take the free slots first, newcomers the rest; when everybody is paused and nobody is to come,
the policy is asked once more, and whoever it does not resume is stopped.

    from rapidfire_automl import replay

    result = replay(curves, ASHA(), slots=8)
    result.selected, result.chunks, result.stopped
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rapidfire_policies.base import Decision, History, Policy, TrialHistory, TrialState, Verdict
from rapidfire_policies.survivors import is_finite

if TYPE_CHECKING:
    import optuna

    from rapidfire_automl.replay_study import StudyMirror

Judge = Callable[[History], Mapping[int, Decision]]

_NO_SCORES: tuple[NDArray[np.float64], ...] = ()


@dataclass(frozen=True, slots=True)
class ReplayVerdict:
    """A decision that was carried out.

    Args:
        round: Counted from 1.
        trial: Row of the curves.
        chunk: Chunks the trial has done.
        verdict: What became of it.
        reason: The policy's.
    """

    round: int
    trial: int
    chunk: int
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class ReplayResult:
    """What a search over recorded curves would have done. Trials are rows of the curves.

    Args:
        selected: The trial it would hand over: the COMPLETE one with the best finite last value, ties to the one that
            came first; without one, the furthest of the others with the best; None if no value was finite.
        chunks: Chunks spent.
        cost: What they cost, in the unit of `costs`.
        stopped: Trials that were stopped.
        complete: Trials that were trained to their end, or ended as good enough.
        resource: `(trials,)`, chunks each trial has done; 0 for those that never came.
        incumbent: `(improvements, 2)`: cost spent when the best value so far got better, and that value.
        verdicts: Every decision, in order.
        order: Trials in the order of their arrival.
        slot_rounds: `(rounds,)`, slots that were taken in each round.
    """

    selected: int | None
    chunks: int
    cost: float
    stopped: frozenset[int]
    complete: frozenset[int]
    resource: NDArray[np.int64]
    incumbent: NDArray[np.float64]
    verdicts: tuple[ReplayVerdict, ...]
    order: tuple[int, ...]
    slot_rounds: NDArray[np.int64]

    def best_within(self, cost: float) -> float:
        """The best value that was known when so much was spent; NaN before the first."""
        known = self.incumbent[self.incumbent[:, 0] <= cost, 1]
        return float(known[-1]) if len(known) else math.nan


def hold_last(curves: ArrayLike) -> NDArray[np.float64]:
    """Give runs that ended early (NaN after their own end) their last value until the end, `(trials, chunks)`.

    >>> hold_last([[3.0, 2.0, float("nan")], [float("nan"), 1.0, float("nan")]])
    array([[ 3.,  2.,  2.],
           [nan,  1.,  1.]])
    """
    table = np.array(curves, dtype=np.float64)
    last = np.maximum.accumulate(np.where(np.isnan(table), -1, np.arange(table.shape[1])), axis=1)
    return np.where(last >= 0, np.take_along_axis(table, np.maximum(last, 0), 1), np.nan)


@dataclass(slots=True, eq=False)
class _Trial:
    """One trial that has come; `history` is what the policy sees of it."""

    number: int
    row: int
    history: TrialHistory
    decision: Decision | None = None
    has_slot: bool = False


@dataclass
class Replay:
    """A search over recorded curves, round by round; `replay` runs one to its end.

    It can be pickled between rounds and goes on as if nothing had happened.

    Args:
        curves: `(trials, chunks)`, lower is better; NaN and infinities are values a policy gets to see.
        judge: Asked once a round.
        slots: Trials that train at a time.
        next_row: Which trial comes next, or None when no more is to come.
        costs: `(trials, chunks)`.
        scores: `(trials, chunks, examples)`, per-example scores, or None.
        params: Hyperparameters by row.
        max_alive: Most trials that live at a time, paused ones included; None for no limit.
        mirror: A study that is told of every trial's end.
    """

    curves: NDArray[np.float64]
    judge: Judge
    slots: int
    next_row: Callable[[], int | None]
    costs: NDArray[np.float64]
    scores: NDArray[np.float64] | None = None
    params: Sequence[Mapping[str, object]] = ()
    max_alive: int | None = None
    mirror: StudyMirror | None = None
    _values: list[tuple[float, ...]] = field(init=False)
    _alive: list[_Trial] = field(default_factory=list)
    _ended: list[TrialHistory] = field(default_factory=list)
    _rows: list[int] = field(default_factory=list)
    _verdicts: list[ReplayVerdict] = field(default_factory=list)
    _incumbent: list[tuple[float, float]] = field(default_factory=list)
    _slot_rounds: list[int] = field(default_factory=list)
    _spent: float = 0.0
    _chunks: int = 0
    _round: int = 0
    _exhausted: bool = False

    def __post_init__(self) -> None:
        self._values = [tuple(row) for row in self.curves.tolist()]

    @property
    def done(self) -> bool:
        """Whether nobody lives and nobody is to come."""
        return self._exhausted and not self._alive

    def round(self) -> None:
        """Refill, train a chunk, judge."""
        self._resume()
        self._admit()
        holders = [trial for trial in self._alive if trial.has_slot]
        if holders:
            self._slot_rounds.append(len(holders))
            self._round += 1
            for trial in holders:
                self._train(trial)
            self._close(holders)
        elif self._alive:
            self._wake_or_end()

    def run(self, budget: float = math.inf) -> ReplayResult:
        """Go on to the end, or until so much is spent; a round that is begun is finished."""
        while not self.done and self._spent < budget:
            self.round()
        return self.result()

    def result(self) -> ReplayResult:
        """What has been done so far."""
        trials = [*self._ended, *(trial.history for trial in self._alive)]
        resource = np.zeros(len(self.curves), dtype=np.int64)
        for trial in trials:
            resource[self._rows[trial.number]] = trial.resource

        def rows(state: TrialState) -> frozenset[int]:
            return frozenset(self._rows[trial.number] for trial in trials if trial.state is state)

        return ReplayResult(
            selected=self._selected(trials),
            chunks=self._chunks,
            cost=self._spent,
            stopped=rows(TrialState.STOPPED),
            complete=rows(TrialState.COMPLETE),
            resource=resource,
            incumbent=np.array(self._incumbent, dtype=np.float64).reshape(-1, 2),
            verdicts=tuple(self._verdicts),
            order=tuple(self._rows),
            slot_rounds=np.array(self._slot_rounds, dtype=np.int64),
        )

    # -- a round -------------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        free = self.slots - sum(trial.has_slot for trial in self._alive)
        for trial in self._alive:
            wants = trial.decision is not None and trial.decision.verdict is Verdict.CONTINUE
            if free and wants and not trial.has_slot:
                self._move(trial, TrialState.RUNNING)
                trial.has_slot = True
                free -= 1

    def _admit(self) -> None:
        free = self.slots - sum(trial.has_slot for trial in self._alive)
        room = free if self.max_alive is None else min(free, self.max_alive - len(self._alive))
        while room > 0 and not self._exhausted:
            row = self.next_row()
            if row is None:
                self._exhausted = True
                return
            history = TrialHistory(len(self._rows), params=self.params[row] if self.params else {})
            self._alive.append(_Trial(history.number, row, history, has_slot=True))
            self._rows.append(row)
            room -= 1
        if len(self._rows) == len(self.curves):
            self._exhausted = True

    def _train(self, trial: _Trial) -> None:
        old, row = trial.history, trial.row
        k = old.resource
        value = self._values[row][k]
        scores = _NO_SCORES if self.scores is None else (*old.scores, self.scores[row, k])
        cost = float(self.costs[row, k])
        trial.history = TrialHistory(
            old.number, self._values[row][: k + 1], TrialState.RUNNING, scores, (*old.costs, cost), old.params
        )
        self._spent += cost
        self._chunks += 1
        if math.isfinite(value) and (not self._incumbent or value < self._incumbent[-1][1]):
            self._incumbent.append((self._spent, value))

    def _close(self, holders: Sequence[_Trial]) -> None:
        """Judge; whoever is at its end is COMPLETE before the policy is asked."""
        if self.mirror is not None:
            for trial in holders:
                self.mirror.report(trial.history)
        whole = {trial.number for trial in holders if trial.history.resource == self.curves.shape[1]}
        for trial in holders:
            if trial.number in whole:
                self._end_as_complete(trial)
        decisions = dict(self._judged()) if len(whole) < len(self._alive) else {}
        decisions.update(dict.fromkeys(whole, Decision(Verdict.COMPLETE, "trained to the end")))
        for trial in self._alive:
            self._carry_out(trial, decisions.get(trial.number))
        self._bury()

    def _wake_or_end(self) -> None:
        """All are paused and nobody is to come: the policy resumes some, or the rest ends."""
        decisions = self._judged()
        for trial in self._alive:
            self._carry_out(trial, decisions.get(trial.number))
        if not any(t.decision is not None and t.decision.verdict is Verdict.CONTINUE for t in self._alive):
            for trial in self._alive:
                if trial.history.is_live:
                    self._carry_out(trial, Decision(Verdict.STOP, "paused when the search ended"))
        self._bury()

    def _judged(self) -> Mapping[int, Decision]:
        trials = (*self._ended, *(trial.history for trial in self._alive))
        return self.judge(History(trials, chunks=self.curves.shape[1], slots=self.slots))

    def _carry_out(self, trial: _Trial, decision: Decision | None) -> None:
        was_paused = trial.history.state is TrialState.PAUSED
        trial.decision = decision
        if decision is None or (was_paused and decision.verdict is Verdict.PAUSE):
            return
        self._note(trial, decision)
        if decision.verdict is Verdict.PAUSE:
            trial.has_slot = False
            self._move(trial, TrialState.PAUSED)
        elif decision.verdict is Verdict.STOP:
            self._move(trial, TrialState.STOPPED)
        elif decision.verdict is Verdict.COMPLETE:
            self._end_as_complete(trial)

    def _end_as_complete(self, trial: _Trial) -> None:
        """A trial that ends with a value that is not finite has failed."""
        self._move(trial, TrialState.COMPLETE if is_finite(trial.history) else TrialState.FAILED)

    def _bury(self) -> None:
        for trial in self._alive:
            if not trial.history.is_live:
                self._ended.append(trial.history)
                if self.mirror is not None:
                    self.mirror.end(trial.history)
        self._alive = [trial for trial in self._alive if trial.history.is_live]

    def _move(self, trial: _Trial, state: TrialState) -> None:
        old = trial.history
        if old.state is not state:
            trial.history = TrialHistory(old.number, old.values, state, old.scores, old.costs, old.params)

    def _note(self, trial: _Trial, decision: Decision) -> None:
        self._verdicts.append(
            ReplayVerdict(self._round, trial.row, trial.history.resource, decision.verdict, decision.reason)
        )

    def _selected(self, trials: Sequence[TrialHistory]) -> int | None:
        finite = [trial for trial in trials if is_finite(trial)]
        complete = [trial for trial in finite if trial.state is TrialState.COMPLETE]
        if complete:
            return self._rows[min(complete, key=lambda t: (t.values[-1], t.number)).number]
        if finite:
            return self._rows[min(finite, key=lambda t: (-t.resource, t.values[-1], t.number)).number]
        return None


def replay(
    curves: ArrayLike,
    policy: Policy | optuna.pruners.BasePruner,
    slots: int = 8,
    seed: int = 0,
    scores: ArrayLike | None = None,
    costs: ArrayLike | None = None,
    sampler: optuna.samplers.BaseSampler | None = None,
    *,
    params: Sequence[Mapping[str, Any]] | None = None,
    n_trials: int | None = None,
    max_alive: int | None = None,
    budget: float | None = None,
) -> ReplayResult:
    """Search over recorded curves as the executor would have searched.

    Args:
        curves: `(trials, chunks)`, lower is better. NaN is what a diverged trial reports; see `hold_last` for runs
            that just ended early.
        policy: A policy, or any Optuna pruner (asked in trial order after all of a round have reported).
        slots: Trials that train at a time.
        seed: Of the order in which trials come: 0 for that of their rows, any other number for one that is drawn. With
            a sampler, the sampler and its own seed decide.
        scores: `(trials, chunks, examples)`, per-example scores, lower is better.
        costs: `(trials, chunks)`, or `(trials,)` for chunks that cost the same; one each by default.
        sampler: Proposes hyperparameters; the nearest row that has not come yet is trained. Needs `params`.
        params: A row's hyperparameters; policies see them, and a sampler chooses among them.
        n_trials: Trials that come, all by default.
        max_alive: Most trials that live at a time, paused ones included; no limit by default. The executor's default
            is twice `slots`.
        budget: In the unit of `costs`: no round begins once so much is spent. Who lives then is neither stopped nor
            complete. No limit by default.

    Raises:
        ValueError: Shapes that do not fit, no trial or no chunk, `slots` below 1, a negative seed or cost, what is no
            policy, a sampler without `params`.

    >>> from rapidfire_policies import ASHA
    >>> result = replay([[0.9, 0.8, 0.7], [0.5, 0.4, 0.3], [0.8, 0.6, 0.2]], ASHA(reduction_factor=3))
    >>> result.selected, result.chunks, sorted(result.stopped)
    (1, 5, [0, 2])
    """
    table = _array("curves", curves, 2)
    trials, chunks = table.shape
    if not trials or not chunks:
        raise ValueError(f"`curves` must hold at least one trial and one chunk, got the shape {table.shape}.")
    for name, number in (("slots", slots), ("n_trials", n_trials), ("max_alive", max_alive)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 1):
            raise ValueError(f"`{name}` must be an integer >= 1, got {number!r}.")
    if budget is not None and not (isinstance(budget, (int, float)) and budget > 0):
        raise ValueError(f"`budget` must be > 0, got {budget!r}.")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"`seed` must be an integer >= 0, got {seed!r}.")
    cost = np.ones(table.shape) if costs is None else _costs(costs, table.shape)
    per_example = None if scores is None else _array("scores", scores, 3)
    if per_example is not None:
        _fits("scores", per_example.shape[:2], table.shape)
    if params is not None:
        _fits("params", (len(params),), (trials,))
    if sampler is not None and not params:
        raise ValueError("`sampler` chooses among recorded hyperparameters: pass them as `params`, one mapping a row.")
    count = trials if n_trials is None else min(int(n_trials), trials)
    order = list(range(trials)) if seed == 0 else np.random.default_rng(seed).permutation(trials).tolist()
    judge: Judge
    if isinstance(policy, Policy) and sampler is None:
        source, judge, mirror = _InOrder(order[:count]).next_row, policy.decide, None
    else:
        from optuna.samplers import BaseSampler

        from rapidfire_automl.replay_study import StudyMirror

        if sampler is not None and not isinstance(sampler, BaseSampler):
            raise ValueError(f"`sampler` must be an Optuna sampler, got {sampler!r}.")
        pruner = None if isinstance(policy, Policy) else _pruner(policy)
        mirror = StudyMirror(pruner, sampler, params or (), order, count)
        source = mirror.next_row
        judge = policy.decide if isinstance(policy, Policy) else mirror.judge
    engine = Replay(table, judge, int(slots), source, cost, per_example, params or (), max_alive, mirror)
    return engine.run(math.inf if budget is None else budget)


class _InOrder:
    """Rows in a given order."""

    def __init__(self, order: Sequence[int]) -> None:
        self._rows = iter(order)

    def next_row(self) -> int | None:
        """The next row, or None after the last."""
        return next(self._rows, None)


def _pruner(pruner: Any) -> optuna.pruners.BasePruner:
    import optuna

    from rapidfire_automl.pruners import PolicyPruner

    if isinstance(pruner, PolicyPruner):
        raise ValueError("`policy` must be a policy or a stock pruner, got a PolicyPruner. Pass its `.policy`.")
    if not isinstance(pruner, optuna.pruners.BasePruner):
        raise ValueError(f"`policy` must be a rapidfire_policies.Policy or an Optuna pruner, got {pruner!r}.")
    return pruner


def _array(name: str, given: ArrayLike, dimensions: int) -> NDArray[np.float64]:
    axes = ", ".join(("trials", "chunks", "examples")[:dimensions])
    table = _numbers(name, given, axes)
    if table.ndim != dimensions:
        raise ValueError(f"`{name}` must have the axes ({axes}), got the shape {table.shape}.")
    return table


def _numbers(name: str, given: ArrayLike, axes: str) -> NDArray[np.float64]:
    try:
        return np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must be a table of numbers with the axes ({axes}), rows of equal length: {error}"
        ) from error


def _costs(given: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float64]:
    cost = _numbers("costs", given, "trials, chunks")
    if cost.ndim == 1:
        _fits("costs", cost.shape, shape[:1])
        cost = np.repeat(cost[:, None], shape[1], axis=1)
    _fits("costs", _array("costs", cost, 2).shape, shape)
    if not (np.isfinite(cost).all() and (cost >= 0).all()):
        raise ValueError("`costs` must be finite and >= 0.")
    return cost


def _fits(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ValueError(f"`{name}` must begin with the shape {expected} of `curves`, got {shape}.")


class _CallableModule(types.ModuleType):
    """`from rapidfire_automl import replay` gives the function before this module is imported, the module after."""

    def __call__(self, *args: Any, **kwargs: Any) -> ReplayResult:
        return replay(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
