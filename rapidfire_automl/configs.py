"""The configs RapidFire AI users know: TRL's and PEFT's fields, where any value may be a `List` or a `Range`.

`build()` makes TRL's or PEFT's own object once nothing is left to choose. Both libraries are imported at the first
construction, which checks the field names against the installed release.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar, Self

from rapidfire_automl.hints import nearest
from rapidfire_automl.removed import check_removed, migrate, removed
from rapidfire_automl.space import List, Range, is_concrete

_MISPLACED = {
    "tokenizer": "RFModelConfig(tokenizer=...), or return it from `create_model_fn`",
    "processing_class": "RFModelConfig(tokenizer=...), or return it from `create_model_fn`",
    **{
        name: f"RFModelConfig({name}=...)"
        for name in (
            "compute_metrics",
            "formatting_func",
            "generation_config",
            "model_name",
            "peft_config",
            "reward_funcs",
        )
    },
}

_ROUNDABLE = {"lora_alpha"}
"""Fields that are annotated `int` but take any number."""


class FieldConfig:
    """Fields for one of TRL's or PEFT's config classes, kept as given until `build`.

    A field reads and sets like an attribute; one that was not given reads as the default of the real class.
    """

    origin: ClassVar[str]
    real_name: ClassVar[str]
    _given: dict[str, Any]

    def __init__(self, **fields: Any) -> None:
        object.__setattr__(self, "_given", {})
        for name, value in fields.items():
            setattr(self, name, value)

    @classmethod
    def known(cls) -> Mapping[str, dataclasses.Field[Any]]:
        """The fields of the real class, by name."""
        return _known(cls.origin, cls.real_name)

    @classmethod
    def of(cls, real: Any) -> Self:
        """The fields in which a real config differs from its class's defaults."""
        changed = {}
        for name, field in cls.known().items():
            value = getattr(real, name)
            if not _same(value, _default(field)):
                changed[name] = value
        if "steps_per_generation" in changed:
            # TRL's config fills in whichever of the two is left out, and refuses to be built with both.
            changed.pop("generation_batch_size", None)
        return cls(**changed)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.known():
            if removed(name, self.real_name) is None:
                raise ValueError(self._unknown(name))
            for concrete in _members(value):
                check_removed(name, concrete, self.real_name)
        elif (hint := _hints(self.origin, self.real_name).get(name)) is not None:
            _check_number(f"{type(self).__name__}.{name}", value, hint, roundable=name in _ROUNDABLE)
        self._given[name] = value

    def __getattr__(self, name: str) -> Any:
        # Only asked for what is no real attribute; dunder names belong to copy and pickle.
        if name.startswith("__") or name == "_given":
            raise AttributeError(name)
        if name in self._given:
            return self._given[name]
        if name in self.known():
            return _default(self.known()[name])
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._given == self._given

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self._given.items())})"

    def __getstate__(self) -> dict[str, Any]:
        return {"_given": self._given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "_given", state["_given"])

    def copy(self) -> Self:
        """A config of its own with the same fields."""
        return type(self)._trusted(fresh(self._given))

    def search_fields(self) -> Mapping[str, Any]:
        """The fields that were given."""
        return self._given

    def with_fields(self, fields: Mapping[str, Any]) -> Self:
        """A config with exactly these fields, which were checked when they were given."""
        return type(self)._trusted(dict(fields))

    def build(self, defaults: Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None) -> Any:
        """The real config object.

        Args:
            defaults: Fields for what was not given.
            overrides: Fields that replace what was given.

        Raises:
            ValueError: A `List` or a `Range` is left, or a field is gone and nothing replaces it.
        """
        if not is_concrete(self):
            raise ValueError(f"{self!r} still holds a List or a Range; `grid` or `suggest` fills it in.")
        given = migrate(fresh(self._given), self.real_name, self.known())
        return _real(self.origin, self.real_name)(**{**(defaults or {}), **given, **(overrides or {})})

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The real class's value of every field."""
        return {name: _default(field) for name, field in cls.known().items()}

    @classmethod
    def _trusted(cls, fields: dict[str, Any]) -> Self:
        config = cls.__new__(cls)
        object.__setattr__(config, "_given", fields)
        return config

    @classmethod
    def _unknown(cls, name: str) -> str:
        if name in _MISPLACED:
            return f"`{name}` is no field of {cls.real_name}. Write {_MISPLACED[name]}."
        near = nearest(name, cls.known())
        hint = f" Did you mean `{near}`?" if near else ""
        return f"`{name}` is no field of {cls.real_name}.{hint}"


