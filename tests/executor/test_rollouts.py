"""GRPO and RLOO trials against plain TRL, one at a time: every completion, logs, gradients, adapters."""

from __future__ import annotations

import asyncio
import copy
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import DPOTrainer, RLOOTrainer

from rapidfire_automl import Sampling
from rapidfire_automl.plan import Plan
from tests.executor.helpers import (
    ALONE,
    JOINT,
    Result,
    Spec,
    differences,
    open_executor,
    tiny_tokenizer,
    train_alone,
    train_together,
    weight_difference,
)
from tests.executor.rollouts import SAMPLING, RolloutSpec, brevity, evenness, near, rollout_base

TOLERANCE = 1e-4
LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")

KNOBS = {
    "beta, dropout, all of sampling": RolloutSpec(
        lora={"r": 8, "lora_dropout": 0.2, "target_modules": "all-linear"},
        args={
            "beta": 0.05,
            "num_generations": 4,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 50,
            "max_completion_length": 9,
        },
    ),
    "two iterations, several rewards": RolloutSpec(
        args={
            "max_steps": 8,
            "num_iterations": 2,
            "steps_per_generation": 2,
            "repetition_penalty": 1.3,
            "min_p": 0.01,
            "reward_weights": [1.0, 2.0, 0.5],
            "scale_rewards": "batch",
            "beta": 0.1,
        },
        rewards=(evenness, near, brevity),
    ),
    "eight generations, accumulation": RolloutSpec(
        lora={"r": 2, "lora_dropout": 0.1},
        args={"num_generations": 8, "gradient_accumulation_steps": 2, "scale_rewards": "none", "seed": 3},
    ),
    "checkpointing, entropy bonus, no cut": RolloutSpec(
        args={
            "gradient_checkpointing": True,
            "entropy_coef": 0.01,
            "mask_truncated_completions": True,
            "temperature": 1.3,
            "multi_objective_aggregation": "normalize_then_sum",
        },
        rewards=(evenness, brevity),
    ),
    "greedy": RolloutSpec(args={"generation_kwargs": {"do_sample": False}, "importance_sampling_level": "sequence"}),
    "RLOO": RolloutSpec(trainer=RLOOTrainer, args={"beta": 0.05}),
    "RLOO, dropout": RolloutSpec(
        trainer=RLOOTrainer,
        lora={"lora_dropout": 0.1, "target_modules": ["v_proj", "down_proj"]},
        args={"num_generations": 4, "beta": 0.0, "temperature": 0.8, "normalize_advantages": True},
        rewards=(brevity, near),
    ),
}


@pytest.fixture(scope="module")
def ending() -> LlamaForCausalLM:
    """A tiny Llama that ends its answers now and then."""
    return rollout_base()


def by_loss(loss: str) -> RolloutSpec:
    level = "sequence" if loss == "luspo" else "token"
    args = {"loss_type": loss, "importance_sampling_level": level, "max_steps": 6, "num_iterations": 2}
    return RolloutSpec(lora={"lora_dropout": 0.1}, args={**args, "beta": 0.04 if loss in LOSSES[::2] else 0.0})


def apart(mine: Result, oracle: Result) -> dict[str, float]:
    """Relative differences of all that is logged, and of the adapter.

    On its own policy a loss is zero but for rounding, and so is a KL before the first update: they are told in units of
    what they are made of, advantages of about 1 and log-probabilities.
    """
    logged = differences(mine.log, oracle.log)
    for name, unit in (("loss", 1.0), ("train_loss", 1.0), ("kl", 0.01)):
        pairs = [(a[name], b[name]) for a, b in zip(mine.log, oracle.log, strict=True) if name in b]
        if pairs:
            logged[name] = max(abs(a - b) / max(abs(b), unit) for a, b in pairs)
    return {"adapter": weight_difference(mine, oracle), **logged}


