"""The self-check at start: does the joint pass agree with this base?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from rapidfire_automl.executor.adapters import LoraSite
from rapidfire_automl.executor.requests import Forward, Generate, HeadSpec
from rapidfire_automl.executor.seams.adapters import find_sites
from rapidfire_automl.executor.seams.clones import decoder_of, device_of, share_clone


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)


@dataclass(slots=True)
class Probe:
    """An adapter that belongs to no trial, for checks and calibration."""

    sites: dict[str, LoraSite]
    row: int = -1

    def generator(self, device: torch.device) -> torch.Generator:
        """Any."""
        return torch.Generator(device=device)

    def put_generator(self, generator: torch.Generator) -> None:
        """Nobody goes on from it."""


def is_half(hidden: Tensor) -> bool:
    """Whether hidden states are in half precision."""
    return hidden.dtype in (torch.bfloat16, torch.float16)


def self_check(multiplexer: Any, bank: Any, model: PreTrainedModel) -> str:
    """Run a random adapter through the joint pass and through PEFT's own forward; returns how they differ.

    Raises:
        Exception: Whatever the base, or the pass, raises.
    """
    from rapidfire_automl.executor.context import generators_of_its_own

    with generators_of_its_own(0):
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        own = get_peft_model(share_clone(model), config).eval()
        sites, why = find_sites(own)
        if why:
            return why
        ids = torch.randint(0, model.config.get_text_config().vocab_size, (2, 5), device=device_of(model))
        probe = Probe(sites)
        try:
            with torch.no_grad():
                for site in sites.values():
                    site.b.mul_(0.1)
                decoder = decoder_of(own.get_base_model())
                expected = decoder(input_ids=ids, use_cache=False).last_hidden_state.double()
                with own.disable_adapter():
                    effect = (decoder(input_ids=ids, use_cache=False).last_hidden_state - expected).norm()
                own_scores = own.get_base_model()(input_ids=ids).logits.float().log_softmax(-1)
            _join(probe, multiplexer, bank)
            request = Forward(ids, None, None, grad=False, autocast=None, checkpointing=False, adapter=True)
            parts, _ = multiplexer.forward([(probe, request)])
            got = parts[0].leaves["hidden"]
            if multiplexer.head is not None:
                spec = HeadSpec(frozenset({"log_probs"}))
                scored = request.with_head(spec, ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.bool))
                scores = multiplexer.forward([(probe, scored)])[0][0].leaves["log_probs"]
                theirs = own_scores[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
                if float((scores - theirs).abs().max()) > (1.0 if is_half(got) else 1e-2):
                    multiplexer.head = None
        finally:
            _part(probe, bank)
        wrong = float((got - expected).norm() / effect)
        tolerance = 0.3 if is_half(got) else 1e-3
        return "" if wrong <= tolerance else f"hidden states are off by {wrong:.1e} of what the adapter does"


def _join(probe: Probe, multiplexer: Any, bank: Any) -> None:
    """Give a probe a row in the bank."""
    probe.row = bank.add(probe.sites)
    multiplexer.wrap(probe.sites)


def _part(probe: Probe, bank: Any) -> None:
    """Take it back."""
    if probe.row >= 0:
        bank.remove(probe.row)
        bank.reset()


def check_rollouts(multiplexer: Any, bank: Any, model: PreTrainedModel) -> str:
    """Decode three tokens with a random adapter, and compare with one pass over all; returns how they differ.

    Raises:
        Exception: Whatever the base, or the decoding, raises.
    """
    from rapidfire_automl.executor.context import generators_of_its_own
    from rapidfire_automl.executor.rollouts import Decoding

    with generators_of_its_own(0), torch.no_grad():
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        own = get_peft_model(share_clone(model), config).eval()
        sites, why = find_sites(own)
        if why:
            return why
        ids = torch.randint(0, model.config.get_text_config().vocab_size, (2, 5), device=device_of(model))
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        probe = Probe(sites)
        try:
            for site in sites.values():
                site.b.mul_(0.1)
            _join(probe, multiplexer, bank)
            greedy = Generate(
                input_ids=ids,
                attention_mask=mask,
                process=lambda ids, scores: scores,
                stop=lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool, device=ids.device),
                temperature=None,
                sample=False,
                pad=None,
                max_new_tokens=3,
                autocast=None,
                adapter=True,
                training=False,
            )
            decoding = Decoding(multiplexer, [(probe, greedy)])
            (rollout,) = decoding.rollouts
            decoding.advance()
            decoding.advance()
            got = decoding.logits
            whole = rollout.ids[:, : rollout.length]
            seen = torch.cat([mask, mask.new_ones(2, 2)], 1)
            inputs = {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0), "use_cache": False}
            expected = own(input_ids=whole, **inputs).logits[:, -1].float()
            with own.disable_adapter():
                effect = (own(input_ids=whole, **inputs).logits[:, -1].float() - expected).norm()
        finally:
            _part(probe, bank)
        wrong = float((got - expected).norm() / effect)
        tolerance = 0.3 if model.dtype in (torch.bfloat16, torch.float16) else 1e-3
        return "" if wrong <= tolerance else f"logits are off by {wrong:.1e} of what the adapter does"
