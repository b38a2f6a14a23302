"""Trees of training state as a JSON form and a few long tensors, without pickle: exact to the bit, or an error.

A tree is made of None, bool, int, float, str, list, tuple, dict, tensors, NumPy arrays and scalars, and
`torch.Generator`. JSON values stand for themselves; everything else is an object with the key `$`. All tensors of a
dtype lie one behind the other in one: an optimizer has a thousand small ones, and each would cost time of its own.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

_KIND = "$"
_DICTS = (dict, OrderedDict, defaultdict)


def encode(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tree's JSON form, and its tensors, flat, by dtype: copies on the CPU, which later training doesn't touch.

    Tensors that are the same memory, seen alike, are stored once and come back as one object. A dense tensor that is
    laid out otherwise than row by row comes back laid out so. Not kept: `requires_grad`, the device (all come back on
    the CPU), subclasses of dict (which come back as dict), the payload of a NaN that is a Python float.

    Raises:
        TypeError: Something has neither a safetensors nor a JSON form; the message names its path in the tree.
    """
    encoder = _Encoder()
    with torch.no_grad():
        return encoder.form(tree, ()), encoder.copies()


def decode(form: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `encode` was given.

    Raises:
        ValueError: The form is not one of `encode`'s, or a tensor is missing.
    """
    return _Decoder(tensors).tree(form)


class _Encoder:
    def __init__(self) -> None:
        self._kept: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        self._ends: defaultdict[torch.dtype, int] = defaultdict(int)
        self._forms: dict[Any, dict[str, Any]] = {}

    def copies(self) -> dict[str, Tensor]:
        """What was kept, by the dtype's name."""
        found = {}
        for dtype, kept in self._kept.items():
            flat = torch.empty(self._ends[dtype], dtype=dtype)
            torch._foreach_copy_(list(flat.split([value.numel() for value in kept])), kept)
            found[_name(dtype)] = flat
        return found

    def form(self, value: Any, path: tuple[str, ...]) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {_KIND: "float", "value": repr(value)}
        if kind in (list, tuple):
            items = [self.form(item, (*path, str(i))) for i, item in enumerate(value)]
            return items if kind is list else {_KIND: "tuple", "items": items}
        if kind in _DICTS:
            return self._dict(value, path)
        if kind in (Tensor, nn.Parameter):
            return self._tensor(value, path)
        if isinstance(value, (np.ndarray, np.generic)):
            return self._array(value, path)
        if kind is torch.Generator:
            return {_KIND: "generator", **self._keep(value.get_state()), "device": str(value.device)}
        raise _no_form(path, f"a {kind.__module__}.{kind.__qualname__}")

    def _dict(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> Any:
        if all(type(key) is str for key in value) and _KIND not in value:
            return {key: self.form(inner, (*path, key)) for key, inner in value.items()}
        pairs = []
        for key, inner in value.items():
            if key is not None and type(key) not in (bool, int, str, float, tuple):
                raise _no_form(path, f"a key that is a {type(key).__qualname__}")
            pairs.append([self.form(key, (*path, "a key")), self.form(inner, (*path, str(key)))])
        return {_KIND: "dict", "pairs": pairs}

    def _tensor(self, value: Tensor, path: tuple[str, ...]) -> Any:
        if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_nested:
            raise _no_form(path, "a sparse, quantized, nested or meta tensor")
        if not _has_form(value.dtype):
            raise _no_form(path, f"a tensor of {value.dtype}")
        strides = value.stride()
        seen = (value.data_ptr(), value.shape, strides, value.dtype, value.device)
        form = self._forms.get(seen)
        if form is None:
            form = {_KIND: "tensor", **self._keep(value)}
            if not value.is_contiguous() and torch.empty_like(value).stride() == strides:
                form["stride"] = list(strides)
            if value.numel():  # else other tensors, too, are at its address
                self._forms[seen] = form
        return form

    def _array(self, value: Any, path: tuple[str, ...]) -> Any:
        try:
            tensor = torch.from_numpy(np.array(value, order="C", copy=True))
        except (TypeError, ValueError):
            raise _no_form(path, f"an array of {value.dtype}") from None
        if not _has_form(tensor.dtype):
            raise _no_form(path, f"an array of {value.dtype}")
        return {_KIND: "array" if isinstance(value, np.ndarray) else "scalar", **self._keep(tensor)}

    def _keep(self, value: Tensor) -> dict[str, Any]:
        """Put a tensor behind the others of its dtype; where it is."""
        begin = self._ends[value.dtype]
        self._ends[value.dtype] += value.numel()
        self._kept[value.dtype].append(value.reshape(-1))
        return {"in": _name(value.dtype), "at": begin, "shape": list(value.shape)}


class _Decoder:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._made: dict[Any, Tensor] = {}

    def tree(self, form: Any) -> Any:
        if isinstance(form, list):
            return [self.tree(item) for item in form]
        if not isinstance(form, dict):
            return form
        try:
            return self._object(form)
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"A tree's form can't be read: {type(error).__name__}: {error}") from error

    def _object(self, form: dict[str, Any]) -> Any:
        match form.get(_KIND):
            case None:
                return {key: self.tree(inner) for key, inner in form.items()}
            case "float":
                return float(form["value"])
            case "tuple":
                return tuple(self.tree(item) for item in form["items"])
            case "dict":
                return {self.tree(key): self.tree(inner) for key, inner in form["pairs"]}
            case "tensor":
                return self._tensor(form, form.get("stride"))
            case "array":
                return self._slice(form).numpy()
            case "scalar":
                return self._slice(form).numpy()[()]
            case "generator":
                generator = torch.Generator(device=form["device"])
                generator.set_state(self._slice(form))
                return generator
            case kind:
                raise ValueError(f"A tree's form can't be read: the kind {kind!r} is unknown.")

    def _slice(self, form: Mapping[str, Any]) -> Tensor:
        """A tensor in memory of its own."""
        flat, begin, shape = self._tensors[form["in"]], int(form["at"]), [int(size) for size in form["shape"]]
        end = begin + math.prod(shape)
        if not 0 <= begin <= end <= flat.numel() or min(shape, default=0) < 0:
            raise ValueError(f"A tree's form can't be read: {form['in']} ends before {end}.")
        return flat[begin:end].clone().reshape(shape)

    def _tensor(self, form: Mapping[str, Any], stride: list[int] | None) -> Tensor:
        key = (form["in"], form["at"], tuple(form["shape"]), None if stride is None else tuple(stride))
        if key not in self._made or not self._made[key].numel():
            value = self._slice(form)
            if stride is not None:
                value = torch.empty_strided(value.shape, stride, dtype=value.dtype).copy_(value)
            self._made[key] = value
        return self._made[key]


def fresh_copy(value: Tensor) -> Tensor:
    """A contiguous copy on the CPU, in memory of its own."""
    return torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())


@cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _has_form(dtype: torch.dtype) -> bool:
    try:
        save({"x": torch.empty(1, dtype=dtype)})
    except (KeyError, ValueError, SafetensorError):
        return False
    return True


def _no_form(path: tuple[str, ...], what: str) -> TypeError:
    return TypeError(
        f"`{'/'.join(path) or 'tree'}` can't be written: {what} has neither a safetensors nor a JSON form."
    )
