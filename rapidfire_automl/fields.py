"""TRL's and PEFT's own field lists, held against what a search file names.

A key of `[space]` belongs to whichever of the two knows it; `lora.` or `args.` in front decides where both do. TRL and
PEFT are imported inside functions: reading a search file stays fast.
"""

from __future__ import annotations

import itertools
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal

from rapidfire_automl.hints import unknown
from rapidfire_automl.settings import Range, Settings, SettingsError, TrainerName

if typing.TYPE_CHECKING:
    import optuna

Part = Literal["args", "lora"]

TRAINERS: Mapping[TrainerName, tuple[str, str]] = {
    "sft": ("SFTTrainer", "SFTConfig"),
    "dpo": ("DPOTrainer", "DPOConfig"),
}
"""Per trainer kind, TRL's trainer and its config. A new kind is a line here and a name in `settings.TrainerName`."""

_NOT_YOURS: Mapping[str, str] = {
    "output_dir": "set `output.dir` instead",
    "report_to": "set `output.mlflow` instead",
    "eval_strategy": "the search evaluates after every chunk; `search.chunks` says how often",
    "eval_steps": "the search evaluates after every chunk; `search.chunks` says how often",
    "eval_on_start": "the untrained base is evaluated once for all trials",
    "save_strategy": "the search saves the adapter of every trial that completes",
    "save_steps": "the search saves the adapter of every trial that completes",
    "load_best_model_at_end": "the search keeps the best trial's adapter",
    "resume_from_checkpoint": "trials start from the base",
    "model_init_kwargs": "the base is loaded once, from `[base]`",
    "auto_find_batch_size": "the planner splits passes when memory runs out",
    "deepspeed": "all trials share one process and one base",
    "fsdp": "all trials share one process and one base",
    "push_to_hub": "push the best adapter yourself when the search is done",
}


@dataclass(frozen=True)
class Dimension:
    """One searched field.

    Args:
        name: The parameter's name in Optuna: the field's, or with its prefix as the search file has it.
        field: The field of the TRL config or of `LoraConfig`.
        part: Which of the two.
        domain: A range, or the choices.
        integer: Whether a range draws integers.
    """

    name: str
    field: str
    part: Part
    domain: Range | list[Any]
    integer: bool = False

    def suggest(self, trial: optuna.Trial) -> Any:
        """Draw a value. Choices that Optuna cannot store (lists, tables) go through their JSON text."""
        if isinstance(self.domain, list):
            return self.decode(trial.suggest_categorical(self.name, self.labels()))
        low, high, step = self.domain.low, self.domain.high, self.domain.step
        if self.integer:
            return trial.suggest_int(self.name, int(low), int(high), log=self.domain.log, step=int(step or 1))
        return trial.suggest_float(self.name, float(low), float(high), log=self.domain.log, step=step)

    def labels(self) -> list[bool | int | float | str | None]:
        """The choices as Optuna stores them; empty for a range."""
        return [_label(choice) for choice in self.domain] if isinstance(self.domain, list) else []

    def decode(self, label: object) -> Any:
        """The choice behind a label."""
        return next(choice for choice in self.domain if _label(choice) == label)

    def sample(self) -> Any:
        """Some value of the dimension, for trying out whether a configuration can be built."""
        if isinstance(self.domain, list):
            return self.domain[0]
        return int(self.domain.low) if self.integer else float(self.domain.low)


def _label(choice: object) -> bool | int | float | str | None:
    if choice is None or isinstance(choice, (bool, int, float, str)):
        return choice
    return json.dumps(choice)


@cache
def _annotations(class_name: str) -> Mapping[str, Any]:
    """Field name -> annotation of a TRL config or of `LoraConfig`."""
    if class_name == "LoraConfig":
        from peft import LoraConfig as config
    else:
        import trl

        config = getattr(trl, class_name)
    hints = typing.get_type_hints(config)
    return {field.name: hints.get(field.name, Any) for field in fields(config) if field.init}


def args_fields(trainer: TrainerName) -> Mapping[str, Any]:
    """The fields of the trainer's TRL config with their annotations."""
    return _annotations(TRAINERS[trainer][1])


def lora_fields() -> Mapping[str, Any]:
    """The fields of `LoraConfig` with their annotations."""
    return _annotations("LoraConfig")