def assert_parity(together: Sequence[Result], alone: Sequence[Result], names: Sequence[str]) -> None:
    """Completions token by token, then every number."""
    for name, mine, oracle in zip(names, together, alone, strict=True):
        trainer: Any = mine.trainer
        theirs: Any = oracle.trainer
        assert trainer.seen == theirs.seen, name
        lengths = {len(ids) for batch in trainer.seen for ids in batch}
        assert len(lengths) > 1 or name == "greedy", "no completion ended early"
        differ = apart(mine, oracle)
        print(name, {key: f"{value:.1e}" for key, value in differ.items() if value})
        assert {"loss", "reward", "entropy", "grad_norm"} <= differ.keys() or name.startswith("RLOO")
        assert max(differ.values()) < TOLERANCE, (name, differ)


def together_without_evaluation(base: LlamaForCausalLM, specs: Sequence[Spec], folder: Path, **more: Any) -> Any:
    """The trials, valued by nothing that would roll out."""
    return train_together(base, specs, folder, **({"metric": lambda trainer: float(trainer.state.global_step)} | more))


@pytest.mark.slow
def test_every_loss_in_company(ending: LlamaForCausalLM, tmp_path: Path) -> None:
    specs = [by_loss(loss) for loss in LOSSES]
    together = together_without_evaluation(ending, specs, tmp_path)
    assert all(result.record.fused for result in together)
    assert together[0].trials_per_pass > 4
    assert_parity(together, [train_alone(ending, spec, tmp_path / "alone") for spec in specs], LOSSES)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["together", "one at a time"])
def test_trials_that_differ_in_every_knob(ending: LlamaForCausalLM, tmp_path: Path, way: str) -> None:
    plan = ALONE if way == "one at a time" else JOINT
    together = together_without_evaluation(ending, list(KNOBS.values()), tmp_path, plan=plan)
    alone = [train_alone(ending, spec, tmp_path / "alone") for spec in KNOBS.values()]
    assert_parity(together, alone, list(KNOBS))


