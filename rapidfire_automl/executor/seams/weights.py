"""Weights and optimizer states put into place: into the tensors that are there, exact to the bit."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from rapidfire_automl.executor.checkpoints import Snapshot


class AdapterWeights:
    """What an adapter's parameters are called in PEFT's layout, found out once: a capture walks no model.

    Args:
        model: With one active adapter.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self._name = model.active_adapter
        named = dict(model.named_parameters())
        by_place = {(p.data_ptr(), p.shape, p.stride()): p for p in named.values()}
        self._parameters: dict[str, nn.Parameter] = {}
        self._whole = True
        for key, value in self._state().items():
            parameter = by_place.get((value.data_ptr(), value.shape, value.stride()))
            if parameter is None:  # a buffer, or something PEFT makes up as it saves
                self._whole = False
            else:
                self._parameters[key] = parameter
        known = {id(p) for p in self._parameters.values()}
        self._others = {name: p for name, p in named.items() if p.requires_grad and id(p) not in known}

    def adapter(self) -> dict[str, Tensor]:
        """The adapter by PEFT's names."""
        if self._whole:
            return {key: parameter.detach() for key, parameter in self._parameters.items()}
        return self._state()

    def others(self) -> dict[str, Tensor]:
        """What trains beside it, by its name in the model."""
        return {name: parameter.detach() for name, parameter in self._others.items()}

    def config(self) -> dict[str, Any]:
        """PEFT's config as PEFT would save it."""
        settings = plain_config(self._model.peft_config[self._name])
        base = settings.get("base_model_name_or_path")
        if base is None:
            base = getattr(self._model.get_base_model(), "name_or_path", None)
        return settings | {"inference_mode": True, "base_model_name_or_path": base}

    @torch.no_grad()
    def put(self, snapshot: Snapshot) -> None:
        """Copy weights into the parameters that are there; views into shared memory stay views.

        Raises:
            ValueError: They are of another adapter.
        """
        here = {key: x.shape for key, x in self.adapter().items()}
        there = {key: x.shape for key, x in snapshot.adapter.items()}
        others = snapshot.tree.get("weights", {})
        wrong = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        if wrong or others.keys() != self._others.keys():
            key = wrong[0] if wrong else min(others.keys() ^ self._others.keys())
            raise ValueError(
                f"The snapshot is of another adapter: {key} is {tuple(there.get(key, ()))} there and "
                f"{tuple(here.get(key, ()))} here."
            )
        if not self._whole:
            copies = {key: value.clone() for key, value in snapshot.adapter.items()}
            set_peft_model_state_dict(self._model, copies, adapter_name=self._name)
        for key, parameter in self._parameters.items():
            parameter.data.copy_(snapshot.adapter[key])
        for name, parameter in self._others.items():
            parameter.data.copy_(others[name])

    def _state(self) -> dict[str, Tensor]:
        # Otherwise PEFT asks the hub whether the vocabulary was changed.
        return dict(get_peft_model_state_dict(self._model, adapter_name=self._name, save_embedding_layers=False))


def plain_config(config: PeftConfig) -> dict[str, Any]:
    """PEFT's config in JSON types; `PeftConfig.from_peft_type` is the inverse."""
    return {name: _plain(value) for name, value in config.to_dict().items()}


def put_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Load an optimizer's state as it was: torch would cast it to the parameters' dtype, and fused kernels walk a state
    and its parameter side by side, so that it has to lie in memory as the parameter does.

    Raises:
        ValueError: The optimizer has other parameter groups.
    """
    optimizer.load_state_dict(on_device(state, None))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, saved in state["state"].items():
        if not isinstance(index, int) or index >= len(parameters) or not isinstance(saved, Mapping):
            continue
        parameter = parameters[index]
        loaded = optimizer.state.get(parameter)
        if not isinstance(loaded, dict):
            continue
        for name, value in saved.items():
            now = loaded.get(name)
            if not isinstance(value, Tensor) or not isinstance(now, Tensor):
                continue
            if value.shape == parameter.shape:
                place = torch.empty_like(parameter.detach(), dtype=value.dtype, device=now.device)
                loaded[name] = place.copy_(value)
            elif value.dtype != now.dtype:
                loaded[name] = value.to(now.device, copy=True)


def on_device(tree: Any, device: torch.device | None) -> Any:
    """A tree with copies of its tensors, on a device or where they are."""
    if isinstance(tree, Tensor):
        return tree.clone() if device is None else tree.to(device, copy=True)
    if isinstance(tree, Mapping):
        return {key: on_device(value, device) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(on_device(value, device) for value in tree)
    return tree


def _plain(value: Any) -> Any:
    """A value of PEFT's config in JSON types."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
