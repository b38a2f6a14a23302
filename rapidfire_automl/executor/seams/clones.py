"""Clones of the base: a trial's own modules over the shared tensors, and what can be said of a base beforehand."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rapidfire_automl.executor.head import Head


def share_clone(model: PreTrainedModel) -> PreTrainedModel:
    """New module objects over the same tensors, so that a trial can inject and patch what it likes."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def decoder_of(model: nn.Module) -> nn.Module:
    """The backbone TRL calls for hidden states."""
    decoder = model.base_model
    assert isinstance(decoder, nn.Module)
    return decoder


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter lives."""
    return next(model.parameters()).device


def why_unfusable_base(model: PreTrainedModel) -> str:
    """Why no trial on this base can train in joint passes, or an empty string."""
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        return "a mixture-of-experts base: the joint pass would drop its router's gradient"
    if getattr(model, "is_loaded_in_8bit", False):
        return "LLM.int8 picks outlier columns over the whole batch"
    dropouts = {name: getattr(config, name) for name in dir(config) if name.endswith(("dropout", "pdrop"))}
    hot = {name: p for name, p in dropouts.items() if isinstance(p, float) and p > 0}
    if hot:
        return f"the base has dropout of its own ({', '.join(f'{k}={v}' for k, v in hot.items())})"
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder base"
    if not isinstance(getattr(model, "base_model", None), nn.Module) or model.base_model is model:
        return "no backbone at `model.base_model`"
    return ""


def shared_head(model: PreTrainedModel) -> Head | None:
    """The base's LM head, or None where the joint head can't stand in for it."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return Head(head.weight, head.bias)


def checkpointing_layers(decoder: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers that can recompute their activations, made ready for it and switched off."""
    layers = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    if layers:
        decoder.gradient_checkpointing_enable({"use_reentrant": False})
    for module in decoder.modules():  # the model's own flag says only whether to warn of the cache
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    return layers


def keep_head_contiguous(model: PreTrainedModel) -> None:
    """Have a model's LM head see contiguous hidden states.

    For the last position of each row it gets a strided slice, which PyTorch on a CPU turns into a batched product with
    a copy of the head for each row: 1.8 GB for 32 rows of SmolLM2-135M.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
