"""How long a trainer trains: room beyond its end, and a schedule of another length."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from rapidfire_automl.executor.seams.rewards import has_rollouts

_LENGTH = "num_training_steps"
_OTHER_LENGTHS = frozenset({"num_stable_steps", "num_decay_steps"})


def leave_room(trainer: Trainer) -> Callable[[], None]:
    """Let a trainer go on into further epochs if it is told to, and end where it would have ended otherwise.

    transformers fixes the range of epochs before the first; it ends training at `state.max_steps`, whatever the range.

    Returns:
        Undoes it.
    """
    own = getattr(trainer, "set_initial_training_values", None)
    if own is None:
        return lambda: None
    meant = _MeantEpochs()

    def values(*args: Any, **kwargs: Any) -> Any:
        meant.epochs, *rest = own(*args, **kwargs)
        return (sys.maxsize, *rest)

    trainer.set_initial_training_values = values
    trainer.callback_handler.callbacks.insert(0, meant)

    def undo() -> None:
        trainer.__dict__.pop("set_initial_training_values", None)
        trainer.callback_handler.callbacks.remove(meant)

    return undo


class _MeantEpochs(TrainerCallback):
    """Has the trainer's state say how many epochs are meant, before any other callback looks."""

    epochs = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set it right."""
        state.num_train_epochs = self.epochs


def why_no_longer(trainer: Trainer, steps: int) -> str:
    """Why a trainer can't train so many steps more, or an empty string."""
    if "set_initial_training_values" not in trainer.__dict__:
        return "this version of transformers fixes its number of epochs"
    scheduler = trainer.lr_scheduler
    if type(scheduler) is not LambdaLR:
        return f"the length of its schedule ({type(scheduler).__name__}) can't be changed"
    for shape in scheduler.lr_lambdas:
        if isinstance(shape, functools.partial) and _OTHER_LENGTHS & shape.keywords.keys():
            return f"its schedule ({trainer.args.lr_scheduler_type.value}) has parts of a fixed length"
    if has_rollouts(trainer):
        every = trainer.args.steps_per_generation * trainer.num_iterations
        if steps * trainer.args.gradient_accumulation_steps % every:
            return "its last chunk is shorter than what it trains on one batch of rollouts"
    return ""


def lengthen(trainer: Trainer, steps: int) -> None:
    """Train so many steps more, at the learning rates that a schedule of the new length has from here on.

    Args:
        trainer: It trains, between two steps or in the middle of one that is not its last.
        steps: Optimizer steps more.
    """
    trainer.state.max_steps += steps
    scheduler = trainer.lr_scheduler
    assert isinstance(scheduler, LambdaLR)
    for i, shape in enumerate(scheduler.lr_lambdas):
        if isinstance(shape, functools.partial) and _LENGTH in shape.keywords:
            keywords = {**shape.keywords, _LENGTH: trainer.state.max_steps}
            scheduler.lr_lambdas[i] = functools.partial(shape.func, *shape.args, **keywords)
    rates = [
        base * shape(scheduler.last_epoch) for base, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