class RFLoraConfig(FieldConfig):
    """PEFT's `LoraConfig` with `List` and `Range` allowed in every field.

    >>> RFLoraConfig(r=List([8, 16]), target_modules=["q_proj", "v_proj"])
    RFLoraConfig(r=List([8, 16]), target_modules=['q_proj', 'v_proj'])
    """

    origin = "peft"
    real_name = "LoraConfig"


class RFSFTConfig(FieldConfig):
    """TRL's `SFTConfig` with `List` and `Range` allowed in every field."""

    origin = "trl"
    real_name = "SFTConfig"


class RFDPOConfig(FieldConfig):
    """TRL's `DPOConfig` with `List` and `Range` allowed in every field."""

    origin = "trl"
    real_name = "DPOConfig"


class RFGRPOConfig(FieldConfig):
    """TRL's `GRPOConfig` with `List` and `Range` allowed in every field.

    >>> RFGRPOConfig(num_generations=List([4, 8, 16]), per_device_train_batch_size=16)
    RFGRPOConfig(num_generations=List([4, 8, 16]), per_device_train_batch_size=16)
    """

    origin = "trl"
    real_name = "GRPOConfig"


class RFRLOOConfig(FieldConfig):
    """TRL's `RLOOConfig` with `List` and `Range` allowed in every field."""

    origin = "trl"
    real_name = "RLOOConfig"


TRAINING_ARGS: Mapping[str, type[FieldConfig]] = {
    "SFT": RFSFTConfig,
    "DPO": RFDPOConfig,
    "GRPO": RFGRPOConfig,
    "RLOO": RFRLOOConfig,
}
"""Trainer type -> its config. A new trainer is a line here, and one in `trainers.TRAINERS`."""


@dataclasses.dataclass(init=False)
class RFModelConfig:
    """One model with everything that is tried on it; any field may hold a `List` or, where a number stands, a `Range`.

    Args:
        model_name: Hub id or path of the base.
        tokenizer: Hub id or path of its tokenizer; the base's by default.
        tokenizer_kwargs: For `AutoTokenizer.from_pretrained`.
        formatting_func: Row of the data set -> dict of columns (`prompt` and `completion`, `messages`, ...) or text.
        compute_metrics: With `generation_config`: `(generated texts, reference texts) -> {name: number}`, as RapidFire
            AI calls it. Without: handed to the TRL trainer, which calls it with an `EvalPrediction`.
        peft_config: `RFLoraConfig`, PEFT's own `LoraConfig`, or several of them.
        training_args: `RFSFTConfig`, `RFDPOConfig`, `RFGRPOConfig` or `RFRLOOConfig`, or TRL's own.
        model_type: Handed to `create_model_fn`.
        model_kwargs: For `from_pretrained`; configurations with different ones are different bases.
        ref_model_name: For DPO; the reference is the base itself, so nothing but the base's name is accepted.
        ref_model_type: Handed to `create_model_fn`.
        ref_model_kwargs: Handed to `create_model_fn`.
        reward_funcs: For GRPO and RLOO: `f(prompts, completions, **columns)`, which returns a number an answer, or
            `"module:function"`, or a built-in's name ("exact_match", "reasoning_gym"), or a list of those, whose sum is
            the reward unless `reward_weights` of the training arguments weigh them. A `List` is a choice of such.
        generation_config: How answers for `compute_metrics` are generated: arguments of `model.generate`.
        num_gpus: Accepted for RapidFire AI's sake; trials share one device.

    Raises:
        ValueError: An unknown field, or a field of the wrong kind.
    """

    model_name: Any
    tokenizer: Any
    tokenizer_kwargs: Any
    formatting_func: Any
    compute_metrics: Any
    peft_config: Any
    training_args: Any
    model_type: Any
    model_kwargs: Any
    ref_model_name: Any
    ref_model_type: Any
    ref_model_kwargs: Any
    reward_funcs: Any
    generation_config: Any
    num_gpus: Any

    def __init__(
        self,
        model_name: Any = None,
        tokenizer: Any = None,
        tokenizer_kwargs: Mapping[str, Any] | List | None = None,
        formatting_func: Callable[..., Any] | List | None = None,
        compute_metrics: Callable[..., Any] | List | None = None,
        peft_config: Any = None,
        training_args: Any = None,
        model_type: str | List | None = "causal_lm",
        model_kwargs: Mapping[str, Any] | List | None = None,
        ref_model_name: str | None = None,
        ref_model_type: str | None = None,
        ref_model_kwargs: Mapping[str, Any] | None = None,
        reward_funcs: Any = None,
        generation_config: Mapping[str, Any] | List | None = None,
        num_gpus: int | None = None,
        **unknown: Any,
    ) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        for name in unknown:
            near = nearest(name, names)
            hint = f" Did you mean `{near}`?" if near else ""
            homes: list[type[FieldConfig]] = [RFLoraConfig, *TRAINING_ARGS.values()]
            for config in homes:
                if name in config.known():
                    hint = f" It belongs into {config.__name__}."
                    break
            raise ValueError(f"`{name}` is no field of RFModelConfig.{hint}")
        given = locals()
        for name in names:
            setattr(self, name, given[name])
        # RapidFire AI takes a plain list of adapter configs for a List, too.
        if isinstance(peft_config, (list, tuple)):
            self.peft_config = List(peft_config)
        for name in ("tokenizer_kwargs", "model_kwargs", "ref_model_kwargs", "generation_config"):
            if not all(value is None or isinstance(value, Mapping) for value in _members(given[name])):
                raise ValueError(f"`{name}` must be a dict, got {given[name]!r}.")
        if num_gpus not in (None, 1):
            warnings.warn(f"`num_gpus={num_gpus}` is ignored: all trials share one device.", stacklevel=2)

    def copy(self) -> RFModelConfig:
        """A config of its own with the same fields."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return self.with_fields(fresh(fields))

    def search_fields(self) -> Mapping[str, Any]:
        """The fields that hold something."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}

    def with_fields(self, fields: Mapping[str, Any]) -> RFModelConfig:
        """The same config with these fields in place of its own."""
        config = copy.copy(self)
        for name, value in fields.items():
            setattr(config, name, value)
        return config


