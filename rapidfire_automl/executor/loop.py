"""Our own ask-and-tell loop: the trials of one `optimize`, their threads, and what Optuna is told of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import optuna

from rapidfire_automl import attempts
from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.executor.durability import Durability
from rapidfire_automl.executor.runner import Outcome
from rapidfire_automl.seeding import reseed


class Loop:
    """Starts trials and tells what came of them.

    Args:
        study: Asked and told.
        arm_of: Makes an arm of a trial.
        run: Takes a trial from its first turn to its end, in its own thread.
        durability: The search's folder, where it is to survive.
    """

    def __init__(
        self,
        study: optuna.Study,
        arm_of: Callable[[optuna.Trial], Arm],
        run: Callable[[Arm], Outcome],
        durability: Durability | None,
    ) -> None:
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

    def launch(self, arm: Arm) -> Arm:
        """Give an arm its thread, which waits for the baton."""
        self.numbers.append(arm.number)

        def body() -> None:
            self._outcomes[arm.number] = self._run(arm)

        self._threads[arm.number] = threading.Thread(target=body, name=f"trial-{arm.number}", daemon=True)
        self._threads[arm.number].start()
        return arm

    def retire(self, arm: Arm) -> None:
        """Tell Optuna how a trial has ended."""
        self._threads.pop(arm.number).join()
        outcome = self._outcomes.pop(arm.number, Outcome("failed"))
        if self.durability is not None and outcome.kind != "cancelled":
            self.durability.ended(arm, outcome.kind, outcome.vector, outcome.reason)
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
        finally:
            if local is not None:
                local.in_optimize_loop = False
