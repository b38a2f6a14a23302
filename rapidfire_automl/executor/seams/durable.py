"""A trainer's whole state as a snapshot, and a fresh trainer that goes on from one as if nothing had happened.

Trainer can resume, but it unpickles, replaces the adapter's parameters, forgets what a TRL trainer counts beside, and
draws other permutations where a sampler has a generator of its own. Here its loading methods are replaced on the one
instance, and each puts into place exactly what was captured.

Taken up: the adapter (and whatever else trains), optimizer, scheduler, gradient scaler, trainer state, callbacks that
are `ExportableState`, random generators, samplers, the losses and token counts between two logs, TRL's metrics, steps,
adaptive entropy and rollouts that are to be used again. What is left of the step in which the snapshot was taken (its
log, evaluation and save, the epoch's end) is done first on resuming.

Out of reach: what a trainer subclass, a plain callback, a reward function or an optimizer keeps outside of these
(layer-wise optimizers, AdaLoRA's allocator, `SyncRefModelCallback`, vLLM); random draws of a collator or a streamed
data set, because batches that are skipped aren't drawn again; another number of GPUs or threads, another version of
torch; rounding where the adapter lies in memory otherwise than before (in joint passes beside other neighbours).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from rapidfire_automl.executor.checkpoints import Snapshot
from rapidfire_automl.executor.context import Generators
from rapidfire_automl.executor.seams.weights import AdapterWeights, on_device, put_optimizer

_LOADERS = ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state")
_RELIED_ON = (*_LOADERS, "_load_callback_state", "_load_scaler", "_maybe_log_save_evaluate", "_run_epoch")
_COUNTERS = (
    "_tr_loss",
    "_total_loss_scalar",
    "_globalstep_last_logged",
    "_initial_global_step",
    "current_flos",
    "_step",
    "_total_train_tokens",
    "_current_train_step_time",
    "entropy_coef",
    "_last_world_entropy",
    "_entropy_window_stats",
)
"""Of Trainer and of TRL's trainers, where they have them."""
_TABLES = ("_pending_extra_logs", "_pending_metrics")


def why_not_durable(trainer: Trainer) -> str:
    """Why a trainer's state can't be captured, or an empty string."""
    missing = [name for name in _RELIED_ON if not hasattr(trainer, name)]
    if missing:
        return f"this version of transformers has no `Trainer.{missing[0]}`"
    if not isinstance(trainer.model, PeftModel) or not isinstance(trainer.model.active_adapter, str):
        return "it does not train one adapter"
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or trainer.args.world_size > 1:
        return "its state is spread over several processes"
    return ""