@pytest.mark.slow
def test_rows_leave_one_by_one(ending: LlamaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Odd numbers of rows with dropout, whose masks are drawn for those that have left, too.

    The adapters are far from zero, so that a wrong mask samples something else.
    """
    drop = {"lora_dropout": 0.3, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    specs = [
        RolloutSpec(
            lora=drop if rows % 2 else {},
            args={"per_device_train_batch_size": rows, "num_generations": rows, "max_completion_length": 14},
        )
        for rows in (3, 5, 8)
    ]
    together = together_without_evaluation(ending, specs, tmp_path)
    alone = [train_alone(ending, spec, tmp_path / "alone") for spec in specs]
    assert_parity(together, alone, ["three", "five", "eight"])
    assert "tried again" not in caplog.text


@pytest.mark.slow
def test_one_trial_alone(ending: LlamaForCausalLM, tmp_path: Path) -> None:
    spec = KNOBS["beta, dropout, all of sampling"]
    (mine,) = together_without_evaluation(ending, [spec], tmp_path)
    assert_parity([mine], [train_alone(ending, spec, tmp_path / "alone")], ["alone"])


@pytest.mark.slow
def test_beside_sft_dpo_and_what_cannot_join(ending: LlamaForCausalLM, tmp_path: Path) -> None:
    """Neighbours of other kinds, and a GRPO trial whose adapter keeps it out of joint passes."""
    dora = RolloutSpec(lora={"use_dora": True, "lora_dropout": 0.1}, args={"beta": 0.05})
    rolling = [KNOBS["eight generations, accumulation"], KNOBS["RLOO"], dora]
    others = [Spec(lora={"lora_dropout": 0.1}), Spec(trainer=DPOTrainer)]
    together = together_without_evaluation(ending, [others[0], *rolling, others[1]], tmp_path)
    assert [result.record.fused for result in together] == [True, True, True, False, True]
    alone = [train_alone(ending, spec, tmp_path / "alone") for spec in [others[0], *rolling, others[1]]]
    assert_parity(together[1:4], alone[1:4], ["eight", "RLOO", "DoRA"])
    for mine, oracle in ((together[0], alone[0]), (together[4], alone[4])):
        assert max(differences(mine.log, oracle.log).values()) < TOLERANCE
    counted = together[3].record
    answers = [ids for batch in together[3].trainer.seen for ids in batch]
    assert sum(counted.generated) == sum(map(len, answers))


def test_a_neighbour_changes_nothing(ending: LlamaForCausalLM, tmp_path: Path) -> None:
    """Not even the rounding of a trial's own pass, with one trial a pass; and no token in joint passes."""
    spec = KNOBS["beta, dropout, all of sampling"]
    others = [by_loss("grpo"), replace(by_loss("dapo"), lora={"r": 2}, args={"learning_rate": math.inf})]
    (alone,) = together_without_evaluation(ending, [spec], tmp_path / "1", plan=ALONE)
    company, *_, nan = together_without_evaluation(
        ending, [spec, *others], tmp_path / "2", plan=ALONE, allow_failures=True
    )
    assert max(differences(company.log, alone.log).values()) == 0.0
    assert all(torch.equal(company.weights[name], alone.weights[name]) for name in alone.weights)
    assert company.trainer.seen == alone.trainer.seen
    joint, *_ = together_without_evaluation(ending, [spec, *others], tmp_path / "3", allow_failures=True)
    assert joint.trainer.seen == alone.trainer.seen
    assert nan.record.error


def test_generated_and_trained_tokens_are_counted(ending: LlamaForCausalLM, tmp_path: Path) -> None:
    """By chunk, and without those of the evaluation."""
    spec = RolloutSpec(args={"num_generations": 4})
    (result,) = train_together(ending, [spec], tmp_path, eval_sampling=SAMPLING)
    record = result.record
    assert record is not None
    trainer: Any = result.trainer
    # What the evaluation samples is of another length.
    answers = [batch for batch in trainer.seen if len(batch) == 4]
    assert sum(record.generated) == sum(len(ids) for batch in answers for ids in batch)
    assert len(record.generated) == 2
    assert all(trained > made > 0 for trained, made in zip(record.tokens, record.generated, strict=True))


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rewards_are_compared_on_the_same_prompts_with_the_same_sampling(
    ending: LlamaForCausalLM, tmp_path: Path
) -> None:
    """Whatever a trial trains with; a value is the mean reward of its prompts, reproducible from the adapter."""
    specs = [
        RolloutSpec(args={"temperature": 0.5, "max_completion_length": 9, "learning_rate": 1e-12}),
        RolloutSpec(trainer=RLOOTrainer, args={"num_generations": 4, "top_k": 3, "learning_rate": 1e-12}),
    ]
    direction = {"direction": "maximize"}
    executor = open_executor(ending, tmp_path, slots=2, eval_sampling=SAMPLING, eval_batch_size=3)

    def objective(trial: optuna.Trial) -> Any:
        return specs[trial.number].build(executor.model(trial), executor.tokenizer, tmp_path / str(trial.number))

    with executor:
        executor.optimize(optuna.create_study(**direction), objective, n_trials=2)
        records, base_scores, base_value = executor.records, executor.base_scores, executor.base_value
    assert base_scores is not None
    for record in records.values():
        assert record.error is None
        assert len(record.scores[-1]) == 4
        assert record.values[-1] == pytest.approx(record.scores[-1].mean())
        # An adapter that has hardly moved samples what the base samples.
        np.testing.assert_allclose(record.scores[-1], base_scores, atol=1e-6)
    assert base_value == pytest.approx(base_scores.mean())
    assert 0 <= base_scores.min() < base_scores.max() <= 1


def test_the_sign_follows_the_study(ending: LlamaForCausalLM, tmp_path: Path) -> None:
    (result,) = train_together(ending, [RolloutSpec()], tmp_path, eval_sampling=SAMPLING)
    assert result.record is not None
    assert all(value <= 0 for value in result.record.values)


@pytest.mark.slow
def test_weights_that_differ_do_not_compare(ending: LlamaForCausalLM, tmp_path: Path) -> None:
    specs = [RolloutSpec(args={"reward_weights": [weight, 1.0]}, rewards=(evenness, brevity)) for weight in (1.0, 2.0)]
    failed = train_together(ending, specs, tmp_path, eval_sampling=SAMPLING, allow_failures=True)
    assert "`reward_weights` differ between trials" in failed[1].record.error  # type: ignore[union-attr, operator]
    agreed = replace(SAMPLING, reward_weights=(1.0, 1.0, 1.0))
    assert all(result.record.error is None for result in train_together(ending, specs, tmp_path, eval_sampling=agreed))  # type: ignore[union-attr]


@pytest.mark.slow
def test_evaluation_leaves_no_trace_in_the_trainers_log(ending: LlamaForCausalLM, tmp_path: Path) -> None:
    spec = replace(KNOBS["two iterations, several rewards"], args={"max_steps": 4, "beta": 0.02})
    (mine,) = train_together(ending, [spec], tmp_path, eval_sampling=SAMPLING, chunks=4)
    oracle = train_alone(ending, spec, tmp_path / "alone")
    assert max(apart(mine, oracle).values()) < TOLERANCE


# -- bad rewards -------------------------------------------------------------------------------------------------------


def raising(completions: list[str], **columns: Any) -> list[float]:
    raise KeyError("answer")


def raises_on_one(prompts: list[str], completions: list[str], wanted: list[int], **columns: Any) -> list[float]:
    if any(want % 2 for want in wanted):
        raise ValueError("an odd one")
    return [0.0] * len(prompts)


def too_few(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * (len(completions) - 1)


def not_a_number(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * (len(completions) - 1) + [math.nan]


def a_number(completions: list[str], **columns: Any) -> float:
    return 1.0


async def late(completions: list[str], **columns: Any) -> list[float]:
    raise TimeoutError("no judge")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (raising, "`raising` raised KeyError: 'answer' for row 0: prompt"),
        (raises_on_one, "`raises_on_one` raised ValueError: an odd one for row"),
        (too_few, "`too_few` must return one reward a completion, 4, got 3"),
        (not_a_number, "`not_a_number` must return finite numbers (or None for no reward), got nan for row 3: prompt"),
        (a_number, "`a_number` must return a list of numbers"),
        (late, "`late` raised TimeoutError: no judge"),
    ],
)
def test_a_bad_reward_function_fails_its_trial_alone(
    ending: LlamaForCausalLM, tmp_path: Path, reward: Any, says: str
) -> None:
    specs = [RolloutSpec(rewards=(reward,)), RolloutSpec()]
    bad, good = together_without_evaluation(ending, specs, tmp_path, allow_failures=True)
    assert says in bad.record.error
    assert good.record.error is None


def test_no_reward_at_all_names_the_row(ending: LlamaForCausalLM, tmp_path: Path) -> None:
    def silent(completions: list[str], **columns: Any) -> list[None]:
        return [None] * len(completions)

    (failed, _) = train_together(
        ending, [RolloutSpec(rewards=(silent,)), RolloutSpec()], tmp_path, eval_sampling=SAMPLING, allow_failures=True
    )
    assert failed.record is not None
    assert "No reward function scored the answers to `eval_dataset[0]`" in str(failed.record.error)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["use_vllm", "use_transformers_continuous_batching"])
