"""`RapidFireExecutor`: plain Optuna and plain TRL code, all trials on one frozen base. Start reading here."""

from __future__ import annotations

import gc
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rapidfire_automl import attempts, workers
from rapidfire_automl.attempts import number_of
from rapidfire_automl.control import Command, Controls, Sent
from rapidfire_automl.events import Event, Listener
from rapidfire_automl.executor import enqueueing, rounds, seams
from rapidfire_automl.executor.arguments import check as check_arguments
from rapidfire_automl.executor.arguments import check_search
from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.executor.base import Base
from rapidfire_automl.executor.commands import Commands
from rapidfire_automl.executor.conductor import Conductor
from rapidfire_automl.executor.context import TrialContext
from rapidfire_automl.executor.crew import Crew
from rapidfire_automl.executor.durability import Spent, is_same
from rapidfire_automl.executor.evaluation import Evaluator, Measured, Metric
from rapidfire_automl.executor.explanation import explain
from rapidfire_automl.executor.journal import NAME, read
from rapidfire_automl.executor.loading import ModelLike, load_base, load_tokenizer
from rapidfire_automl.executor.loop import Loop
from rapidfire_automl.executor.planner import plan_for
from rapidfire_automl.executor.runner import Builder, Outcome, Runner
from rapidfire_automl.executor.sources import Arrivals, Asking, Claims
from rapidfire_automl.executor.survival import Survival, facts
from rapidfire_automl.mailboxes import Mailbox
from rapidfire_automl.memory import give_back
from rapidfire_automl.names import check_folder
from rapidfire_automl.patience import PATIENCE_S, PatientStorage, patient
from rapidfire_automl.plan import Plan
from rapidfire_automl.records import TrialRecord
from rapidfire_automl.sampling import Sampling
from rapidfire_automl.seeding import reseed
from rapidfire_automl.workers import Worker
from rapidfire_policies.base import TrialState

logger = logging.getLogger("rapidfire_automl")

_WIND_UP_S = 20.0
"""After SIGTERM trials have so long to finish their step: who sends it often kills after 30 s."""


