"""A search space is an ordinary value (a config, a dict, a list) with `List` and `Range` standing somewhere inside.

`grid` lists its combinations, `suggest` asks an Optuna trial for one, `distributions` names what Optuna would see.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Protocol, TypeAlias, runtime_checkable

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial

Choice: TypeAlias = bool | int | float | str | None
"""What Optuna can store as a categorical value."""

GRID_LIMIT = 10_000
"""Combinations beyond which a grid is refused: nobody means to train so many."""

_LABEL_LENGTH = 60


@dataclass(frozen=True)
class List:
    """A discrete set of values, of which every trial gets one.

    Args:
        values: Any values, whole configs and further `List`s and `Range`s among them.

    Raises:
        ValueError: No values, or a string in place of a list.

    >>> List([8, 16]).values
    (8, 16)
    """

    values: tuple[Any, ...]

    def __init__(self, values: Iterable[Any]) -> None:
        if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
            raise ValueError(f"`values` must be a list, got {values!r}. Write List([{values!r}]).")
        object.__setattr__(self, "values", tuple(values))
        if not self.values:
            raise ValueError("`values` must hold at least one value, got an empty List.")

    def __repr__(self) -> str:
        return f"List({list(self.values)!r})"

    @property
    def choices(self) -> tuple[Choice, ...]:
        """One value per member that Optuna can store: the member itself, or a label where it is no plain value."""
        plain = all(v is None or isinstance(v, (bool, int, str)) or _is_finite_float(v) for v in self.values)
        if plain and all(a != b for i, a in enumerate(self.values) for b in self.values[:i]):
            return self.values
        return _labels(self.values)

    @property
    def distribution(self) -> CategoricalDistribution:
        """The Optuna distribution."""
        return CategoricalDistribution(self.choices)


@dataclass(frozen=True)
class Range:
    """Every number from `start` to `end`, both included; whole numbers if both ends are.

    Args:
        start: Lower end.
        end: Upper end.
        dtype: "int" or "float"; by default what `start` and `end` are.
        log: Whether the logarithm is drawn uniformly.
        step: Distance between the values; not together with `log`.

    Raises:
        ValueError: Ends that are no finite numbers or not in order, a log range that reaches 0, a step with `log`.

    >>> Range(1e-5, 1e-3, log=True)
    Range(1e-05, 0.001, log=True)
    """

    start: float
    end: float
    dtype: str | None = None
    log: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, "int", "float"):
            raise ValueError(f'`dtype` must be "int" or "float", got {self.dtype!r}.')
        if not isinstance(self.log, bool):
            raise ValueError(f"`log` must be True or False, got {self.log!r}.")
        start, end = _number("start", self.start), _number("end", self.end)
        step = None if self.step is None else _number("step", self.step)
        if self.dtype == "int" or (self.dtype is None and isinstance(start, int) and isinstance(end, int)):
            start, end = _whole("start", start), _whole("end", end)
            if step is not None:
                fix = " Write the ends as floats, too." if self.dtype is None else ""
                step = _whole("step", step, fix)
        else:
            start, end = float(start), float(end)
        for name, value in (("start", start), ("end", end), ("step", step)):
            object.__setattr__(self, name, value)
        if start >= end:
            fix = " Swap them." if start > end else " A single value needs no Range."
            raise ValueError(f"`start` must be < `end`, got {start} and {end}.{fix}")
        if self.log and start <= 0:
            raise ValueError(f"`start` must be > 0 in a log Range, got {start}.")
        if self.log and step is not None:
            raise ValueError("`step` and `log` exclude each other. Drop `step`, or list the values: List([...]).")
        if step is not None and not 0 < step <= end - start:
            raise ValueError(f"`step` must be > 0 and <= `end` - `start`, got {step}.")

    def __repr__(self) -> str:
        log = ", log=True" if self.log else ""
        step = "" if self.step is None else f", step={self.step!r}"
        return f"Range({self.start!r}, {self.end!r}{log}{step})"

    @property
    def is_int(self) -> bool:
        """Whether whole numbers are drawn."""
        return isinstance(self.start, int)

    @property
    def distribution(self) -> IntDistribution | FloatDistribution:
        """The Optuna distribution."""
        if self.is_int:
            return IntDistribution(int(self.start), int(self.end), log=self.log, step=int(self.step or 1))
        return FloatDistribution(float(self.start), float(self.end), log=self.log, step=self.step)


@runtime_checkable
class Searchable(Protocol):
    """An object whose fields may hold `List` and `Range`."""

    def search_fields(self) -> Mapping[str, Any]:
        """The fields to look into, by name."""

    def with_fields(self, fields: Mapping[str, Any]) -> Any:
        """The same object with these values in place of its own."""


@dataclass(frozen=True)
class Member:
    """The step of a path that goes into the `index`-th value of a `List`."""

    index: int


Path: TypeAlias = tuple[str | int | Member, ...]
Pick: TypeAlias = Callable[[Path, List | Range], Any]


@dataclass(frozen=True)
class Combination:
    """One point of a grid: its parameters, as Optuna stores them, and the value with nothing left to choose."""

    params: dict[str, Choice]
    value: Any


@dataclass(frozen=True)
class Space:
    """A value with `List` and `Range` in it, and a stable name for each of them.

    A name is the last step of the way to the parameter where that is unambiguous (`r`, `learning_rate`), else the
    dotted way (`training_args.beta`). Members of a `List` share a name for a field in which they offer the same; where
    they differ, it carries the member's index (`peft_config[0].r`).
    """

    value: Any
    root: str = "config"

    @cached_property
    def names(self) -> dict[Path, str]:
        """Path -> name of every `List` and `Range`."""
        groups: dict[str, list[tuple[Path, BaseDistribution]]] = {}
        for path, node in _walk(self.value, ()):
            groups.setdefault(_dotted(path, self.root), []).append((path, node.distribution))
        dotted: dict[Path, str] = {}
        for name, group in groups.items():
            first_path, first = group[0]
            # Paths of different lengths: a List in a List, where one trial has both.
            alike = all(len(path) == len(first_path) and offer == first for path, offer in group)
            for path, _ in group:
                dotted[path] = name if alike else _dotted(path, self.root, members=True)
        by_last_step: dict[str, set[str]] = {}
        for name in dotted.values():
            by_last_step.setdefault(_last_step(name), set()).add(name)
        return {p: _last_step(name) if len(by_last_step[_last_step(name)]) == 1 else name for p, name in dotted.items()}

    def distributions(self) -> dict[str, BaseDistribution]:
        """Name -> Optuna distribution, those that only some members of a `List` have included."""
        nodes = dict(_walk(self.value, ()))
        return {name: nodes[path].distribution for path, name in self.names.items()}

    def suggest(self, trial: BaseTrial) -> Any:
        """The value with every `List` and `Range` replaced by what the trial suggests."""

        def pick(path: Path, node: List | Range) -> Any:
            name = self.names[path]
            if isinstance(node, List):
                return node.choices.index(trial.suggest_categorical(name, node.choices))
            if node.is_int:
                return trial.suggest_int(name, int(node.start), int(node.end), log=node.log, step=int(node.step or 1))
            return trial.suggest_float(name, node.start, node.end, log=node.log, step=node.step)

        return _resolve(self.value, (), pick)

    def grid(self, needs: str = "a grid") -> list[Combination]:
        """All combinations, the last field varying fastest.

        Args:
            needs: What asks for the grid, for the error.

        Raises:
            ValueError: A `Range` (a grid needs the values), or more than `GRID_LIMIT` combinations.
        """
        for path, node in _walk(self.value, ()):
            if isinstance(node, Range):
                raise ValueError(
                    f"`{_dotted(path, self.root)}` is a Range, and {needs} needs values. Write "
                    f"List([{node.start!r}, ..., {node.end!r}]), or take RFRandomSearch or RFOptuna."
                )
        size = _size(self.value)
        if size > GRID_LIMIT:
            raise ValueError(
                f"The grid has {size} combinations, more than {GRID_LIMIT}. Take RFRandomSearch or RFOptuna."
            )
        return [Combination(params, value) for params, value in self._expand(self.value, ())]

    def _expand(self, value: Any, path: Path) -> Iterator[tuple[dict[str, Choice], Any]]:
        if isinstance(value, List):
            for index, (choice, member) in enumerate(zip(value.choices, value.values, strict=True)):
                for params, concrete in self._expand(member, (*path, Member(index))):
                    yield {self.names[path]: choice, **params}, concrete
            return
        children = _children(value)
        if not children:
            yield {}, value
            return
        expanded = [list(self._expand(child, (*path, step))) for step, child in children.items()]
        for point in product(*expanded):
            params = {name: choice for part, _ in point for name, choice in part.items()}
            yield params, _rebuild(value, dict(zip(children, (child for _, child in point), strict=True)))


def grid(value: Any) -> list[Combination]:
    """All combinations of a space; see `Space.grid`.

    >>> [point.params for point in grid({"r": List([4, 8]), "lr": List([1e-4])})]
    [{'r': 4, 'lr': 0.0001}, {'r': 8, 'lr': 0.0001}]
    """
    return Space(value).grid()


def suggest(value: Any, trial: BaseTrial) -> Any:
    """The space with an Optuna trial's choices filled in; see `Space.suggest`.

    >>> import optuna
    >>> suggest({"r": List([4, 8]), "bias": "none"}, optuna.trial.FixedTrial({"r": 8}))
    {'r': 8, 'bias': 'none'}
    """
    return Space(value).suggest(trial)


def distributions(value: Any) -> dict[str, BaseDistribution]:
    """Parameter name -> Optuna distribution of a space; see `Space.distributions`."""
    return Space(value).distributions()


def is_concrete(value: Any) -> bool:
    """Whether nothing in the value is left to choose."""
    return next(_walk(value, ()), None) is None


def _walk(value: Any, path: Path) -> Iterator[tuple[Path, List | Range]]:
    if isinstance(value, (List, Range)):
        yield path, value
    if isinstance(value, List):
        for index, member in enumerate(value.values):
            yield from _walk(member, (*path, Member(index)))
    for step, child in _children(value).items():
        yield from _walk(child, (*path, step))


def _children(value: Any) -> Mapping[Any, Any]:
    """What a container holds, by the step that leads there; empty for everything else."""
    if isinstance(value, Searchable):
        return value.search_fields()
    if isinstance(value, Mapping):
        return value
    if type(value) in (list, tuple):
        return dict(enumerate(value))
    return {}


def _rebuild(value: Any, children: Mapping[Any, Any]) -> Any:
    if isinstance(value, Searchable):
        return value.with_fields(children)
    if isinstance(value, Mapping):
        return dict(children)
    return type(value)(children.values())


def _resolve(value: Any, path: Path, pick: Pick) -> Any:
    if isinstance(value, Range):
        return pick(path, value)
    if isinstance(value, List):
        index = pick(path, value)
        return _resolve(value.values[index], (*path, Member(index)), pick)
    if is_concrete(value):
        return value
    return _rebuild(value, {step: _resolve(child, (*path, step), pick) for step, child in _children(value).items()})


def _size(value: Any) -> int:
    if isinstance(value, List):
        return sum(_size(member) for member in value.values)
    return math.prod(_size(child) for child in _children(value).values())


def _dotted(path: Path, root: str, *, members: bool = False) -> str:
    """`("peft_config", Member(0), "r")` -> `peft_config.r`, or `peft_config[0].r` with `members`."""
    text = ""
    for step in path:
        if isinstance(step, Member):
            text = f"{text or root}[{step.index}]" if members else text
        elif isinstance(step, int):
            text = f"{text or root}[{step}]"
        else:
            text = f"{text}.{step}" if text else str(step)
    return text or root


def _last_step(name: str) -> str:
    return name.rpartition(".")[2]


def _labels(values: tuple[Any, ...]) -> tuple[str, ...]:
    """A short text per value, all different; values with fields are told apart by those in which they differ."""
    fields = [_leaves(value) if isinstance(value, (Searchable, Mapping)) else None for value in values]
    known = [own for own in fields if own is not None]
    same = {
        name for name, text in (known[0].items() if len(known) > 1 else ()) if all(f.get(name) == text for f in known)
    }
    shown = {name for own in known for name in own if name not in same}
    last_steps = [_last_step(name) for name in shown]
    texts = []
    for value, own in zip(values, fields, strict=True):
        parts = {} if own is None else {name: text for name, text in own.items() if name in shown}
        short = {n: _last_step(n) if last_steps.count(_last_step(n)) == 1 else n for n in parts}
        text = _label(value) if own is None else " ".join(f"{short[n]}={part}" for n, part in parts.items()) or "{}"
        texts.append(text if len(text) <= _LABEL_LENGTH else f"{text[: _LABEL_LENGTH - 3]}...")
    if len(set(texts)) < len(texts):
        texts = [f"{index}: {text}" for index, text in enumerate(texts)]
    return tuple(texts)


def _leaves(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted name -> text of everything in nested fields."""
    leaves: dict[str, str] = {}
    for name, child in _children(value).items():
        if isinstance(child, (Searchable, Mapping)) and _children(child):
            leaves |= _leaves(child, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = _label(child)
    return leaves


def _label(value: Any) -> str:
    if isinstance(value, (List, Range, str)) or value is None or isinstance(value, (bool, numbers.Number)):
        return str(value)
    if isinstance(value, (Searchable, Mapping)):
        return "{" + " ".join(f"{name}={_label(child)}" for name, child in _children(value).items()) + "}"
    if isinstance(value, (list, tuple)):
        return ",".join(_label(child) for child in value)
    if isinstance(value, (set, frozenset)):
        return ",".join(sorted(_label(child) for child in value))
    name = getattr(value, "__name__", None)
    if isinstance(name, str):
        return name
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text


def _is_finite_float(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, str):
        raise ValueError(f'`{name}` must be a number, got the string "{value}". Write it without quotes.')
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"`{name}` must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}.")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _whole(name: str, value: int | float, fix: str = "") -> int:
    if value != int(value):
        raise ValueError(f"`{name}` must be a whole number in a Range of whole numbers, got {value}.{fix}")
    return int(value)
