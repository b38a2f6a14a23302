"""What is known of one trial, kept while it trains and after; torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
        values: One value a chunk, in the user's sign; with several objectives that of the first.
        vectors: One value an objective a chunk, in the user's sign; empty with one objective.
        scores: Per-example scores behind each value, shape `(examples,)`, or `(objectives, examples)` with several
            objectives, in the user's sign.
        metrics: What else the trainer logged, by name: the mean over each chunk, NaN where it logged nothing.
        seconds: What each chunk cost; the time of a joint pass is split over its trials by tokens.
        tokens: Real (not padding) tokens trained in each chunk.
        generated: Tokens generated for training in each chunk; those of an evaluation, the same for all, don't count.
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
    vectors: list[tuple[float, ...]] = field(default_factory=list)
    scores: list[NDArray[np.float64]] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    boundaries: list[int] = field(default_factory=list)
    verdicts: list[tuple[int, str, str]] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)
    adapter: str | None = None
    trainer: str = ""
    fused: bool = True
    why_unfused: str = ""
    error: str | None = None
    log_history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def last_vector(self) -> tuple[float, ...]:
        """The last value of each objective; empty before the first chunk is done."""
        return self.vectors[-1] if self.vectors else tuple(self.values[-1:])

    @property
    def standing(self) -> dict[str, float]:
        """Chunks done and the last value, as the numbers of a verdict; without a value none."""
        return {"resource": len(self.values), "value": self.values[-1]} if self.values else {}

    def add_chunk(
        self,
        vector: tuple[float, ...],
        scores: NDArray[np.float64],
        metrics: Mapping[str, float],
        seconds: float,
        tokens: int,
        generated: int = 0,
    ) -> None:
        """Take down what a chunk came to.

        Args:
            vector: One value an objective.
            scores: Per example; may be empty.
            metrics: What the trainer logged in the chunk.
            seconds: What it cost.
            tokens: What it trained.
            generated: What it generated to train on.
        """
        done = len(self.values)
        self.values.append(vector[0])
        if len(vector) > 1:
            self.vectors.append(vector)
        self.scores.append(scores)
        self.seconds.append(seconds)
        self.tokens.append(tokens)
        self.generated.append(generated)
        for name in sorted({*self.metrics, *metrics}):
            self.metrics.setdefault(name, [math.nan] * done).append(metrics.get(name, math.nan))
