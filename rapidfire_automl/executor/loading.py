"""Loading the base and its tokenizer from a hub id, a path or an object."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ModelLike: TypeAlias = "str | os.PathLike[str] | PreTrainedModel"


def load_base(model: ModelLike, dtype: str | torch.dtype, device: str | torch.device | None) -> PreTrainedModel:
    """Load or take the base, and freeze it.

    Args:
        model: Hub id, path or loaded model.
        dtype: As in `from_pretrained`; a loaded model keeps its own.
        device: Where to put it; None: the first GPU if there is one, else the CPU. A loaded model stays where it is.

    Returns:
        The frozen base, in training mode as TRL would have it.

    Raises:
        ValueError: The model can't be loaded, or there is no such device.
    """
    if not isinstance(model, PreTrainedModel):
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=place)
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch is built without it
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"`device` must be one that is here, got {str(place)!r}: {first}") from error
        try:
            loaded = AutoModelForCausalLM.from_pretrained(os.fspath(model), dtype=dtype)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"`model` must be a hub id, a path or a model; {os.fspath(model)!r}: {first}") from error
        model = loaded.to(torch.device(place))
    assert isinstance(model, PreTrainedModel)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def load_tokenizer(model: ModelLike, tokenizer: Any) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the one beside the model; padded with EOS if it has no padding token.

    Raises:
        ValueError: A loaded model came without one, or none can be loaded.
    """
    if tokenizer is None:
        if isinstance(model, PreTrainedModel):
            raise ValueError("`tokenizer` must be given when `model` is a loaded model.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(os.fspath(model))
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"`tokenizer` could not be loaded from {os.fspath(model)!r}: {first} Pass one.") from error
    if getattr(tokenizer, "pad_token", None) is None and getattr(tokenizer, "eos_token", None) is not None:
        tokenizer.pad_token = tokenizer.eos_token
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
