"""A search as a TOML file: its shape, its defaults, and one clear line for every mistake in it.

Nothing here imports torch. What needs TRL's or PEFT's own field lists is checked in `fields.py`, what needs the data
in `data.py`; `program.py` puts the three together.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from rapidfire_automl.hints import unknown
from rapidfire_automl.tables import (
    Base,
    Data,
    Evaluation,
    Output,
    Range,
    ReasoningGym,
    Search,
    Table,
    looks_numeric,
    named,
)

TrainerName = Literal["sft", "dpo", "grpo", "rloo"]
GENERATING: tuple[TrainerName, ...] = ("grpo", "rloo")
"""Trainer kinds that learn from rewards for what they generate."""
Scalar = bool | int | float | str | None


class SettingsError(ValueError):
    """A search file, or an override of one of its keys, that cannot be run; the message has one line per mistake."""


def _as_names(value: object) -> object:
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value


def _as_base(value: object) -> object:
    return {"model": value} if isinstance(value, str) else value


def _flatten_space(value: object) -> object:
    """`lora.r = [4, 8]` arrives as a nested table; as a key of the space it is "lora.r"."""
    if not isinstance(value, Mapping):
        return value
    flat: dict[str, object] = {}
    for key, entry in value.items():
        if key in ("lora", "args") and isinstance(entry, Mapping):
            flat.update({f"{key}.{name}": inner for name, inner in entry.items()})
        else:
            flat[key] = entry
    return flat


def _as_domain(value: object) -> object:
    if isinstance(value, list):
        if not value:
            raise ValueError("needs at least one choice, got [].")
        bad = [choice for choice in value if isinstance(choice, float) and not math.isfinite(choice)]
        if bad:
            raise ValueError(f"choices must be finite, got {bad[0]}.")
        return value
    if isinstance(value, (Mapping, Range)):
        return value
    raise ValueError(
        f"must be a list of choices or a range like {{low = 1e-5, high = 1e-2, log = true}}, got {value!r}. "
        "A fixed value belongs in [args] or [lora]."
    )


Domain = Annotated[
    Annotated[Range, Tag("range")] | Annotated[list[Any], Tag("choices")],
    Discriminator(lambda value: "choices" if isinstance(value, list) else "range"),
    BeforeValidator(_as_domain),
]


class Settings(Table):
    """A whole search file."""

    base: Annotated[Base, BeforeValidator(_as_base)]
    data: Data
    trainer: TrainerName = "sft"
    reward: Annotated[tuple[str, ...], BeforeValidator(_as_names)] = ()
    args: dict[str, Any] = Field(default_factory=dict)
    lora: dict[str, Any] = Field(default_factory=dict)
    space: Annotated[dict[str, Domain], BeforeValidator(_flatten_space)]
    evaluation: Evaluation = Evaluation()
    search: Search = Search()
    output: Output = Output()

    @model_validator(mode="after")
    def _something_to_search(self) -> Self:
        if not self.space:
            raise ValueError(
                "`space` is empty: name at least one field to search, like `learning_rate = {low = 1e-5, high = 1e-2}`."
            )
        return self

    @model_validator(mode="after")
    def _rewards_for_those_who_generate(self) -> Self:
        if self.trainer in GENERATING:
            if not self.reward:
                one = "reasoning_gym" if self.data.reasoning_gym else "module:function"
                raise ValueError(
                    f'`reward` is missing: trainer {self.trainer} learns from rewards. Write `reward = "{one}"`.'
                )
            return self
        for name in ("reward", "evaluation"):
            if name in self.model_fields_set:
                raise ValueError(
                    f'`{name}` is for {" and ".join(GENERATING)}, got `trainer = "{self.trainer}"`; drop it.'
                )
        return self

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """The direction that is given, or else the metric's own: a reward is maximised, all else minimised."""
        rewarded = self.trainer in GENERATING and self.search.metric in (None, "reward")
        return self.search.direction or ("maximize" if rewarded else "minimize")