def test_engines_that_merge_or_decode_alone_are_refused(ending: LlamaForCausalLM, tmp_path: Path, setting: str) -> None:
    class Pretends(RolloutSpec):
        def build(self, *args: Any, **kwargs: Any) -> Any:
            trainer = super().build(*args, **kwargs)
            object.__setattr__(trainer.args, setting, True)
            return trainer

    bad, good = together_without_evaluation(ending, [Pretends(), RolloutSpec()], tmp_path, allow_failures=True)
    assert f"`{setting}=True`" in bad.record.error
    assert good.record.error is None


# -- memory, precision -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_rollout_that_does_not_fit_is_run_in_smaller_ones(
    ending: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in the middle of decoding; the same completions all the same."""
    from rapidfire_automl.executor.rollouts import Decoding

    advance = Decoding.advance
    failures = []

    def short_of_memory(self: Decoding) -> Any:
        if self.rows > 8 and self.rollouts[0].length > self.rollouts[0].request.input_ids.shape[1]:
            failures.append(self.rows)
            raise torch.OutOfMemoryError
        return advance(self)

    monkeypatch.setattr(Decoding, "advance", short_of_memory)
    specs = [RolloutSpec(args={"seed": seed}, lora={"lora_dropout": 0.1}) for seed in range(4)]
    together = together_without_evaluation(ending, specs, tmp_path)
    assert failures
    assert_parity(together, [train_alone(ending, spec, tmp_path / "alone") for spec in specs], ["a", "b", "c", "d"])


@pytest.mark.slow
def test_rows_are_limited_by_the_plan(ending: LlamaForCausalLM, tmp_path: Path) -> None:
    specs = [RolloutSpec(args={"seed": seed}) for seed in range(4)]
    plan = Plan(budget_tokens=1 << 20, max_padding=1e9, rollout_rows=9)
    together = together_without_evaluation(ending, specs, tmp_path, plan=plan)
    assert_parity(together, [train_alone(ending, spec, tmp_path / "alone") for spec in specs], ["a", "b", "c", "d"])


@pytest.mark.slow
def test_bfloat16_samples_the_same_distribution(tmp_path: Path) -> None:
    """First tokens and lengths of 1,000 answers to a prompt, against plain TRL with another seed: chi-squared."""
    from scipy.stats import chi2_contingency

    base = rollout_base().to(torch.bfloat16)
    args = {"max_steps": 2, "per_device_train_batch_size": 1000, "num_generations": 1000, "temperature": 0.5}
    specs = [RolloutSpec(args={**args, "shuffle_dataset": False, "seed": seed}, examples=2) for seed in (0, 5, 7)]
    together = together_without_evaluation(base, specs[:2], tmp_path)
    alone: Any = train_alone(base, specs[2], tmp_path / "alone").trainer
    for result in together:
        mine, theirs = result.trainer.seen[0], alone.seen[0]
        for what in (lambda ids: ids[0], len):
            counts = np.array([np.bincount([what(ids) for ids in batch], minlength=304) for batch in (mine, theirs)])
            frequent = counts.sum(0) >= 20
            table = np.c_[counts[:, frequent], counts[:, ~frequent].sum(1)]
            assert chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-3


@pytest.mark.slow
def test_gradients_in_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's gradients: beside neighbours, with beta and temperature, against plain TRL's."""
    base = rollout_base().double()
    grads: dict[str, list[torch.Tensor]] = {}

    class Keeps(RolloutSpec):
        def build(self, model: Any, tokenizer: Any, folder: Path, *, peft: bool = True) -> Any:
            trainer = super().build(model, tokenizer, folder, peft=peft)
            clip = trainer.accelerator.clip_grad_norm_
            key = f"{folder.name}"

            def keep(parameters: Any, *args: Any, **kwargs: Any) -> Any:
                listed = list(parameters)
                grads.setdefault(key, [p.grad.clone() for p in listed if p.grad is not None])
                return clip(listed, *args, **kwargs)

            trainer.accelerator.clip_grad_norm_ = keep
            return trainer

    one = Keeps(args={"beta": 0.1, "temperature": 0.7, "max_steps": 2}, lora={"lora_dropout": 0.1})
    specs = [one, RolloutSpec(args={"max_steps": 2, "num_generations": 4}), RolloutSpec(args={"max_steps": 2})]
    together_without_evaluation(base, specs, tmp_path)
    train_alone(base, one, tmp_path / "alone")
    mine, theirs = grads["trial-0"], grads["alone"]
    assert len(mine) == len(theirs) > 0
    total = torch.cat([x.flatten() for x in theirs]).norm()
    differ = torch.cat([(a - b).flatten() for a, b in zip(mine, theirs, strict=True)]).norm()
    print(float(differ / total), mine[0].dtype)
    assert float(differ / total) < 1e-6


