"""`RapidFireExecutor`: plain Optuna and plain TRL code, all trials on one frozen base. Start reading here."""

from __future__ import annotations

import gc
import logging
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna.study import StudyDirection
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rapidfire_automl.events import Event, Listener
from rapidfire_automl.executor import rounds, seams, training
from rapidfire_automl.executor.arguments import check as check_arguments
from rapidfire_automl.executor.arguments import check_search
from rapidfire_automl.executor.arm import Arm, Leave
from rapidfire_automl.executor.base import Base, BaseChanged
from rapidfire_automl.executor.conductor import Conductor
from rapidfire_automl.executor.context import TrialContext
from rapidfire_automl.executor.evaluation import Evaluator, Measured, Metric
from rapidfire_automl.executor.explanation import explain
from rapidfire_automl.executor.loading import ModelLike, load_base, load_tokenizer
from rapidfire_automl.executor.planner import plan_for
from rapidfire_automl.executor.requests import Forward
from rapidfire_automl.executor.sources import Arrivals, Asking
from rapidfire_automl.plan import Plan
from rapidfire_automl.records import TrialRecord
from rapidfire_policies.base import TrialState, Verdict

logger = logging.getLogger("rapidfire_automl")

Builder = Callable[[optuna.Trial], Any]
Outcome = tuple[Literal["complete", "pruned", "failed", "cancelled"], float | None, str]


