"""Prompts and scores from `reasoning-gym`: over a hundred tasks whose answers a program can make and check.

The package is an extra, imported at the first use. Its scorers run in this process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any

from rapidfire_automl.hints import nearest

COLUMN = "task_entry"
"""The column that holds what a task needs to score an answer, as JSON: tasks of different metadata share a data set."""

_REFUSED = {
    "game_of_life_halting": "it takes any answer for right that Python takes for true",
    "composite": "name the tasks one by one",
}
_TUPLE, _PAIRS = "__tuple__", "__pairs__"


@dataclass(frozen=True)
class Task:
    """A task with its options.

    Args:
        name: One of reasoning-gym's, like "chain_sum".
        options: Fields of the task's config.

    Raises:
        ModuleNotFoundError: reasoning-gym is missing; names the pip line.
        ValueError: An unknown task or option, a value that the task doesn't take, or a task that can't be a reward.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)
        known = _tasks()[self.name][1].__dataclass_fields__
        for option in self.options:
            if option not in known or option in ("seed", "size"):
                near = nearest(option, known)
                hint = f" Did you mean `{near}`?" if near else f" It has {', '.join(sorted(known))}."
                raise ValueError(f"`{option}` is no option of the task {self.name}.{hint}")
        self.make(seed=0, size=1)

    def make(self, seed: int, size: int) -> Any:
        """The task's data set of reasoning-gym."""
        from reasoning_gym import create_dataset

        try:
            return create_dataset(self.name, seed=seed, size=size, **self.options)
        except Exception as error:  # configs check themselves with assert, and with whatever else
            raise ValueError(f"The task {self.name} does not take {dict(self.options)}: {error}") from error


def check_name(name: str) -> None:
    """Refuse a task that reasoning-gym doesn't have, or that can't be a reward.

    Raises:
        ModuleNotFoundError: reasoning-gym is missing; names the pip line.
        ValueError: As said.
    """
    if name in _REFUSED:
        raise ValueError(f"The task {name} can't be a reward: {_REFUSED[name]}.")
    if name not in _tasks():
        near = nearest(name, _tasks())
        raise ValueError(f"reasoning-gym has no task {name!r}.{f' Did you mean {near!r}?' if near else ''}")