@pytest.mark.slow
def test_conversations_roll_out(ending: LlamaForCausalLM, tmp_path: Path) -> None:
    """Prompts as chat messages, rewards that see messages."""

    def polite(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
        return [len(messages[0]["content"]) / 10 for messages in completions]

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}w2"
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"w{i} w{i + 1}"}]} for i in range(8)])

    class Chats(RolloutSpec):
        def build(self, model: Any, _: Any, folder: Path, *, peft: bool = True) -> Any:
            trainer = super().build(model, tokenizer, folder, peft=peft)
            trainer.train_dataset = trainer.eval_dataset = rows
            return trainer

    spec = Chats(rewards=(polite,))
    (mine,) = train_together(
        ending, [spec], tmp_path, eval_sampling=Sampling(num_generations=1, temperature=0, max_completion_length=3)
    )
    oracle = train_alone(copy.deepcopy(ending), spec, tmp_path / "alone")
    assert max(apart(mine, oracle).values()) < TOLERANCE


JUDGING: list[int] = []
"""How many trials were being judged when another judge began, and it among them."""
_at_work: set[int] = set()


async def judged(completions: list[str], **columns: Any) -> list[float]:
    """A judge that takes its time; the sleeping says nothing of the reward."""
    me = threading.get_ident()
    _at_work.add(me)
    JUDGING.append(len(_at_work))
    await asyncio.sleep(0.2)
    _at_work.discard(me)
    return [len(text.split()) / 10 for text in completions]