class Durable:
    """One trainer's captures, and its going on.

    Use it in the trial's thread while it holds the baton: the process-wide random generators are the trial's then.

    Args:
        trainer: A trainer that trains one adapter; not yet training.

    Raises:
        ValueError: Its state can't be captured.
    """

    def __init__(self, trainer: Trainer) -> None:
        if why := why_not_durable(trainer):
            raise ValueError(f"The trainer's state can't be captured: {why}.")
        self._trainer = trainer
        self._weights = AdapterWeights(trainer.model)
        self._watch = _Watch(self)
        self._resumed: Mapping[str, Any] | None = None
        self._generators: Generators | None = None
        self._epoch_start: dict[str, Any] | None = None
        self._epoch_ended = False
        self._logging = 0
        self._grad_norm: Any = None
        self._learning_rate: Any = None

    def train(self, snapshot: Snapshot | None = None) -> Any:
        """Train from the beginning, or on from a snapshot, which may be used again after.

        Args:
            snapshot: Of a trainer that was built alike.

        Returns:
            What `Trainer.train` returns; None where the snapshot is of training's end: then the weights and the
            trainer's state are put into place, and that is all.

        Raises:
            ValueError: The snapshot is of another adapter, optimizer or machine.
        """
        if snapshot is None:
            with self._hooked():
                return self._trainer.train()
        state = dict(snapshot.tree["trainer"])
        if state["global_step"] >= state["max_steps"]:
            self.put(snapshot)
            return None
        self._resumed = snapshot.tree
        args = self._trainer.args
        changed = {"ignore_data_skip": False, "eval_on_start": False}
        own = {name: getattr(args, name) for name in changed}
        # Trainer reads its state from a file.
        with TemporaryDirectory(prefix="rapidfire-") as folder, self._hooked(snapshot):
            Path(folder, "trainer_state.json").write_text(json.dumps(state, default=lambda number: number.item()))
            try:
                vars(args).update(changed)
                return self._trainer.train(resume_from_checkpoint=folder)
            finally:
                vars(args).update(own)
                self._resumed = self._generators = None

    def put(self, snapshot: Snapshot) -> None:
        """Put a snapshot's weights and the trainer's state into place, and train no further."""
        self._weights.put(snapshot)
        self._trainer.state = TrainerState(**snapshot.tree["trainer"])

    def capture(self, **meta: Any) -> Snapshot:
        """The state between two steps: call it from a callback's `on_step_end` or `on_log`. Nothing is copied.

        Args:
            meta: Goes into the snapshot as it is.

        Raises:
            RuntimeError: The trainer has not begun an epoch.
        """
        if self._epoch_start is None:
            raise RuntimeError("A trainer's state can only be captured while it trains.")
        trainer = self._trainer
        state, control = trainer.state, trainer.control
        scaler = trainer.accelerator.scaler
        tree = {
            "trainer": dataclasses.asdict(state) | {"stateful_callbacks": {}},
            "callbacks": [[type(callback).__name__, callback.state()] for callback in self._exportable()],
            "counters": {name: vars(trainer)[name] for name in _COUNTERS if name in vars(trainer)},
            "own": self._own(),
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "generators": Generators.in_force().tree(),
            "samplers": _sampler_states(trainer.callback_handler.train_dataloader),
            "epoch_start": self._epoch_start,
            "rest": {
                "log": control.should_log,
                "evaluate": control.should_evaluate,
                "save": control.should_save,
                "epoch_end": float(state.epoch).is_integer() and not self._epoch_ended,
                "grad_norm": self._grad_norm,
                "learning_rate": self._learning_rate,
            },
            "weights": self._weights.others(),
        }
        return Snapshot(tree, self._weights.adapter(), self._weights.config(), meta)

    def _own(self) -> dict[str, Any]:
        """What TRL's trainers keep beside."""
        trainer = self._trainer
        own: dict[str, Any] = {}
        if isinstance(metrics := getattr(trainer, "_metrics", None), Mapping):
            own["_metrics"] = {mode: dict(values) for mode, values in metrics.items()}
            if self._logging:  # TRL clears what it has logged only after the callbacks have heard of it
                own["_metrics"]["train" if trainer.model.training else "eval"] = {}
        for name in _TABLES:
            if isinstance(table := getattr(trainer, name, None), Mapping):
                own[name] = dict(table)
        if hasattr(trainer, "_buffered_inputs") and hasattr(trainer.args, "steps_per_generation"):
            every = trainer.args.steps_per_generation * trainer.num_iterations
            own["_buffered_inputs"] = trainer._buffered_inputs if trainer._step % every else None
        return own

    def _exportable(self) -> list[Any]:
        return [
            callback for callback in self._trainer.callback_handler.callbacks if isinstance(callback, ExportableState)
        ]

    @contextmanager
    def _hooked(self, snapshot: Snapshot | None = None) -> Iterator[None]:
        """While open, the trainer tells what is needed to capture it, and loads from the snapshot."""
        trainer = self._trainer
        own_log = trainer.log

        def log(*args: Any, **kwargs: Any) -> None:
            self._logging += 1
            try:
                own_log(*args, **kwargs)
            finally:
                self._logging -= 1

        replaced: dict[str, Any] = {
            "log": log,
            "_get_grad_norm": self._remembering("_get_grad_norm", "_grad_norm"),
            "_get_learning_rate": self._remembering("_get_learning_rate", "_learning_rate"),
        }
        if snapshot is not None:
            replaced |= {
                "_load_from_checkpoint": lambda *args, **kwargs: self._weights.put(snapshot),
                "_load_optimizer_and_scheduler": lambda checkpoint: self._put_optimizer(snapshot.tree),
                "_load_scaler": lambda checkpoint: self._put_scaler(snapshot.tree["scaler"]),
                "_load_rng_state": lambda checkpoint: self._put_generators(),
                "_load_callback_state": lambda: self._put_callbacks(snapshot.tree["callbacks"]),
            }
        before = {name: vars(trainer)[name] for name in replaced if name in vars(trainer)}
        vars(trainer).update({name: new for name, new in replaced.items() if new is not None})
        trainer.add_callback(self._watch)  # the last: what it finishes is heard by all others
        try:
            yield
        finally:
            trainer.remove_callback(self._watch)
            for name in replaced:
                vars(trainer).pop(name, None)
            vars(trainer).update(before)
            self._epoch_start = None

    def _remembering(self, method: str, attribute: str) -> Callable[..., Any] | None:
        own = getattr(self._trainer, method, None)
        if own is None:
            return None

        def remember(*args: Any, **kwargs: Any) -> Any:
            value = own(*args, **kwargs)
            setattr(self, attribute, value)
            return value

        return remember

    def begin_step(self) -> None:
        """A step begins."""
        self._epoch_ended = False

    def end_epoch(self) -> None:
        """An epoch's end has been told."""
        self._epoch_ended = True

    def begin_training(self) -> None:
        """The trainer has set its counters to zero: put them back, and finish the step of the snapshot."""
        if self._resumed is None:
            return
        trainer, tree = self._trainer, self._resumed
        for name, value in tree["counters"].items():
            setattr(trainer, name, value.to(trainer.args.device, copy=True) if isinstance(value, Tensor) else value)
        self._put_own(tree["own"])
        self._grad_norm, self._learning_rate = tree["rest"]["grad_norm"], tree["rest"]["learning_rate"]
        outer = Generators.in_force()
        Generators.from_tree(tree["generators"]).enter()
        self._finish_step(tree["rest"])
        self._generators = Generators.in_force()
        outer.enter()

    def begin_epoch(self) -> None:
        """The sampler is about to draw: put the state back that it drew from, or note it."""
        loader = self._trainer.callback_handler.train_dataloader
        if self._resumed is not None:
            tree, self._resumed = self._resumed, None
            if float(tree["trainer"]["epoch"]).is_integer():
                self._put_generators()
                _put_sampler_states(loader, tree["samplers"])
            else:
                Generators.from_tree(tree["epoch_start"]["generators"]).enter()
                _put_sampler_states(loader, tree["epoch_start"]["samplers"])
        self._epoch_start = {"generators": Generators.in_force().tree(), "samplers": _sampler_states(loader)}

    def _finish_step(self, rest: Mapping[str, Any]) -> None:
        """What Trainer would have done after the moment of the snapshot, before it goes on to the next batch."""
        trainer = self._trainer
        control = trainer.control

        def log_save_evaluate() -> None:
            trainer._maybe_log_save_evaluate(
                trainer._tr_loss,
                rest["grad_norm"],
                trainer.model_wrapped,
                None,
                math.floor(trainer.state.epoch),
                None,
                time.time(),
                learning_rate=rest["learning_rate"],
            )

        control.should_log, control.should_evaluate, control.should_save = rest["log"], rest["evaluate"], rest["save"]
        log_save_evaluate()
        if rest["epoch_end"]:
            trainer.control = trainer.callback_handler.on_epoch_end(trainer.args, trainer.state, trainer.control)
            log_save_evaluate()

    def _put_own(self, own: Mapping[str, Any]) -> None:
        trainer = self._trainer
        for mode, values in own.get("_metrics", {}).items():
            trainer._metrics[mode].clear()
            trainer._metrics[mode].update({name: list(logged) for name, logged in values.items()})
        for name in _TABLES:
            if name in own:
                getattr(trainer, name).clear()
                getattr(trainer, name).update({key: list(values) for key, values in own[name].items()})
        if "_buffered_inputs" in own:
            trainer._buffered_inputs = on_device(own["_buffered_inputs"], trainer.args.device)

    def _put_optimizer(self, tree: Mapping[str, Any]) -> None:
        put_optimizer(self._trainer.optimizer, tree["optimizer"])
        self._trainer.lr_scheduler.load_state_dict(on_device(tree["scheduler"], None))

    def _put_scaler(self, state: Mapping[str, Any] | None) -> None:
        scaler = self._trainer.accelerator.scaler
        if (scaler is None) != (state is None):
            raise ValueError("The snapshot is of a trainer with another precision.")
        if scaler is not None:
            scaler.load_state_dict(on_device(state, None))

    def _put_generators(self) -> None:
        if self._generators is not None:
            self._generators.enter()

    def _put_callbacks(self, states: list[list[Any]]) -> None:
        """In place: Trainer would put new objects at the list's end."""
        waiting = self._exportable()
        for name, state in states:
            callback = next((other for other in waiting if type(other).__name__ == name), None)
            if callback is not None:
                waiting.remove(callback)
                vars(callback).update(state.get("attributes", {}))


