"""Drawing tokens: the very stream `torch.multinomial` draws, for less."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def draw(probabilities: Tensor, generator: torch.Generator, rows: int, kept: Tensor | None) -> Tensor:
    """One token a row, as `torch.multinomial(all rows, 1, generator=generator)` would have drawn it.

    `torch.multinomial` divides each probability by an exponential variate and takes the largest. On a CPU it computes
    the logarithms one by one; here they are computed in vectors, from the same uniform variates, with the same result.

    Args:
        probabilities: `(kept rows, vocabulary)` float32.
        generator: The trial's; left where the trial's own run would have left it.
        rows: How many rows that run has, those that are done and have left included.
        kept: `(kept rows,)`, which of them these are, or None for all.

    Returns:
        `(kept rows,)` token ids.

    Raises:
        RuntimeError: A probability is not finite; in PyTorch's words.
    """
    if not _is_exponential(probabilities.device.type):
        if kept is not None:
            everybody = probabilities.new_ones(rows, probabilities.shape[-1])
            everybody[kept] = probabilities
            return torch.multinomial(everybody, 1, generator=generator)[kept, 0]
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    uniform = torch.empty((rows, probabilities.shape[-1]), dtype=torch.float64).uniform_(generator=generator)
    if kept is not None:
        uniform = uniform.index_select(0, kept)
    variates = uniform.neg_().log1p_().neg_().float()
    best, tokens = torch.div(probabilities, variates, out=variates).max(-1)
    if not bool(torch.isfinite(best).all()):
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
    return tokens


@functools.cache
def _is_exponential(device: str) -> bool:
    """Whether this PyTorch's `multinomial` is what `draw` takes it for, on this device."""
    if device != "cpu":
        return False
    ours, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    probabilities = torch.linspace(0, 1, 4 * 999).view(4, 999).softmax(-1)
    expected = torch.empty(4, 999).exponential_(1, generator=theirs)
    theirs.manual_seed(1)
    tokens = torch.multinomial(probabilities, 1, generator=theirs)[:, 0]
    uniform = torch.empty((4, 999), dtype=torch.float64).uniform_(generator=ours)
    variates = uniform.neg_().log1p_().neg_().float()
    return (
        torch.equal(variates, expected)
        and torch.equal((probabilities / variates).argmax(-1), tokens)
        and torch.equal(ours.get_state(), theirs.get_state())
    )