def fresh(value: Any) -> Any:
    """New dicts, lists and configs around the same leaves: TRL and PEFT write into what they are given."""
    if isinstance(value, (FieldConfig, RFModelConfig)):
        return value.copy()
    if isinstance(value, List):
        return List([fresh(member) for member in value.values])
    if type(value) is dict:
        return {key: fresh(child) for key, child in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(fresh(child) for child in value)
    return value


@cache
def _real(origin: str, name: str) -> type:
    if origin == "peft":
        import peft as module
    else:
        import trl as module
    return typing.cast(type, getattr(module, name))


@cache
def _known(origin: str, name: str) -> Mapping[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(_real(origin, name)) if field.init}


@cache
def _hints(origin: str, name: str) -> Mapping[str, Any]:
    return typing.get_type_hints(_real(origin, name))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _same(value: Any, default: Any) -> bool:
    try:
        return bool(value == default)
    except Exception:  # an object that can't be compared is not the default
        return False


def _members(value: Any) -> list[Any]:
    """The values a field can take, as far as they are listed: a `Range` yields its ends."""
    if isinstance(value, List):
        return [concrete for member in value.values for concrete in _members(member)]
    return [value.start, value.end] if isinstance(value, Range) else [value]


def _check_number(name: str, value: Any, hint: Any, *, roundable: bool) -> None:
    """Refuse text, NaN and fractions in fields that take numbers only.

    Raises:
        ValueError: The value, or one that a `List` or a `Range` may draw, is none the field takes.
    """
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = {k for k in (typing.get_args(hint) if union else (hint,)) if k is not types.NoneType}
    if not kinds or not kinds <= {int, float, bool}:
        return
    whole = kinds <= {int, bool} and not roundable
    what = "True or False" if kinds == {bool} else "a whole number" if whole else "a number"
    if isinstance(value, Range) and whole and not value.is_int:
        raise ValueError(f"`{name}` must be {what}, and {value!r} draws fractions. Write whole ends or a List.")
    for member in _members(value):
        if isinstance(member, str):
            raise ValueError(f'`{name}` must be {what}, got the string "{member}". Write it without quotes.')
        if isinstance(member, float) and not math.isfinite(member):
            raise ValueError(f"`{name}` must be finite, got {member}.")
        if isinstance(member, float) and whole:
            raise ValueError(f"`{name}` must be {what}, got {member}.")
