"""The shared base: loaded once, frozen, watched, and multiplexed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from rapidfire_automl.executor import overflow, seams
from rapidfire_automl.executor.adapters import AdapterBank
from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.executor.passes import Multiplexer


class BaseChanged(RuntimeError):
    """A trial changed the shared base.

    Args:
        name: Of the first tensor it changed.
        repaired: Whether the base is as it was: what was unfrozen or replaced is put back, what was written to is not.
    """

    def __init__(self, name: str, repaired: bool) -> None:
        super().__init__(
            f"`{name}` of the shared base was unfrozen, replaced or written to. "
            "Train adapters only; to merge one, load the saved adapter into a model of your own."
        )
        self.repaired = repaired


class Base:
    """The frozen base and what stands on it.

    Args:
        model: The base, frozen.
        slots: Trials that train at a time.
    """

    def __init__(self, model: PreTrainedModel, slots: int) -> None:
        self.model = model
        self.bank = AdapterBank(slots, seams.device_of(model))
        self.multiplexer = Multiplexer(model, self.bank)
        self.notes: list[str] = []
        self._why_unfused = seams.why_unfusable_base(model)
        self._rollouts_agree: bool | None = None
        self._clones: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._watched = [(name, t, t.detach(), t._version) for name, t in tensors]
        if not self._why_unfused:
            self._why_unfused = self._differs(seams.self_check)
            if self._why_unfused:
                self.notes.append(
                    f"the joint pass does not agree with this base ({self._why_unfused}): trials run unfused"
                )

        if not self._why_unfused and self.multiplexer.head is None:
            self.notes.append("this base's LM head can't be joined: each trial scores with its own")

    def rollouts_agree(self) -> bool:
        """Whether trials can roll out together here; checked once, since only some trainers roll out."""
        if self._rollouts_agree is None:
            why = self._why_unfused or self._differs(seams.check_rollouts)
            self._rollouts_agree = not why
            if why and not self._why_unfused:
                self.notes.append(f"joint rollouts do not agree with this base ({why}): each trial decodes by itself")
        return self._rollouts_agree

    def _differs(self, check: Callable[[Multiplexer, AdapterBank, PreTrainedModel], str], *, last: bool = False) -> str:
        """How the joint pass differs from this base; memory that ran out says nothing of that, and is tried again."""
        try:
            return check(self.multiplexer, self.bank, self.model)
        except Exception as error:
            if last or not seams.is_out_of_memory(error):
                return f"{type(error).__name__}: {error}"
        overflow.free_memory()
        return self._differs(check, last=True)

    def clone(self) -> PreTrainedModel:
        """A trial's own modules over the same tensors."""
        clone = seams.share_clone(self.model)
        self._clones.add(clone)
        return clone

    def owns(self, model: nn.Module) -> bool:
        """Whether a model is one of `clone`'s."""
        return model in self._clones

    def join(self, arm: Arm, model: PeftModel, args: Any) -> str:
        """Move an arm's adapter into the bank; returns why it can't join, or an empty string."""
        sites, why = seams.find_sites(model)
        why = self._why_unfused or why or seams.why_unfusable_args(args)
        if why:
            return why
        try:
            arm.row = self.bank.add(sites)
        except ValueError as error:
            return str(error)
        arm.sites = sites
        self.multiplexer.wrap(sites)
        return ""

    def part(self, arm: Arm) -> None:
        """Give an arm its adapter back."""
        if arm.row >= 0:
            self.bank.remove(arm.row)
            arm.row, arm.sites = -1, {}

    def check(self, *, repair: bool = False) -> None:
        """Assert that the base's tensors are frozen, where they were and as they were.

        Args:
            repair: Put replaced or unfrozen tensors back before raising, so that the other trials are unharmed.

        Raises:
            BaseChanged: Somebody touched them. Writing through `tensor.data` leaves no trace and is not found.
        """
        touched, written = "", False
        for name, tensor, original, version in self._watched:
            if tensor.requires_grad or tensor.data_ptr() != original.data_ptr() or tensor._version != version:
                touched = touched or name
                written = written or tensor._version != version
                if repair:
                    tensor.requires_grad_(False)
                    tensor.data = original
        if touched:
            raise BaseChanged(touched, repaired=repair and not written)

    @torch.no_grad()
    def restore(self, fresh: PreTrainedModel) -> None:
        """Copy a base that was loaded anew over this one."""
        new = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers())}
        for name, tensor, _, version in self._watched:
            if tensor._version != version:
                tensor.copy_(new[name])
        self._watched = [(name, t, original, t._version) for name, t, original, _ in self._watched]

    def check_arm(self, arm: Arm) -> None:
        """`check`, and that an arm's parameters are where the joint passes read them."""
        self.check()
        if arm.row >= 0:
            self.bank.check(arm.row)

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's first parameter."""
        dtype: torch.dtype = self.model.dtype
        return dtype
