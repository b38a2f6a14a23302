"""Trainers with rollouts and rewards (GRPO, RLOO): what they are asked for beside training."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, Trainer
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer.utils import is_async_callable

from rapidfire_automl.sampling import Sampling


def has_rollouts(trainer: Any) -> TypeGuard[GRPOTrainer | RLOOTrainer]:
    """Whether a trainer makes the data it trains on."""
    return isinstance(trainer, (GRPOTrainer, RLOOTrainer))


def why_refused(trainer: Any) -> str:
    """Why such a trainer can't train here at all, or an empty string."""
    if getattr(trainer.args, "use_vllm", False):
        return (
            "`use_vllm=True` hands the weights to another engine and merges the adapter into the base for that, which "
            "all trials share. Leave it out: trials roll out together."
        )
    if getattr(trainer.args, "use_transformers_continuous_batching", False):
        return (
            "`use_transformers_continuous_batching=True` decodes each trial by itself. Leave it out: trials roll out "
            "together."
        )
    return ""


def why_no_rewards(trainer: Any) -> str:
    """What keeps such a trainer's answers from being sampled outside of its own steps, or an empty string."""
    if getattr(trainer, "environment_factories", None) is not None:
        return "an environment"
    return "tools" if getattr(trainer, "tools", None) else ""


@contextmanager
def sampling_as(trainer: Any, sampling: Sampling) -> Iterator[None]:
    """While open, a trainer in evaluation mode samples as told, and what it notes down is forgotten after."""
    greedy = sampling.temperature == 0
    kept = ("pad_token_id", "bos_token_id", "eos_token_id", "suppress_tokens")
    wanted = {name: value for name, value in trainer.generation_kwargs.items() if name in kept}
    wanted |= {"max_new_tokens": sampling.max_completion_length, "do_sample": not greedy, "cache_implementation": None}
    if not greedy:
        wanted |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    ours = {
        "generation_kwargs": wanted,
        "generation_config": GenerationConfig(**wanted, disable_compile=True),
        "max_completion_length": sampling.max_completion_length,
    }
    before = {name: getattr(trainer, name) for name in ours}
    metrics = copy.deepcopy(dict(trainer._metrics["eval"]))
    for name, value in ours.items():
        setattr(trainer, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)
        trainer._metrics["eval"].clear()
        trainer._metrics["eval"].update(metrics)
        for name in ("_pending_extra_logs", "_pending_metrics"):
            getattr(trainer, name, {}).clear()


def sample_rewards(trainer: Any, rows: Sequence[Mapping[str, Any]], sampling: Sampling) -> Tensor:
    """Sample answers and have the trainer's reward functions score them.

    Args:
        trainer: In evaluation mode, inside `sampling_as`.
        rows: Rows of its data set.
        sampling: How many answers.

    Returns:
        `(rows * num_generations, functions)` float64, NaN where a function has nothing to say.
    """
    inputs = [dict(row) for row in rows for _ in range(sampling.num_generations)]
    prompts = [row["prompt"] for row in inputs]
    with torch.no_grad():
        made = trainer._generate(prompts)
        ids, completions = made[1], made[3] if len(made) > 3 else made[2]
        rewards: Tensor = trainer._calculate_rewards(inputs, prompts, completions, ids)
    return rewards.double().cpu()


def watch(trainer: Trainer, step_out: Callable[[Callable[[], Any]], Any]) -> list[Callable[[], None]]:
    """Have errors of reward functions say which function and which row, and let asynchronous ones overlap.

    Args:
        trainer: The trial's trainer.
        step_out: Does something while others go on. What only waits for answers from outside is done so; functions
            that are not `async` may draw random numbers, and are called in turn.

    Returns:
        What undoes it.
    """
    if not has_rollouts(trainer):
        return []
    functions = list(trainer.reward_funcs)
    calculate = trainer._calculate_rewards
    if all(not isinstance(function, nn.Module) and is_async_callable(function) for function in functions):
        trainer._calculate_rewards = lambda *args: step_out(lambda: calculate(*args))
    trainer.reward_funcs = [
        function if isinstance(function, nn.Module) else _watched(function, name)
        for function, name in zip(functions, trainer.reward_func_names, strict=True)
    ]

    def undo() -> None:
        trainer.reward_funcs = functions
        trainer.__dict__.pop("_calculate_rewards", None)

    return [undo]


def _watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    if is_async_callable(function):

        async def wait(**arguments: Any) -> Any:
            try:
                rewards = await function(**arguments)
            except Exception as error:
                raise RuntimeError(f"The reward function `{name}` raised {type(error).__name__}: {error}") from error
            return _checked(rewards, name, arguments)

        return functools.wraps(function, updated=())(wait)

    def call(**arguments: Any) -> Any:
        try:
            rewards = function(**arguments)
        except Exception as error:
            row = _row_that_raises(function, arguments)
            where = "" if row is None else f" for {_shown(arguments, row)}"
            raise RuntimeError(f"The reward function `{name}` raised {type(error).__name__}: {error}{where}") from error
        return _checked(rewards, name, arguments)

    return functools.wraps(function, updated=())(call)


def _checked(rewards: Any, name: str, arguments: Mapping[str, Any]) -> list[float | None]:
    """Rewards as a list, one a completion, each finite or None."""
    expected = len(arguments["completions"])
    try:
        listed = list(rewards)
    except TypeError as error:
        raise ValueError(f"The reward function `{name}` must return a list of numbers, got {rewards!r:.80}.") from error
    if len(listed) != expected:
        raise ValueError(
            f"The reward function `{name}` must return one reward a completion, {expected}, got {len(listed)}."
        )
    for row, reward in enumerate(listed):
        if reward is None:
            continue
        try:
            finite = math.isfinite(reward)
        except TypeError:
            finite = False
        if not finite:
            raise ValueError(
                f"The reward function `{name}` must return finite numbers (or None for no reward), got {reward!r} for "
                f"{_shown(arguments, row)}"
            )
    return [None if reward is None else float(reward) for reward in listed]


def _row_that_raises(function: Callable[..., Any], arguments: Mapping[str, Any]) -> int | None:
    """The first row for which a function raises alone, or None."""
    expected = len(arguments["completions"])
    for row in range(expected):
        alone = {
            name: value[row : row + 1] if isinstance(value, list) and len(value) == expected else value
            for name, value in arguments.items()
        }
        try:
            function(**alone)
        except Exception:
            return row
    return None


def _shown(arguments: Mapping[str, Any], row: int) -> str:
    return f"row {row}: prompt {arguments['prompts'][row]!r:.80}, completion {arguments['completions'][row]!r:.80}."
