"""The median rule: stop whoever does worse than the median of its peers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rapidfire_policies._arguments import check_int
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, Verdict, numbers_of
from rapidfire_policies.survivors import is_finite, keep_one, stop_diverged
from rapidfire_policies.wording import counted


@dataclass(frozen=True)
class Median(Policy):
    """Stop a trial whose best value is worse than the median of the other trials' running averages.

    Let `r` be the chunks a running trial has done and `P` the averages of the first `r` values of all others that have
    done as many, running, paused, stopped or at their end. The trial is stopped if and only if

        r >= grace,  |P| >= min_peers,  and  its best value so far > median(P)

    With `average=False`, the last value of the trial is compared with the values that the others had after `r` chunks.

    A live trial whose last value is NaN or infinite is stopped. Before that, such values are no best value; whoever has
    one among its first `r` values (`average=False`: as its r-th) is no peer. If the rule would leave no finite trial
    live or complete, the most advanced one goes on (`rapidfire_policies.survivors.keep_one`).

    Args:
        grace: Chunks before which nobody is judged.
        min_peers: Peers without which nobody is judged.
        average: Compare the best value with running averages (Vizier), rather than last values (RapidFire AI).

    Raises:
        ValueError: An argument below 1.

    What breaks it: curves that cross. On curves that fall, the best value beats an average of past ones, so that only
    slow or bad trials are stopped; on a long plateau it stops nobody worse. With `average=False` it is harsh: it stops
    about half of those that stand together at every chunk, so 16 trials in lockstep are down to one after four chunks
    however close they are.

    Paper: Golovin et al., Google Vizier, 2017, section 3.2.2, where only completed trials are peers (while all trials
    run together it has none, and stops nobody).

    >>> from rapidfire_policies import History, Median, TrialHistory
    >>> curves = [(0.4, 0.3), (0.3, 0.2), (0.5, 0.45)]
    >>> history = History(tuple(TrialHistory(i, values) for i, values in enumerate(curves)), chunks=4)
    >>> {number: str(decision.verdict) for number, decision in Median().decide(history).items()}
    {0: 'continue', 1: 'continue', 2: 'stop'}
    >>> {number: str(decision.verdict) for number, decision in Median(average=False).decide(history).items()}
    {0: 'continue', 1: 'continue', 2: 'stop'}
    >>> Median().decide(history)[2].reason
    'chunk 2: 0.45, median of 2 peers 0.3'
    """

    grace: int = 1
    min_peers: int = 1
    average: bool = True

    def __post_init__(self) -> None:
        check_int("grace", self.grace, at_least=1, fix="It is in chunks.")
        check_int("min_peers", self.min_peers, at_least=1)

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Judge every running trial against all others."""
        running = [trial for trial in history.running if is_finite(trial)]
        marks = _marks(history.trials, max((trial.resource for trial in running), default=0), average=self.average)
        row = {trial.number: index for index, trial in enumerate(history.trials)}
        columns = {}
        for resource in {trial.resource for trial in running}:
            column = marks[:, resource - 1]
            columns[resource] = np.sort(column[np.isfinite(column)])
        decisions = stop_diverged(history)
        for trial in running:
            own = float(marks[row[trial.number], trial.resource - 1])
            decisions[trial.number] = self._judge(trial, without(columns[trial.resource], own))
        return keep_one(history, decisions)

    def _judge(self, trial: TrialHistory, peers: NDArray[np.float64]) -> Decision:
        """Judge a trial with a finite last value by its peers' marks, ascending, `(peers,)` float64."""
        if trial.resource < self.grace or len(peers) < self.min_peers:
            return Decision(Verdict.CONTINUE, f"chunk {trial.resource}: too early to judge")
        value = min(filter(math.isfinite, trial.values)) if self.average else trial.values[-1]
        middle = float(peers[(len(peers) - 1) // 2] / 2 + peers[len(peers) // 2] / 2)
        words = f"chunk {trial.resource}: {value:.4g}, median of {counted(len(peers), 'peer')} {middle:.4g}"
        numbers = numbers_of(trial, value=value, threshold=middle, peers=len(peers))
        return Decision(Verdict.STOP if value > middle else Verdict.CONTINUE, words, numbers)


def without(ascending: NDArray[np.float64], own: float) -> NDArray[np.float64]:
    """The sorted values, `(n,)` float64, less one that equals `own`; all of them if none does."""
    place = int(np.searchsorted(ascending, own))
    there = place < len(ascending) and ascending[place] == own
    return np.delete(ascending, place) if there else ascending


def _marks(trials: Sequence[TrialHistory], chunks: int, *, average: bool) -> NDArray[np.float64]:
    """What the others are compared with, by trial and chunk, `(trials, chunks)` float64, NaN where there is nothing."""
    values = np.full((len(trials), chunks), np.nan)
    for row, trial in enumerate(trials):
        values[row, : trial.resource] = trial.values[:chunks]
    if not average:
        return values
    with np.errstate(invalid="ignore", over="ignore"):  # a sum that overflows is no mark, like one with an infinity
        averages: NDArray[np.float64] = np.cumsum(values, axis=1) / np.arange(1, chunks + 1)
    return averages
