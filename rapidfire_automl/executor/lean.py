"""A leaner decoder: what the joint pass does in fewer and cheaper operations than the stock modules, same numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    """`weight * (x / rms(x)).to(dtype)` as Llama's does it, statistics in float32; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps))
        normed = wide * inverse
        ctx.save_for_backward(normed, inverse, weight)
        ctx.dtype = x.dtype
        return weight * normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        normed, inverse, weight = ctx.saved_tensors
        g = (dy * weight).to(normed.dtype)
        mean = torch.linalg.vecdot(g, normed).unsqueeze(-1).div_(normed.shape[-1])
        return (g - normed * mean).mul_(inverse).to(ctx.dtype), None, None


class LeanRMSNorm(nn.Module):
    """Stands where the base has a Llama-style RMSNorm.

    Args:
        norm: The base's own, whose weight is read.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = float(norm.variance_epsilon)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """`(..., hidden)` to the same."""
        out: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return out


class _GatedSiLU(torch.autograd.Function):
    """`silu(gate) * up`, elementwise, with one intermediate fewer than autograd keeps."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_up = torch.nn.functional.silu(gate).mul_(dy)
        return torch.ops.aten.silu_backward(dy * up, gate), d_up


class LeanMLP(nn.Module):
    """Stands where the base has a Llama-style gated MLP; its Linears keep their names.

    Args:
        mlp: The base's own, whose Linears are used.
    """

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """`(..., hidden)` to the same."""
        out: Tensor = self.down_proj(_GatedSiLU.apply(self.gate_proj(x), self.up_proj(x)))  # type: ignore[operator]
        return out


def make_lean(decoder: nn.Module) -> int:
    """Replace what has a leaner form that gives the same numbers on a probe.

    Args:
        decoder: The multiplexed decoder, changed in place.

    Returns:
        How many modules were replaced.
    """
    return lean_norms(decoder) + lean_mlps(decoder)


def lean_mlps(decoder: nn.Module) -> int:
    """Replace Llama-style gated MLPs with SiLU."""
    count = 0
    for owner in list(decoder.modules()):
        for name, child in list(owner.named_children()):
            parts = {part for part, _ in child.named_children()}
            if parts != {"gate_proj", "up_proj", "down_proj", "act_fn"} or not isinstance(child.gate_proj, nn.Linear):
                continue
            weight = child.gate_proj.weight
            probe = torch.linspace(-2, 3, weight.shape[1], device=weight.device, dtype=weight.dtype)[None]
            lean = LeanMLP(child)
            with torch.no_grad():
                if torch.allclose(lean(probe), child(probe), rtol=1e-5, atol=1e-6):
                    setattr(owner, name, lean)
                    count += 1
    return count


def lean_norms(decoder: nn.Module) -> int:
    """Replace Llama-style RMSNorms."""
    count = 0
    for owner in list(decoder.modules()):
        for name, child in list(owner.named_children()):
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                lean = LeanRMSNorm(child)
                probe = torch.linspace(-2, 3, child.weight.numel(), device=child.weight.device)[None]  # type: ignore[operator, arg-type]
                probe = probe.to(child.weight.dtype)  # type: ignore[arg-type]
                with torch.no_grad():
                    if torch.allclose(lean(probe), child(probe), rtol=1e-5, atol=1e-6):
                        setattr(owner, name, lean)
                        count += 1
    return count
