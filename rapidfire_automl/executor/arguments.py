"""The executor's arguments, checked before any model is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rapidfire_automl.plan import Plan

METRICS = ("nll", "preference_loss", "preference_accuracy", "reward_margin", "reward")
"""The built-in metrics' names."""
COSTS = ("tokens", "seconds")
"""What a policy may see as the cost of a chunk."""


def check(
    *,
    model: Any,
    tokenizer: Any,
    metric: Any,
    cost: Any,
    plan: Any,
    listeners: Any,
    dtype: Any,
    device: Any,
    **numbers: Any,
) -> None:
    """Raise ValueError if an argument of `RapidFireExecutor` is out of range.

    Args:
        model: Hub id, path or loaded model.
        tokenizer: Or None.
        metric: Name, function, sequence of those, or None.
        cost: "tokens" or "seconds".
        plan: A plan, its path, or None.
        listeners: Functions.
        dtype: Of the base.
        device: Of the base, or None.
        numbers: Integers; `seed` and `max_paused` may be 0.
    """
    for name, value in numbers.items():
        least = 0 if name in ("seed", "max_paused") else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be an integer >= {least}, got {value!r}.")
    _check_model(model, tokenizer)
    several = list(metric) if isinstance(metric, (list, tuple)) else [metric]
    for one in several or [metric]:
        if not (callable(one) or one in METRICS or metric is None):
            names = ", ".join(METRICS)
            raise ValueError(f"`metric` must be a function or one of {names}, or a list of those, got {one!r}.")
    if cost not in COSTS:
        raise ValueError(f"`cost` must be one of {', '.join(COSTS)}, got {cost!r}.")
    if not (plan is None or isinstance(plan, (Plan, str, os.PathLike))):
        raise ValueError(f"`plan` must be a Plan, the path of a recorded one or None, got {plan!r}.")
    for listener in listeners:
        if not callable(listener):
            raise ValueError(f"`listeners` must be functions, got {listener!r:.80}.")
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not isinstance(named, torch.dtype):
        raise ValueError(f"`dtype` must be 'auto', a torch.dtype or its name such as 'bfloat16', got {dtype!r}.")
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"`device` must be a device such as 'cpu' or 'cuda:0', or None, got {device!r}.") from error


def _check_model(model: Any, tokenizer: Any) -> None:
    if not isinstance(model, (str, os.PathLike, PreTrainedModel)) or model == "":
        raise ValueError(f"`model` must be a hub id, a path or a transformers model, got {model!r:.80}.")
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise ValueError("`tokenizer` must be given when `model` is a loaded model, got None.")
    elif (isinstance(model, os.PathLike) or model.startswith(("/", ".", "~"))) and not Path(model).is_dir():
        raise ValueError(f"`model` must be a hub id, a path or a model, got {os.fspath(model)!r}: no such folder.")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"`tokenizer` must be a transformers tokenizer, got {tokenizer!r:.80}.")


def check_search(objective: Any, n_trials: Any) -> None:
    """Raise ValueError if an argument of `RapidFireExecutor.optimize` is out of range."""
    if isinstance(n_trials, bool) or not isinstance(n_trials, int) or n_trials < 1:
        raise ValueError(f"`n_trials` must be an integer >= 1, got {n_trials!r}.")
    if not callable(objective):
        raise ValueError(f"`objective` must be a function that builds a trainer, got {objective!r:.80}.")
