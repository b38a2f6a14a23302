"""The cuts in one trial's trainer: backbone, LM head, backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl.trainer.utils import FusedCausalLMOutput

from rapidfire_automl.executor.requests import Backward, Forward, HeadSpec
from rapidfire_automl.executor.seams import rewards, rollouts
from rapidfire_automl.executor.seams.clones import decoder_of

Submit = Callable[[Any], Any]

_PLAIN_KEYWORDS = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict"}
_PACKED_KEYWORDS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""What TRL says of packed rows beside their position ids: hints for kernels that a Llama does without."""


def fused_head_settings(forward: Callable[..., Any]) -> HeadSpec | None:
    """Read temperature, scale and outputs from TRL's patched forward, or None if it isn't one we can stand in for."""
    function = getattr(forward, "__func__", None)
    if function is None or "fused_lm_head" not in function.__code__.co_varnames:
        return None
    known = inspect.getclosurevars(function).nonlocals
    try:
        if known["final_logit_softcapping"] is not None or known["cast_lm_head_to_fp32"]:
            return None
        return HeadSpec(
            outputs=frozenset(known["outputs"]) | {"log_probs"},
            inverse_temperature=1.0 / float(known["temperature"]),
            logit_scale=float(known["logit_scale"]),
        )
    except (KeyError, TypeError):
        return None


def autocast_dtype(device: str) -> torch.dtype | None:
    """The autocast dtype in force in this thread, or None."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _real_tokens(kwargs: dict[str, Any]) -> int:
    """The tokens of a backbone's forward, without padding."""
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return int(mask.sum())
    return int(ids.numel() if ids is not None else kwargs["inputs_embeds"][..., 0].numel())


