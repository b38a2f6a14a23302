"""TRL's and PEFT's own field lists, held against what a search file names.

A key of `[space]` belongs to whichever of the two knows it; `lora.` or `args.` in front decides where both do. TRL and
PEFT are imported inside functions: reading a search file stays fast.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, Literal

from rapidfire_automl import rl, space
from rapidfire_automl.hints import unknown
from rapidfire_automl.limits import Limit, limit_of
from rapidfire_automl.sampling import Sampling
from rapidfire_automl.settings import GENERATING, Settings, SettingsError, TrainerName
from rapidfire_automl.space import Space
from rapidfire_automl.tables import Range

Part = Literal["args", "lora"]

TRAINERS: Mapping[TrainerName, tuple[str, str]] = {
    "sft": ("SFTTrainer", "SFTConfig"),
    "dpo": ("DPOTrainer", "DPOConfig"),
    "grpo": ("GRPOTrainer", "GRPOConfig"),
    "rloo": ("RLOOTrainer", "RLOOConfig"),
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


@cache
def _config(class_name: str) -> Any:
    """A TRL config or `LoraConfig`."""
    if class_name == "LoraConfig":
        from peft import LoraConfig

        return LoraConfig
    import trl

    return getattr(trl, class_name)


@cache
def _annotations(class_name: str) -> Mapping[str, Any]:
    """Field name -> annotation of a TRL config or of `LoraConfig`."""
    config = _config(class_name)
    hints = typing.get_type_hints(config)
    return {field.name: hints.get(field.name, Any) for field in fields(config) if field.init}


def args_fields(trainer: TrainerName) -> Mapping[str, Any]:
    """The fields of the trainer's TRL config with their annotations."""
    return _annotations(TRAINERS[trainer][1])


def args_defaults(trainer: TrainerName) -> dict[str, Any]:
    """The fields of the trainer's TRL config with the values they have when they are left out."""
    made = {}
    for field in fields(_config(TRAINERS[trainer][1])):
        made[field.name] = field.default if field.default_factory is MISSING else field.default_factory()
    return made


def lora_fields() -> Mapping[str, Any]:
    """The fields of `LoraConfig` with their annotations."""
    return _annotations("LoraConfig")


def check_fields(settings: Settings) -> Space:
    """Hold `[args]`, `[lora]` and `[space]` against the fields of TRL's config and of `LoraConfig`.

    Returns:
        `{"args": ..., "lora": ...}`: keyword arguments for the two, with `List` and `Range` where `[space]` searches.

    Raises:
        SettingsError: Unknown fields (with the nearest), fields the search itself sets, values of the wrong kind,
            fields that are fixed and searched at once, a range in a grid; one line per mistake.
    """
    known: dict[Part, Mapping[str, Any]] = {"args": args_fields(settings.trainer), "lora": lora_fields()}
    fixed: dict[Part, Mapping[str, Any]] = {"args": settings.args, "lora": settings.lora}
    tree: dict[Part, dict[str, Any]] = {"args": dict(settings.args), "lora": dict(settings.lora)}
    problems = [
        problem
        for part, values in fixed.items()
        for name, value in values.items()
        for problem in _problems(f"{part}.{name}", name, part, known, [value])
    ]
    for name, domain in settings.space.items():
        try:
            part, field = _place(name, known)
            if field in fixed[part]:
                raise SettingsError(f"`{field}` is fixed in [{part}] and searched in [space]; drop one.")
            if isinstance(domain, Range) and settings.search.sampler.name == "grid":
                raise SettingsError(
                    f"`space.{name}` is a range, and a grid needs lists of choices. "
                    'List the values, or take `sampler = "random"`.'
                )
            problems += _problems(f"space.{name}", field, part, known, _bounds(domain))
            tree[part][field] = _node(name, domain, known[part][field])
        except SettingsError as error:
            problems.append(str(error))
    if problems:
        raise SettingsError("\n".join(dict.fromkeys(problems)))
    if settings.trainer in GENERATING:
        _check_generating(settings, tree["args"])
    return Space(tree)


