"""How the policies experiment's own tables are made: the tasks, the metric of right answers, a recording at toy size."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import provenance
from experiments.policies.record import collect, data, record, shortened, tasks_of
from experiments.policies.tasks import MAKERS, answer_errors, rows_of
from rapidfire_automl.records import TrialRecord
from tests.tiny.data import MODEL, additions, sums

HERE = Path(provenance.ROOT) / "experiments" / "policies"
SPACE: dict[str, Any] = {
    "learning_rate": {"low": 1e-3, "high": 1e-2},
    "r": {"choices": [2]},
    "alpha_over_r": {"choices": [2.0]},
    "lora_dropout": {"choices": [0.1]},
    "target_modules": {"choices": ["q_proj v_proj"]},
}
TASK: dict[str, Any] = {
    "trainer": "sft", "data": "sums", "rows": 8, "held_out": 6, "seed": 1, "trials": 2, "slots": 2, "chunks": 2,
    "max_steps": 4, "metric": "answer_errors", "eval_batch_size": 4, "model": "tests/tiny/model", "space": SPACE,
}  # fmt: skip


# -- tasks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_prompts_differ_and_the_seed_decides(name: str) -> None:
    rows = rows_of(name, 150, seed=3)
    assert len({row["prompt"] for row in rows}) == 150
    assert rows == rows_of(name, 150, seed=3)
    assert rows != rows_of(name, 150, seed=4)
    train, held_out = data(name, 20, 10, seed=3)
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert (len(train), len(held_out)) == (20, 10)


def test_answers_are_right() -> None:
    for name in ("products", "subtractions"):
        assert all(eval(row["prompt"].rstrip(" =")) == int(row["completion"]) for row in rows_of(name, 100, seed=0))
    for row in rows_of("backwards", 100, seed=0):
        assert row["completion"] == f" {str(eval(row['prompt'].rstrip(' =')))[::-1]}"
    for row in rows_of("reversals", 100, seed=0):
        assert row["completion"].split() == row["prompt"].split()[1:-1][::-1]
        assert 3 <= len(row["completion"].split()) <= 5

    for row in rows_of("remainders", 100, seed=0):
        assert int(row["completion"]) == eval(row["prompt"].rstrip(" ="))
    for row in rows_of("sequences", 100, seed=0):
        first, second, third = map(int, row["prompt"].split()[1:-1])
        assert int(row["completion"]) - third == third - second == second - first > 0
    for row in rows_of("sortings", 100, seed=0):
        assert row["completion"].split() == sorted(row["prompt"].split()[1:-1])
    for row in rows_of("largest", 100, seed=0):
        assert row["completion"].strip() == max(row["prompt"].split()[1:-1])


def test_wrong_answers_are_wrong_in_their_way() -> None:
    for name in ("near_misses", "longer_answers", "wrong_order"):
        for row in rows_of(name, 100, seed=0):
            right, chosen, rejected = eval(row["prompt"].rstrip(" =")), row["chosen"], row["rejected"]
            assert chosen == f" {str(right)[::-1] if name == 'wrong_order' else right}"
            assert rejected != chosen
            if name == "near_misses":
                assert abs(int(rejected) - right) == 1
            elif name == "longer_answers":
                assert rejected[:-1] == chosen
            else:
                assert rejected == f" {right}"


def test_wrong_picks_signs_and_places() -> None:
    for row in rows_of("wrong_pick", 100, seed=0):
        digits, rejected = row["prompt"].split()[1:-1], row["rejected"].strip()
        assert row["chosen"].strip() == max(digits) > rejected
        assert rejected in digits
    for row in rows_of("wrong_sign", 100, seed=0):
        assert int(row["chosen"]) == eval(row["prompt"].rstrip(" =")) == -int(row["rejected"]) != 0
    for row in rows_of("swapped_digits", 100, seed=0):
        chosen, rejected = row["chosen"], row["rejected"]
        assert int(chosen) == eval(row["prompt"].rstrip(" ="))
        assert (chosen[:-2], chosen[-2:]) == (rejected[:-2], rejected[-2:][::-1])
        assert chosen != rejected


def test_the_models_own_tasks_have_their_names() -> None:
    assert rows_of("sums", 5, seed=2) == list(sums(5, seed=2))
    assert set(rows_of("preferences", 1, seed=2)[0]) == {"prompt", "chosen", "rejected"}


def test_tasks_that_cannot_be_made() -> None:
    with pytest.raises(ValueError, match=r"must be one of sums, preferences, products, .*, got 'quotients'"):
        rows_of("quotients", 5, seed=0)
    with pytest.raises(ValueError, match="fewer prompts than products has, got 801"):
        rows_of("products", 801, seed=0)


# -- configuration -------------------------------------------------------------------------------------------------


def test_a_task_has_what_holds_for_all_and_its_own() -> None:
    common = {name: TASK[name] for name in ("seed", "slots", "model", "eval_batch_size", "chunks")}
    own = {name: value for name, value in TASK.items() if name not in common}
    tasks = tasks_of({**common, "a": own, "b": {**own, "chunks": 1, "arguments": {"weight_decay": 0.1}}})
    assert [(task["chunks"], task["arguments"], task["seed"]) for task in tasks.values()] == [
        (2, {}, 1), (1, {"weight_decay": 0.1}, 1),
    ]  # fmt: skip
    for changed, message in (
        ({"trainer": "grpo"}, "`trainer` must be 'sft' or 'dpo', got 'grpo'"),
        ({"sede": 3}, "a has a setting 'sede', which does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks_of({**common, "a": {**own, **changed}})
    with pytest.raises(ValueError, match="`chunks` must be given, for a or for all tasks"):
        tasks_of({name: value for name, value in {**common, "a": own}.items() if name != "chunks"})


@pytest.mark.parametrize("name", ["record.toml", "heldout.toml", "heldout2.toml"])
def test_the_committed_configurations_are_read(name: str) -> None:
    tasks = tasks_of(tomllib.loads((HERE / name).read_text(encoding="utf-8")))
    for task in tasks.values():
        assert len(rows_of(task["data"], task["rows"] + task["held_out"], task["seed"])) > task["rows"]
        assert task["trials"] >= 36


# -- recording -----------------------------------------------------------------------------------------------------


def test_records_become_arrays() -> None:
    records = [
        TrialRecord(0, {"r": 4}, scores=[np.array([1.0, 2.0]), np.array([3.0, 4.0])], tokens=[5, 6]),
        TrialRecord(1, {"r": 8}, scores=[np.array([7.0, 8.0])], tokens=[9]),
    ]
    made = collect(records, chunks=2, examples=2)
    assert made["scores"].tolist()[0] == [[1.0, 2.0], [3.0, 4.0]]
    assert made["scores"][1, 0].tolist() == [7.0, 8.0]
    assert np.isnan(made["scores"][1, 1]).all()
    assert made["tokens"].tolist() == [[5, 6], [9, 0]]
    assert json.loads(str(made["params"])) == [{"r": 4}, {"r": 8}]


def test_shortened_scores_keep_their_size_and_what_is_not_finite() -> None:
    scores = np.random.default_rng(0).normal(size=1000).astype(np.float32) * np.float32(1e30)
    np.testing.assert_array_equal(shortened(scores, 24), scores)
    near = shortened(scores, 10)
    assert near.dtype == np.float32
    assert 0 < np.abs(near / scores - 1).max() <= 2.0**-10
    assert not (near.view(np.int32) & (2**14 - 1)).any()  # 10 bits are the leading one and nine of the 23 stored
    np.testing.assert_array_equal(shortened(np.array([np.nan, np.inf, 0, 1]), 10), [np.nan, np.inf, 0, 1])


def test_right_answers_are_those_of_greedy_decoding(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from tests.tiny.make_model import answered

    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)
    rows = Dataset.from_list(additions())
    settings = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    trainer = SFTTrainer(model, settings, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    errors = answer_errors(trainer)
    assert set(errors.tolist()) == {0.0, 1.0}
    assert 100 - errors.sum() == answered(trainer.model.eval(), tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [{}, {"trainer": "dpo", "data": "wrong_order", "metric": "reward_margin", "arguments": {"beta": 0.5}}],
)
def test_a_recording_of_two_trials(changed: dict[str, Any]) -> None:
    (task,) = tasks_of({"toy": {**TASK, **changed}}).values()
    arrays, about = record("toy", task)
    assert (about["trials"], about["failed"], about["states"]) == (2, {}, ["complete"])
    assert arrays["toy_scores"].shape == (2, 2, 6)
    assert arrays["toy_base"].shape == (6,)
    assert np.isfinite(arrays["toy_scores"]).all()
    assert (arrays["toy_tokens"] > 0).all()
    params = json.loads(str(arrays["toy_params"]))
    assert [set(one) for one in params] == [set(SPACE)] * 2
    if not changed:
        assert set(np.unique(arrays["toy_scores"])) <= {0.0, 1.0}
