"""The tests' own model and data are what they are taken for."""

from __future__ import annotations

import hashlib

import pytest

from tests.tiny.data import MODEL, additions, preferences, sums


def test_files_are_those_that_the_script_made() -> None:
    lines = (MODEL.parent / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    recorded = {name: digest for digest, name in (line.split("  ") for line in lines)}
    found = {f"model/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in MODEL.iterdir()}
    assert found == recorded


def test_it_answers_about_a_third_of_the_sums() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.tiny.make_model import answered

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    assert model.num_parameters() == 918_656
    assert len(tokenizer) == model.config.vocab_size == 1024
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert 25 <= answered(model, tokenizer) <= 50


def test_prompts_are_prefixes_of_whole_rows_in_tokens() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for row in sums(50):
        whole, prompt = (tokenizer(text).input_ids for text in (row["prompt"] + row["completion"], row["prompt"]))
        assert whole[: len(prompt)] == prompt
        assert tokenizer.decode(whole) == row["prompt"] + row["completion"]
    turns = [{"role": "user", "content": "3 + 4 ="}, {"role": "assistant", "content": "7"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "3 + 4 = 7<eos>"


def test_sums_are_right_and_different() -> None:
    rows = list(sums(500, seed=3))
    assert len({row["prompt"] for row in rows}) == 500
    for row in rows:
        digits = row["prompt"].removesuffix(" =").replace(" ", "")
        assert eval(digits) == int(row["completion"])
    assert rows == list(sums(500, seed=3))
    assert rows != list(sums(500, seed=4))
    assert len(additions()) == len({row["prompt"] for row in additions()}) == 100


@pytest.mark.parametrize("n", [0, 1, 5000])
def test_sums_are_as_many_as_asked_for(n: int) -> None:
    assert len(sums(n)) == n


def test_preferences_prefer_the_right_answer() -> None:
    for right, pair in zip(sums(100, seed=1), preferences(100, seed=1), strict=True):
        assert (pair["prompt"], pair["chosen"]) == (right["prompt"], right["completion"])
        assert pair["rejected"] != pair["chosen"]
