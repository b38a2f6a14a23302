"""A search file: what it may say, and the one line every mistake in it gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rapidfire_automl.hints import nearest, unknown
from rapidfire_automl.program import build_pruner
from rapidfire_automl.settings import Range, SettingsError, apply_override, load_settings, parse_settings
from rapidfire_policies import ASHA, CostAware, Median

GOOD: dict[str, Any] = {
    "base": "org/model",
    "data": {"train": "a.jsonl", "eval": "b.jsonl"},
    "space": {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "r": [4, 8], "lora": {"lora_alpha": [8, 16]}},
}


def message(*overrides: str, **changes: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        parse_settings({**GOOD, **changes}, overrides)
    return str(caught.value)


def test_defaults_and_short_forms() -> None:
    settings = parse_settings(GOOD)
    assert settings.base.model == "org/model"
    assert settings.trainer == "sft"
    assert settings.search.policy.name == "auto"
    assert settings.space["learning_rate"] == Range(low=1e-5, high=1e-2, log=True)
    assert settings.space["lora.lora_alpha"] == [8, 16]


def test_integers_stay_integers() -> None:
    domain = parse_settings(GOOD, ["space.r={low = 4, high = 16}"]).space["r"]
    assert isinstance(domain, Range)
    assert isinstance(domain.low, int)


def test_plugin_with_arguments() -> None:
    search = parse_settings(GOOD, ["search.policy.budget=40", "search.sampler=random"]).search
    assert (search.policy.name, search.policy.arguments) == ("auto", {"budget": 40})
    assert search.sampler.name == "random"


def test_a_wrapped_policy_is_a_table_in_a_table() -> None:
    search = parse_settings(
        GOOD, ['search.policy={name = "cost_aware", policy = {name = "asha", reduction_factor = 2}}']
    )
    assert build_pruner(search).policy == CostAware(ASHA(reduction_factor=2))  # type: ignore[attr-defined]
    by_line = parse_settings(GOOD, ["search.policy=cost_aware", "search.policy.policy=median"])
    assert build_pruner(by_line).policy == CostAware(Median())  # type: ignore[attr-defined]
    deeper = parse_settings(
        GOOD, ["search.policy=cost_aware", "search.policy.policy=asha", "search.policy.policy.min_resource=2"]
    )
    assert build_pruner(deeper).policy == CostAware(ASHA(min_resource=2))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ('{name = "cost_awar"}', r"^`search\.policy` must be one of .*Did you mean `costaware`\?"),
        ('{name = "cost_aware", chunks = 2}', r"`chunks` is no argument of CostAware.*min_chunks"),
        ('{name = "cost_aware", policy = "ahsa"}', r"^`search\.policy\.policy` must be one of .*Did you mean `asha`\?"),
        ('{name = "cost_aware", policy = {name = "asha", reduction = 2}}', "Did you mean `reduction_factor`"),
        ('{name = "cost_aware", policy = 3}', r"^`search\.policy\.policy` must be a policy, got 3"),
        ('{name = "math:pi"}', r"`search\.policy` 'math:pi' is no policy"),
    ],
)
def test_bad_policies(policy: str, expected: str) -> None:
    with pytest.raises(SettingsError, match=expected):
        build_pruner(parse_settings(GOOD, [f"search.policy={policy}"]))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("search.cost=flops", "`search.cost` must be one of 'tokens' or 'seconds', got 'flops'."),
        ("search.slotz=3", "`search.slotz` is no known key; did you mean `search.slots`?"),
        ("serch.slots=3", "`serch` is no known key; did you mean `search`?"),
        ("search.timeout=3", "`search.timeout` is no known key; did you mean `search.timeout_s`?"),
        ("space.learning_rate.lo=1", "did you mean `space.learning_rate.low`?"),
        ("search.slots=0", "`search.slots` must be >= 1, got 0."),
        ("search.n_trials=1.5", "`search.n_trials` must be an integer, got 1.5."),
        ("search.slots='8'", 'must be an integer, got the string "8". Write it without quotes.'),
        ("space.learning_rate.low='1e-5'", 'must be a number, got the string "1e-5". Write it without quotes.'),
        ("space.learning_rate.low=nan", "`space.learning_rate.low` must be finite, got nan."),
        ("space.learning_rate.high=inf", "`space.learning_rate.high` must be finite, got inf."),
        ("space.learning_rate.low=1.0", "`low` must be below `high`"),
        ("space.learning_rate.low=0.0", "`low` must be > 0 on a log scale"),
        ("space.r=[]", "`space.r` needs at least one choice, got []."),
        ("space.r=4", "A fixed value belongs in [args] or [lora]."),
        ("trainer=ppo", "`trainer` must be one of 'sft', 'dpo', 'grpo' or 'rloo', got 'ppo'."),
        ("search.direction=up", "`search.direction` must be one of"),
        ("data.eval_fraction=0.1", "`data.eval_fraction` and `data.eval` exclude each other"),
        ("data.train=''", "`data.train` must not be empty."),
        ("search=3", "`search` must be a table, got 3."),
        ("slots", "An override must look like `search.n_trials=16`, got `slots`."),
        ("trainer.x=1", "`trainer` is no table"),
    ],
)
def test_one_line_per_mistake(override: str, expected: str) -> None:
    changes = {"trainer": "sft"} if override == "trainer.x=1" else {}
    text = message(override, **changes)
    assert expected in text
    assert len(text.splitlines()) == 1


def test_held_out_examples_are_needed() -> None:
    assert "`data.eval` is missing" in message(data={"train": "a.jsonl"})
    assert parse_settings({**GOOD, "data": {"train": "a", "eval_fraction": 0.2}}).data.eval_fraction == 0.2


def test_missing_tables_are_named() -> None:
    with pytest.raises(SettingsError, match="`base` is missing"):
        parse_settings({key: value for key, value in GOOD.items() if key != "base"})
    assert "`space` is empty" in message(space={})


def test_all_mistakes_at_once() -> None:
    assert len(message("search.slots=0", "search.chunks=0").splitlines()) == 2


def test_override_leaves_the_tree_alone_and_reads_bare_words() -> None:
    tree = {"search": {"slots": 8}, "base": "a/b"}
    assert apply_override(tree, "base.dtype=float32")["base"] == {"model": "a/b", "dtype": "float32"}
    assert apply_override(tree, "search.slots=4")["search"] == {"slots": 4}
    assert tree == {"search": {"slots": 8}, "base": "a/b"}


def test_files(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="There is no file"):
        load_settings(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(SettingsError, match="is not valid TOML"):
        load_settings(tmp_path / "bad.toml")


def test_nearest() -> None:
    assert nearest("lr", ["learning_rate", "r"]) == "learning_rate"
    assert nearest("learning_rat", ["learning_rate", "r"]) == "learning_rate"
    assert nearest("zzz", ["learning_rate"]) is None
    assert unknown("zzz", ["a", "b"]) == "`zzz` is no known key; known are a, b."
