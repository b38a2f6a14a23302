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


Number = float | int | str | tuple[float | int | str, ...]
"""What a decision's numbers may be: all of it has a place in JSON, NaN and infinities as text."""

IN_VALUES = frozenset({"value", "threshold", "bound", "lead", "forecast", "best", "first"})
"""The names of `Decision.numbers` that are in the sign of the values: whoever flips that flips these back."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict, the one-line reason a person reads beside it, and the numbers the rule looked at.

    Any name will do for a number; these are understood where a verdict is explained (`rapidfire-automl why`):

    - `resource`, `value`: the chunks the trial has done and its value that was judged (`numbers_of` gives both); `rung`
      where that is the value at an earlier chunk.
    - `threshold`: with a value below it, all else equal, the trial would have gone on; `rival`, whose value it is.
    - `rank`, `of`, `keep`: the value is number `rank` of so many, and the best `keep` go on, `ahead` the first ones.
    - `peers`: the number of others compared with. `lead`: the value that `rival` has. `best`, `first`: the trial's own.
    - `bound`: what the trial can still reach. `forecast`, `deviation`: where it is believed to end.
    - `chance` and `least_chance`, `p` and `alpha`, `capital` and `most_capital`, `kl` and `max_kl`: a quantity
      beside its limit. `flat`: chunks without variance in the reward.
    - `worse_by`, `worse_by_at_least`: the mean difference to `rival` and its lower bound at a `level`, over `examples`.
      `short_by`: had every score been better by more, the trial would have gone on.
    - `cost`, `rival_cost`, `margin`; `paid`: so far; `unit`: of a unit of `rung`. `spent`, `to_come`, `budget`: chunks.

    Args:
        verdict: What becomes of the trial.
        reason: Why, in one line.
        numbers: By name; a STOP and a PAUSE have at least the `value`. They are working, not part of the verdict: two
            decisions are equal without them.
    """

    verdict: Verdict
    reason: str = ""
    numbers: Mapping[str, Number] = field(default_factory=dict, compare=False)


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


def numbers_of(trial: TrialHistory, **more: Number) -> dict[str, Number]:
    """What every verdict on a trial that has a value starts from: its `resource` and its last `value`.

    >>> numbers_of(TrialHistory(0, (0.5, 0.4)), threshold=0.3)
    {'resource': 2, 'value': 0.4, 'threshold': 0.3}
    """
    return {"resource": trial.resource, "value": trial.values[-1], **more}


def flipped(numbers: Mapping[str, Number]) -> dict[str, Number]:
    """The numbers of a decision about values whose sign was flipped, in the other sign.

    >>> flipped({"resource": 2, "value": -0.8, "threshold": -0.9, "worse_by": 0.1})
    {'resource': 2, 'value': 0.8, 'threshold': 0.9, 'worse_by': 0.1}
    """
    return {
        name: -number if name in IN_VALUES and isinstance(number, (int, float)) else number
        for name, number in numbers.items()
    }


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
