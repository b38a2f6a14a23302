"""One trial in its own thread: wait for the baton, build, train, and say what came of it."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from peft import PeftModel
from transformers import PreTrainedModel

from rapidfire_automl.events import ENDED_WITH_SEARCH, warn
from rapidfire_automl.executor import training
from rapidfire_automl.executor.arm import Arm, Halt, Leave
from rapidfire_automl.executor.base import Base, BaseChanged
from rapidfire_automl.executor.conductor import Conductor
from rapidfire_automl.executor.evaluation import Evaluator, Measured
from rapidfire_automl.executor.requests import Forward
from rapidfire_automl.executor.rounds import TAKEN_OVER
from rapidfire_automl.executor.survival import Survival
from rapidfire_automl.executor.warmstart import WarmStart
from rapidfire_automl.patience import StorageAway
from rapidfire_automl.precision import why_slow
from rapidfire_automl.refusals import SearchDiffers
from rapidfire_policies.base import Decision, TrialState, Verdict
from rapidfire_policies.wording import counted

logger = logging.getLogger("rapidfire_automl")

Builder = Callable[[optuna.Trial], Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a trial.

    Args:
        kind: "cancelled" if the search was ended, "lost" if another worker has taken the trial over.
        vector: Its last values, one an objective; empty if it has none.
        reason: In words.
        traceback: Where it has raised.
    """

    kind: Literal["complete", "pruned", "failed", "cancelled", "lost"]
    vector: tuple[float, ...] = ()
    reason: str = ""
    traceback: str = ""