class _Watch(TrainerCallback):
    """Tells when training, an epoch and a step begin."""

    def __init__(self, durable: Durable) -> None:
        self._durable = durable

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._durable.begin_training()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._durable.begin_epoch()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._durable.begin_step()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._durable.end_epoch()


def _sampler_states(loader: Any) -> dict[str, dict[str, Any]]:
    """What each sampler under a data loader goes by: its generator's state, seed and epoch."""
    states = {}
    for path, sampler in _samplers(loader):
        state: dict[str, Any] = {}
        if isinstance(generator := getattr(sampler, "generator", None), torch.Generator):
            state["generator"] = generator.get_state()
        state |= {name: vars(sampler)[name] for name in ("epoch", "initial_seed") if name in vars(sampler)}
        if state:
            states[path] = state
    return states


def _put_sampler_states(loader: Any, states: Mapping[str, Mapping[str, Any]]) -> None:
    for path, sampler in _samplers(loader):
        for name, value in states.get(path, {}).items():
            if name != "generator":
                setattr(sampler, name, value)
                continue
            if sampler.generator is None:
                sampler.generator = torch.Generator()
            sampler.generator.set_state(value)


def _samplers(owner: Any, path: str = "loader", depth: int = 4) -> Iterator[tuple[str, Any]]:
    yield path, owner
    for name in ("sampler", "batch_sampler"):
        inner = getattr(owner, name, None)
        if inner is not None and depth:
            yield from _samplers(inner, f"{path}.{name}", depth - 1)
