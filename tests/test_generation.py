"""What generation costs beside the decoder."""

from __future__ import annotations

import torch

from rapidfire_automl.generation import contiguous_head
from tests.executor.helpers import tiny_llama


def test_the_head_sees_contiguous_rows_while_generating_and_is_left_as_it_was() -> None:
    model = tiny_llama()
    seen: list[bool] = []
    head = model.get_output_embeddings()
    ids = torch.arange(24).view(4, 6)

    def generate() -> torch.Tensor:
        spy = head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].is_contiguous()))
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
        spy.remove()
        return out

    plain = generate()
    assert not all(seen), "transformers makes the slice contiguous itself: the context is no longer needed"
    seen.clear()
    with contiguous_head(model):
        assert torch.equal(generate(), plain)
    assert all(seen)
    assert not head._forward_pre_hooks
