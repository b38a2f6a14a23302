"""What is known of one trial, kept while it trains and after; torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rapidfire_policies.base import TrialState


@dataclass(slots=True)
class TrialRecord:
    """One trial's story.

    Args:
        number: Optuna's number.
        params: Its hyperparameters, as suggested.
        state: Where it is now.
        values: One value a chunk, in the user's sign.
        scores: Per-example scores behind each value, shape `(examples,)`, in the user's sign.
        seconds: What each chunk cost; the time of a joint pass is split over its trials by tokens.
        tokens: Real (not padding) tokens trained in each chunk.
        boundaries: Optimizer step at which each chunk ends.
        verdicts: `(chunk, verdict, reason)`, in order.
        spans: `(start_s, end_s)` in which it held a slot, in seconds since the executor was entered.
        adapter: Folder of the saved adapter, in PEFT's layout, or None.
        trainer: Class name of its trainer.
        fused: Whether it trains in joint passes.
        why_unfused: The reason when it does not.
        error: What failed it, or None.
        log_history: The trainer's own log.
    """

    number: int
    params: dict[str, Any] = field(default_factory=dict)
    state: TrialState = TrialState.RUNNING
    values: list[float] = field(default_factory=list)
    scores: list[NDArray[np.float64]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    boundaries: list[int] = field(default_factory=list)
    verdicts: list[tuple[int, str, str]] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)
    adapter: str | None = None
    trainer: str = ""
    fused: bool = True
    why_unfused: str = ""
    error: str | None = None
    log_history: list[dict[str, Any]] = field(default_factory=list)
