"""Attention for short sequences on a CPU, where the stock kernel's backward costs more than the rest of the layer.

Measured on one core with AMX, 8 rows of 16 tokens, 9 heads, bfloat16, forward and backward: the stock kernel 14.8 ms,
this 1.0 ms; at 512 tokens it is the other way round. Where to switch is measured on each machine, by `measure`. For one
token that looks back, as in decoding, the stock kernel takes 1.0 ms for 32 rows of 40 tokens, this 0.2.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rapidfire_short"
_ATTRIBUTE = "_rapidfire_widths"


class _CausalAttention(torch.autograd.Function):
    """`q (batch, heads, tokens, d)`, `k, v (batch, kv_heads, tokens, d)` to the shape of `q`; softmax in float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        batch, heads, tokens, d = q.shape
        groups = k.shape[1]
        together = (batch * groups, heads // groups * tokens, d)
        q, k, v = q.reshape(together), k.reshape(-1, tokens, d), v.reshape(-1, tokens, d)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        mask = torch.full((tokens, tokens), float("-inf"), dtype=wide, device=q.device).triu_(1)
        scores = torch.bmm(q, k.transpose(1, 2)).to(wide).mul_(scale).view(-1, tokens, tokens).add_(mask)
        p = scores.softmax(-1).to(q.dtype).view(batch * groups, -1, tokens)
        out = torch.bmm(p, v)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale, ctx.heads = scale, heads
        return out.view(batch, heads, tokens, d)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        batch, heads, tokens, d = grad.shape
        grad = grad.reshape(q.shape)
        dv = torch.bmm(p.transpose(1, 2), grad)
        dp = torch.bmm(grad, v.transpose(1, 2))
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        ds = torch._softmax_backward_data(dp.to(wide), p.to(wide), -1, wide).mul_(ctx.scale).to(q.dtype)
        dq, dk = torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q)
        shape = (batch, -1, tokens, d)
        return dq.view(batch, heads, tokens, d), dk.view(shape), dv.view(shape), None


def _one_token(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`q (batch, heads, 1, d)`, `k, v (batch, kv_heads, tokens, d)`, `mask (batch, 1, 1, tokens)` bool or None."""
    batch, heads, _, d = q.shape
    groups, tokens = k.shape[1:3]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = k.reshape(-1, tokens, d), v.reshape(-1, tokens, d)
    # Keys first: a CPU copies them to multiply by their transpose.
    products = torch.bmm(k, q.reshape(batch * groups, -1, d).transpose(1, 2)).transpose(1, 2)
    scores = torch.empty(products.shape, dtype=wide, device=q.device).copy_(products).mul_(scale)
    if mask is not None:
        scores.view(batch, heads, tokens).masked_fill_(~mask[:, 0], float("-inf"))
    return torch.bmm(scores.softmax(-1).to(q.dtype), v).view(batch, heads, 1, d)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: plain causal attention of a short pass here, anything else as before."""
    tokens = query.shape[2]
    device = query.device.type
    if torch.is_autocast_enabled(
        device
    ):  # as the stock kernel is cast; queries may come in float32, values in bfloat16
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bare = dropout == 0 and kwargs.get("softcap") is None
    if tokens == 1 and bare and not torch.is_grad_enabled() and _is_bool(attention_mask):
        with torch.autocast(device, enabled=False):
            return _one_token(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None
    plain = bare and attention_mask is None and key.shape[2] == tokens > 1
    if not plain or kwargs.get("is_causal") is False or tokens > _widest(module, query.dtype):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    with torch.autocast(device, enabled=False):
        out: Tensor = _CausalAttention.apply(query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


def _is_bool(mask: Tensor | None) -> bool:
    return mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)


def _widest(module: nn.Module, dtype: torch.dtype) -> int:
    widths: dict[str, int] = getattr(module.config, _ATTRIBUTE, {})
    return widths.get(str(dtype).removeprefix("torch."), 0)


def install(model: Any, widths: Mapping[str, int]) -> None:
    """Let a model on the CPU use it for short sequences.

    Args:
        model: A clone of the base with a config of its own, changed in place.
        widths: By dtype's name, the widest sequence to use it for.
    """
    config = model.config.get_text_config()
    windowed = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if model.device.type != "cpu" or windowed:
        return
    if config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
    if config._attn_implementation == NAME:
        setattr(config, _ATTRIBUTE, dict(widths))


def widths(config: Any, dtypes: Iterable[torch.dtype]) -> dict[str, int]:
    """Measure on this machine, for a text config's heads.

    Args:
        config: The base's text config.
        dtypes: In which its attention may run.

    Returns:
        By dtype's name, the widest sequence at which ours is faster.
    """
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    d = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {str(dtype).removeprefix("torch."): measure(heads, groups, d, dtype) for dtype in dtypes}


def measure(heads: int, groups: int, d: int, dtype: torch.dtype) -> int:
    """The widest sequence, of those tried, at which ours beats the stock kernel, forward and backward."""
    widest = 0
    for tokens in (16, 64, 128, 256, 512):
        q, k, v = (torch.zeros(4, n, tokens, d, dtype=dtype).requires_grad_() for n in (heads, groups, groups))

        def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return _CausalAttention.apply(q, k, v, 1.0)  # type: ignore[no-any-return]

        def stock(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            k, v = k.repeat_interleave(heads // groups, 1), v.repeat_interleave(heads // groups, 1)
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        times = []
        for run in (ours, stock):
            best = float("inf")
            for _ in range(4):
                begin = time.perf_counter()
                run().sum().backward()
                best = min(best, time.perf_counter() - begin)
            times.append(best)
        if times[0] > times[1]:
            break
        widest = tokens
    return widest
