"""What a trial's thread can ask for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """What a trial's fused LM head computes.

    Args:
        outputs: Per-token fields.
        inverse_temperature: One over the temperature.
        logit_scale: The architecture's factor on the logits.
    """

    outputs: frozenset[str]
    inverse_temperature: float = 1.0
    logit_scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """A pass through the backbone, and through the head where `head` is given.

    Answer: hidden states `(rows, width, hidden)`, or the head's fields, each `(rows, width - 1)`; leaves that ask for a
    gradient if `grad`.

    Args:
        input_ids: `(rows, width)`.
        attention_mask: `(rows, width)` or None.
        position_ids: `(rows, width)` or None.
        grad: Whether a backward may follow.
        autocast: The trial's autocast dtype, or None.
        checkpointing: Whether activations are recomputed in the backward.
        adapter: False for the reference pass.
        head: The head's settings.
        targets: `(rows, width - 1)`, next tokens.
        scored: `(rows, width - 1)` bool, positions to score.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    grad: bool
    autocast: torch.dtype | None
    checkpointing: bool
    adapter: bool
    head: HeadSpec | None = None
    targets: Tensor | None = None
    scored: Tensor | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Requests of one kind can share a pass.

        Packed rows are told from each other by their position ids, which counts only where the pass has no mask; and
        the dense mask it becomes would cost their neighbours the causal kernel.
        """
        packed = self.position_ids is not None and self.attention_mask is None
        return (self.grad, self.autocast, packed)

    def with_head(self, head: HeadSpec, targets: Tensor, scored: Tensor) -> Forward:
        """The same pass, scored."""
        return replace(self, head=head, targets=targets, scored=scored)


@dataclass(frozen=True, slots=True, eq=False)
class Generate:
    """A rollout: rows to continue token by token.

    Answer: `(rows, width + new)` token ids, as transformers' `generate` returns them.

    Args:
        input_ids: `(rows, width)`, padded on the left.
        attention_mask: `(rows, width)` or None.
        process: From ids `(rows, so far)` and logits `(rows, vocabulary)` to scores of the same shape.
        stop: From ids and None to `(rows,)` bool, the rows that are done.
        temperature: Where `process` does nothing but divide by it, else None.
        sample: Whether tokens are drawn, or else the likeliest is taken.
        pad: What stands after a row's end, a scalar tensor; None if rows have no end of their own.
        max_new_tokens: At most so many.
        autocast: The trial's autocast dtype, or None.
        adapter: False for the reference.
        training: Whether the trial will train on it.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    process: Callable[[Any, Any], Any]
    stop: Callable[[Any, Any], Any]
    temperature: float | None
    sample: bool
    pad: Tensor | None
    max_new_tokens: int
    autocast: torch.dtype | None
    adapter: bool
    training: bool

    @property
    def rows(self) -> int:
        """Rows to continue."""
        return self.input_ids.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class Away:
    """The trial waits for something outside, a judge's answer, and has given the baton back meanwhile.

    Args:
        done: Set when it is back.
    """

    done: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Backward:
    """The trial's loss has run backward as far as the cut; answer: None, when its adapters have their gradients."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The trial is about to begin an optimizer step."""


@dataclass(frozen=True, slots=True, eq=False)
class Boundary:
    """A chunk is done, evaluated and recorded; answer: a `Decision`, when the round is over and the trial has a slot.

    Args:
        chunk: Chunks done.
    """

    chunk: int
