"""Rollouts: transformers prepares a trial's `generate`, and the decoding itself is filed as a request.

Everything that belongs to one trial, its generation config, logits processors and stopping criteria, is built by
transformers' own `generate`; `custom_generate`, its extension point for decoding methods, is where trials meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerationConfig, GenerationMode
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper
from transformers.generation.stopping_criteria import StoppingCriteriaList

from rapidfire_automl.executor.requests import Generate

_OURS = {"input_ids", "inputs", "attention_mask", "generation_config"}
"""What a joint rollout takes beside single settings of the generation config."""
_MODEL_KEYWORDS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


def can_join(model: PreTrainedModel, arguments: dict[str, Any]) -> bool:
    """Whether these arguments of `generate` ask for plain sampling or greedy decoding of token ids."""
    given = {name: value for name, value in arguments.items() if value is not None}
    if not all(name in _OURS or hasattr(GenerationConfig, name) or name in _settings() for name in given):
        return False
    config = model._prepare_generation_config(
        given.get("generation_config"), **{name: value for name, value in given.items() if name not in _OURS}
    )[0]
    plain = config.get_generation_mode(None) in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)
    return (
        plain
        and config.use_cache is not False
        and not config.return_dict_in_generate
        and config.cache_implementation is None
        and config.prefill_chunk_size is None
        and not config.token_healing
    )


def _settings() -> frozenset[str]:
    return frozenset(GenerationConfig().to_dict())


def decoder(
    submit: Callable[[Generate], Tensor],
    *,
    autocast: Callable[[], torch.dtype | None],
    adapter: Callable[[], bool],
) -> Callable[..., Tensor]:
    """A decoding method for `custom_generate` that files a request.

    Args:
        submit: Files it and returns the answer.
        autocast: The autocast dtype in force.
        adapter: Whether the adapter is on.
    """

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Tensor:
        asked = {name for name, value in kwargs.items() if value is not None and value is not False}
        if asked - _MODEL_KEYWORDS:
            sampled: Tensor = type(model)._sample(
                model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
            )
            return sampled
        has_end = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        return submit(
            Generate(
                input_ids=input_ids,
                attention_mask=kwargs.get("attention_mask"),
                process=logits_processor,
                stop=stopping_criteria,
                temperature=_temperature(logits_processor),
                sample=bool(generation_config.do_sample),
                pad=generation_config._pad_token_tensor if has_end else None,
                max_new_tokens=int(generation_config.max_length) - input_ids.shape[1],
                autocast=autocast(),
                adapter=adapter(),
                training=model.training,
            )
        )

    return decode


@contextmanager
def unchecked(model: torch.nn.Module) -> Iterator[None]:
    """While open, no layer recomputes its activations, which would keep `generate` from caching."""
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True  # type: ignore[assignment]


def count_new(made: Any, prompts: Any, model: Any) -> int:
    """The tokens that a `generate` of the trial's own has made, up to each row's end."""
    if not isinstance(made, Tensor) or not isinstance(prompts, Tensor):
        return 0
    new = made[:, prompts.shape[1] :]
    end = model.generation_config.eos_token_id
    if end is None:
        return new.numel()
    ended = torch.isin(new, torch.tensor(end, device=new.device)).cumsum(1)
    return int((ended - torch.isin(new, torch.tensor(end, device=new.device)).long() == 0).sum())


def _temperature(processors: LogitsProcessorList) -> float | None:
    """The one thing these processors do, if it is that; None if they do more."""
    if not processors:
        return 1.0
    if len(processors) == 1 and type(processors[0]) is TemperatureLogitsWarper:
        return float(processors[0].temperature)
    return None
