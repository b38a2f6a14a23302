"""Cheap walks: answers about a trial's model that don't visit every module of a frozen tree.

transformers walks the whole tree several times a step (`train`, `zero_grad`, `parameters`, `num_parameters`); of a
clone on a frozen base it is known what has to be touched. Each answer is the one the walk would give;
`CheapWalks.refresh` looks again at every chunk boundary, in case somebody changed the tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


class CheapWalks:
    """Instance attributes on a model that answer `parameters`, `train`, `zero_grad` and `num_parameters`.

    Args:
        model: The trial's PEFT model; undone by `close`.
    """

    _NAMES = ("parameters", "train", "zero_grad", "num_parameters")

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._counts: dict[tuple[Any, ...], int] = {}
        self._num_parameters = getattr(model, "num_parameters", None)
        self.refresh()
        model.parameters = self._parameters  # type: ignore[method-assign]
        model.train = self._train  # type: ignore[method-assign]
        model.zero_grad = self._zero_grad  # type: ignore[method-assign]
        if self._num_parameters is not None:
            model.num_parameters = self._count  # type: ignore[assignment]

    def refresh(self) -> None:
        """Walk once and remember."""
        self._list = list(nn.Module.parameters(self._model))
        self._trainable = [p for p in self._list if p.requires_grad]
        self._modules = [module.__dict__ for module in self._model.modules()]
        self._counts.clear()

    def close(self) -> None:
        """Give the model its own methods back."""
        for name in self._NAMES:
            self._model.__dict__.pop(name, None)

    def _parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(self._list) if recurse else nn.Module.parameters(self._model, recurse=False)

    def _train(self, mode: bool = True) -> nn.Module:
        for attributes in self._modules:
            attributes["training"] = mode
        return self._model

    def _zero_grad(self, set_to_none: bool = True) -> None:
        for p in self._trainable:
            if p.grad is not None:
                if set_to_none:
                    p.grad = None
                else:
                    p.grad.detach_().zero_()

    def _count(self, *args: Any, **kwargs: Any) -> int:
        key = (args, tuple(sorted(kwargs.items())))
        if key not in self._counts:
            assert self._num_parameters is not None
            self._counts[key] = self._num_parameters(*args, **kwargs)
        return self._counts[key]
