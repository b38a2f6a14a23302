"""Reward functions: TRL's contract, the built-in ones, and how a name in a file or a config becomes one.

A reward function is called with keywords, `f(prompts=..., completions=..., <column>=..., **more)`, each a list with one
entry an answer, and returns one number an answer, None where it has no opinion. It may be async. Prompts in chat form
come with completions in chat form, lists of messages.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from rapidfire_automl.hints import nearest
from rapidfire_automl.reasoning import COLUMN, score

RewardFunc: TypeAlias = Callable[..., Any]

GIVEN = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
)
"""What TRL hands to a reward function beside the columns of the data set."""

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def text_of(completion: Any) -> str:
    """The text of a completion, plain or in chat form (its last message)."""
    if isinstance(completion, str):
        return completion
    if not completion:
        return ""
    content = completion[-1].get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def answer_in(completion: Any) -> str:
    """What counts as the answer: what stands between the last `<answer>` and `</answer>`, else the whole text.

    >>> answer_in("It is <answer> 4 </answer>."), answer_in(" 4 ")
    ('4', '4')
    """
    text = text_of(completion)
    found: list[str] = _TAGGED.findall(text)
    return (found or [text])[-1].strip()


def exact_match(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """1 for the answer of the column `answer` to the letter, space around it aside, else 0; None where that is None.

    >>> exact_match(completions=["4", "<answer>5</answer>", "6"], answer=["4", 5, None])
    [1.0, 1.0, None]
    """
    return [
        None if right is None else float(answer_in(completion) == str(right).strip())
        for completion, right in zip(completions, answer, strict=True)
    ]


def reasoning_gym(completions: Sequence[Any], task_entry: Sequence[str], **_: Any) -> list[float]:
    """The score that the row's task of reasoning-gym gives the answer, in [0, 1]; 0 where its scorer raises."""
    return [score(answer_in(completion), entry) for completion, entry in zip(completions, task_entry, strict=True)]


BUILTIN: Mapping[str, RewardFunc] = {"exact_match": exact_match, "reasoning_gym": reasoning_gym}
"""Rewards that have a name."""


def as_rewards(given: Any, where: str = "reward_funcs", folder: Path | None = None) -> list[RewardFunc]:
    """The reward functions that a config or a file means.

    Args:
        given: A function, a name of `BUILTIN`, `"module:function"`, a reward model, or a list of such.
        where: The field's name, for errors.
        folder: Where modules are looked up beside `sys.path`.

    Raises:
        ValueError: None is given, a name that means nothing, a module that can't be imported, or no function.
    """
    parts = list(given) if isinstance(given, (list, tuple)) else [given]
    if given is None or not parts:
        raise ValueError(
            f"`{where}` must be given: GRPO and RLOO learn from rewards. Write a function, "
            f'"module:function", or one of {", ".join(sorted(BUILTIN))}.'
        )
    return [_as_reward(part, where, folder) for part in parts]


def check_columns(rewards: Iterable[RewardFunc], columns: Iterable[str], where: str) -> None:
    """Refuse rows without a prompt, or without a column that a reward function can't do without.

    Args:
        rewards: Functions.
        columns: Of the data set.
        where: The data set's name, for errors.

    Raises:
        ValueError: A column is missing.
    """
    have = set(columns)
    # TRL keeps these two to itself.
    given = have - {"prompt", "completion"}
    if "prompt" not in have:
        raise ValueError(f"`{where}` lacks the column `prompt`, got {', '.join(sorted(have))}.")
    for reward in rewards:
        for name in sorted(_needed(reward) - given):
            fix = " `reasoning_rows` and `[data] reasoning_gym` make it." if name == COLUMN else ""
            raise ValueError(
                f"`{where}` lacks the column `{name}`, which the reward {name_of(reward)} asks for, got "
                f"{', '.join(sorted(have))}.{fix}"
            )


def name_of(reward: RewardFunc) -> str:
    """What a reward function is called."""
    if isinstance(reward, functools.partial):
        return name_of(reward.func)
    return str(getattr(reward, "__name__", type(reward).__name__))


def _as_reward(given: Any, where: str, folder: Path | None) -> RewardFunc:
    if isinstance(given, str):
        if given in BUILTIN:
            return BUILTIN[given]
        if ":" not in given:
            near = nearest(given, BUILTIN)
            hint = f' Did you mean "{near}"?' if near else " A reward model must be given loaded."
            raise ValueError(
                f'`{where}` must be "module:function" or one of {", ".join(sorted(BUILTIN))}, got "{given}".{hint}'
            )
        found = _imported(given, where, folder)
        if not callable(found):
            raise ValueError(f"`{where}`: {given} is no function, it is {type(found).__name__}.")
        given = found
    if not callable(given) or inspect.isclass(given):
        raise ValueError(f'`{where}` must be a function or "module:function", got {given!r}.')
    reward: RewardFunc = given
    parameters = _parameters(reward)
    if parameters and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"`{where}`: {name_of(reward)} must take `**columns`: every column comes as a keyword, and so does "
            "`trainer_state` and more."
        )
    return reward


def _imported(name: str, where: str, folder: Path | None) -> Any:
    module, _, attribute = name.partition(":")
    try:
        with _findable(folder):
            found = importlib.import_module(module)
    except Exception as error:  # a module of the user's own raises what it likes
        why = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"`{where}`: {name} cannot be imported: {why}.") from error
    try:
        return functools.reduce(getattr, attribute.split("."), found)
    except AttributeError:
        functions = [key for key, value in vars(found).items() if inspect.isfunction(value)]
        near = nearest(attribute, functions)
        hint = f" Did you mean {module}:{near}?" if near else ""
        raise ValueError(f"`{where}`: {module} has no function {attribute}.{hint}") from None


@contextmanager
def _findable(folder: Path | None) -> Iterator[None]:
    """While open, modules in a folder and in the current one can be imported, after those that are installed."""
    before = list(sys.path)
    sys.path.extend([*([str(folder.absolute())] if folder is not None else []), str(Path.cwd())])
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def _needed(reward: RewardFunc) -> set[str]:
    """The columns without which a call would fail; none where that can't be told."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = _parameters(reward)
    return {p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty} - GIVEN


def _parameters(reward: RewardFunc) -> list[inspect.Parameter]:
    """What a call takes; nothing where that can't be told, as of reward models, which TRL calls in its own way."""
    if hasattr(reward, "forward"):
        return []
    try:
        return list(inspect.signature(reward).parameters.values())
    except (TypeError, ValueError):
        return []
