"""The multiplexed decoder: one forward over the rows of many trials, each row through its own trial's adapter.

`y = x W + s_i (x A_i) B_i`: the base product once for all rows, the low-rank update as one `bmm` over trials. Trials
with unequal row counts are padded with zero rows for the `bmm` alone. A masked block-diagonal product would be
simpler and would leak a NaN from one trial into all; this does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rapidfire_automl.executor.adapters import LoraSite


@dataclass(slots=True)
class Segment:
    """One trial's rows in a joint pass.

    Args:
        start: First row.
        stop: One past the last.
        width: The trial's own sequence length; the pass may be wider.
        row: The trial's row in the adapter bank.
        sites: Its adapter, empty when it is off.
        generator: Draws the trial's dropout, from the state its own run would be in.
        drawn: Rows that its own run would draw dropout for, where some of them have left; 0 for all that are here.
        kept: `(rows,)`, which of the drawn rows are here, or None for all.
        left: Whether the pass pads it on the left.
    """

    start: int
    stop: int
    width: int
    row: int
    sites: Mapping[str, LoraSite]
    generator: torch.Generator
    drawn: int = 0
    kept: Tensor | None = None
    left: bool = False

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.stop - self.start

    def dropout(self, key: str) -> float:
        """Probability of dropout at a site, as its modules stand now."""
        site = self.sites.get(key)
        return site.dropout if site is not None and site.dropout_module.training else 0.0


@dataclass(slots=True)
class JointPass:
    """What a running joint pass knows; the multiplexed Linears read it, also when a checkpoint recomputes them.

    Args:
        segments: In row order, without gaps.
        stacks: By site: `A (trials, rank, in)`, `B (trials, rank, out)`.
        scales: By site: `(trials, 1, 1)`, each trial's scaling.
        anchor: A scalar that asks for a gradient, so that the first layer's adapters get theirs.
        draw_dtype: Dtype of the adapters' parameters, in which PEFT draws dropout.
        lane: Rows that share an entry of `stacks`; 0: an entry a segment. With trials of 4, 8 and 16 rows, lanes of 4
            need no padding.
        replaying: Whether a checkpoint is recomputing this pass.
        grads: By site: gradients of `stacks`, filled by the backward.
    """

    segments: list[Segment]
    stacks: Mapping[str, tuple[Tensor, Tensor]]
    scales: Mapping[str, Tensor]
    anchor: Tensor
    device: torch.device
    draw_dtype: torch.dtype = torch.float32
    lane: int = 0
    replaying: bool = False
    grads: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _draws: dict[str, list[Tensor]] = field(default_factory=dict)
    _slots: Tensor | None = None
    rows_per_trial: int = 0

    def __post_init__(self) -> None:
        counts = [segment.rows for segment in self.segments]
        self.rows_per_trial = self.lane or max(counts)
        if len(set(counts)) > 1 and not self.lane:
            places = [i * self.rows_per_trial + j for i, count in enumerate(counts) for j in range(count)]
            self._slots = torch.tensor(places, device=self.device)

    def pack(self, x: Tensor) -> Tensor:
        """`(rows, tokens, features)` to `(trials, rows_per_trial * tokens, features)`, padded with zero rows."""
        if self._slots is not None:
            padded = x.new_zeros(len(self.segments) * self.rows_per_trial, *x.shape[1:])
            x = padded.index_copy_(0, self._slots, x)
        return x.reshape(x.shape[0] // self.rows_per_trial, -1, x.shape[-1])

    def unpack(self, x: Tensor, tokens: int) -> Tensor:
        """The inverse of `pack`."""
        x = x.reshape(-1, tokens, x.shape[-1])
        return x if self._slots is None else x.index_select(0, self._slots)

    def add_grad(self, key: str, a: Tensor, b: Tensor) -> None:
        """Add to a site's gradients, `(trials, rank, in)` and `(trials, rank, out)`."""
        if key in self.grads:
            a, b = self.grads[key][0] + a, self.grads[key][1] + b
        self.grads[key] = (a, b)

    def dropout_mask(self, key: str, x: Tensor) -> Tensor | None:
        """What each trial's own `nn.Dropout` would multiply `x (rows, tokens, in)` with, or None when none is on.

        A mask is drawn at the trial's own width from its own generator, in the dtype PEFT would draw it in; a
        checkpoint's recomputation draws the same again.
        """
        chances = [segment.dropout(key) for segment in self.segments]
        if not any(chances):
            return None
        mask = torch.ones(x.shape, dtype=x.dtype, device=x.device)
        if not self.replaying and self.anchor.requires_grad:
            self._draws[key] = [segment.generator.get_state() for segment in self.segments]
        for i, (segment, chance) in enumerate(zip(self.segments, chances, strict=True)):
            if not chance:
                continue
            generator = segment.generator
            if self.replaying:
                generator = torch.Generator(device=self.device)
                generator.set_state(self._draws[key][i])
            shape = (segment.drawn or segment.rows, segment.width, x.shape[-1])
            draw = torch.empty(shape, dtype=self.draw_dtype, device=x.device).bernoulli_(
                1 - chance, generator=generator
            )
            if segment.kept is not None:
                draw = draw.index_select(0, segment.kept)
            first = x.shape[1] - segment.width if segment.left else 0
            mask[segment.start : segment.stop, first : first + segment.width] = draw.div_(1 - chance).to(x.dtype)
        return mask


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, key: str, joint: JointPass, base_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The product, the dropout mask, and what a backward needs: the packed input and its product with A."""
    a, b = joint.stacks[key]
    mask = joint.dropout_mask(key, x)
    base_in = x.to(base_dtype)
    y = F.linear(base_in, weight.to(base_dtype), None if bias is None else bias.to(base_dtype))
    lora_in = base_in.to(a.dtype) if a.dtype != x.dtype else x
    if mask is not None:
        lora_in = lora_in * mask.to(a.dtype)
    packed = joint.pack(lora_in)
    z = torch.bmm(packed, a.transpose(1, 2)).mul_(joint.scales[key])
    if y.dtype == a.dtype and joint._slots is None:
        y = torch.baddbmm(y.view(z.shape[0], z.shape[1], -1), z, b).view(y.shape)
    else:
        y = (y + joint.unpack(torch.bmm(z, b), x.shape[1])).to(y.dtype)
    return y, mask, packed, z


class _MultiplexedLinear(torch.autograd.Function):
    """`x (rows, tokens, in)` to `(rows, tokens, out)`; the adapters' gradients go to the pass, not through autograd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, key: str, joint: JointPass
    ) -> Tensor:
        device = x.device.type
        base_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            y, mask, packed, z = _linear(x, weight, bias, key, joint, base_dtype)
        ctx.key, ctx.joint, ctx.mask, ctx.scale, ctx.weight = key, joint, mask, joint.scales[key], weight
        ctx.in_dtype = x.dtype
        ctx.save_for_backward(packed, z)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        packed, z = ctx.saved_tensors
        joint, key = ctx.joint, ctx.key
        a, b = joint.stacks[key]
        with torch.autocast(dy.device.type, enabled=False):
            dy_packed = joint.pack(dy.to(a.dtype))
            dz = torch.bmm(dy_packed, b.transpose(1, 2)).mul_(ctx.scale)
            joint.add_grad(key, torch.bmm(dz.transpose(1, 2), packed), torch.bmm(z.transpose(1, 2), dy_packed))
            dx = None
            if ctx.needs_input_grad[0]:
                dx = dy @ ctx.weight.to(dy.dtype)
                update = joint.unpack(torch.bmm(dz, a), dy.shape[1])
                if ctx.mask is not None:
                    update = update * ctx.mask
                dx = (dx + update).to(ctx.in_dtype)
        return dx, None, None, None, None, None


class MultiplexedLinear(nn.Module):
    """Stands where the base has a Linear that some trial adapts; the base's own weight, nothing of its own.

    Args:
        base: The base's Linear.
        key: Its module path.
        current: Gives the pass that is running.
    """

    def __init__(self, base: nn.Linear, key: str, current: Callable[[], JointPass | None]) -> None:
        super().__init__()
        self.base = base
        self.key = key
        self._current = current

    def forward(self, x: Tensor) -> Tensor:
        """`(rows, tokens, in)` to `(rows, tokens, out)`."""
        joint = self._current()
        if joint is None or self.key not in joint.stacks:
            return self.base(x)  # type: ignore[no-any-return]
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
            return _linear(x, self.base.weight, self.base.bias, self.key, joint, x.dtype)[0]
        out: Tensor = _MultiplexedLinear.apply(x, joint.anchor, self.base.weight, self.base.bias, self.key, joint)
        return out