@dataclass(slots=True)
class Seam:
    """The cuts in one trial's trainer; `close` undoes them.

    Args:
        trainer: The trial's trainer.
        model: Its PEFT model.
        submit: Files a request and returns its answer, in the trial's thread.
        step_out: Does something without the baton.
        generated: Called with the tokens of a rollout that is not handed over.
        fused: Whether forwards are handed over; the backward and the pace are in any case.
        pace: Called before a training forward, with the real tokens in it if it is not handed over.
        joint_head: Whether the base's head can join.
        joint_rollouts: Whether rollouts can join; asked at the first one.
    """

    trainer: Trainer
    model: PeftModel
    submit: Submit
    step_out: Callable[[Callable[[], Any]], Any]
    pace: Callable[[int], None]
    generated: Callable[[int], None]
    fused: bool
    joint_head: bool
    joint_rollouts: Callable[[], bool]
    notes: list[str] = field(default_factory=list)
    _checkpointed: Any = None
    _adapted: Any = None
    _off: int = 0
    _own_disable: Callable[[], Any] = nullcontext
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def open(self) -> None:
        """Put the cuts in place."""
        causal: Any = self.model.get_base_model()
        decoder = decoder_of(causal)
        self._checkpointed = next((m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)), None)
        self._adapted = next((m for m in decoder.modules() if isinstance(m, LoraLayer)), None)
        self._cut_decoder(decoder)
        self._cut_generate(causal)
        self._undo += rewards.watch(self.trainer, self.step_out)
        if self.fused and self.joint_head:
            spec = fused_head_settings(causal.forward)
            if spec is None:
                self.notes.append("this trainer's LM head can't be joined: it scores with its own")
            else:
                self._cut_head(causal, decoder, spec)
        if self.fused:
            self._cut_backward()
            self._cut_disable_adapter()

    def close(self) -> None:
        """Take the cuts out again."""
        while self._undo:
            self._undo.pop()()

    def _replace(self, owner: Any, name: str, new: Any) -> None:
        old = owner.__dict__.get(name)
        setattr(owner, name, new)

        def undo() -> None:
            if old is None:
                owner.__dict__.pop(name, None)
            else:
                setattr(owner, name, old)

        self._undo.append(undo)

    def _request(self, decoder: nn.Module, kwargs: dict[str, Any]) -> Forward | None:
        """The forward as a request, or None if only the trial's own clone can run it."""
        ids = kwargs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or kwargs.get("use_cache"):
            return None
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        known = _PLAIN_KEYWORDS if mask is not None or positions is None else _PLAIN_KEYWORDS | _PACKED_KEYWORDS
        if any(value is not None for name, value in kwargs.items() if name not in known):
            return None
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
            return None
        if positions is not None and positions.shape != ids.shape:
            return None
        layer = self._checkpointed
        grad = torch.is_grad_enabled()
        return Forward(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            grad=grad,
            autocast=autocast_dtype(ids.device.type),
            checkpointing=grad and layer is not None and layer.gradient_checkpointing and layer.training,
            adapter=self._adapter_is_on(),
        )

    def _cut_decoder(self, decoder: nn.Module) -> None:
        own = decoder.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                kwargs["input_ids"] = args[0]
            request = self._request(decoder, kwargs) if self.fused and len(args) <= 1 else None
            if torch.is_grad_enabled():
                self.pace(_real_tokens(kwargs) if request is None else 0)
            if request is None:
                with self._own_disable() if self._off else nullcontext():
                    return own(**kwargs)
            return BaseModelOutputWithPast(last_hidden_state=self.submit(request))

        self._replace(decoder, "forward", forward)

    def _cut_generate(self, causal: PreTrainedModel) -> None:
        """Transformers prepares a rollout; its decoding is handed over."""
        own = causal.generate
        device = next(causal.parameters()).device.type
        decode = rollouts.decoder(
            self.submit,
            autocast=lambda: autocast_dtype(device),
            adapter=self._adapter_is_on,
        )

        def generate(*args: Any, **kwargs: Any) -> Any:
            if self.fused and not args and rollouts.can_join(causal, kwargs) and self.joint_rollouts():
                return own(custom_generate=decode, **kwargs)
            with rollouts.unchecked(causal):
                made = own(*args, **kwargs)
            if causal.training:
                self.generated(rollouts.count_new(made, args[0] if args else kwargs.get("input_ids"), causal))
            return made

        self._replace(causal, "generate", generate)
        # TRL would walk the model three times to switch checkpointing off for a rollout that is not run there.
        self._replace(self.model, "is_gradient_checkpointing", False)

    def _adapter_is_on(self) -> bool:
        return not self._off and not (self._adapted is not None and self._adapted.disable_adapters)

    def _cut_head(self, causal: nn.Module, decoder: nn.Module, spec: HeadSpec) -> None:
        own = causal.forward

        def forward(
            *args: Any,
            fused_lm_head: bool = False,
            labels: Tensor | None = None,
            shift_labels: Tensor | None = None,
            num_items_in_batch: Any = None,
            **kwargs: Any,
        ) -> Any:
            request = None
            if fused_lm_head and labels is not None and shift_labels is None and not args:
                request = self._request(decoder, kwargs)
            if request is None:
                given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
                kwargs.update({name: value for name, value in given.items() if value is not None})
                if fused_lm_head:
                    kwargs["fused_lm_head"] = True
                return own(*args, **kwargs)
            assert labels is not None
            if request.grad:
                self.pace(0)
            mask = labels[:, 1:] != -100
            fields = self.submit(request.with_head(spec, labels[:, 1:], mask))
            count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            return FusedCausalLMOutput(loss=-fields["log_probs"].sum() / count, label_mask=mask, **fields)

        self._replace(causal, "forward", forward)

    def _cut_disable_adapter(self) -> None:
        """A reference pass needs a flag; PEFT's own switch walks the model three times, at every step of DPO."""
        self._own_disable = self.model.disable_adapter

        @contextmanager
        def disable_adapter() -> Iterator[None]:
            self._off += 1
            try:
                yield
            finally:
                self._off -= 1

        self._replace(self.model, "disable_adapter", disable_adapter)

    def _cut_backward(self) -> None:
        accelerator = self.trainer.accelerator
        own = accelerator.backward

        def backward(loss: Tensor, **kwargs: Any) -> None:
            own(loss, **kwargs)
            self.submit(Backward())

        self._replace(accelerator, "backward", backward)