def check_fields(settings: Settings) -> tuple[Dimension, ...]:
    """Hold `[args]`, `[lora]` and `[space]` against the fields of TRL's config and of `LoraConfig`.

    Returns:
        The search space, in the file's order.

    Raises:
        SettingsError: Unknown fields (with the nearest), fields the search itself sets, values of the wrong kind,
            fields that are fixed and searched at once; one line per mistake.
    """
    known: dict[Part, Mapping[str, Any]] = {"args": args_fields(settings.trainer), "lora": lora_fields()}
    problems: list[str] = []
    fixed: dict[Part, Mapping[str, Any]] = {"args": settings.args, "lora": settings.lora}
    for part, values in fixed.items():
        for name, value in values.items():
            problems += _problems(f"{part}.{name}", name, part, known, [value])
    dimensions = []
    for name, domain in settings.space.items():
        placed = _place(name, known)
        if isinstance(placed, str):
            problems.append(placed)
            continue
        part, field = placed
        values = domain if isinstance(domain, list) else [domain.low, domain.high]
        found = _problems(f"space.{name}", field, part, known, values)
        if field in fixed[part]:
            found.append(f"`{field}` is fixed in [{part}] and searched in [space]; drop one.")
        problems += found
        kinds = _kinds(known[part].get(field, Any))
        whole = isinstance(domain, Range) and all(isinstance(v, int) for v in (domain.low, domain.high))
        dimensions.append(Dimension(name, field, part, domain, integer=whole and "float" not in kinds))
    if problems:
        raise SettingsError("\n".join(dict.fromkeys(problems)))
    if settings.search.sampler.name == "grid":
        for dimension in dimensions:
            if isinstance(dimension.domain, Range):
                raise SettingsError(
                    f"`space.{dimension.name}` is a range, and a grid needs lists of choices. "
                    'List the values, or take `sampler = "random"`.'
                )
    return tuple(dimensions)


def split(dimensions: Iterable[Dimension], values: Mapping[str, Any]) -> dict[Part, dict[str, Any]]:
    """Sort drawn values (by parameter name) into keyword arguments of the TRL config and of `LoraConfig`."""
    parts: dict[Part, dict[str, Any]] = {"args": {}, "lora": {}}
    for dimension in dimensions:
        parts[dimension.part][dimension.field] = values[dimension.name]
    return parts


def grid(dimensions: Iterable[Dimension]) -> list[dict[str, Any]]:
    """Every combination of the choices, as Optuna's parameters, the last dimension moving fastest."""
    dimensions = tuple(dimensions)
    combinations = itertools.product(*(dimension.labels() for dimension in dimensions))
    return [dict(zip((d.name for d in dimensions), labels, strict=True)) for labels in combinations]


def _place(name: str, known: Mapping[Part, Mapping[str, Any]]) -> tuple[Part, str] | str:
    """Where a key of the space belongs, or what is wrong with it."""
    prefix, dot, field = name.partition(".")
    if dot:
        if prefix not in known:
            return f"`space.{name}`: the part before the dot must be `lora` or `args`, got `{prefix}`."
        part: Part = "lora" if prefix == "lora" else "args"
        return (part, field) if field in known[part] else unknown(field, known[part], f"space.{part}")
    homes: list[Part] = [part for part in ("args", "lora") if name in known[part]]
    if len(homes) == 2:
        return f"`space.{name}` is a field of both the trainer's config and LoraConfig; write `args.{name}` or `lora.{name}`."
    return (homes[0], name) if homes else unknown(name, {*known["args"], *known["lora"]}, "space")


def _problems(
    where: str, field: str, part: Part, known: Mapping[Part, Mapping[str, Any]], values: Iterable[Any]
) -> list[str]:
    if part == "args" and field in _NOT_YOURS:
        return [f"`{where}` cannot be set here: {_NOT_YOURS[field]}."]
    if field not in known[part]:
        other: Part = "lora" if part == "args" else "args"
        if field in known[other]:
            return [f"`{where}` is no field of [{part}]; it belongs in [{other}]."]
        return [unknown(field, known[part], part)]
    kinds = _kinds(known[part][field])
    return [f"`{where}` {wrong}" for value in values if (wrong := _wrong(value, kinds)) is not None]


def _kinds(annotation: object) -> frozenset[str]:
    """The types an annotation is made of, by name: `float | None` -> {"float", "NoneType"}."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return frozenset().union(*(_kinds(inner) for inner in typing.get_args(annotation)))
    return frozenset({getattr(origin or annotation, "__name__", str(annotation))})


def _wrong(value: object, kinds: frozenset[str]) -> str | None:
    """What is wrong with a value for a field that takes numbers or flags only; other fields check themselves."""
    plain = kinds - {"NoneType"}
    if not plain <= {"int", "float", "bool"} or (value is None and "NoneType" in kinds):
        return None
    wanted = "a number" if "float" in plain else "an integer" if "int" in plain else "true or false"
    right: tuple[type, ...] = (int, float) if "float" in plain else (int,) if "int" in plain else (bool,)
    flag = isinstance(value, bool) and "bool" not in plain
    if isinstance(value, right) and not flag:
        return None
    got = f'the string "{value}"' if isinstance(value, str) else repr(value)
    return f"must be {wanted}, got {got}." + (" Write it without quotes." if isinstance(value, str) else "")
