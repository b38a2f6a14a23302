"""Adapters: which can join, and which would harm the shared base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import Trainer

from rapidfire_automl.executor.adapters import LoraSite

_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def refuse(config: Any) -> None:
    """Raise ValueError for adapters that would change the shared base.

    Args:
        config: A PEFT config that is about to be injected into a trial's clone.
    """
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower().startswith(_REWRITES_BASE):
        raise ValueError(
            f"`init_lora_weights={init!r}` rewrites the base model's weights, which all trials share. "
            "Use True, 'gaussian', 'orthogonal' or 'eva'."
        )
    if getattr(config, "kasa_config", None) is not None:
        raise ValueError("`kasa_config` rewrites the base model's weights, which all trials share. Leave it out.")
    for name in ("bias", "vera_bias"):
        bias = getattr(config, name, "none")
        if bias != "none":
            raise ValueError(f"`{name}={bias!r}` unfreezes biases of the base, which all trials share. Use 'none'.")


@contextmanager
def guarded_injection(is_ours: Callable[[nn.Module], bool]) -> Iterator[None]:
    """While open, adapters that would rewrite the base, and merging, are refused before PEFT touches a shared clone."""
    original = BaseTuner.inject_adapter

    def inject(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if is_ours(model):
            refuse(self.peft_config[adapter_name])
        return original(self, model, adapter_name, *args, **kwargs)

    def refused(name: str) -> Callable[..., Any]:
        own = getattr(BaseTuner, name)

        def merge(self: BaseTuner, *args: Any, **kwargs: Any) -> Any:
            if is_ours(self.model):
                raise RuntimeError(
                    f"`{name}` would write into the base, which all trials share. "
                    "Load the saved adapter into a model of your own and merge it there."
                )
            return own(self, *args, **kwargs)

        return merge

    names = ("merge_adapter", "merge_and_unload")
    originals = {name: getattr(BaseTuner, name) for name in names}
    BaseTuner.inject_adapter = inject
    for name in names:
        setattr(BaseTuner, name, refused(name))
    try:
        yield
    finally:
        BaseTuner.inject_adapter = original
        for name, own in originals.items():
            setattr(BaseTuner, name, own)


def find_sites(model: PeftModel) -> tuple[dict[str, LoraSite], str]:
    """The trial's adapter by module path, and why it can't join, or an empty string."""
    if len(model.peft_config) != 1:
        return {}, "several adapters"
    name = model.active_adapter
    if not isinstance(name, str):
        return {}, "several active adapters"
    config = model.peft_config[name]
    if type(config) is not LoraConfig:
        return {}, f"{type(config).__name__} adapters"
    sites: dict[str, LoraSite] = {}
    known: set[int] = set()
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return {}, "`modules_to_save` or `trainable_token_indices`"
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            return {}, f"{type(module).__name__} adapters"
        if not isinstance(module, LoraLayer):
            continue
        variant = getattr(module, "lora_variant", {}).get(name)
        if variant is not None:
            return {}, f"the LoRA variant {type(variant).__name__}"
        if type(module) is not LoraLinear or type(module.base_layer) is not nn.Linear:
            return {}, f"LoRA on {type(module.get_base_layer()).__name__} ({path})"
        if module.lora_bias[name] or getattr(module, "fan_in_fan_out", False):
            return {}, "`lora_bias` or `fan_in_fan_out`"
        if not path.startswith(model.get_base_model().base_model_prefix + "."):
            return {}, f"LoRA outside the backbone ({path})"
        drop = module.lora_dropout[name]
        site = LoraSite(
            a=module.lora_A[name].weight,
            b=module.lora_B[name].weight,
            scaling=float(module.scaling[name]),
            dropout=drop.p if isinstance(drop, nn.Dropout) else 0.0,
            dropout_module=drop,
        )
        known |= {id(site.a), id(site.b)}
        sites[path] = site
    extra = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if extra:
        return {}, f"trainable parameters beside LoRA ({extra[0]})"
    return (sites, "") if sites else ({}, "no LoRA layer")


def why_unfusable_args(args: Any) -> str:
    """Why a trial's own arguments keep it out of joint passes, or an empty string."""
    for name in ("neftune_noise_alpha", "use_liger_kernel", "torch_compile", "activation_offloading"):
        if getattr(args, name, None):
            return f"`{name}`"
    if (getattr(args, "gradient_checkpointing_kwargs", None) or {}).get("use_reentrant"):
        return "reentrant gradient checkpointing"
    return ""


def adapter_model(trainer: Trainer) -> PeftModel | None:
    """The trainer's PEFT model, or None if it trains something else."""
    model = trainer.model
    return model if isinstance(model, PeftModel) else None