@dataclass
class Runner:
    """Runs trials, each in the thread that calls `run`.

    Args:
        base: The shared base.
        conductor: Hands the baton round.
        evaluator: Scores trainers.
        chunks: Of a whole trial.
        seed: Of the evaluation.
        tell: Emits an event (kind, arm or None, data).
        record: Takes down what a chunk has come to.
        folder: Where a trial's files go.
        adapter_folder: Where a trial's adapter goes.
        reload: Loads the base anew, or None where it came as an object.
        keep_base: Takes what the untrained base is worth.
        abort: Ends the search with an error.
        warm_start: What an arm begins with, if not from nothing.
        survival: Of the search, if it is to survive the process.
        cancelled: Whether somebody has ended the search and wants to keep what there is.
    """

    base: Base
    conductor: Conductor
    evaluator: Evaluator
    chunks: int
    seed: int
    tell: Callable[..., None]
    record: Callable[..., None]
    folder: Callable[[int], Path]
    adapter_folder: Callable[[Arm], Path]
    reload: Callable[[], PreTrainedModel] | None
    keep_base: Callable[[Measured], None]
    abort: Callable[[BaseException], None]
    warm_start: Callable[[Arm], WarmStart | None]
    survival: Survival
    cancelled: Callable[[], bool]
    _local: threading.local = field(default_factory=threading.local)
    _base_taken: bool = False
    _slow_said: bool = False

    @property
    def arm(self) -> Arm | None:
        """The arm whose trial is built or trained in this thread."""
        return getattr(self._local, "arm", None)

    def base_is_known(self) -> None:
        """An earlier process has measured the untrained base."""
        self._base_taken = True

    def run(self, arm: Arm, build: Builder) -> Outcome:
        """Take a trial from its first turn to its end; raises nothing a trial can raise."""
        conductor = self.conductor
        outcome = Outcome("failed")
        while not arm.go.wait(0.2):
            if conductor.cancelled and arm not in conductor.arms:
                arm.record.state, arm.record.error = TrialState.FAILED, ENDED_WITH_SEARCH
                return Outcome("cancelled", reason=arm.record.error)
        try:
            if conductor.cancelled:
                raise Leave
            arm.context.enter()
            self._local.arm = arm
            outcome = self._train(arm, build)
        except Leave:
            outcome = Outcome("cancelled", reason=ENDED_WITH_SEARCH)
            arm.record.error = outcome.reason
        except Halt as halt:
            outcome = Outcome("pruned", arm.record.last_vector, str(halt))
        except optuna.TrialPruned as pruned:
            outcome = Outcome("pruned", reason=str(pruned))
        except optuna.exceptions.UpdateFinishedTrialError:
            arm.lost = True
        except StorageAway as error:
            outcome = Outcome("cancelled", reason=str(error))
            arm.record.error = outcome.reason
            self.abort(error)
        except BaseException as error:
            outcome = Outcome("failed", reason=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
            arm.record.error = outcome.reason
            if isinstance(error, BaseChanged) and not error.repaired:
                self._mend_base(arm)
            logger.warning("Trial %d failed. %s", arm.number, outcome.reason)
            logger.debug("%s", outcome.traceback)
            self._note_error(arm, outcome.reason)
        finally:
            self._local.arm = None
            arm.walks = arm.trainer = None
            if arm.lost:
                outcome = Outcome("lost", reason=TAKEN_OVER)
            states = {"complete": TrialState.COMPLETE, "pruned": TrialState.STOPPED}
            arm.record.state = states.get(outcome.kind, TrialState.FAILED)
            try:
                if not arm.lost:
                    self._tell_end(arm, outcome)
            finally:
                conductor.leave(arm)
        return outcome

    def _note_error(self, arm: Arm, reason: str) -> None:
        try:
            arm.trial.set_user_attr("rapidfire:error", reason)
        except optuna.exceptions.UpdateFinishedTrialError:
            arm.lost = True
        except StorageAway as error:
            self.abort(error)

    def _tell_end(self, arm: Arm, outcome: Outcome) -> None:
        self.tell(
            "trial_ended",
            arm,
            state="failed" if outcome.kind == "cancelled" else outcome.kind,
            value=outcome.vector[0] if outcome.vector else None,
            reason=outcome.reason,
            adapter=arm.record.adapter,
            **({"traceback": outcome.traceback} if outcome.traceback else {}),
        )

    def _train(self, arm: Arm, build: Builder) -> Outcome:
        base, record = self.base, arm.record
        if isinstance(arm.answer, Decision) and arm.answer.verdict is Verdict.STOP:
            return Outcome("pruned", record.last_vector, arm.answer.reason)  # while it was paused, in another process
        trainer = None
        try:
            trainer = build(arm.trial)
        except StopIteration as error:
            raise ValueError("`train_dataset` must not be empty: TRL asked for its first example.") from error
        finally:
            record.params = dict(arm.trial.params)
            base.check(repair=True)
        if isinstance(model := getattr(trainer, "model", None), PeftModel) and not base.owns(model.get_base_model()):
            raise ValueError("The trainer's model did not come from this executor. Pass `model=executor.model(trial)`.")
        try:
            self.survival.check_same(arm, trainer)
        except SearchDiffers as error:
            self.abort(error)
            raise
        self._say_if_slow(trainer)
        try:
            training.train(arm, trainer, self._host())
        except Leave:
            if self.cancelled() and arm.step and isinstance(model, PeftModel):
                try:
                    self._save(arm, model)
                except Exception as error:  # a full disk must not keep a search from ending
                    logger.warning("The adapter of trial %d could not be saved: %s", arm.number, error)
            raise
        verdict, reason = record.verdicts[-1][1:] if record.verdicts else ("", "")
        if record.boundaries and len(record.values) < len(record.boundaries):
            if verdict == Verdict.STOP:
                return Outcome("pruned", record.last_vector, reason)
            if verdict != Verdict.COMPLETE:
                raise RuntimeError(
                    f"the trainer ended itself after {len(record.values)} of {counted(len(record.boundaries), 'chunk')}"
                    " (early stopping of its own?); let the policy stop trials instead"
                )
        vector = record.last_vector
        if not np.isfinite(vector).all():
            raise ValueError(f"the last value is {vector[0] if len(vector) == 1 else list(vector)}")
        assert isinstance(model, PeftModel)
        self._save(arm, model)
        return Outcome("complete", vector, reason)

    def _say_if_slow(self, trainer: Any) -> None:
        """Warn once of a number format that this machine is slow with."""
        if not self._slow_said and (why := why_slow(self.base.model, getattr(trainer, "args", None))):
            self._slow_said = True
            warn(self.tell, why)

    def _save(self, arm: Arm, model: PeftModel) -> None:
        training.save(arm, model, self.adapter_folder(arm), self.survival.save_later)
        arm.trial.set_user_attr("rapidfire:adapter", arm.record.adapter)

    def _mend_base(self, arm: Arm) -> None:
        """A trial wrote into the base: load it again, or end the search where that is not possible."""
        if self.reload is None:
            self.abort(RuntimeError(f"The search was ended by trial {arm.number}. {arm.record.error}"))
        else:
            self.base.restore(self.reload())

    def _host(self) -> training.Host:
        base = self.base

        def take_base() -> bool:
            taken, self._base_taken = self._base_taken, True
            return not taken

        def keep_base(measured: Measured | None) -> None:
            if measured is None:
                self._base_taken = False
                return
            self.keep_base(measured)
            self.tell("base_evaluated", None, value=measured.value)

        def submit(arm: Arm, request: Any) -> Any:
            if not isinstance(request, Forward):  # whoever wrote to the base is still at work here
                base.check(repair=True)
            return self.conductor.submit(arm, request)

        return training.Host(
            submit=submit,
            step_out=self.conductor.step_out,
            join=base.join,
            part=base.part,
            evaluator=self.evaluator,
            chunks=self.chunks,
            seed=self.seed,
            tell=self.tell,
            record=self.record,
            durable=lambda: self.survival.is_on,
            save=self.survival.save,
            leaving=lambda: self.conductor.leaving,
            measure_base=take_base,
            keep_base=keep_base,
            check=base.check_arm,
            folder=self.folder,
            joint_head=base.multiplexer.head is not None,
            joint_rollouts=base.rollouts_agree,
            warm_start=self.warm_start,
        )
