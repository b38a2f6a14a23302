"""Reward functions by name, and the built-in ones."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest

from rapidfire_automl.rewards import BUILTIN, as_rewards, check_columns, exact_match, name_of, reasoning_gym, text_of


def chat(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def lengths(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float(len(text_of(completion))) for completion in completions]


async def slow(completions: Any, source: Any, **columns: Any) -> list[float]:
    return [0.0 for _ in completions]


class Judge:
    def __call__(self, completions: Any, **columns: Any) -> list[float]:
        return [1.0 for _ in completions]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_rewards_beside.py").write_text("def short(completions, **_):\n    return [0.0]\n\nLIMIT = 3\n")
    (tmp_path / "my_broken_rewards.py").write_text("raise RuntimeError('no licence')\n")
    return tmp_path


def test_names_functions_and_lists() -> None:
    here = f"{__name__}:lengths"
    assert as_rewards(lengths) == [lengths]
    assert as_rewards(here)[0].__name__ == "lengths"
    assert as_rewards([here, "exact_match", slow])[1:] == [exact_match, slow]
    assert name_of(functools.partial(functools.partial(lengths))) == "lengths"
    assert name_of(as_rewards(Judge())[0]) == "Judge"


def test_a_module_beside_the_search_file(folder: Path) -> None:
    (found,) = as_rewards("my_rewards_beside:short", "reward", folder)
    assert found(completions=["a"]) == [0.0]
    import sys

    assert str(folder) not in sys.path


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (None, "`reward` must be given: GRPO and RLOO learn from rewards"),
        ([], "`reward` must be given"),
        ("exact_macth", 'Did you mean "exact_match"?'),
        ("org/reward-model", "A reward model must be given loaded."),
        ("no_such_module:f", "cannot be imported: No module named 'no_such_module'"),
        ("my_broken_rewards:f", "cannot be imported: RuntimeError: no licence"),
        ("my_rewards_beside:shrot", "has no function shrot. Did you mean my_rewards_beside:short?"),
        ("my_rewards_beside:LIMIT", "is no function, it is int"),
        (Judge, "`reward` must be a function"),
        (3, "`reward` must be a function"),
        (lambda completions: [0.0], "<lambda> must take `**columns`"),
        ("os.path:join", "join must take `**columns`"),
    ],
)
def test_what_is_no_reward(given: Any, named: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        as_rewards(given, "reward", folder)


def test_columns_a_reward_asks_for() -> None:
    check_columns([lengths, Judge(), exact_match], ["prompt", "answer"], "data.train")
    check_columns([functools.partial(slow, source=1)], ["prompt"], "data.train")
    with pytest.raises(ValueError, match=r"`data\.train` lacks the column `prompt`, got question"):
        check_columns([], ["question"], "data.train")
    with pytest.raises(ValueError, match=r"`data\.train` lacks the column `source`, which the reward slow asks for"):
        check_columns([slow], ["prompt", "answer"], "data.train")
    with pytest.raises(ValueError, match="`reasoning_rows` and"):
        check_columns([reasoning_gym], ["prompt"], "data.train")


def test_exact_match_plain_and_in_chat_form() -> None:
    said = ["4", " 4\n", "It is <answer>3</answer>, no: <answer> 4 </answer>.", "4.", ""]
    right = [1.0, 1.0, 1.0, 0.0, 0.0]
    assert exact_match(completions=said, answer=["4"] * 5, prompts=said) == right
    assert exact_match(completions=[chat(text) for text in said], answer=[4] * 5) == right
    assert exact_match(completions=["4"], answer=[None]) == [None]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "4"}]}]
    assert exact_match(completions=[parts, []], answer=["4", "4"]) == [1.0, 0.0]


def test_every_name_is_a_function() -> None:
    assert all(reward.__name__ == name for name, reward in BUILTIN.items())