@pytest.mark.slow
def test_asynchronous_rewards_overlap(ending: LlamaForCausalLM, tmp_path: Path) -> None:
    """Four trials wait for their judges at the same time; completions and numbers are as if each had waited alone."""

    class Judged(RolloutSpec):
        def build(self, *args: Any, **kwargs: Any) -> Any:
            trainer = super().build(*args, **kwargs)
            del trainer.reward_funcs[1:]
            del trainer.reward_func_names[1:]
            del trainer.reward_processing_classes[1:]
            trainer.reward_weights = trainer.reward_weights[:1]
            return trainer

    specs = [Judged(rewards=(judged,), args={"seed": seed}) for seed in range(4)]
    JUDGING.clear()
    together = together_without_evaluation(ending, specs, tmp_path)
    assert max(JUDGING) == 4
    assert all(sum(result.record.seconds) > 0.8 for result in together)
    for spec, mine in zip(specs[:2], together, strict=False):
        assert max(apart(mine, train_alone(ending, spec, tmp_path / "alone")).values()) < TOLERANCE


@pytest.mark.slow
def test_rollouts_that_do_not_agree_are_each_trials_own(
    ending: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-check sees a wrong decoder, says so, and the trials decode by themselves."""
    from rapidfire_automl.executor.rollouts import Decoding

    decode = Decoding._decode
    monkeypatch.setattr(Decoding, "_decode", lambda self, tokens: decode(self, tokens) + torch.arange(304) / 10)
    spec = KNOBS["beta, dropout, all of sampling"]
    executor = open_executor(ending, tmp_path, slots=1, metric=lambda trainer: float(trainer.state.global_step))
    trainers = []

    def objective(trial: optuna.Trial) -> Any:
        trainers.append(spec.build(executor.model(trial), executor.tokenizer, tmp_path / str(trial.number)))
        return trainers[-1]

    with executor:
        executor.optimize(optuna.create_study(), objective, n_trials=1)
        explained = executor.explain()
    assert "joint rollouts do not agree with this base (logits are off by" in explained
    assert "Joint rollouts:" not in explained
    theirs: Any = train_alone(ending, spec, tmp_path / "alone").trainer
    assert trainers[0].seen == theirs.seen
