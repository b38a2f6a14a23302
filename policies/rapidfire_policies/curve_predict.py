"""Extrapolate every curve; stop whoever has next to no chance against the leader."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rapidfire_policies._arguments import check_int, check_level
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, TrialState, Verdict, numbers_of
from rapidfire_policies.power_laws import forecast
from rapidfire_policies.rungs import bounded, rank_key
from rapidfire_policies.survivors import diverged, is_finite, keep_one

_PRIOR = 20.0
"""Backtests that the ensemble's own spread is worth."""


@dataclass(frozen=True)
class CurvePredict(Policy):
    """Stop a trial whose forecast says it ends ahead of the leader with a chance below `threshold`.

    A trial's running best after each chunk is extrapolated to the last chunk by an ensemble of power laws
    `c + a * k**-b` with resampled residuals (`rapidfire_policies.power_laws`), giving a center `f` and a spread `s`.
    How far such forecasts are off is measured in this search: every trial of `2 * min_resource` chunks or more,
    whatever became of it, is forecast from the first half of its curve, and `z = (what came - f) / s`. With `J` such
    backtests

        chance = (20 * P_ensemble(final < lead) + #{j: f + s * z_j < lead}) / (20 + J)

    The trial is stopped if and only if it has done `min_resource` chunks, is not among the best `keep` by last value,
    and `chance < threshold`; `lead` is the smallest value a rival (live or complete) has: the worse of its last two.
    Where forecasts are poor, as where curves drop late, the backtests say so and fewer trials are stopped.

    Args:
        threshold: The chance below which a trial is stopped, between 0 and 1.
        min_resource: Chunks before which nobody is judged, at least 3.
        keep: So many of the best are never stopped.

    Raises:
        ValueError: `threshold` outside (0, 1), `min_resource` below 3, `keep` below 1.

    A live trial whose last value is NaN or infinite is stopped; such values are skipped in the running best. If the
    rule would leave no finite trial live or complete, the most advanced one goes on
    (`rapidfire_policies.survivors.keep_one`).

    What breaks it: the first trials of a search that are all of one kind (no backtest warns of what comes later);
    curves that are no power laws and differ in when they drop.

    Paper: after Domhan et al., Speeding up Automatic Hyperparameter Optimization of Deep Neural Networks by
    Extrapolation of Learning Curves, IJCAI 2015, with one family of curves instead of eleven, least squares instead of
    MCMC, and calibration within the search.

    >>> from rapidfire_policies import CurvePredict, History, TrialHistory
    >>> curves = [tuple(level + 0.5 / k for k in (1, 2, 3, 4)) for level in (0.1, 0.12, 0.5, 0.8)]
    >>> history = History(tuple(TrialHistory(i, curve) for i, curve in enumerate(curves)), chunks=12)
    >>> decisions = CurvePredict(keep=1).decide(history)
    >>> [str(decisions[number].verdict) for number in range(4)]
    ['continue', 'continue', 'stop', 'stop']
    >>> decisions[3].reason
    'chunk 4: 0.925 is forecast to end at 0.842, its chance against 0.267 of trial 0 is 0.000'
    """

    threshold: float = 0.05
    min_resource: int = 3
    keep: int = 2

    def __post_init__(self) -> None:
        check_level("threshold", self.threshold, fix="It is a chance.")
        check_int("min_resource", self.min_resource, at_least=3, fix="A power law has three unknowns.")
        check_int("keep", self.keep, at_least=1, fix="The best trial is never stopped.")

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Judge every running trial by its forecast."""
        rivals = [t for t in history.trials if (t.is_live or t.state is TrialState.COMPLETE) and is_finite(t)]
        rivals.sort(key=lambda t: rank_key(t.values[-1], t.number))
        running = [trial for trial in history.running if trial.values]
        decisions = {trial.number: self._early(trial) for trial in running}
        top = {trial.number for trial in rivals[: self.keep]}
        judged = [t for t in running if is_finite(t) and t.resource >= self.min_resource and t.number not in top]
        if judged:
            leader = min(rivals, key=lambda t: (max(t.values[-2:]), t.number))
            decisions.update(self._chances(history, judged, leader))
        return keep_one(history, decisions)

    def _early(self, trial: TrialHistory) -> Decision:
        if not is_finite(trial):
            return diverged(trial)
        return Decision(Verdict.CONTINUE, f"chunk {trial.resource}: among the best {self.keep}, or too early to judge")

    def _chances(
        self, history: History, judged: Iterable[TrialHistory], leader: TrialHistory
    ) -> Iterable[tuple[int, Decision]]:
        lead = max(value for value in leader.values[-2:] if math.isfinite(value))
        z = self._backtests(history)
        for done, trials in _by_resource(judged):
            cast = forecast(_running_best(trials, done), history.chunks)
            inside = (cast.weights * (cast.draws < lead)).sum(1)
            outside = (cast.center[:, None] + cast.spread[:, None] * z < lead).sum(1)
            chances = (_PRIOR * inside + outside) / (_PRIOR + len(z))
            for trial, center, chance in zip(trials, cast.center.tolist(), chances.tolist(), strict=True):
                words = f"{trial.values[-1]:.4g} is forecast to end at {center:.3g}"
                against = f"its chance against {lead:.3g} of trial {leader.number} is {chance:.3f}"
                numbers = numbers_of(
                    trial, forecast=center, lead=lead, rival=leader.number, chance=chance, least_chance=self.threshold
                )
                verdict = Verdict.STOP if chance < self.threshold else Verdict.CONTINUE
                yield trial.number, Decision(verdict, f"chunk {done}: {words}, {against}", numbers)

    def _backtests(self, history: History) -> NDArray[np.float64]:
        """The errors, in spreads, of forecasts from the first halves of the curves."""
        errors = []
        old = [t for t in history.trials if t.resource >= 2 * self.min_resource and is_finite(t)]
        for done, trials in _by_resource(old):
            curves = _running_best(trials, done)
            cast = forecast(curves[:, : done // 2], done)
            errors.append((curves[:, -1] - cast.center) / (cast.spread + 1e-9))
        return np.sort(np.concatenate(errors)) if errors else np.empty(0)


def _by_resource(trials: Iterable[TrialHistory]) -> list[tuple[int, list[TrialHistory]]]:
    groups: dict[int, list[TrialHistory]] = defaultdict(list)
    for trial in sorted(trials, key=lambda trial: trial.number):
        groups[trial.resource].append(trial)
    return sorted(groups.items())


def _running_best(trials: Iterable[TrialHistory], done: int) -> NDArray[np.float64]:
    """`(trials, done)`; what is not finite takes the value before it, or the first finite one."""
    table = np.array([trial.values[:done] for trial in trials], dtype=np.float64)
    table = np.where(np.isfinite(table), bounded(table), np.inf)
    best = np.minimum.accumulate(table, axis=1)
    first = best[np.arange(len(best)), np.isfinite(best).argmax(1)]
    return np.where(np.isfinite(best), best, first[:, None])