def eval_sampling(settings: Settings, space: Space) -> Sampling:
    """How trials that generate answer when they are compared."""
    args = {**args_defaults(settings.trainer), **space.value["args"]}
    return rl.default_sampling([args], **settings.evaluation.given)


def _check_generating(settings: Settings, args: Mapping[str, Any]) -> None:
    """What GRPO and RLOO ask of every combination of their fields."""
    try:
        rl.check_arguments(args, args_defaults(settings.trainer))
        weights = rl.members(args.get("reward_weights"))
        for one in weights:
            rl.check_weights(one, [settings.reward])
        rl.check_comparable([settings.reward], weights, settings.evaluation.reward_weights)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    try:
        rl.default_sampling([{**args_defaults(settings.trainer), **args}], **settings.evaluation.given)
    except ValueError as error:
        raise SettingsError(f"[evaluation] {error}") from None


def _bounds(domain: Range | list[Any]) -> list[Any]:
    """The values by which a domain is checked."""
    return domain if isinstance(domain, list) else [domain.low, domain.high]


def _node(name: str, domain: Range | list[Any], annotation: object) -> space.List | space.Range:
    if isinstance(domain, list):
        return space.List(domain)
    dtype = "float" if "float" in _kinds(annotation) else None
    try:
        return space.Range(domain.low, domain.high, dtype=dtype, log=domain.log, step=domain.step)
    except ValueError as error:
        raise SettingsError(f"`space.{name}`: {error}") from None


def _place(name: str, known: Mapping[Part, Mapping[str, Any]]) -> tuple[Part, str]:
    """Where a key of the space belongs."""
    prefix, dot, field = name.partition(".")
    if dot:
        if prefix not in known:
            raise SettingsError(f"`space.{name}`: before the dot must stand `lora` or `args`, got `{prefix}`.")
        part: Part = "lora" if prefix == "lora" else "args"
        if field not in known[part]:
            raise SettingsError(unknown(field, known[part], f"space.{part}"))
        return part, field
    homes = [part for part in known if name in known[part]]
    if not homes:
        raise SettingsError(unknown(name, {*known["args"], *known["lora"]}, "space"))
    if len(homes) == 2:
        raise SettingsError(
            f"`space.{name}` is a field of the trainer's config and of LoraConfig; "
            f"write `args.{name}` or `lora.{name}`."
        )
    return homes[0], name


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
    limit = None if field == "num_generations" else limit_of(field)  # `rl` checks that one, and says why
    return [f"`{where}` {wrong}" for value in values if (wrong := _wrong(value, kinds, limit)) is not None]


def _kinds(annotation: object) -> frozenset[str]:
    """The types an annotation is made of, by name: `float | None` -> {"float", "NoneType"}."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return frozenset().union(*(_kinds(inner) for inner in typing.get_args(annotation)))
    return frozenset({getattr(origin or annotation, "__name__", str(annotation))})


def _wrong(value: object, kinds: frozenset[str], limit: Limit | None) -> str | None:
    """What is wrong with a value for a field that takes numbers or flags only; other fields check themselves."""
    plain = kinds - {"NoneType"}
    if not plain <= {"int", "float", "bool"} or (value is None and "NoneType" in kinds):
        return None
    wanted = "a number" if "float" in plain else "an integer" if "int" in plain else "true or false"
    right: tuple[type, ...] = (int, float) if "float" in plain else (int,) if "int" in plain else (bool,)
    flag = isinstance(value, bool) and "bool" not in plain
    if isinstance(value, right) and not flag:
        possible = limit is None or not isinstance(value, (int, float)) or limit.takes(value)
        return None if possible else f"must be {limit}, got {value!r}."
    got = f'the string "{value}"' if isinstance(value, str) else repr(value)
    return f"must be {wanted}, got {got}." + (" Write it without quotes." if isinstance(value, str) else "")