def reasoning_rows(
    task: str | Task | Sequence[str | Task],
    size: int,
    eval_size: int,
    *,
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
    template: str = "{question}",
    **options: Any,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompts to train on and prompts to compare trials by; no question of these stands among those.

    A row has `prompt`, `answer` (the task's own; text) and `task_entry`, from which the reward "reasoning_gym" scores.

    Args:
        task: A task's name, a `Task`, or several, whose rows alternate.
        size: Rows to train on; questions may repeat.
        eval_size: Rows to compare by, all different.
        seed: Same seed, same rows.
        chat: Whether the prompt is a chat of one user message, for bases with a chat template, or plain text.
        system: A system message before it; needs `chat`.
        template: The prompt, or user message, around `{question}`.
        options: Options of the task, where `task` is one name.

    Raises:
        ModuleNotFoundError: reasoning-gym is missing; names the pip line.
        ValueError: An unknown task or option, a number of rows < 1, or a task with too few different questions.

    Example:
        ```python
        train, held_out = reasoning_rows("chain_sum", 256, 64, max_terms=2, max_digits=1, template="{question} =")
        ```
    """
    for name, value in (("size", size), ("eval_size", eval_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be >= 1, got {value}.")
    if "{question}" not in template:
        raise ValueError(f"`template` must hold {{question}}, got {template!r}.")
    if system is not None and not chat:
        raise ValueError("`system` needs `chat = true`: a plain prompt has no messages.")
    given = [task] if isinstance(task, (str, Task)) else list(task)
    if options and not (len(given) == 1 and isinstance(given[0], str)):
        raise ValueError(f"Options ({', '.join(options)}) need one task's name. Write Task(name, {{...}}) for each.")
    tasks = [part if isinstance(part, Task) else Task(part, options) for part in given]
    if not tasks:
        raise ValueError("`task` must name at least one task, got none.")

    def row(task: Task, entry: Mapping[str, Any]) -> dict[str, Any]:
        text = template.replace("{question}", entry["question"])
        before = [] if system is None else [{"role": "system", "content": system}]
        return {
            "prompt": [*before, {"role": "user", "content": text}] if chat else text,
            "answer": "" if entry["answer"] is None else str(entry["answer"]),
            COLUMN: pack({"task": task.name, "options": dict(task.options), "entry": dict(entry)}),
        }

    # Held out first: with a longer training set, the prompts that trials are compared by stay the same.
    most = 4 * (size + eval_size) + 64
    train: list[dict[str, Any]] = []
    held_out: dict[str, dict[str, Any]] = {}
    for task, entry in _entries(tasks, seed, most):
        if entry["question"] in held_out:
            continue
        if len(held_out) < eval_size:
            held_out[entry["question"]] = row(task, entry)
        elif len(train) < size:
            train.append(row(task, entry))
        else:
            break
    if len(train) < size:
        names = ", ".join(task.name for task in tasks)
        raise ValueError(
            f"{names} made {len(held_out)} different held-out questions and {len(train)} others out of {most} tries, "
            f"fewer than {eval_size} and {size}. Take fewer, or options with more questions."
        )
    return train, list(held_out.values())


def score(answer: str, packed: str) -> float:
    """A task's own score of an answer; 0 where its scorer raises or gives no finite number.

    Args:
        answer: What was answered.
        packed: The row's `task_entry`.

    Raises:
        ValueError: `packed` is no entry, or its task can't be a reward.
    """
    name, options, entry = _unpacked(packed)
    try:
        value = float(_scorer(name, options).score_answer(answer, unpack(entry)))
    except Exception:  # scorers parse what a model wrote: that it cannot be parsed is no error of the search's
        return 0.0
    return value if math.isfinite(value) else 0.0


def pack(value: Any) -> str:
    """JSON that `unpack` reads as it was: tuples stay tuples and keys numbers, which some scorers compare by."""
    return json.dumps(_plain(value), ensure_ascii=False)


def unpack(text: str) -> Any:
    """What `pack` was given."""
    return json.loads(text, object_hook=_revived)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _plain(inner) for key, inner in value.items()}
        return {_PAIRS: [[_plain(key), _plain(inner)] for key, inner in value.items()]}
    if isinstance(value, (tuple, set, frozenset)):
        return {_TUPLE: [_plain(inner) for inner in value]}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return value.item() if hasattr(value, "item") else str(value)


def _revived(found: dict[str, Any]) -> Any:
    if found.keys() == {_TUPLE}:
        return tuple(found[_TUPLE])
    if found.keys() == {_PAIRS}:
        return dict(found[_PAIRS])
    return found


def _entries(tasks: Sequence[Task], seed: int, most: int) -> Iterator[tuple[Task, Mapping[str, Any]]]:
    """Entries of the tasks in turn, at most `most` in all."""
    # reasoning-gym seeds row i with seed + i: neighbouring seeds would share all but one row.
    made = [task.make(seed=10_000_000 * seed, size=most) for task in tasks]
    for place in count():
        for task, rows in zip(tasks, made):
            if place * len(tasks) >= most:
                return
            try:
                yield task, rows[place]
            except Exception as error:
                raise ValueError(f"The task {task.name} cannot make a row of {dict(task.options)}: {error}") from error


@cache
def _unpacked(packed: str) -> tuple[str, str, str]:
    """The task, its options and its entry, the last two packed again: a scorer may write into what it gets."""
    try:
        found = unpack(packed)
        name, options, entry = found["task"], pack(found.get("options", {})), pack(found["entry"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`{COLUMN}` must be what `reasoning_rows` writes, got {packed[:60]!r}.") from error
    check_name(name)
    return name, options, entry


@cache
def _scorer(name: str, options: str) -> Any:
    return Task(name, unpack(options)).make(seed=0, size=1)


def _tasks() -> Mapping[str, tuple[Any, Any]]:
    """reasoning-gym's tasks: name -> its data set's class and its config's."""
    try:
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "The task comes from `reasoning-gym`. Install it: pip install reasoning-gym"
        ) from None
    return DATASETS  # type: ignore[no-any-return]
