"""What a policy sees and says: `History` in, one `Decision` a trial out.

Values are minimised: whoever builds a `History` flips the sign of a score to be maximised, once. A value may be NaN or
infinite (a diverged trial reports what it has); every policy says in its docstring what it makes of that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray


class Verdict(StrEnum):
    """What becomes of a trial at a chunk boundary."""

    CONTINUE = "continue"
    """Train the next chunk (for a paused trial: resume as soon as a slot is free)."""
    PAUSE = "pause"
    """Keep everything, give up the slot; a later `decide` may say CONTINUE (for a paused trial: stay paused)."""
    STOP = "stop"
    """End now as pruned: not good enough."""
    COMPLETE = "complete"
    """End now as complete: good enough, and its last value is its result."""


class TrialState(StrEnum):
    """Where a trial is when `decide` is called."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    COMPLETE = "complete"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict and the one-line reason a person reads beside it."""

    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TrialHistory:
    """One trial as a policy sees it.

    Args:
        number: Optuna's number of the trial; the key of every tie-break.
        values: `values[k - 1]` is the value after chunk `k`, lower is better; may hold NaN and infinities.
        state: RUNNING trials stand at a boundary and are judged; PAUSED ones may be resumed; the rest is history.
        scores: `scores[k - 1]` holds the per-example scores behind `values[k - 1]`, shape `(examples,)`, lower is
            better, the same examples in the same order for every trial; empty where nobody recorded them.
        costs: `costs[k - 1]` is what chunk `k` cost (tokens or seconds, one unit in the whole history); may be empty.
        params: The trial's hyperparameters.
        metrics: What else the trainer logged, by name ("kl", "reward_std", ...), one number a chunk in its own sign;
            NaN for a chunk without one.
    """

    number: int
    values: tuple[float, ...] = ()
    state: TrialState = TrialState.RUNNING
    scores: tuple[NDArray[np.float64], ...] = ()
    costs: tuple[float, ...] = ()
    params: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def resource(self) -> int:
        """Chunks done."""
        return len(self.values)

    @property
    def is_live(self) -> bool:
        """Whether a decision about this trial still means something."""
        return self.state in (TrialState.RUNNING, TrialState.PAUSED)


@dataclass(frozen=True, slots=True)
class History:
    """Every trial of the search so far; a set: the order of `trials` carries no meaning.

    Args:
        trials: The trials, each number once.
        chunks: Chunks of a whole trial, the largest resource.
        slots: Trials that train at a time.
    """

    trials: tuple[TrialHistory, ...]
    chunks: int
    slots: int = 1

    @property
    def running(self) -> tuple[TrialHistory, ...]:
        """The trials that wait for a verdict, by number."""
        return _by_number([trial for trial in self.trials if trial.state is TrialState.RUNNING])

    @property
    def paused(self) -> tuple[TrialHistory, ...]:
        """The paused trials, by number."""
        return _by_number([trial for trial in self.trials if trial.state is TrialState.PAUSED])

    @property
    def live(self) -> tuple[TrialHistory, ...]:
        """The running and the paused trials, by number."""
        # Not by `is_live`: one search's rounds look at each of its trials thousands of times.
        running, paused = TrialState.RUNNING, TrialState.PAUSED
        return _by_number([trial for trial in self.trials if trial.state is running or trial.state is paused])


def _by_number(trials: list[TrialHistory]) -> tuple[TrialHistory, ...]:
    return tuple(sorted(trials, key=attrgetter("number")))


class Policy(ABC):
    """Who trains the next chunk: one pure method over the whole history.

    A policy is a frozen dataclass of hyperparameters. `decide` depends on nothing but its argument: no clock, no
    randomness, no memory of earlier calls. Crash recovery, replay and order-independence come from that.
    """

    @property
    def by_age(self) -> bool:
        """Whether the order of the trials' numbers plays a part beyond ties (in most policies it doesn't)."""
        return False

    @abstractmethod
    def decide(self, history: History) -> Mapping[int, Decision]:
        """Judge every live trial at once.

        Args:
            history: All trials; RUNNING ones stand at a chunk boundary.

        Returns:
            A decision per trial number. A live trial that is left out goes on as it is: a RUNNING one continues, a
            PAUSED one stays paused. Entries for trials that are not live are ignored.
        """
