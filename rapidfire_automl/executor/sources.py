"""Where trials come from: Optuna's own threads (`study.optimize`), or our ask-and-tell loop (`executor.optimize`)."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import optuna
from optuna.trial import FrozenTrial

from rapidfire_automl.executor import enqueueing
from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.executor.crew import Crew

_LOOK_S = 1.0


class Arrivals:
    """Trials that arrive in threads of Optuna's; admitted by trial number.

    Args:
        gather_s: How long a free slot waits for the next arrival, after one has come or gone.
        cancelled: Whether the search has been cancelled.
    """

    def __init__(self, gather_s: float, cancelled: Callable[[], bool]) -> None:
        self._gather_s = gather_s
        self._cancelled = cancelled
        self._waiting: list[Arm] = []
        self._news = threading.Condition()
        self._last_s = time.monotonic()
        self._closed = False

    def arrive(self, arm: Arm) -> None:
        """Called in the trial's thread."""
        with self._news:
            self._waiting.append(arm)
            self._last_s = time.monotonic()
            self._news.notify_all()

    def gone(self) -> None:
        """A trial has left; its thread may come back with the next."""
        with self._news:
            self._last_s = time.monotonic()

    def close(self) -> None:
        """No trial will come any more."""
        with self._news:
            self._closed = True
            self._news.notify_all()

    def offer(self, free: int, *, idle: bool) -> list[Arm]:
        """The waiting arms, lowest numbers first; waits a moment for company, and as long as nothing else is to do."""
        with self._news:
            while len(self._waiting) < free and not self._closed and not self._cancelled():
                left = self._last_s + self._gather_s - time.monotonic()
                if left <= 0 and (self._waiting or not idle or self.exhausted):
                    break
                self._news.wait(min(max(left, 0.02), 0.1))
            self._waiting.sort(key=lambda arm: arm.number)
            taken, self._waiting = self._waiting[:free], self._waiting[free:]
            return taken

    @property
    def exhausted(self) -> bool:
        """Whether nobody has come or gone for a while."""
        return self._closed or (not self._waiting and time.monotonic() - self._last_s > max(1.0, 4 * self._gather_s))

    news = False
    """Other workers' trials are not these sources' concern."""

    @property
    def closed(self) -> bool:
        """Whether `close` was called and nobody waits."""
        return self._closed and not self._waiting

    @property
    def over(self) -> str:
        """Why no trial is started any more, or an empty string."""
        return "the executor is closing" if self._closed else ""


class Asking:
    """Trials asked from a study as slots get free.

    Args:
        study: The study.
        n_trials: How many to ask for.
        start: Makes an arm of a trial and starts its thread, which waits for the baton.
        timeout_s: No trial is asked for after so many seconds.
        before: Called with how many of them were asked for, before the next one is.
    """

    def __init__(
        self,
        study: optuna.Study,
        n_trials: int,
        start: Callable[[optuna.Trial], Arm],
        timeout_s: float | None,
        before: Callable[[int], None] = lambda asked: None,
    ) -> None:
        self._study = study
        self._left = n_trials
        self._first: list[FrozenTrial] = []
        self._asked = 0
        self._before = before
        self._start = start
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s

    def offer(self, free: int, *, idle: bool) -> list[Arm]:
        """Ask for as many trials as there are free slots."""
        arms: list[Arm] = []
        while free > len(arms) and not self.closed:
            self._left -= 1
            self._before(self._asked)
            trial = enqueueing.claim(self._study, self._first.pop(0)) if self._first else self._study.ask()
            if trial is not None:
                self._asked += 1
                arms.append(self._start(trial))
        return arms

    news = False

    def ask_for(self, trial: FrozenTrial) -> None:
        """Ask for one trial more: this one, before all others."""
        self._first.append(trial)
        self._left += 1

    @property
    def exhausted(self) -> bool:
        """The same as `closed`: nobody else brings trials."""
        return self.closed

    @property
    def closed(self) -> bool:
        """Whether all trials were asked for, the time is up, or the sampler has stopped the study."""
        return self._left <= 0 or bool(self.over)

    @property
    def over(self) -> str:
        """Why no trial is started any more, or an empty string."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "the search's time is up"
        return "its sampler has seen all there is" if getattr(self._study, "_stop_flag", False) else ""


class Claims:
    """Trials that wait in a study for whichever worker has room.

    Args:
        crew: This worker among the others.
        begin: Makes an arm of a trial that was claimed, its thread waiting for the baton; None if its end was decided
            before.
        timeout_s: No trial is claimed after so many seconds.
    """

    def __init__(self, crew: Crew, begin: Callable[[optuna.Trial], Arm | None], timeout_s: float | None) -> None:
        self._crew = crew
        self._begin = begin
        self._looked_s = -math.inf
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s

    def offer(self, free: int, *, idle: bool) -> list[Arm]:
        """Claim as many trials as there are free slots; with nothing else to do, look once a second."""
        now = time.monotonic()
        if self.over or (idle and now - self._looked_s < _LOOK_S):
            return []
        self._looked_s = now
        arms: list[Arm] = []
        for trial in self._crew.claimable():
            if len(arms) >= free:
                break
            claimed = self._crew.claim(trial)
            if claimed is None:
                continue
            self._looked_s = -math.inf  # what others do is counted again
            arm = self._begin(claimed)
            if arm is not None:
                arms.append(arm)
        return arms

    def ask_for(self, trial: FrozenTrial) -> None:
        """One that somebody has added through this worker: it waits in the study, and any may take it."""

    @property
    def news(self) -> bool:
        """Whether other workers' trials have come further since this was asked last."""
        return self._crew.news

    @property
    def exhausted(self) -> bool:
        """Whether no trial waits and no other worker's trains: what is paused here waits for nobody."""
        return self.closed or (self._crew.left == 0 and self._crew.training == 0)

    @property
    def closed(self) -> bool:
        """Whether no trial waits and no other worker has any that it could leave behind."""
        return bool(self.over) or (self._crew.left == 0 and self._crew.others == 0)

    @property
    def over(self) -> str:
        """Why no trial is started any more, or an empty string."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "this worker's time is up"
        return ""
