"""Our own ask-and-tell loop: the trials of one `optimize`, their threads, and what Optuna is told of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import optuna

from rapidfire_automl import attempts, workers
from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.executor.crew import Crew
from rapidfire_automl.executor.durability import Durability
from rapidfire_automl.executor.runner import Outcome
from rapidfire_automl.records import TrialRecord
from rapidfire_automl.seeding import reseed


class Loop:
    """Starts trials and tells what came of them.

    Args:
        study: Asked and told.
        arm_of: Makes an arm of a trial.
        run: Takes a trial from its first turn to its end, in its own thread.
        durability: The search's folder, where it is to survive.
        crew: Other workers on the study, if there are any.
        handed_back: Whether what runs when the search ends is left to them.
    """

    def __init__(
        self,
        study: optuna.Study,
        arm_of: Callable[[optuna.Trial], Arm],
        run: Callable[[Arm], Outcome],
        durability: Durability | None,
        crew: Crew | None = None,
        handed_back: Callable[[], bool] = lambda: False,
    ) -> None:
        self._crew = crew
        self._handed_back = handed_back
        self.numbers: list[int] = []
        self._study = study
        self._arm_of = arm_of
        self._run = run
        self.durability = durability
        self._threads: dict[int, threading.Thread] = {}
        self._outcomes: dict[int, Outcome] = {}
        if hasattr(study, "_stop_flag"):
            study._stop_flag = False

    def ask(self, place: int) -> None:
        """Called before Optuna is asked for the trial at a place in the search."""
        if self.durability is not None:
            self.durability.asking()
            self.seed(place)

    def seed(self, *key: int) -> None:
        """Have what the sampler draws next depend on this alone, where the search is to survive."""
        if self.durability is not None:
            reseed(self._study.sampler, self.durability.sampler_seed, *key)

    def start(self, trial: optuna.Trial) -> Arm:
        """Begin a trial that was asked for."""
        if self.durability is None:
            return self.launch(self._arm_of(trial))
        attempts.label(self._study, trial)
        arm = self._arm_of(trial)
        self.durability.asked(arm.number)
        return self.launch(arm)

    def take_up(self, trial: optuna.Trial) -> Arm | None:
        """Begin a trial that was claimed, where another worker has left off; None if its end was decided before."""
        assert self.durability is not None
        number = attempts.label(self._study, trial)
        found = self.durability.take_up(trial, number)
        if isinstance(found, TrialRecord):
            return None
        arm = self._arm_of(trial) if found is None else found.arm_of(self._arm_of)
        return self.launch(arm)

    def launch(self, arm: Arm) -> Arm:
        """Give an arm its thread, which waits for the baton."""
        self.numbers.append(arm.number)
        if self._crew is not None:
            self._crew.hold(arm)

        def body() -> None:
            self._outcomes[arm.number] = self._run(arm)

        self._threads[arm.number] = threading.Thread(target=body, name=f"trial-{arm.number}", daemon=True)
        self._threads[arm.number].start()
        return arm

    def retire(self, arm: Arm) -> None:
        """Tell Optuna how a trial has ended."""
        self._threads.pop(arm.number).join()
        outcome = self._outcomes.pop(arm.number, Outcome("failed"))
        if self._crew is None:
            self._tell_end(arm, outcome)
            return
        try:
            if arm.lost:
                return
            if outcome.kind == "cancelled" and self._handed_back():
                assert self.durability is not None
                self.durability.flush()
                workers.hand_back(self._study, arm.trial)
                return
            if outcome.kind == "cancelled":
                self._crew.end_for_all()
            self._tell_end(arm, outcome)
        finally:
            self._crew.release(arm)

    def _tell_end(self, arm: Arm, outcome: Outcome) -> None:
        if self.durability is not None and outcome.kind != "cancelled":
            self.durability.ended(arm, outcome.kind, outcome.vector, outcome.reason)
        if arm.lost:
            return
        local: Any = getattr(self._study, "_thread_local", None)
        if local is not None:  # a sampler that has seen all of its grid may stop the study from `tell`
            local.in_optimize_loop = True
        try:
            if outcome.kind == "complete":
                self._study.tell(arm.trial, outcome.vector)
            else:
                pruned = outcome.kind == "pruned"
                state = optuna.trial.TrialState.PRUNED if pruned else optuna.trial.TrialState.FAIL
                self._study.tell(arm.trial, state=state)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
            if self._crew is None:
                raise
            arm.lost = True  # others have failed it in this very moment
        finally:
            if local is not None:
                local.in_optimize_loop = False
