"""Fields that older releases of TRL and transformers knew and newer ones don't: what to do with each.

Compared: TRL 0.12, 0.21, 0.29 with 1.16, and transformers 4.44, 4.56 with 5.23. PEFT's `LoraConfig` lost none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Fields: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Removed:
    """A field that is gone.

    Args:
        instead: What replaces it, one sentence for people.
        becomes: From its value and all fields given to the fields that stand for it today (none: it is dropped). None
            where nothing does: then any value but a harmless one is an error.
        harmless: Values that ask for nothing; they are dropped silently.
        exact: Whether `becomes` means the same; if not, the user is warned.
        only: Config classes that had it; None for every trainer's.
    """

    instead: str
    becomes: Callable[[Any, Fields], dict[str, Any]] | None = None
    harmless: tuple[Any, ...] = (None,)
    exact: bool = True
    only: str | None = None


def _now(name: str) -> Removed:
    """A field that has only been renamed."""
    return Removed(f"Use `{name}`.", lambda value, _: {name: value})


def _dropped(why: str, only: str | None = None, harmless: tuple[Any, ...] = (None, False)) -> Removed:
    """A field without which training goes on as it is; a value that asked for something draws a warning."""
    return Removed(why, lambda value, _: {}, harmless, exact=False, only=only)


def _flag(instead: str, **fields: Any) -> Removed:
    """A switch that another field has taken over."""
    return Removed(instead, lambda value, _: fields if value else {}, (None, False))


def _warmup(ratio: Any, fields: Fields) -> dict[str, Any]:
    if fields.get("warmup_steps"):  # as transformers 4 did: steps win
        return {}
    if not 0 <= ratio < 1:
        raise ValueError(
            f"`warmup_ratio` must be >= 0 and < 1, got {ratio}. Write `warmup_steps` for a number of steps."
        )
    return {"warmup_steps": float(ratio)}


def _rpo(alpha: Any, fields: Fields) -> dict[str, Any]:
    losses = fields.get("loss_type", "sigmoid")
    losses = [losses] if isinstance(losses, str) else list(losses)
    weights = fields.get("loss_weights") or [1.0] * len(losses)
    return {"loss_type": [*losses, "sft"], "loss_weights": [*weights, float(alpha)]}


def _lengths(_: Any, fields: Fields) -> dict[str, Any]:
    parts = [fields.get("max_prompt_length"), fields.get("max_completion_length") or fields.get("max_target_length")]
    if "max_length" in fields or None in parts:
        return {}
    return {"max_length": sum(int(part) for part in parts if part is not None)}


def _accelerator(key: str) -> Removed:
    def becomes(value: Any, fields: Fields) -> dict[str, Any]:
        return {"accelerator_config": {**(fields.get("accelerator_config") or {}), key: value}}

    return Removed(f'Use `accelerator_config={{"{key}": ...}}`.', becomes)


_MAX_LENGTH = (
    "TRL bounds prompt and completion together with `max_length` and cuts at the end. Shorten long prompts in "
    "`formatting_func`, or leave long pairs out of the data set."
)
_REFERENCE = "The reference is the shared base with the adapter switched off."

REMOVED: Mapping[str, Removed] = {
    # transformers.TrainingArguments
    "adafactor": _flag('Use `optim="adafactor"`.', optim="adafactor"),
    "dispatch_batches": _accelerator("dispatch_batches"),
    "evaluation_strategy": _now("eval_strategy"),
    "fp16_backend": _dropped("Mixed precision is PyTorch's own now.", harmless=(None, "auto")),
    "fp16_opt_level": _dropped("Mixed precision is PyTorch's own now; Apex levels are gone.", harmless=(None, "O1")),
    "fsdp_min_num_params": Removed("Use `fsdp_config`.", harmless=(None, 0)),
    "fsdp_transformer_layer_cls_to_wrap": Removed("Use `fsdp_config`."),
    "group_by_length": _flag(
        'Use `train_sampling_strategy="group_by_length"`.', train_sampling_strategy="group_by_length"
    ),
    "half_precision_backend": _dropped("Mixed precision is PyTorch's own now.", harmless=(None, "auto", "cpu_amp")),
    "include_inputs_for_metrics": _flag('Use `include_for_metrics=["inputs"]`.', include_for_metrics=["inputs"]),
    "include_tokens_per_second": _dropped("Use `include_num_input_tokens_seen`."),
    "jit_mode_eval": _dropped("TorchScript evaluation is gone; `torch_compile=True` is what replaces it."),
    "logging_dir": _dropped("Set the environment variable TENSORBOARD_LOGGING_DIR."),
    "mp_parameters": _dropped("SageMaker model parallelism is gone.", harmless=(None, "")),
    "no_cuda": _now("use_cpu"),
    "overwrite_output_dir": _dropped("Every trial has a folder of its own.", harmless=(None, False, True)),
    "past_index": Removed("No causal model needs it.", harmless=(None, -1)),
    "per_gpu_eval_batch_size": _now("per_device_eval_batch_size"),
    "per_gpu_train_batch_size": _now("per_device_train_batch_size"),
    "push_to_hub_model_id": _now("hub_model_id"),
    "push_to_hub_organization": Removed('Use `hub_model_id="organization/name"`.'),
    "push_to_hub_token": _now("hub_token"),
    "ray_scope": _dropped("It belonged to Ray Tune, which doesn't run here.", harmless=(None, "last")),
    "save_safetensors": _dropped("Checkpoints are always safetensors.", harmless=(None, True)),
    "split_batches": _accelerator("split_batches"),
    "torchdynamo": _now("torch_compile_backend"),
    "tpu_metrics_debug": _flag('Use `debug="tpu_metrics_debug"`.', debug="tpu_metrics_debug"),
    "tpu_num_cores": _dropped("The launcher decides it."),
    "use_ipex": _dropped("Intel's extension is part of PyTorch now."),
    "use_legacy_prediction_loop": _dropped("There is one prediction loop."),
    "use_mps_device": _dropped("An Apple GPU is used where there is one.", harmless=(None, False, True)),
    "warmup_ratio": Removed("Use `warmup_steps`, which takes a share below 1 too.", _warmup),
    # trl.SFTConfig
    "chars_per_token": _dropped("`packing` counts tokens now.", "SFTConfig"),
    "dataset_batch_size": _dropped("Data sets are tokenized in batches of TRL's choice.", "SFTConfig"),
    "max_seq_length": Removed("Use `max_length`.", lambda value, _: {"max_length": value}, only="SFTConfig"),
    "num_of_sequences": _dropped("`packing` fills sequences of `max_length` now.", "SFTConfig"),
    "use_liger": Removed(
        "Use `use_liger_kernel`.", lambda value, _: {"use_liger_kernel": value}, (None, False), only="SFTConfig"
    ),
    # trl.DPOConfig
    "base_model_attribute_name": _dropped("TRL finds the backbone by itself.", "DPOConfig", (None, "model")),
    "force_use_ref_model": _dropped(_REFERENCE, "DPOConfig"),
    "generate_during_eval": _dropped(
        "Give `RFModelConfig` a `compute_metrics` and a `generation_config` to score generated answers.", "DPOConfig"
    ),
    "is_encoder_decoder": Removed("DPO trains causal models only.", harmless=(None, False), only="DPOConfig"),
    "label_pad_token_id": Removed("TRL masks the prompt by itself.", harmless=(None, -100), only="DPOConfig"),
    "max_completion_length": Removed(_MAX_LENGTH, _lengths, exact=False, only="DPOConfig"),
    "max_prompt_length": Removed(_MAX_LENGTH, _lengths, exact=False, only="DPOConfig"),
    "max_target_length": Removed(_MAX_LENGTH, _lengths, exact=False, only="DPOConfig"),
    "model_adapter_name": Removed(
        "A trial has one adapter, which PEFT calls `default`.", harmless=(None, "default"), only="DPOConfig"
    ),
    "padding_value": Removed("Set `tokenizer.pad_token` in `create_model_fn`.", only="DPOConfig"),
    "ref_adapter_name": Removed(_REFERENCE, harmless=(None, "reference"), only="DPOConfig"),
    "ref_model_init_kwargs": Removed(_REFERENCE, harmless=(None, {}), only="DPOConfig"),
    "reference_free": Removed(
        "TRL trains without a reference in `trl.experimental.cpo` and `trl.experimental.orpo`.",
        harmless=(None, False),
        only="DPOConfig",
    ),
    "rpo_alpha": Removed(
        'Use `loss_type=["sigmoid", "sft"]` and `loss_weights=[1.0, alpha]`.', _rpo, exact=True, only="DPOConfig"
    ),
    "tools": Removed("Give the data set a `tools` column.", only="DPOConfig"),
    "use_liger_loss": _dropped("It only saved memory; TRL's own head is chunked now.", "DPOConfig"),
    "use_logits_to_keep": _dropped("It only saved memory; TRL scores completions only now.", "DPOConfig"),
}

_PROMPTS = "TRL no longer cuts prompts. Leave long ones out of the data set, or shorten them in `formatting_func`."
_VLLM = "Rollouts of all trials are generated together here, without vLLM."

REMOVED_OF_RL: Mapping[str, Removed] = {
    # trl.GRPOConfig
    "ds3_gather_for_generation": _dropped("It belonged to DeepSpeed ZeRO-3.", harmless=(None, True, False)),
    "max_prompt_length": _dropped(_PROMPTS, harmless=(None,)),
    "use_liger_loss": _dropped("It only saved memory; TRL's own head is chunked now."),
    "vllm_device": _dropped(_VLLM, harmless=(None, "auto")),
    "vllm_dtype": _dropped(_VLLM, harmless=(None, "auto")),
    "vllm_enable_prefix_caching": _dropped(_VLLM, harmless=(None, True, False)),
    "vllm_guided_decoding_regex": Removed(_VLLM),
    "vllm_init_kwargs": _dropped(_VLLM, harmless=(None, {})),
    "vllm_max_model_len": _dropped(_VLLM, harmless=(None,)),
    "wandb_log_unique_prompts": _now("log_unique_prompts"),
    # trl.RLOOConfig as it was before it took GRPO's names
    "cliprange": _now("epsilon"),
    "kl_coef": _now("beta"),
    "num_ppo_epochs": _now("num_iterations"),
    "response_length": _now("max_completion_length"),
    "rloo_k": _now("num_generations"),
}
"""As `REMOVED`, for the two configs whose trainers generate; it goes before."""


def removed(name: str, config: str) -> Removed | None:
    """The entry of a field that `config` (a class of TRL, by name) no longer has; None if it never had it."""
    if config in ("GRPOConfig", "RLOOConfig") and name in REMOVED_OF_RL:
        return REMOVED_OF_RL[name]
    entry = REMOVED.get(name)
    return entry if entry is not None and entry.only in (None, config) else None


def check_removed(name: str, value: Any, config: str) -> None:
    """Refuse a removed field, or warn where it is dropped or mapped to something that isn't quite the same.

    Raises:
        ValueError: Nothing stands for this value today; the message says what replaces the field.
    """
    entry = removed(name, config)
    if entry is None or _is_in(value, entry.harmless):
        return
    if entry.becomes is None:
        raise ValueError(f"`{name}={value!r}`: {config} no longer has `{name}`. {entry.instead}")
    entry.becomes(value, {})
    if not entry.exact:
        warnings.warn(f"`{name}={value!r}` is ignored: {config} no longer has it. {entry.instead}", stacklevel=4)


def migrate(fields: Fields, config: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields in today's names.

    Args:
        fields: Name -> value, nothing left to choose.
        config: TRL's class by name.
        known: The fields it has in the installed release; a field that is still there stays as it is.

    Raises:
        ValueError: A field that nothing replaces, or an old and a new name that contradict each other.
    """
    old = {name: entry for name in fields if name not in known and (entry := removed(name, config)) is not None}
    result = {name: value for name, value in fields.items() if name not in old}
    for name, entry in old.items():
        if _is_in(fields[name], entry.harmless):
            continue
        if entry.becomes is None:
            raise ValueError(f"`{name}={fields[name]!r}`: {config} no longer has `{name}`. {entry.instead}")
        for new, value in entry.becomes(fields[name], {**fields, **result}).items():
            merged = name in ("rpo_alpha", "dispatch_batches", "split_batches")
            if new in fields and not merged and fields[new] != value:
                raise ValueError(f"`{name}={fields[name]!r}` contradicts `{new}={fields[new]!r}`. Drop `{name}`.")
            result[new] = value
    return result


def _is_in(value: Any, values: tuple[Any, ...]) -> bool:
    """Like `in`, but `True` isn't 1."""
    return any(type(value) is type(v) and value == v for v in values)
