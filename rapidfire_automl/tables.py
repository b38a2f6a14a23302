"""The tables of a search file: their keys, their defaults, and what a value must be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from rapidfire_automl.names import check_folder, check_name


class Table(BaseModel):
    """What all tables are: unknown keys, other types and NaN are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _as_tasks(value: object) -> object:
    parts = value if isinstance(value, (list, tuple)) else [value]
    if not parts:
        raise ValueError("needs at least one task, got [].")
    return tuple({"task": part} if isinstance(part, str) else part for part in parts)


def _as_gym(value: object) -> object:
    return {"tasks": value} if isinstance(value, (str, list)) else value


class Base(Table):
    """`[base]`: the frozen model that all trials share; `base = "name"` is short for `base.model`."""

    model: str = Field(min_length=1)
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None


class TaskName(BaseModel):
    """A task of reasoning-gym beside its options."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    task: str = Field(min_length=1)

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.__pydantic_extra__ or {})


class ReasoningGym(Table):
    """`[data.reasoning_gym]`: prompts made by tasks; `reasoning_gym = "chain_sum"` is short for `tasks`.

    `tasks` is a name, a table of a name and options, `{task = "chain_sum", max_terms = 3}`, or a list of such. For the
    rest see `reasoning.reasoning_rows`.
    """

    tasks: Annotated[tuple[TaskName, ...], BeforeValidator(_as_tasks)]
    size: int = Field(default=256, ge=1)
    eval_size: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0)
    chat: bool = False
    system: str | None = None
    template: str = "{question}"


class Data(Table):
    """`[data]`: files (.jsonl, .json, .csv, .parquet; beside the search file or in the current folder) or hub ids.

    Give `eval`, or `eval_split` (another split of `train`), or `eval_fraction` (held out of `train` at random). Or give
    `reasoning_gym` and nothing else.
    """

    train: str = Field(default="", min_length=1)
    eval: str | None = None
    split: str = "train"
    eval_split: str | None = None
    eval_fraction: float | None = Field(default=None, gt=0, lt=1)
    subset: str | None = None
    max_train: int | None = Field(default=None, ge=1)
    max_eval: int | None = Field(default=None, ge=1)
    reasoning_gym: Annotated[ReasoningGym | None, BeforeValidator(_as_gym)] = None

    @model_validator(mode="after")
    def _some_held_out(self) -> Self:
        if self.reasoning_gym is not None:
            others = sorted(self.model_fields_set - {"reasoning_gym"})
            if others:
                raise ValueError(
                    f"`data.reasoning_gym` makes all rows, and `data.{others[0]}` is given, too; drop one."
                )
            return self
        if not self.train:
            raise ValueError("`data.train` is missing.")
        if self.eval is None and self.eval_split is None and self.eval_fraction is None:
            raise ValueError(
                "`data.eval` is missing: trials are compared on held-out examples. "
                "Name a file or data set, or hold some out with `eval_fraction = 0.1`."
            )
        if self.eval_fraction is not None and (self.eval is not None or self.eval_split is not None):
            raise ValueError("`data.eval_fraction` and `data.eval` exclude each other; drop one.")
        return self


class Evaluation(Table):
    """`[evaluation]`: how trials that generate answer when they are compared; see `Sampling`.

    What is left out is what all trials share: their temperature, the longest of their answers.
    """

    num_generations: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    max_completion_length: int | None = Field(default=None, ge=1)
    reward_weights: list[float] | None = None

    @property
    def given(self) -> dict[str, Any]:
        """What is said, as arguments of `Sampling`."""
        said = {name: value for name, value in self if value is not None}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}


def _as_number(value: object) -> object:
    """An int stays an int and a float a float: which of them the bounds are says what is drawn."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        quotes = " Write it without quotes." if isinstance(value, str) and looks_numeric(value) else ""
        raise ValueError(f"must be a number, got {named(value)}.{quotes}")
    if not math.isfinite(value):
        raise ValueError(f"must be finite, got {value}.")
    return value


Number = Annotated[Any, BeforeValidator(_as_number)]


class Range(Table):
    """`{low = 1e-5, high = 1e-2, log = true}`: numbers between two bounds, both included."""

    low: Number
    high: Number
    log: bool = False
    step: Number = None

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"`low` must be below `high`, got {self.low} and {self.high}.")
        if self.log and self.low <= 0:
            raise ValueError(f"`low` must be > 0 on a log scale, got {self.low}.")
        if self.step is not None and (self.log or self.step <= 0):
            raise ValueError("`step` must be > 0 and does not go with `log = true`.")
        return self


class Plugin(BaseModel):
    """A sampler or policy: its name, or `"package.module:Class"`, beside the arguments it is built with."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    name: str = Field(min_length=1)

    @property
    def arguments(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.__pydantic_extra__ or {})


def _named_or(default: str) -> BeforeValidator:
    """A bare string is a name; a table without one means the default's."""

    def as_table(value: object) -> object:
        if isinstance(value, Mapping):
            return {"name": default, **value}
        return {"name": value} if isinstance(value, str) else value

    return BeforeValidator(as_table)


def _as_study(name: str | None) -> str | None:
    return None if name is None else check_name(name, "search.study")


def _as_dir(path: str | None) -> str | None:
    return None if path is None else check_folder(path, "output.dir")


class Search(Table):
    """`[search]`: how many trials, how they are judged, and by whom the next one is proposed.

    With `shared` several workers search `study` in `storage`; one that has been silent for `grace_s` is taken for dead.
    """

    n_trials: int = Field(default=16, ge=1)
    slots: int = Field(default=8, ge=1)
    chunks: int = Field(default=8, ge=1)
    seed: int = Field(default=0, ge=0)
    direction: Literal["minimize", "maximize"] | None = None
    metric: str | None = None
    cost: Literal["tokens", "seconds"] = "tokens"
    eval_batch_size: int = Field(default=16, ge=1)
    sampler: Annotated[Plugin, _named_or("tpe")] = Plugin(name="tpe")
    policy: Annotated[Plugin, _named_or("auto")] = Plugin(name="auto")
    storage: str | None = None
    study: Annotated[str | None, AfterValidator(_as_study)] = None
    shared: bool = False
    heartbeat_s: int = Field(default=30, ge=1)
    grace_s: int = Field(default=120, ge=2)
    storage_patience_s: float = Field(default=600.0, ge=0)
    timeout_s: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _where_workers_meet(self) -> Self:
        if self.shared and not (self.storage and self.study):
            raise ValueError("`shared` needs `storage` and `study`: there the workers meet.")
        return self


class Output(Table):
    """`[output]`: where the search is written, and an MLflow experiment's name to log to besides."""

    dir: Annotated[str | None, AfterValidator(_as_dir)] = None
    mlflow: str | None = None


def looks_numeric(text: str) -> bool:
    """Whether a string was meant as a number or a flag."""
    try:
        float(text)
    except ValueError:
        return text in ("true", "false")
    return True


def named(value: object) -> str:
    """A value as an error shows it."""
    return f'the string "{value}"' if isinstance(value, str) else repr(value)
