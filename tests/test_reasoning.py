"""Tasks of reasoning-gym: rows, and scores that survive a data set's column."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from datasets import Dataset, concatenate_datasets

from rapidfire_automl import reasoning_rows
from rapidfire_automl.reasoning import COLUMN, Task, pack, score, unpack
from rapidfire_automl.rewards import reasoning_gym


def test_rows_are_repeatable_and_apart() -> None:
    train, held_out = reasoning_rows("chain_sum", 40, 10, max_terms=2, max_digits=1, template="{question} =>")
    again, _ = reasoning_rows("chain_sum", 80, 10, max_terms=2, max_digits=1, template="{question} =>")
    assert again[:40] == train
    asked = {row["prompt"] for row in held_out}
    assert len(asked) == 10
    assert not asked & {row["prompt"] for row in train}
    assert all(row["prompt"].endswith(" =>") for row in train)
    assert reasoning_rows("chain_sum", 40, 10, seed=1, max_terms=2, max_digits=1)[0] != train


def test_mixed_tasks_share_a_data_set_and_keep_their_scores() -> None:
    names = ["chain_sum", "word_sequence_reversal", Task("rearc"), Task("basic_arithmetic", {"max_terms": 3})]
    train, held_out = reasoning_rows(names, 12, 4, chat=True, system="Be brief.")
    rows = concatenate_datasets([Dataset.from_list(train), Dataset.from_list(held_out)])
    assert [message["role"] for message in rows[0]["prompt"]] == ["system", "user"]
    right = [[{"role": "assistant", "content": f"<answer>{row['answer']}</answer>"}] for row in rows]
    assert reasoning_gym(prompts=None, completions=right, **{COLUMN: rows[COLUMN]}) == [1.0] * 16
    assert max(reasoning_gym(completions=["no"] * 16, **{COLUMN: rows[COLUMN]})) < 0.1


def test_json_keeps_what_scorers_compare_by() -> None:
    value = {"a": (1, [2, (3,)]), "b": {1: "x", (2, 3): None}, "c": 1.5, "d": [True]}
    assert unpack(pack(value)) == value
    assert isinstance(unpack(pack(value))["a"], tuple)


def test_a_scorer_that_raises_gives_nothing() -> None:
    task = Task("prime_factorization")
    entry = task.make(seed=0, size=1)[0]
    with pytest.raises(ValueError, match="invalid literal"):
        task.make(seed=0, size=1).score_answer("wrong", entry)
    packed = pack({"task": task.name, "entry": entry})
    assert score("wrong", packed) == 0.0
    assert score(entry["answer"], packed) == 1.0


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"task": "game_of_life_halting"}, "game_of_life_halting can't be a reward"),
        ({"task": "composite"}, "name the tasks one by one"),
        ({"task": "chain_sun"}, "Did you mean 'chain_sum'?"),
        ({"task": "chain_sum", "max_term": 2}, "Did you mean `max_terms`?"),
        ({"task": "chain_sum", "min_terms": 9, "max_terms": 2}, "The task chain_sum does not take"),
        ({"task": "chain_sum", "size": 0}, "`size` must be >= 1"),
        ({"task": "chain_sum", "template": "go"}, "`template` must hold"),
        ({"task": "chain_sum", "system": "Be brief."}, "`system` needs"),
        ({"task": ["chain_sum", "gcd"], "max_terms": 2}, "Options \\(max_terms\\) need one task's name"),
        ({"task": []}, "at least one task"),
        ({"task": "chain_sum", "max_terms": 2, "max_digits": 1, "eval_size": 200}, "different held-out questions"),
    ],
)
def test_mistakes(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        reasoning_rows(**{"size": 8, "eval_size": 4, **given})


def test_a_column_of_something_else() -> None:
    for packed in ("{", "{}", '{"task": "game_of_life_halting", "entry": {}}'):
        with pytest.raises(ValueError, match=r"`task_entry` must be|can't be a reward"):
            score("4", packed)


def test_without_the_package_the_pip_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ModuleNotFoundError, match="pip install reasoning-gym"):
        reasoning_rows("chain_sum", 8, 4)


@pytest.mark.slow
def test_every_task_survives_the_column() -> None:
    from reasoning_gym.factory import DATASETS

    for name in sorted(set(DATASETS) - {"composite", "game_of_life_halting"}):
        task = Task(name)
        made = task.make(seed=5, size=2)
        entry = made[0]
        back = unpack(pack(entry))
        for answer in (entry["answer"], "7", ""):
            try:
                expected = float(made.score_answer(answer, entry))
            except Exception:
                continue
            assert float(made.score_answer(answer, back)) == expected, (name, answer)
