"""Warm starts: a new trial begins with another's adapter and optimizer state.

Only these are taken over. The learning rate and every other setting of the optimizer, the schedule, the data order and
the chunks are the new trial's own, so that whatever was changed is in force from its first step. What another rank,
other target modules or another optimizer would make of foreign numbers is nothing: they are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from rapidfire_automl.executor import seams
from rapidfire_automl.executor.checkpoints import Snapshot

_FIX = "Clone it without warm start, or without this change."
_SCALES = ("lora_alpha", "use_rslora", "alpha_pattern")
"""Settings that say what an adapter's numbers mean."""


@dataclass(frozen=True, slots=True)
class WarmStart:
    """What a trial leaves to its clone.

    Args:
        source: Its number.
        adapter: By name in PEFT's layout.
        config: Its adapter's.
        optimizer: State by parameter and entry; None where it is gone.
        optimizer_class: Whose state that is.
    """

    source: int
    adapter: Mapping[str, Tensor] = field(repr=False)
    config: PeftConfig = field(repr=False)
    optimizer: Mapping[str, Mapping[str, Any]] | None = field(default=None, repr=False)
    optimizer_class: str = ""


@torch.no_grad()
def take(source: int, trainer: Any) -> WarmStart:
    """Copy a live trial's adapter and optimizer state; it must not run meanwhile."""
    model = trainer.model
    optimizer = _inner(trainer.optimizer)
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    state = {
        names[id(p)]: {entry: _copy(value) for entry, value in entries.items()}
        for p, entries in optimizer.state.items()
        if id(p) in names
    }
    adapter = {name: tensor.detach().clone() for name, tensor in _adapter(model).items()}
    config = model.peft_config[model.active_adapter]
    return WarmStart(source, adapter, config, state or None, type(optimizer).__name__)


def read(source: int, folder: Path) -> WarmStart:
    """An adapter that was saved; its optimizer state is gone.

    Raises:
        FileNotFoundError: There is none.
    """
    adapter = load_file(folder / "adapter_model.safetensors")
    return WarmStart(source, adapter, PeftConfig.from_pretrained(str(folder)))


def to_snapshot(warm: WarmStart) -> Snapshot:
    """For the disk."""
    tree = {"source": warm.source, "optimizer": warm.optimizer, "optimizer_class": warm.optimizer_class}
    return Snapshot(tree, warm.adapter, seams.plain_config(warm.config))


def from_snapshot(snapshot: Snapshot) -> WarmStart:
    """The inverse of `to_snapshot`."""
    tree = snapshot.tree
    config = PeftConfig.from_peft_type(**snapshot.config)
    return WarmStart(tree["source"], snapshot.adapter, config, tree["optimizer"], tree["optimizer_class"])


@torch.no_grad()
def give_adapter(warm: WarmStart, model: PeftModel) -> None:
    """Overwrite a new trial's adapter.

    Raises:
        ValueError: It has another shape or meaning; the message names what differs and the fix.
    """
    own, config = _adapter(model), model.peft_config[model.active_adapter]
    who = f"trial {warm.source}"
    if type(config) is not type(warm.config):
        raise ValueError(f"{who} has {type(warm.config).__name__}, this one {type(config).__name__}. {_FIX}")
    theirs, mine = (getattr(c, "base_model_name_or_path", None) for c in (warm.config, config))
    if theirs and mine and theirs != mine:
        raise ValueError(f"{who} stands on the base {theirs}, this one on {mine}. {_FIX}")
    if own.keys() != warm.adapter.keys():
        odd = sorted(own.keys() ^ warm.adapter.keys())[0].removeprefix("base_model.model.")
        raise ValueError(
            f"`target_modules` (or what else is trained) of {who} are others: {odd} is in one adapter only. {_FIX}"
        )
    for name, tensor in own.items():
        if tensor.shape != warm.adapter[name].shape:
            ranks = getattr(warm.config, "r", "?"), getattr(config, "r", "?")
            raise ValueError(
                f"`r` of {who} is {ranks[0]}, here it is {ranks[1]}: {name.removeprefix('base_model.model.')} has "
                f"shape {tuple(warm.adapter[name].shape)} there and {tuple(tensor.shape)} here. {_FIX}"
            )
    for name in _SCALES:
        theirs, mine = getattr(warm.config, name, None), getattr(config, name, None)
        if theirs != mine:
            raise ValueError(
                f"`{name}` of {who} is {theirs}, here it is {mine}: the same numbers would mean something else. {_FIX}"
            )
    for name, tensor in own.items():
        tensor.copy_(warm.adapter[name])


@torch.no_grad()
def give_optimizer(warm: WarmStart, trainer: Any) -> None:
    """Give a new trial's optimizer the state, when it has been built and has made no step.

    Raises:
        ValueError: It is another optimizer.
    """
    if warm.optimizer is None:
        return
    optimizer = _inner(trainer.optimizer)
    if type(optimizer).__name__ != warm.optimizer_class:
        raise ValueError(
            f"`optim` of trial {warm.source} is {warm.optimizer_class}, here it is {type(optimizer).__name__}. {_FIX}"
        )
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for name, p in trainer.model.named_parameters():
        if name in warm.optimizer and p.requires_grad:
            state = {entry: _copy(value, like=p) for entry, value in warm.optimizer[name].items()}
            if on_device and isinstance(state.get("step"), Tensor):  # kernels count beside the parameter
                state["step"] = state["step"].to(p.device)
            optimizer.state[p] = state


def _adapter(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors, not copied."""
    return get_peft_model_state_dict(model, save_embedding_layers=False)  # type: ignore[no-any-return]


def _inner(optimizer: Any) -> Any:
    """What accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def _copy(value: Any, like: Tensor | None = None) -> Any:
    """A copy; what belongs to a parameter element by element gets its strides."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if like is None or value.shape != like.shape:
        return value.detach().clone()
    return torch.empty_like(like, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)
