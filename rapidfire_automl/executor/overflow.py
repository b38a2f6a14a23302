"""A pass that does not fit into memory: what is tried next, and what the trial is told that does not fit by itself.

Whoever tries again does so after its `except` block: an error that is being handled keeps the frames of the failed
pass, and with them the memory that is missing.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from rapidfire_automl.executor.requests import Generate
from rapidfire_automl.executor.seams import is_out_of_memory
from rapidfire_policies.wording import counted


def next_size(trials: int, error: Exception) -> int:
    """How many trials a failed pass of several is tried with again: half of them if it did not fit, else each alone."""
    return max(1, trials // 2) if is_out_of_memory(error) else 1


def told_alone(error: Exception, request: Any) -> Exception:
    """What a trial hears whose pass has failed with nobody else in it.

    Args:
        error: Why.
        request: What it asked for: a `Forward`, a `Backward`, or a `Generate`.

    Returns:
        The error itself, or, out of memory, one with the fix and without the frames of the pass.
    """
    if not is_out_of_memory(error):
        return error
    if isinstance(request, Generate):
        what, fix = "rollout", "`per_device_train_batch_size`, `num_generations` or `max_completion_length`"
    else:
        what, fix = "pass", "`per_device_train_batch_size` (with more `gradient_accumulation_steps`) or `max_length`"
    ids = getattr(request, "input_ids", None)
    size = "" if ids is None else f" of {counted(ids.shape[0], 'row')} of {counted(ids.shape[1], 'token')}"
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return torch.OutOfMemoryError(
        f"A {what}{size} does not fit into memory, even with no other trial in it. Take smaller {fix}. ({first})"
    )


def free_memory() -> None:
    """Give back what failed passes have left."""
    gc.collect(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
