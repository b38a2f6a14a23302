"""One trial from its trainer to its value: attach, train chunk by chunk, evaluate, save. Runs in the trial's thread."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from rapidfire_automl import failpoints
from rapidfire_automl.chunks import chunk_boundaries, generation_boundaries
from rapidfire_automl.disk import is_full, make_folder, sync, sync_tree
from rapidfire_automl.executor import enqueueing, extending, seams, warmstart
from rapidfire_automl.executor.arm import Arm, Halt, Leave
from rapidfire_automl.executor.checkpoints import Snapshot
from rapidfire_automl.executor.context import generators_of_its_own
from rapidfire_automl.executor.evaluation import Evaluator
from rapidfire_automl.executor.requests import Boundary, Pace
from rapidfire_automl.executor.walks import CheapWalks
from rapidfire_policies.base import Decision, Verdict

logger = logging.getLogger("rapidfire_automl")


@dataclass(slots=True)
class Host:
    """What training needs of the executor.

    Args:
        submit: Files a request of the arm.
        step_out: Does something of the arm's without the baton.
        join: Moves an arm's adapter into the bank; returns why it can't join, or an empty string.
        part: The inverse.
        evaluator: Scores trainers.
        chunks: Of a whole trial.
        seed: Of the evaluation's generator.
        tell: Emits an event.
        record: Takes down what a chunk has come to.
        durable: Whether trials are to survive the process.
        save: Puts an arm's state on disk.
        leaving: Whether every trial is to leave at the end of its step.
        measure_base: Whether this arm is to measure the untrained base: the first, or the next if that fails.
        keep_base: Takes what it measured, or None if it failed.
        check: Raises if the base's tensors were touched, or the arm's were replaced.
        folder: Where a trial's files go.
        joint_head: Whether the base's head can join.
        joint_rollouts: Whether rollouts can join.
        warm_start: What the arm begins with, if not from nothing.
    """

    submit: Callable[[Arm, Any], Any]
    step_out: Callable[[Arm, Callable[[], Any]], Any]
    join: Callable[[Arm, PeftModel, TrainingArguments], str]
    part: Callable[[Arm], None]
    evaluator: Evaluator
    chunks: int
    seed: int
    tell: Callable[..., None]
    record: Callable[[Arm, tuple[float, ...], Any, Mapping[str, float]], None]
    durable: Callable[[], bool]
    save: Callable[[Arm, Trainer, Callable[[], Snapshot]], None]
    leaving: Callable[[], bool]
    measure_base: Callable[[], bool]
    keep_base: Callable[[Any], None]
    check: Callable[[Arm], None]
    folder: Callable[[int], Path]
    joint_head: bool
    joint_rollouts: Callable[[], bool]
    warm_start: Callable[[Arm], warmstart.WarmStart | None]


class ChunkCallback(TrainerCallback):
    """Stops at every chunk boundary, reports, and waits for the verdict.

    A trainer logs a step after the callbacks have heard of its end. Where the step at a boundary is to be logged, the
    boundary waits for that, so that a chunk's metrics include its last step.
    """

    def __init__(self, arm: Arm, trainer: Trainer, host: Host) -> None:
        self._arm = arm
        self._trainer = trainer
        self._host = host
        self.durable: seams.Durable | None = None
        self._due = False
        self.step_begins = False
        self.warm: warmstart.WarmStart | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the trial's own stream into chunks."""
        arm, host = self._arm, self._host
        if self.warm is not None:
            warmstart.give_optimizer(self.warm, self._trainer)
            self.warm = None
        boundaries = list(_boundaries(self._trainer, state.max_steps, host.chunks))
        before = arm.record.boundaries
        if before and boundaries != before[: len(boundaries)]:
            raise ValueError(f"its chunks ended at steps {before}, now they would at {boundaries}")
        arm.record.boundaries = boundaries
        if arm.restored is not None:
            extending.again(arm, before, state.global_step)
        arm.step, arm.begun = state.global_step, True
        host.tell(
            "trial_resumed" if arm.restored is not None else "trial_started",
            arm,
            params=dict(arm.record.params),
            trainer=arm.record.trainer,
            max_steps=state.max_steps,
            boundaries=list(arm.record.boundaries),
            fused=arm.record.fused,
            **enqueueing.origin(arm.trial.user_attrs),
            **({} if arm.restored is None else {"attempt": arm.restored.attempt}),
        )
        if host.measure_base():
            measured = None
            try:
                with generators_of_its_own(host.seed), self._trainer.model.disable_adapter():
                    measured = host.evaluator.measure(self._trainer, minimize=arm.minimize)
            finally:
                host.keep_base(measured)
        if arm.restored is None or arm.restored.snapshot is None:
            arm.logged = len(state.log_history)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember to keep pace before the step's first forward."""
        self._close_chunk(state, control)
        if self._arm.extensions:
            extending.at_step(self._arm, state.global_step)
        self.step_begins = True

    def pace(self, tokens: int) -> None:
        """Called before every forward with gradient, with the tokens that no joint pass counts."""
        self._arm.chunk_tokens += tokens
        if self.step_begins:
            self.step_begins = False
            self._arm.abandon_passes()
            decision = self._host.submit(self._arm, Pace())
            if isinstance(decision, Decision) and decision.verdict is Verdict.STOP:
                raise Halt(decision.reason)

    def generated(self, tokens: int) -> None:
        """Called after a rollout, with the tokens that no joint one counts."""
        self._arm.chunk_generated += tokens

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Notice a boundary."""
        failpoints.hit("step")
        arm, host, record = self._arm, self._host, self._arm.record
        arm.abandon_passes()
        arm.step = state.global_step
        done = arm.trained
        host.tell("step", arm, step=state.global_step, max_steps=state.max_steps)
        if done >= len(record.boundaries) or state.global_step < record.boundaries[done]:
            self._save_between()
            return
        self._due = True
        if not control.should_log:
            self._close_chunk(state, control)

    def _save_between(self) -> None:
        """In the middle of a chunk: onto the disk where somebody wants that, and away where the search is left."""
        arm, host = self._arm, self._host
        leaves = host.leaving()
        if not (leaves or arm.save_due):
            return
        arm.save_due = False
        host.check(arm)
        arm.charge_baton()
        if self.durable is not None:
            host.save(arm, self._trainer, self.durable.capture)
        if leaves:
            raise Leave

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The boundary's step has been logged."""
        self._close_chunk(state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A callback has kept the trainer from logging the last step."""
        self._close_chunk(state, control)

    def _close_chunk(self, state: TrainerState, control: TrainerControl) -> None:
        """Where a boundary is due: evaluate, record, save, wait; what was judged in an earlier process is not again."""
        if not self._due:
            return
        self._due = False
        arm, host = self._arm, self._host
        host.check(arm)
        if arm.walks is not None:
            arm.walks.refresh()
        flags = dict(vars(control))
        metrics = _means(state.log_history[arm.logged :])
        arm.trained = chunk = arm.trained + 1
        known = chunk <= len(arm.record.values)  # reported before a kill; its checkpoint was lost, and maybe its scores
        if not known or not len(arm.record.scores[chunk - 1]):
            with generators_of_its_own(host.seed):
                measured = host.evaluator.measure(self._trainer, minimize=arm.minimize)
            vars(control).update(flags)  # a metric that calls `trainer.evaluate()` would swallow this step's log
            if known:
                arm.record.scores[chunk - 1] = measured.scores
            else:
                host.record(arm, measured.vector, measured.scores, metrics)
        arm.logged, arm.save_due = len(state.log_history), False
        if self.durable is not None:
            host.save(arm, self._trainer, self.durable.capture)
        if chunk > arm.judged:
            decision = host.submit(arm, Boundary(chunk))
        else:
            decision = arm.final if chunk == arm.judged else None
        if isinstance(decision, Decision) and decision.verdict in (Verdict.STOP, Verdict.COMPLETE):
            control.should_training_stop = True
            if state.global_step < state.max_steps:
                control.should_save = control.should_evaluate = False


def train(arm: Arm, trainer: Any, host: Host) -> None:
    """Train a trial to its end or its verdict.

    Args:
        arm: The trial.
        trainer: What the user's function returned.
        host: The executor's side.

    Raises:
        TypeError: It is no trainer.
        ValueError: It can't be trained here; the message says what to do.
    """
    model = check_trainer(trainer)
    arm.record.trainer = type(trainer).__name__
    host.evaluator.check(trainer)
    goes_on = arm.restored is not None and arm.restored.snapshot is not None
    warm = None if goes_on else host.warm_start(arm)
    if warm is not None:
        warmstart.give_adapter(warm, model)
    arm.record.why_unfused = host.join(arm, model, trainer.args)
    arm.record.fused = not arm.record.why_unfused
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    if trainer.args.output_dir == "trainer_output":
        trainer.args.output_dir = str(host.folder(arm.number) / "trainer")
    callback = ChunkCallback(arm, trainer, host)
    callback.warm, arm.trainer = warm, trainer
    trainer.add_callback(callback)
    seam = seams.Seam(
        trainer,
        model,
        submit=lambda request: host.submit(arm, request),
        step_out=lambda work: host.step_out(arm, work),
        pace=callback.pace,
        generated=callback.generated,
        fused=arm.record.fused,
        joint_head=host.joint_head,
        joint_rollouts=host.joint_rollouts,
    )
    arm.walks = CheapWalks(model)
    if host.durable() and not seams.why_not_durable(trainer):
        callback.durable = seams.Durable(trainer)
    seam.open()
    undo = seams.leave_room(trainer)
    try:
        _train(arm, trainer, callback.durable, host)
    finally:
        undo()
        seam.close()
        arm.walks.close()
        arm.record.log_history = list(trainer.state.log_history)
        host.part(arm)
    for note in seam.notes:
        logger.info("Trial %d: %s.", arm.number, note)


def _train(arm: Arm, trainer: Trainer, durable: seams.Durable | None, host: Host) -> None:
    """Train from the start, or from where an earlier process has left off."""
    snapshot = None if arm.restored is None else arm.restored.snapshot
    if durable is None or snapshot is None:
        trainer.train() if durable is None else durable.train()
        return
    # What was trained and not judged is judged first; a verdict on a paused trial is known.
    decision = arm.answer
    if arm.trained > arm.judged:
        decision = host.submit(arm, Boundary(arm.trained))
    if not isinstance(decision, Decision) or decision.verdict not in (Verdict.STOP, Verdict.COMPLETE):
        durable.train(snapshot)
    elif decision.verdict is Verdict.COMPLETE:
        durable.put(snapshot)


def save(arm: Arm, model: PeftModel, folder: Path, later: Callable[[Arm, Path, Snapshot], bool]) -> None:
    """Save the adapter in PEFT's layout, whole or not at all, and on the disk when this returns.

    Args:
        arm: Whose.
        model: Its model.
        folder: Where to.
        later: Called where the disk is full, with the adapter in memory; says whether somebody will write it.

    Raises:
        OSError: It can't be written, and nobody will.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        failpoints.hit("adapter.saving")
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial)
        model.save_pretrained(str(partial))
        sync_tree(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync(folder.parent)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        weights = seams.AdapterWeights(model)
        if not (is_full(error) and later(arm, folder, Snapshot({}, weights.adapter(), weights.config()))):
            raise
        logger.warning("Trial %d: its adapter waits in memory, the disk is full.", arm.number)
    arm.record.adapter = str(folder)


def check_trainer(trainer: Any) -> PeftModel:
    """The trainer's adapter model, or an error that says what is wrong with it."""
    if not isinstance(trainer, Trainer):
        got = "nothing" if trainer is None else f"a {type(trainer).__name__}"
        raise TypeError(f"The objective must build and return a trainer (SFTTrainer, DPOTrainer), got {got}.")
    model = seams.adapter_model(trainer)
    if model is None:
        raise ValueError(
            "The trainer trains the whole model: full fine-tuning can't share a base. "
            "Pass `peft_config=LoraConfig(...)` to it."
        )
    if why := seams.why_refused(trainer):
        raise ValueError(why)
    if isinstance(trainer.args.learning_rate, str):
        raise ValueError(f"`learning_rate` must be a number, got {trainer.args.learning_rate!r}. Leave out the quotes.")
    if hasattr(trainer.train_dataset, "__len__") and not len(trainer.train_dataset):
        raise ValueError("`train_dataset` must not be empty.")
    return model


def _means(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each number in some entries of a trainer's log, over the entries that have it."""
    logged: dict[str, list[float]] = {}
    for entry in entries:
        for name, value in entry.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in ("epoch", "step"):
                logged.setdefault(name, []).append(float(value))
    return {name: sum(values) / len(values) for name, values in logged.items()}


def _boundaries(trainer: Trainer, max_steps: int, chunks: int) -> tuple[int, ...]:
    args = trainer.args
    if seams.has_rollouts(trainer):
        batches = len(trainer.get_train_dataloader()) if hasattr(trainer.train_dataset, "__len__") else 0
        return generation_boundaries(
            batches or max_steps * args.gradient_accumulation_steps,
            args.gradient_accumulation_steps,
            args.steps_per_generation * trainer.num_iterations,
            max_steps,
            chunks,
        )
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    dataset = trainer.train_dataset
    examples = len(dataset) if hasattr(dataset, "__len__") else per_step * max_steps
    if args.dataloader_drop_last:
        examples -= examples % args.per_device_train_batch_size
    return chunk_boundaries(max(1, examples), per_step, max_steps, chunks)