class RapidFireExecutor(Controls):
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
            beta 0.1; GRPO and RLOO: mean reward), a built-in's name ("nll", "preference_loss", "preference_accuracy",
            "reward_margin", "reward"), or a function from a trainer to a number or to one score an example. In a study
            with k directions, a list of k of these, or a function from a trainer to k numbers, to k rows of scores, or
            to a mapping of k of either.
        cost: What a policy sees as the cost of a chunk: trained tokens, the same in every run, or seconds.
        eval_batch_size: Examples of an evaluation forward, prompts of an evaluation's rollout.
        eval_sampling: How answers are sampled where rewards are compared, alike for all trials.
        plan: How requests are split into joint passes: None to calibrate, a `Plan`, or the path of a recorded one.
        output_dir: Where adapters go, `<output_dir>/trials/<number>/adapter`; a temporary folder by default.
        durable: Whether `optimize` keeps checkpoints there, so that after a kill the same call on the same stored study
            goes on; by default if `output_dir` is given.
        storage_patience_s: How long the study's storage may be away; then the search ends with `StorageAway`.
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
        metric: str | Metric | Sequence[str | Metric] | None = None,
        cost: Literal["tokens", "seconds"] = "tokens",
        eval_batch_size: int = 16,
        eval_sampling: Sampling | None = None,
        plan: Plan | str | os.PathLike[str] | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        durable: bool | None = None,
        storage_patience_s: float = PATIENCE_S,
        listeners: Sequence[Listener] = (),
    ) -> None:
        max_paused = slots if max_paused is None else max_paused
        check_arguments(
            model=model,
            tokenizer=tokenizer,
            metric=metric,
            cost=cost,
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
        self.base_vector: tuple[float, ...] | None = None
        self.base_scores: NDArray[np.float64] | None = None
        self._model_like = model
        self._dtype, self._device = dtype, device
        self._tokenizer = load_tokenizer(model, tokenizer) if tokenizer is not None else None
        self._plan = plan if isinstance(plan, Plan) or plan is None else Plan.load(Path(plan))
        self._evaluator = Evaluator(metric, eval_batch_size, eval_sampling or Sampling())
        self._output_dir = None if output_dir is None else Path(check_folder(output_dir, "output_dir"))
        self._durable = output_dir is not None if durable is None else durable
        self._storage_patience_s = storage_patience_s
        self._storage: PatientStorage | None = None
        self._listeners = list(listeners)
        self._records: dict[int, TrialRecord] = {}
        survival = self._survival = Survival(self._tell, lambda: self._conductor.arms if self._conductor else ())
        self._referee = rounds.Referee(
            self._records,
            chunks,
            slots,
            self._tell,
            cost,
            survival.keep_verdicts,
            survival.look_at_peers,
            survival.share,
        )
        self._commands = Commands(self._records, chunks, self._tell, self._end)
        self._study: optuna.Study | None = None
        self._base: Base | None = None
        self._conductor: Conductor | None = None
        self._runner: Runner | None = None
        self._arrivals: Arrivals | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stopping = self._hurry = False
        self._handlers: dict[int, Any] = {}
        self._study_name = ""
        self._exit = ExitStack()
        self._opening = threading.Lock()
        self._finished = threading.Event()  # `Thread.join` may return early when Ctrl-C interrupts it
        self._born_s = time.perf_counter()
        self._worker = Worker.here()

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

    @property
    def spent(self) -> Spent | None:
        """What checkpoints have cost so far in time and on the disk; None where there are none."""
        return self._survival.spent

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
        arm = None if self._runner is None else self._runner.arm
        if arm is None or self._base is None:
            raise RuntimeError("`executor.model(trial)` works inside a function decorated with `@executor.objective`.")
        if trial.number != arm.trial.number:
            raise ValueError(
                f"`trial` must be the one the objective was called with, {arm.trial.number}, got {trial.number}."
            )
        return self._base.clone()

    def objective(self, build: Builder) -> Callable[[optuna.Trial], float | Sequence[float]]:
        """Make an Optuna objective of a function that builds and returns a trainer.

        Args:
            build: Called when the trial has a slot, with the trial.

        Returns:
            For `study.optimize(..., n_jobs=executor.n_jobs)` or `executor.optimize`; in a study with several
            directions it returns as many values. A trial that raises is FAIL in Optuna, its error in
            `records[number].error`; the others go on.
        """

        def objective(trial: optuna.Trial) -> float | Sequence[float]:
            self._begin(trial.study)
            self._open(serving=True)
            assert self._arrivals is not None
            assert self._runner is not None
            arm = self._arm(trial)
            self._arrivals.arrive(arm)
            outcome = self._runner.run(arm, build)
            self._arrivals.gone()
            if self._error is not None:
                raise RuntimeError(f"The search has failed. {self._error}") from self._error
            if outcome.kind == "cancelled" and self._stopping:
                trial.study.stop()
            elif outcome.kind == "cancelled":
                raise KeyboardInterrupt
            if outcome.kind == "pruned":
                raise optuna.TrialPruned(outcome.reason)
            vector = outcome.vector if outcome.kind == "complete" else (float("nan"),) * len(arm.minimize)
            return vector if len(vector) > 1 else vector[0]

        objective.__wrapped__ = build  # type: ignore[attr-defined]
        objective.__name__ = getattr(build, "__name__", "objective")
        return objective

    def optimize(
        self,
        study: optuna.Study,
        objective: Builder,
        n_trials: int,
        timeout_s: float | None = None,
        *,
        more: bool = True,
    ) -> None:
        """Search with our own ask-and-tell loop, in one thread's order: the same search each time it is run.

        With an `output_dir` and a study that is stored, a search that was killed goes on when it is called again.

        Args:
            study: Any study; with several directions `metric` has to give as many values.
            objective: A function that builds a trainer, decorated or not.
            n_trials: Trials to ask for, those included that a killed search has begun.
            timeout_s: No trial is asked for after so many seconds; those that run go on.
            more: Whether a search in `output_dir` that has come to its end is followed by `n_trials` more. Else what it
                has found is in `records` again, and trials are asked for only as far as they were fewer.

        Raises:
            ValueError: `n_trials` is below 1, `objective` is no function, or `metric` does not give as many values as
                the study has directions.
            FolderInUse: A search is under way in `output_dir`.
            SearchDiffers: Another search in `output_dir` has not come to its end.
            RuntimeError: Every trial failed; the message has the first error.
            KeyboardInterrupt: Ctrl-C; finished trials are in the study.
        """
        check_search(objective, n_trials)
        build = getattr(objective, "__wrapped__", objective)

        def seeded(trial: optuna.Trial) -> Any:
            number = number_of(trial)
            loop.seed(number, 1)  # whatever others were proposed since it was asked for
            trainer = build(trial)
            self._survival.built(number)
            return trainer

        run = self._ready(study, seeded)
        self._survival.alone(self._lasting_folder(study))
        loop = Loop(study, self._arm, run, self._survival.durability)
        begun, left = self._take_up(study, n_trials, loop, more=more)
        source = Asking(study, left, loop.start, timeout_s, lambda asked: loop.ask(begun + asked))
        for queued in enqueueing.left_over(study) if begun else ():
            source.ask_for(queued)
        self._search(source, loop.retire)
        self._survival.over()
        self._raise_if_all_failed(loop.numbers)

    def check_folder(self, study: optuna.Study) -> None:
        """See whether `optimize` can have the folder, without the base.

        Raises:
            SearchDiffers: There is a search of another study that has not come to its end.
        """
        if (folder := self._lasting_folder(study)) is not None:
            is_same(folder, read(folder / NAME), study)

    def work(
        self, study: optuna.Study, objective: Builder, n_trials: int | None = None, timeout_s: float | None = None
    ) -> None:
        """Search together with other processes: each calls this on the same study, with an `output_dir` that all see.

        Every worker trains what it has claimed; its policy sees the trials of all. One that dies leaves its trials to
        the others, who go on from its checkpoints; called again, it is one more worker. It returns when no trial is
        left, neither to begin nor in another worker's hands.

        Args:
            study: In a storage with a heartbeat: `open_storage(url, heartbeat_s=30, grace_s=120)`.
            objective: A function that builds a trainer, decorated or not; alike in all workers.
            n_trials: Trials of all workers together; needed by the first, which has them queued.
            timeout_s: This worker begins no trial after so many seconds; those that run go on.

        Raises:
            ValueError: As `optimize`; the storage has no heartbeat; there is no `output_dir`.
            SearchDiffers: Other workers search something else.
            StorageAway: The storage was away for longer than `storage_patience_s`.
            RuntimeError: Every trial failed.
            KeyboardInterrupt: Ctrl-C; what ran is left to the others.
        """
        check_search(objective, 1 if n_trials is None else n_trials)
        workers.rhythm(study)
        if self._output_dir is None:
            raise ValueError("`output_dir` must be given for several workers: a folder that all of them see.")
        build = getattr(objective, "__wrapped__", objective)

        def seeded(trial: optuna.Trial) -> Any:
            """What is proposed depends on the trial's number, whichever worker has it."""
            assert self._survival.durability is not None
            reseed(study.sampler, self._survival.durability.sampler_seed, number_of(trial))
            return build(trial)

        run = self._ready(study, seeded)
        if n_trials is not None:
            workers.fill(study, n_trials)
        crew = Crew(study, self.worker, self._records, self._folder, self._tell, self._cancelled_elsewhere)
        self._survival.together(study, self._output_dir, crew)
        durability = self._survival.durability
        assert durability is not None
        loop = Loop(study, self._arm, run, durability, crew, lambda: not self._stopping)
        try:
            durability.join(self._facts(study))
            self._recall_base()
            self._referee.leave_out(attempts.last_attempts(study))
            crew.start()
            self._search(Claims(crew, loop.take_up, timeout_s), loop.retire)
            if self._stopping:
                crew.end_for_all()
            elif not workers.are_left(study):
                self._survival.keeping.over()
        finally:
            self._survival.close()
        self._raise_if_all_failed(loop.numbers)

    @property
    def worker(self) -> Worker:
        """This process, as other workers know it."""
        return self._worker

    def stop(self, trial: int | None = None) -> Sent | None:  # type: ignore[override]
        """Prune a trial at its next step; without one, end the search as `cancel` does.

        Args:
            trial: Its number.
        """
        if trial is not None:
            return super().stop(trial)
        self._end()
        return None

    @property
    def cancelled(self) -> bool:
        """Whether the last search was ended by `cancel` or `stop()`."""
        return self._stopping

    def add_mailbox(self, mailbox: Mailbox) -> None:
        """Take commands from one more place in the next search."""
        self._commands.add_mailbox(mailbox)

    def explain(self) -> str:
        """What the planner chose and why, and what the joint passes did so far."""
        if self._conductor is None or self._base is None:
            return "Nothing is planned yet: the base is loaded with the first trial or on entering the executor."
        return explain(self._conductor.plan, self._base, self._conductor.rolling.counts, self._records.values())

    def close(self) -> None:
        """Free the base, the adapters and the threads."""
        if self._arrivals is not None:
            self._arrivals.close()
        if self._thread is not None and not self._hurry:
            self._finished.wait()
        self._survival.close(1.0 if self._hurry else None)
        self._exit.close()
        self._commands.detach()
        self._base = self._conductor = self._runner = self._arrivals = self._thread = None
        gc.unfreeze()
        give_back()

    def __enter__(self) -> RapidFireExecutor:
        self._open(serving=None)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = self._handlers[number] = signal.getsignal(number)
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
                base = self._load_base()
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
                self._conductor = Conductor(
                    self.slots, self.n_jobs, plan, self._referee, self._tell, self._clock, self._commands
                )
                self._conductor.multiplexer = self._base.multiplexer
                self._runner = Runner(
                    base=self._base,
                    conductor=self._conductor,
                    evaluator=self._evaluator,
                    chunks=self.chunks,
                    seed=self.seed,
                    tell=self._tell,
                    record=self._referee.record,
                    folder=self._folder,
                    adapter_folder=self._adapter_folder,
                    reload=None if isinstance(self._model_like, PreTrainedModel) else self._load_base,
                    keep_base=self._keep_base,
                    abort=self._abort,
                    warm_start=self._commands.warm_start,
                    survival=self._survival,
                    cancelled=lambda: self._stopping,
                )
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

    def _conduct(self, source: Arrivals | Asking | Claims, retire: Callable[[Arm], None]) -> None:
        conductor = self._conductor
        assert conductor is not None
        assert self._study is not None
        self._commands.begin(self._study, source, self._survival.keeping)

        def body() -> None:
            home = TrialContext.capture()
            try:
                conductor.run(source, retire, home)
            except BaseException as error:
                self._error = error
                conductor.dismiss(retire)
            finally:
                home.enter()
                reason = "the search was cancelled" if self._stopping else "the search has ended"
                self._commands.end(reason, cancelled=self._stopping)
                self._finished.set()

        self._finished.clear()
        self._thread = threading.Thread(target=body, name="conductor", daemon=True)
        self._thread.start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """End the search, and do what would have been done without it; the second time, without waiting for trials."""
        conductor = self._conductor
        if conductor is not None:
            self._hurry = conductor.cancelled or conductor.leaving
            if number == signal.SIGTERM and not self._hurry and self._survival.is_on:
                conductor.wind_up()
            else:
                conductor.cancel()
        if self._storage is not None:
            self._storage.give_up()
        if number == signal.SIGTERM:
            raise SystemExit(128 + number)
        before = self._handlers.get(number)
        if callable(before):
            before(number, frame)
        raise KeyboardInterrupt

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    # -- the rest ----------------------------------------------------------------------------------------------------

    def _begin(self, study: optuna.Study) -> None:
        """Take a study; what is known of another's trials is forgotten, since numbers start anew."""
        self._evaluator.check_objectives(len(study.directions))
        with self._opening:
            self._study = study
            if study.study_name != self._study_name:
                if self._arrivals is not None:
                    self._commands.begin(study, self._arrivals, self._survival.keeping)
                self._study_name = study.study_name
                self._records.clear()
                self._referee.begin(study)

    def _ready(self, study: optuna.Study, build: Builder) -> Callable[[Arm], Outcome]:
        """Make ready for a search of our own; how a trial is run."""
        self._storage = patient(study, patience_s=self._storage_patience_s)
        if self._storage is not None:
            self._storage.listen(self._on_storage)
        self._begin(study)
        self._stopping, self._hurry, self._error = False, False, None
        if self._conductor is not None:
            self._conductor.renew()
        self._open(serving=False)
        assert self._runner is not None
        runner = self._runner
        return lambda arm: runner.run(arm, build)

    def _search(self, source: Asking | Claims, retire: Callable[[Arm], None]) -> None:
        """Conduct, and wait for the end."""
        assert self._conductor is not None
        self._conduct(source, retire)
        try:
            while not self._finished.wait(0.2):
                pass
        except BaseException:
            if self._conductor.leaving:
                self._finished.wait(_WIND_UP_S)
            self._conductor.cancel()
            self._finished.wait()
            raise
        self._raise_error()
        if self._conductor.cancelled and not self._stopping:
            raise KeyboardInterrupt

    def _raise_if_all_failed(self, ran: Sequence[int]) -> None:
        failed = [number for number in ran if self._records[number].state is TrialState.FAILED]
        if ran and len(failed) == len(ran) and not self._stopping:
            all_of = "The only trial" if len(ran) == 1 else f"All {len(ran)} trials"
            raise RuntimeError(f"{all_of} failed. Trial {failed[0]}: {self._records[failed[0]].error}")

    def _facts(self, study: optuna.Study) -> dict[str, Any]:
        """What is searched, to tell this search from another one."""
        assert self._base is not None
        return facts(study, self._base.model, self.chunks)

    def _recall_base(self) -> None:
        """What the untrained base is worth needn't be measured again."""
        assert self._runner is not None
        if (measured := self._survival.base()) is not None:
            self._keep_base(measured)
            self._runner.base_is_known()

    def _on_storage(self, what: str, away_s: float, reason: str) -> None:
        self._tell(f"storage_{what}", None, seconds=away_s, reason=reason)

    def _cancelled_elsewhere(self, reason: str) -> None:
        if not self._stopping:
            self._tell("warning", None, message=f"The search was ended: {reason}.")
            self._end()

    def _take_up(self, study: optuna.Study, n_trials: int, loop: Loop, *, more: bool) -> tuple[int, int]:
        """Begin a search, or go on with one that was killed.

        Returns:
            How many trials were begun, and how many are left to ask for beside those that people have added.
        """
        durability = loop.durability
        if durability is None:
            return 0, n_trials
        assert self._conductor is not None
        past = durability.begin(study, self._facts(study), more=more)
        if past is None:
            return 0, n_trials
        self._recall_base()
        over, going = durability.go_on(study, past)
        self._referee.leave_out(past.asked)
        self._records.update({record.number: record for record in over})
        self._conductor.adopt([loop.launch(one.arm_of(self._arm)) for one in going])
        logger.info("The search goes on: %d trials have ended, %d go on.", len(over), len(going))
        self._tell("search_resumed", None, ended=len(over), going_on=len(going))
        for number, chunk, said in past.said:  # the process may have been killed before it could tell
            self._hear(Event("verdict", self._clock(), number, chunk, {**said, "again": True}))
        added = enqueueing.numbers_of_people(study)
        return len(past.asked), max(0, n_trials - sum(number not in added for number in past.asked))

    def _arm(self, trial: optuna.Trial, record: TrialRecord | None = None) -> Arm:
        number = number_of(trial)
        record = TrialRecord(number) if record is None else record
        self._records[number] = record
        minimize = tuple(direction == StudyDirection.MINIMIZE for direction in trial.study.directions)
        return Arm(trial, TrialContext(self.seed), record, minimize, attempt=attempts.attempt_of(trial))

    def _keep_base(self, measured: Measured) -> None:
        self.base_value, self.base_vector, self.base_scores = measured.value, measured.vector, measured.scores
        self._survival.keep_base(measured)

    def _send(self, command: Command) -> Sent:
        return self._commands.send(command)

    def _end(self) -> None:
        self._stopping = True
        if self._conductor is not None:
            self._conductor.cancel()

    def _abort(self, error: BaseException) -> None:
        self._error = error
        if self._conductor is not None:
            self._conductor.cancel()

    def _load_base(self) -> PreTrainedModel:
        return load_base(self._model_like, self._dtype, self._device)

    def _tell(self, kind: str, arm: Arm | None, **data: Any) -> None:
        number, chunk = (None, None) if arm is None else (arm.number, len(arm.record.values))
        self._hear(Event(kind, self._clock(), number, chunk, data))

    def _hear(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                logger.exception("A listener failed on %s; the search goes on.", event.kind)

    def _clock(self) -> float:
        return time.perf_counter() - self._born_s

    def _adapter_folder(self, arm: Arm) -> Path:
        """A worker that was taken for dead must not write over what its successor has written."""
        again = self._survival.crew is not None and arm.attempt > 1
        return self._folder(arm.number) / (f"adapter-{arm.attempt}" if again else "adapter")

    def _lasting_folder(self, study: optuna.Study) -> Path | None:
        """Where a study's search survives, if it is to; a killed process takes a study in memory with it."""
        stored = not isinstance(study._storage, InMemoryStorage)
        return self._folder(0).parent.parent if self._durable and stored else None

    def _folder(self, number: int) -> Path:
        if self._output_dir is None:
            self._output_dir = Path(tempfile.mkdtemp(prefix="rapidfire-"))
        return self._output_dir / "trials" / str(number)
