"""The joint LM head: per-token log-probabilities of all trials' scored positions in one product with the head.

The gradient of a position's log-probability with respect to its hidden state does not depend on the loss:
`d log p[y] / dh = (W[y] - p W) * scale / temperature`. It is computed with the forward, while the probabilities are at
hand, so that a backward costs one multiplication and no second pass over the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TILE_BYTES = 64 << 20
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass(frozen=True, slots=True)
class Head:
    """The frozen head all trials share.

    Args:
        weight: `(vocabulary, hidden)`.
        bias: `(vocabulary,)` or None.
        logit_scale: Constant factor some architectures put on the logits.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Scores:
    """Per scored position; a field nobody asked for is None.

    Args:
        fields: By name of `FIELDS`, each `(positions,)` in float32 (`is_top1`: bool).
        jacobian: `d log_prob / d hidden`, `(positions, hidden)`, or None without gradient.
    """

    fields: dict[str, Tensor]
    jacobian: Tensor | None


def score(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    outputs: frozenset[str],
    *,
    inverse_temperature: Tensor | None,
    with_gradient: bool,
    dtype: torch.dtype,
) -> Scores:
    """Score every position against the head.

    Args:
        hidden: `(positions, hidden)`.
        targets: `(positions,)`, the token to score.
        head: The head.
        outputs: Names of `FIELDS` to compute; `log_probs` always is.
        inverse_temperature: `(positions,)` float32, or None for 1.
        with_gradient: Whether to compute the jacobian.
        dtype: Of the products (the trial's autocast dtype); statistics are float32, as TRL's are.

    Returns:
        The scores, detached.
    """
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        weight = head.weight.to(dtype)
        bias = None if head.bias is None else head.bias.to(dtype)
        step = max(1, _TILE_BYTES // (weight.shape[0] * 4))
        parts: dict[str, list[Tensor]] = {name: [] for name in FIELDS if name == "log_probs" or name in outputs}
        jacobians: list[Tensor] = []
        for start in range(0, max(1, len(hidden)), step):
            h = hidden[start : start + step].to(dtype)
            y = targets[start : start + step, None]
            factor = torch.full((len(h), 1), head.logit_scale, device=h.device)
            if inverse_temperature is not None:
                factor = factor * inverse_temperature[start : start + step, None]
            plain = inverse_temperature is None and head.logit_scale == 1.0
            logits = torch.nn.functional.linear(h, weight, bias)
            if not plain:
                logits = logits.float().mul_(factor)
            log_p = logits.log_softmax(1, dtype=torch.float32)
            target = log_p.gather(1, y)[:, 0]
            parts["log_probs"].append(target)
            if "mean_logits" in parts:
                parts["mean_logits"].append(logits.mean(1, dtype=torch.float32))
            if "is_top1" in parts:
                parts["is_top1"].append(_is_top1(log_p, target, y[:, 0]))
            if not with_gradient and not parts.keys() & {"entropy", "log_sum_sq_probs"}:
                continue
            p = log_p.exp()
            if "entropy" in parts:
                parts["entropy"].append(-torch.linalg.vecdot(p, log_p))
            if "log_sum_sq_probs" in parts:
                parts["log_sum_sq_probs"].append(torch.linalg.vecdot(p, p).log())
            if with_gradient:
                jacobian = weight[y[:, 0]].float().sub_((p.to(dtype) @ weight).float())
                jacobians.append(jacobian if plain else jacobian.mul_(factor))
        fields = {name: torch.cat(part) for name, part in parts.items()}
        return Scores(fields, torch.cat(jacobians) if with_gradient else None)


def _is_top1(log_p: Tensor, target: Tensor, y: Tensor) -> Tensor:
    """Whether the target is the first maximum; the slow `argmax` looks only at rows whose target is a maximum."""
    top = log_p.amax(1) == target
    rows = top.nonzero()[:, 0]
    if len(rows):
        top[rows] = log_p[rows].argmax(1) == y[rows]
    return top


def entropy_jacobian(hidden: Tensor, head: Head, *, inverse_temperature: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`d entropy / d hidden`, `(positions, hidden)`; recomputed for the rare loss that uses it."""
    with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
        h = hidden.detach().to(dtype).requires_grad_(True)
        logits = torch.nn.functional.linear(h, head.weight.to(dtype), head.bias).float() * head.logit_scale
        if inverse_temperature is not None:
            logits = logits * inverse_temperature[:, None]
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum()
        return torch.autograd.grad(entropy, h)[0].float()
