"""The parts of a joint rollout: drawn tokens, the growing cache, attention of one token, lanes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

from rapidfire_automl.executor import draws
from rapidfire_automl.executor.attention import _one_token
from rapidfire_automl.executor.cache import GrowingLayer
from rapidfire_automl.executor.draws import draw


@pytest.mark.parametrize("vocabulary", [7, 304, 49152])
@pytest.mark.parametrize("cold", [1.0, 30.0])
def test_tokens_are_those_that_multinomial_draws(vocabulary: int, cold: float) -> None:
    """Token by token, and the generators are left alike."""
    ours, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    probabilities = (cold * torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(0))).softmax(-1)
    for _ in range(20):
        expected = torch.multinomial(probabilities, 1, generator=theirs)[:, 0]
        assert torch.equal(draw(probabilities, ours, 6, None), expected)
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("fast", [True, False])
def test_rows_that_have_left_still_draw(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """A trial's own run draws for all of its rows until the last is done."""
    if not fast:
        monkeypatch.setattr(draws, "_is_exponential", lambda device: False)
    ours, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    probabilities = torch.rand(5, 50, generator=torch.Generator().manual_seed(0)).softmax(-1)
    kept = torch.tensor([0, 3])
    expected = torch.multinomial(probabilities, 1, generator=theirs)[:, 0]
    assert torch.equal(draw(probabilities[kept], ours, 5, kept), expected[kept])
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_draws_have_the_frequencies_they_should() -> None:
    """Chi-squared over 20,000 draws at temperature 0.7 and top-p 0.9."""
    from scipy.stats import chisquare
    from transformers.generation.logits_process import TopPLogitsWarper

    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 2
    kept = TopPLogitsWarper(0.9)(None, logits / 0.7).softmax(-1)
    generator = torch.Generator().manual_seed(2)
    tokens = draw(kept.expand(20_000, -1).contiguous(), generator, 20_000, None)
    seen = torch.bincount(tokens, minlength=40)
    possible = kept[0] > 0
    assert not seen[~possible].any()
    shares = kept[0, possible].double()
    assert chisquare(seen[possible].numpy(), (20_000 * shares / shares.sum()).numpy()).pvalue > 1e-3


def test_a_probability_that_is_not_finite_raises_as_in_pytorch() -> None:
    probabilities = torch.full((2, 4), 0.25)
    probabilities[1, 2] = torch.nan
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        draw(probabilities, torch.Generator(), 2, None)


def test_the_cache_is_the_stock_one() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, stock = GrowingLayer(), DynamicLayer()
    rows = 4
    for tokens in (5, *[1] * 80, 3):
        keys, values = (torch.randn(rows, 2, tokens, 8, generator=generator) for _ in range(2))
        got = ours.update(keys, values)
        expected = stock.update(keys, values)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert ours.get_seq_length() == stock.get_seq_length()
        assert ours.get_mask_sizes(1) == stock.get_mask_sizes(1)
        if tokens == 3 or ours.get_seq_length() == 40:
            index = torch.tensor([2, 0, 0])[:rows]
            ours.batch_select_indices(index)
            stock.batch_select_indices(index)
            rows = len(index)
            assert torch.equal(ours.keys, stock.keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_one_token_attends_as_the_stock_kernel_has_it(dtype: torch.dtype, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, tokens, 8, generator=generator).to(dtype) for heads, tokens in
               ((6, 1), (2, 11), (2, 11)))  # fmt: skip
    mask = None
    if masked:
        mask = torch.ones(3, 1, 1, 11, dtype=torch.bool)
        mask[0, ..., :4] = False
    wide = [x.repeat_interleave(3, 1).double() for x in (k, v)]
    expected = F.scaled_dot_product_attention(q.double(), *wide, attn_mask=mask, scale=0.3)
    got = _one_token(q, k, v, mask, 0.3)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, atol={torch.bfloat16: 2e-2}.get(dtype, 1e-6), rtol=1e-2)