class RapidFireExecutor:
    """Trains all live trials of a study together, chunk by chunk, as adapters on one shared frozen base.

    Args:
        model: Hub id, path, or loaded model (then with `tokenizer`).
        slots: Trials that train at a time.
        chunks: Parts a whole trial is cut into; a verdict after each.
        tokenizer: Of the model; loaded beside it by default.
        dtype: Of the base, as in `from_pretrained`.
        device: Where the base goes; the first GPU if there is one.
        seed: Of the evaluation and of what runs before a trainer sets its own.
        max_paused: Trials that may live beside those that train, `slots` by default; counts towards `n_jobs`.
        metric: What a trial is worth: None for the trainer's built-in one (SFT: mean token NLL; DPO: preference loss at
            beta 0.1), a built-in's name ("nll", "preference_loss", "preference_accuracy", "reward_margin"), or a
            function from a trainer to a number or to one score an example.
        eval_batch_size: Examples of an evaluation forward.
        plan: How requests are split into joint passes: None to calibrate, a `Plan`, or the path of a recorded one.
        output_dir: Where adapters go, `<output_dir>/trials/<number>/adapter`; a temporary folder by default.
        listeners: Called with every `Event`.

    Raises:
        ValueError: An argument is out of range; before any model is loaded.

    Example:
        ```python
        executor = RapidFireExecutor("path-or-hub-id", slots=8, chunks=8)

        @executor.objective
        def objective(trial):
            return SFTTrainer(model=executor.model(trial), peft_config=LoraConfig(...), ...)

        with executor:
            study.optimize(objective, n_trials=32, n_jobs=executor.n_jobs)
        ```
    """

    def __init__(
        self,
        model: ModelLike,
        *,
        slots: int = 8,
        chunks: int = 8,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        seed: int = 0,
        max_paused: int | None = None,
        metric: str | Metric | None = None,
        eval_batch_size: int = 16,
        plan: Plan | str | os.PathLike[str] | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        max_paused = slots if max_paused is None else max_paused
        check_arguments(
            model=model,
            tokenizer=tokenizer,
            metric=metric,
            plan=plan,
            listeners=listeners,
            dtype=dtype,
            device=device,
            slots=slots,
            chunks=chunks,
            eval_batch_size=eval_batch_size,
            seed=seed,
            max_paused=max_paused,
        )
        self.slots = slots
        self.chunks = chunks
        self.seed = seed
        self.max_paused = max_paused
        self.base_value: float | None = None
        self.base_scores: NDArray[np.float64] | None = None
        self._model_like = model
        self._dtype, self._device = dtype, device
        self._tokenizer = load_tokenizer(model, tokenizer) if tokenizer is not None else None
        self._plan = plan if isinstance(plan, Plan) or plan is None else Plan.load(Path(plan))
        self._evaluator = Evaluator(metric, eval_batch_size)
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._listeners = list(listeners)
        self._records: dict[int, TrialRecord] = {}
        self._referee = rounds.Referee(self._records, chunks, slots, self._tell)
        self._base: Base | None = None
        self._conductor: Conductor | None = None
        self._arrivals: Arrivals | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stopping = False
        self._base_taken = False
        self._study_name = ""
        self._local = threading.local()
        self._exit = ExitStack()
        self._opening = threading.Lock()
        self._finished = threading.Event()  # `Thread.join` may return early when Ctrl-C interrupts it
        self._born_s = time.perf_counter()

    # -- what users call ---------------------------------------------------------------------------------------------

    @property
    def n_jobs(self) -> int:
        """Threads `study.optimize` needs: one a slot, one a trial that may be paused."""
        return self.slots + self.max_paused

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._model_like, None)
        return self._tokenizer

    @property
    def records(self) -> Mapping[int, TrialRecord]:
        """What is known of each trial so far, by number."""
        return dict(sorted(self._records.items()))

    @property
    def plan(self) -> Plan | None:
        """The plan in force, None before the base is loaded."""
        return self._conductor.plan if self._conductor is not None else self._plan

    def add_listener(self, listener: Listener) -> None:
        """Have a function called with every event, in the search's own threads: it should be quick."""
        self._listeners.append(listener)

    def model(self, trial: optuna.trial.BaseTrial) -> PreTrainedModel:
        """The trial's own modules over the shared base's tensors; give it to a TRL trainer with a `peft_config`.

        Args:
            trial: The trial the objective was called with.

        Raises:
            RuntimeError: Called outside an objective of this executor.
        """
        arm = getattr(self._local, "arm", None)
        if arm is None or self._base is None:
            raise RuntimeError("`executor.model(trial)` works inside a function decorated with `@executor.objective`.")
        if trial.number != arm.number:
            raise ValueError(
                f"`trial` must be the one the objective was called with, {arm.number}, got {trial.number}."
            )
        return self._base.clone()

    def objective(self, build: Builder) -> Callable[[optuna.Trial], float]:
        """Make an Optuna objective of a function that builds and returns a trainer.

        Args:
            build: Called when the trial has a slot, with the trial.

        Returns:
            For `study.optimize(..., n_jobs=executor.n_jobs)` or `executor.optimize`. A trial that raises is FAIL in
            Optuna, its error in `records[number].error`; the others go on.
        """

        def objective(trial: optuna.Trial) -> float:
            self._begin(trial.study)
            self._open(serving=True)
            assert self._arrivals is not None
            arm = self._arm(trial)
            self._arrivals.arrive(arm)
            kind, value, reason = self._run(arm, build)
            self._arrivals.gone()
            if self._error is not None:
                raise RuntimeError(f"The search has failed. {self._error}") from self._error
            if kind == "cancelled" and self._stopping:
                trial.study.stop()
            elif kind == "cancelled":
                raise KeyboardInterrupt
            if kind == "pruned":
                raise optuna.TrialPruned(reason)
            return float("nan") if kind != "complete" or value is None else value

        objective.__wrapped__ = build  # type: ignore[attr-defined]
        objective.__name__ = getattr(build, "__name__", "objective")
        return objective

    def optimize(self, study: optuna.Study, objective: Builder, n_trials: int, timeout_s: float | None = None) -> None:
        """Search with our own ask-and-tell loop, in one thread's order: the same search each time it is run.

        Args:
            study: Any study with one objective.
            objective: A function that builds a trainer, decorated or not.
            n_trials: Trials to ask for.
            timeout_s: No trial is asked for after so many seconds; those that run go on.

        Raises:
            ValueError: `n_trials` is below 1, `objective` is no function, or the study has several objectives.
            RuntimeError: Every trial failed; the message has the first error.
            KeyboardInterrupt: Ctrl-C; finished trials are in the study.
        """
        check_search(objective, n_trials)
        self._begin(study)
        build = getattr(objective, "__wrapped__", objective)
        self._stopping, self._error = False, None
        if self._conductor is not None:
            self._conductor.renew()
        self._open(serving=False)
        assert self._conductor is not None
        threads: dict[int, threading.Thread] = {}
        outcomes: dict[int, Outcome] = {}
        mine: list[int] = []
        local = getattr(study, "_thread_local", None)

        def start(trial: optuna.Trial) -> Arm:
            arm = self._arm(trial)
            mine.append(arm.number)

            def body() -> None:
                outcomes[arm.number] = self._run(arm, build)

            threads[arm.number] = threading.Thread(target=body, name=f"trial-{arm.number}", daemon=True)
            threads[arm.number].start()
            return arm

        def retire(arm: Arm) -> None:
            threads.pop(arm.number).join()
            kind, value, _ = outcomes.pop(arm.number, ("failed", None, ""))
            if local is not None:  # a sampler that has seen all of its grid may stop the study from `tell`
                local.in_optimize_loop = True
            try:
                if kind == "complete":
                    study.tell(arm.trial, value)
                else:
                    state = optuna.trial.TrialState.PRUNED if kind == "pruned" else optuna.trial.TrialState.FAIL
                    study.tell(arm.trial, state=state)
            finally:
                if local is not None:
                    local.in_optimize_loop = False
            gc.collect(1)

        if hasattr(study, "_stop_flag"):
            study._stop_flag = False
        source = Asking(study, n_trials, start, timeout_s)
        self._conduct(source, retire)
        try:
            while not self._finished.wait(0.2):
                pass
        except BaseException:
            self._conductor.cancel()
            self._finished.wait()
            raise
        self._raise_error()
        if self._conductor.cancelled and not self._stopping:
            raise KeyboardInterrupt
        failed = [number for number in mine if self._records[number].state is TrialState.FAILED]
        if mine and len(failed) == len(mine) and not self._stopping:
            raise RuntimeError(f"All {len(mine)} trials failed. Trial {failed[0]}: {self._records[failed[0]].error}")

    def stop(self) -> None:
        """End the search at the next safe point; finished trials are kept, running ones fail as stopped."""
        self._stopping = True
        if self._conductor is not None:
            self._conductor.cancel()

    def explain(self) -> str:
        """What the planner chose and why, and what the joint passes did so far."""
        if self._conductor is None or self._base is None:
            return "Nothing is planned yet: the base is loaded with the first trial or on entering the executor."
        return explain(self._conductor.plan, self._base, self._records.values())

    def close(self) -> None:
        """Free the base, the adapters and the threads."""
        if self._arrivals is not None:
            self._arrivals.close()
        if self._thread is not None:
            self._finished.wait()
        self._exit.close()
        self._base = self._conductor = self._arrivals = self._thread = None
        gc.unfreeze()
        gc.collect()

    def __enter__(self) -> RapidFireExecutor:
        self._open(serving=None)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                signal.signal(number, self._on_signal)
                self._exit.callback(signal.signal, number, before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._conductor is not None:
            self._conductor.cancel()
        self.close()
        if error is None:  # with several jobs, Optuna drops the exceptions of the last trials
            self._raise_error()

    # -- opening -----------------------------------------------------------------------------------------------------

    def _open(self, serving: bool | None) -> None:
        """Load the base and plan, once; with `serving`, start conducting for Optuna's threads."""
        with self._opening:
            if self._base is None:
                self._born_s = time.perf_counter()
                base = load_base(self._model_like, self._dtype, self._device)
                _ = self.tokenizer
                self._base = Base(base, self.slots)
                for note in self._base.notes:
                    self._tell("warning", None, message=note)
                self._exit.enter_context(seams.guarded_injection(self._base.owns))
                gc.collect()
                gc.freeze()
                if self._plan is None:
                    self._plan = plan_for(self._base, self.slots)
                plan = self._plan
                self._base.multiplexer.use(plan)
                self._conductor = Conductor(self.slots, self.n_jobs, plan, self._referee, self._tell, self._clock)
                self._conductor.multiplexer = self._base.multiplexer
                logger.info("Plan: %s", plan.reason)
                self._tell(
                    "plan",
                    None,
                    budget_tokens=plan.budget_tokens,
                    trials_per_pass=plan.trials_per_pass,
                    reason=plan.reason,
                )
            assert self._conductor is not None
            if serving and self._arrivals is None:
                conductor = self._conductor
                self._arrivals = Arrivals(gather_s=0.3, cancelled=lambda: conductor.cancelled)
                self._conduct(self._arrivals, retire=lambda arm: None)
            elif serving is False and self._arrivals is not None:
                raise RuntimeError("This executor already serves `study.optimize`; use another for `optimize`.")

    def _conduct(self, source: Arrivals | Asking, retire: Callable[[Arm], None]) -> None:
        conductor = self._conductor
        assert conductor is not None

        def body() -> None:
            home = TrialContext.capture()
            try:
                conductor.run(source, retire, home)
            except BaseException as error:
                self._error = error
                conductor.cancel()
                conductor.run(source, retire, home)
            finally:
                home.enter()
                self._finished.set()

        self._finished.clear()
        self._thread = threading.Thread(target=body, name="conductor", daemon=True)
        self._thread.start()

    def _on_signal(self, number: int, frame: object) -> None:
        if self._conductor is not None:
            self._conductor.cancel()
        if number == signal.SIGTERM:
            raise SystemExit(128 + number)
        raise KeyboardInterrupt

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    # -- one trial, in its own thread --------------------------------------------------------------------------------

    def _begin(self, study: optuna.Study) -> None:
        """Take a study; what is known of another's trials is forgotten, since numbers start anew."""
        if len(study.directions) != 1:
            raise ValueError(f"`study` must have one objective, got {len(study.directions)}.")
        with self._opening:
            if study.study_name != self._study_name:
                self._study_name = study.study_name
                self._records.clear()
                self._referee.past = rounds.past(study, self.chunks)

    def _arm(self, trial: optuna.Trial) -> Arm:
        record = TrialRecord(trial.number)
        self._records[trial.number] = record
        minimize = trial.study.direction == StudyDirection.MINIMIZE
        return Arm(trial, TrialContext(self.seed), record, minimize)

    def _run(self, arm: Arm, build: Builder) -> Outcome:
        """Wait for the baton, build, train, and say what came of it."""
        conductor = self._conductor
        assert conductor is not None
        kind: Literal["complete", "pruned", "failed", "cancelled"] = "failed"
        value, reason = None, ""
        while not arm.go.wait(0.2):
            if conductor.cancelled and arm not in conductor.arms:
                arm.record.state, arm.record.error = TrialState.FAILED, "the search was ended"
                return "cancelled", None, arm.record.error
        try:
            if conductor.cancelled:
                raise Leave
            arm.context.enter()
            self._local.arm = arm
            kind, value, reason = self._train(arm, build)
        except Leave:
            kind, reason = "cancelled", "the search was ended"
            arm.record.error = reason
        except optuna.TrialPruned as pruned:
            kind, reason = "pruned", str(pruned)
        except BaseException as error:
            reason = arm.record.error = f"{type(error).__name__}: {error}"
            if isinstance(error, BaseChanged) and not error.repaired:
                self._mend_base(arm)
            logger.warning("Trial %d failed. %s", arm.number, reason)
            logger.debug("%s", traceback.format_exc())
            arm.trial.set_user_attr("rapidfire:error", reason)
        finally:
            self._local.arm = None
            arm.walks = None
            states = {"complete": TrialState.COMPLETE, "pruned": TrialState.STOPPED}
            arm.record.state = states.get(kind, TrialState.FAILED)
            try:
                self._tell(
                    "trial_ended",
                    arm,
                    state="failed" if kind == "cancelled" else kind,
                    value=value,
                    reason=reason,
                    adapter=arm.record.adapter,
                )
            finally:
                conductor.leave(arm)
        return kind, value, reason

    def _train(self, arm: Arm, build: Builder) -> Outcome:
        conductor, base, record = self._conductor, self._base, arm.record
        assert conductor is not None
        assert base is not None
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
        training.train(arm, trainer, self._host(base, conductor))
        if arm.record.boundaries and len(record.values) < len(record.boundaries):
            verdict, reason = record.verdicts[-1][1:] if record.verdicts else ("", "")
            if verdict == Verdict.STOP:
                return "pruned", record.values[-1], reason
            if verdict != Verdict.COMPLETE:
                raise RuntimeError(
                    f"the trainer ended itself after {len(record.values)} of {len(record.boundaries)} chunks "
                    "(early stopping of its own?); let the policy stop trials instead"
                )
        value, reason = record.values[-1], (record.verdicts[-1][2] if record.verdicts else "")
        if not np.isfinite(value):
            raise ValueError(f"the last value is {value}")
        assert isinstance(model, PeftModel)
        training.save(arm, model, self._folder(arm.number) / "adapter")
        arm.trial.set_user_attr("rapidfire:adapter", arm.record.adapter)
        return "complete", value, reason

    def _mend_base(self, arm: Arm) -> None:
        """A trial wrote into the base: load it again, or end the search where that is not possible."""
        conductor, base = self._conductor, self._base
        assert conductor is not None
        assert base is not None
        if isinstance(self._model_like, PreTrainedModel):
            self._error = RuntimeError(f"The search was ended by trial {arm.number}. {arm.record.error}")
            conductor.cancel()
        else:
            base.restore(load_base(self._model_like, self._dtype, self._device))

    def _host(self, base: Base, conductor: Conductor) -> training.Host:
        def take_base() -> bool:
            taken, self._base_taken = self._base_taken, True
            return not taken

        def keep_base(measured: Measured | None) -> None:
            if measured is None:
                self._base_taken = False
                return
            self.base_value, self.base_scores = measured.value, measured.scores
            self._tell("base_evaluated", None, value=measured.value)

        def submit(arm: Arm, request: Any) -> Any:
            if not isinstance(request, Forward):  # whoever wrote to the base is still at work here
                base.check(repair=True)
            return conductor.submit(arm, request)

        return training.Host(
            submit=submit,
            join=base.join,
            part=base.part,
            evaluator=self._evaluator,
            chunks=self.chunks,
            seed=self.seed,
            tell=self._tell,
            measure_base=take_base,
            keep_base=keep_base,
            check=base.check_arm,
            folder=self._folder,
            joint_head=base.multiplexer.head is not None,
        )

    # -- the rest ----------------------------------------------------------------------------------------------------

    def _tell(self, kind: str, arm: Arm | None, **data: Any) -> None:
        event = Event(
            kind,
            self._clock(),
            trial=None if arm is None else arm.number,
            chunk=None if arm is None else len(arm.record.values),
            data=data,
        )
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                logger.exception("A listener failed on %s; the search goes on.", event.kind)

    def _clock(self) -> float:
        return time.perf_counter() - self._born_s

    def _folder(self, number: int) -> Path:
        if self._output_dir is None:
            self._output_dir = Path(tempfile.mkdtemp(prefix="rapidfire-"))
        return self._output_dir / "trials" / str(number)