def load_settings(path: str | Path, overrides: Iterable[str] = ()) -> Settings:
    """Read a search file.

    Args:
        path: The TOML file.
        overrides: `key=value` lines as of `--set`, applied in order; see `apply_override`.

    Raises:
        SettingsError: The file is missing or no TOML, or a key or value in it is wrong; one line per mistake.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"There is no file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not valid TOML: {error}.") from None
    return parse_settings(raw, overrides)


def parse_settings(raw: Mapping[str, Any], overrides: Iterable[str] = ()) -> Settings:
    """Check an already read search file; see `load_settings`."""
    tree = dict(raw)
    for override in overrides:
        tree = apply_override(tree, override)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        lines = dict.fromkeys(_line(problem) for problem in error.errors())
        raise SettingsError("\n".join(lines)) from None


_SHORT = {"base": "model", "sampler": "name", "policy": "name", "reasoning_gym": "tasks"}
"""Tables for which a bare string is short, and the key that it stands for."""


def apply_override(raw: Mapping[str, Any], override: str) -> dict[str, Any]:
    """Set one key, `search.n_trials=16` or `space.r=[4, 8]`, in a copy of a search file's tree.

    The value is read as TOML; what is no TOML is taken as the string it is, so that paths and names need no quotes.

    Raises:
        SettingsError: No `=`, or a key that leads through something that is no table.
    """
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise SettingsError(f"An override must look like `search.n_trials=16`, got `{override}`.")
    value = toml_value(text)
    tree = dict(raw)
    at = tree
    for depth, part in enumerate(parts[:-1]):
        inner = at.get(part, {})
        if isinstance(inner, str) and parts[depth] in _SHORT:
            inner = {_SHORT[parts[depth]]: inner}
        if not isinstance(inner, Mapping):
            raise SettingsError(f"`{'.'.join(parts[: depth + 1])}` is no table, so `{key.strip()}` cannot be set.")
        at[part] = dict(inner)
        at = at[part]
    at[parts[-1]] = value
    return tree


def toml_value(text: str) -> Any:
    """A value as TOML spells it; what is no TOML is the string it is.

    >>> toml_value("1e-4"), toml_value("[4, 8]"), toml_value("all-linear")
    (0.0001, [4, 8], 'all-linear')
    """
    try:
        read = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    return read["value"] if read.keys() == {"value"} else text.strip()


_TABLES: dict[str, type[BaseModel]] = {
    "base": Base,
    "data": Data,
    "data.reasoning_gym": ReasoningGym,
    "evaluation": Evaluation,
    "search": Search,
    "output": Output,
}
_WANTED = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "a string",
    "dict": "a table",
    "tuple": "a name or a list of names",
}


def _line(problem: Any) -> str:
    """One of pydantic's problems in the house's words."""
    loc = [str(part) for part in problem["loc"]]
    if loc[:1] == ["space"] and loc[2:3] in (["range"], ["choices"]):
        del loc[2]  # the tag of the union's branch is no key
    where, kind, got = ".".join(loc), str(problem["type"]), problem.get("input")
    if kind == "extra_forbidden":
        return unknown(loc[-1], _known(loc[:-1]), ".".join(loc[:-1]))
    if kind == "missing":
        return f"`{where}` is missing."
    if kind == "value_error":
        message = str(problem["ctx"]["error"])
        if message.startswith(("`data", "`space", "`reward`", "`evaluation`", f"`{where}`")):
            return message
        return f"`{where}`: {message}" if message.startswith("`") else f"`{where}` {message}"
    if kind == "literal_error":
        return f"`{where}` must be one of {problem['ctx']['expected']}, got {got!r}."
    bounds = problem.get("ctx", {})
    for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        if name in bounds:
            return f"`{where}` must be {sign} {bounds[name]}, got {got!r}."
    if kind == "string_too_short":
        return f"`{where}` must not be empty."
    if kind == "finite_number":
        return f"`{where}` must be finite, got {got!r}."
    if kind == "int_from_float":
        return f"`{where}` must be an integer, got {got!r}."
    wanted = _WANTED.get(kind.removesuffix("_type").removesuffix("_parsing"))
    if kind.startswith("model"):
        wanted = "a table"
    if wanted:
        quotes = " Write it without quotes." if isinstance(got, str) and looks_numeric(got) else ""
        return f"`{where}` must be {wanted}, got {named(got)}.{quotes}"
    return f"`{where}`: {problem['msg']} (got {got!r})."


def _known(path: list[str]) -> Iterable[str]:
    if not path:
        return Settings.model_fields
    if path[0] == "space":
        return Range.model_fields
    table = _TABLES.get(".".join(path)) or _TABLES.get(path[0])
    return table.model_fields if table else ()


def trainer_names() -> tuple[str, ...]:
    """The trainer kinds a search file may name."""
    return get_args(TrainerName)
