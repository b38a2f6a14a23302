"""Joint training against plain TRL, one trial at a time: logs, evaluation losses, gradients and final adapters."""

from __future__ import annotations

import copy
import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from trl import DPOTrainer, SFTTrainer

from rapidfire_automl.plan import Plan
from tests.executor.helpers import (
    Result,
    Spec,
    differences,
    open_executor,
    sft_data,
    tiny_llama,
    tiny_tokenizer,
    train_alone,
    train_together,
    weight_difference,
)

TOLERANCE = 1e-4
STEPS = 30
EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 10}

# Adam turns a gradient of nothing but rounding into a full step: `k_proj` has such components (a softmax does not see
# what it adds to all keys), so the trials that adapt it with AdamW have a larger epsilon.
SFT = {
    "plain, by epochs": Spec(
        lora={"r": 4},
        args={"num_train_epochs": 3, "max_steps": -1, "learning_rate": 5e-3, "eval_strategy": "epoch"},
    ),
    "rsLoRA, dropout, ragged accumulation": Spec(
        lora={"r": 8, "lora_alpha": 16, "use_rslora": True, "lora_dropout": 0.2, "target_modules": "all-linear"},
        args={
            "max_steps": STEPS,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 3,
            "optim": "adamw_torch",
            "lr_scheduler_type": "cosine",
            "warmup_steps": 5,
            "weight_decay": 0.1,
            "adam_epsilon": 1e-6,
            **EVALUATED,
        },
    ),
    "SGD": Spec(
        lora={"r": 1, "lora_alpha": 4, "target_modules": ["o_proj", "down_proj"]},
        args={
            "max_steps": STEPS,
            "optim": "sgd",
            "optim_args": "momentum=0.9",
            "learning_rate": 5e-3,
            "max_grad_norm": 0.0,
            "seed": 5,
            **EVALUATED,
        },
    ),
    "Adafactor, checkpointing, dropout": Spec(
        lora={"r": 16, "lora_dropout": 0.05, "target_modules": ["k_proj", "gate_proj", "up_proj"]},
        args={
            "max_steps": STEPS,
            "optim": "adafactor",
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 3,
            "gradient_checkpointing": True,
            "seed": 7,
            **EVALUATED,
        },
    ),
    "DFT": Spec(
        args={"max_steps": STEPS, "loss_type": "dft", "per_device_train_batch_size": 5, "data_seed": 11, **EVALUATED},
    ),
    "label smoothing": Spec(
        lora={"lora_dropout": 0.1},
        args={
            "max_steps": STEPS,
            "label_smoothing_factor": 0.1,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            **EVALUATED,
        },
    ),
    "packing": Spec(
        lora={"r": 6, "target_modules": "all-linear"},
        args={"max_steps": STEPS, "packing": True, "max_length": 24, "adam_epsilon": 1e-6, **EVALUATED},
    ),
    "clipping, patterns": Spec(
        lora={
            "r": 5,
            "target_modules": r".*layers\.1\..*_proj",
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"q_proj": 20},
            "init_lora_weights": "gaussian",
        },
        args={
            "max_steps": STEPS,
            "max_grad_norm": 0.05,
            "gradient_checkpointing": True,
            "lr_scheduler_type": "inverse_sqrt",
            "warmup_steps": 4,
            "optim": "rmsprop",
            "learning_rate": 5e-4,
            "per_device_train_batch_size": 4,
            **EVALUATED,
        },
    ),
}

DPO = {
    "sigmoid": Spec(trainer=DPOTrainer, args={"max_steps": STEPS, **EVALUATED}),
    "hinge": Spec(
        trainer=DPOTrainer,
        lora={"r": 8, "target_modules": ["v_proj", "o_proj", "up_proj", "down_proj"]},
        args={"max_steps": STEPS, "loss_type": "hinge", "beta": 0.5, "per_device_train_batch_size": 3, **EVALUATED},
    ),
    "IPO, checkpointing": Spec(
        trainer=DPOTrainer,
        lora={"r": 2},
        args={
            "max_steps": STEPS,
            "loss_type": "ipo",
            "beta": 0.2,
            "gradient_checkpointing": True,
            "gradient_accumulation_steps": 3,
            "seed": 3,
            **EVALUATED,
        },
    ),
    "label smoothing, dropout": Spec(
        trainer=DPOTrainer,
        lora={"r": 8, "lora_dropout": 0.15, "target_modules": ["q_proj", "gate_proj", "o_proj"]},
        args={
            "max_steps": STEPS,
            "label_smoothing": 0.1,
            "disable_dropout": False,
            "optim": "adamw_torch",
            **EVALUATED,
        },
    ),
    "precomputed reference": Spec(
        trainer=DPOTrainer,
        args={"max_steps": STEPS, "precompute_ref_log_probs": True, "max_length": 8, "optim": "adafactor", **EVALUATED},
    ),
    "weighted mixture": Spec(
        trainer=DPOTrainer,
        args={
            "max_steps": STEPS,
            "loss_type": ["sigmoid", "apo_zero"],
            "loss_weights": [1.0, 0.5],
            "use_weighting": True,
            "ld_alpha": 0.5,
            "per_device_train_batch_size": 4,
            "lr_scheduler_type": "cosine",
            **EVALUATED,
        },
    ),
}


EVERY_STEP = {"loss", "grad_norm", "entropy", "mean_token_accuracy", "learning_rate"}


def assert_parity(
    together: Sequence[Result],
    alone: Sequence[Result],
    names: Sequence[str],
    logged_at_least: Collection[str] = EVERY_STEP,
) -> None:
    """Every logged number and every adapter tensor."""
    for name, mine, oracle in zip(names, together, alone, strict=True):
        logged = differences(mine.log, oracle.log)
        assert logged.keys() >= set(logged_at_least)
        apart = {"adapter": weight_difference(mine, oracle)} | logged
        print(name, {key: f"{value:.1e}" for key, value in apart.items() if value})
        assert max(apart.values()) < TOLERANCE, (name, apart)


def short(spec: Spec) -> Spec:
    """Six steps of it."""
    changes = {"max_steps": 6, "eval_steps": 3, "warmup_steps": 2}
    return replace(spec, args={**spec.args, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trials_that_differ_in_every_knob(base: LlamaForCausalLM, tmp_path: Path, kind: str) -> None:
    specs = {"sft": SFT, "dpo": DPO}[kind]
    together = train_together(base, list(specs.values()), tmp_path, chunks=3)
    alone = [train_alone(base, spec, tmp_path / "alone") for spec in specs.values()]
    assert all(result.record is not None and result.record.fused for result in together)
    assert together[0].trials_per_pass > 1.5
    assert_parity(together, alone, list(specs))


@pytest.mark.slow
def test_sft_and_dpo_side_by_side(base: LlamaForCausalLM, tmp_path: Path) -> None:
    names = ["rsLoRA, dropout, ragged accumulation", "label smoothing, dropout", "DFT", "IPO, checkpointing"]
    specs = [short((SFT | DPO)[name]) for name in names]
    together = train_together(base, specs, tmp_path)
    assert_parity(together, [train_alone(base, spec, tmp_path / "alone") for spec in specs], names)
    assert {result.record.trainer for result in together if result.record} == {"SFTTrainer", "DPOTrainer"}


@pytest.mark.slow
@pytest.mark.parametrize("trials_per_pass", [1, 2])
def test_any_plan_gives_the_same_numbers(base: LlamaForCausalLM, tmp_path: Path, trials_per_pass: int) -> None:
    specs = [short(spec) for spec in (*list(SFT.values())[:3], DPO["sigmoid"])]
    plan = Plan(trials_per_pass=trials_per_pass, max_padding=1e9)
    together = train_together(base, specs, tmp_path, plan=plan)
    assert_parity(together, [train_alone(base, spec, tmp_path / "alone") for spec in specs], ["a", "b", "c", "d"])


def test_the_built_in_value_is_the_mean_token_nll(base: LlamaForCausalLM, tmp_path: Path) -> None:
    """Whatever the loss type, and of every example even where TRL packs them."""
    specs = [short(SFT[name]) for name in ("DFT", "packing", "label smoothing", "plain, by epochs")]
    for result in train_together(base, specs, tmp_path):
        assert result.record is not None
        rows = sft_data(9, 1)
        sums, counts = [], []
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
            model = result.trainer.model.eval()
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
            target = torch.tensor(labels[1:])
            sums.append(float(F.cross_entropy(logits, target, ignore_index=-100, reduction="sum")))
            counts.append(int((target != -100).sum()))
        assert result.record.values[-1] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
        if not result.trainer.args.packing:
            expected = [total * len(sums) / sum(counts) for total in sums]
            np.testing.assert_allclose(result.record.scores[-1], expected, rtol=1e-5)


# -- what can't join a pass, and what TRL's users hang on a trainer ---------------------------------------------------


class Doubled(SFTTrainer):
    """Someone's own loss, on the model's logits."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits
        loss = 2 * F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return (loss, {"logits": logits}) if return_outputs else loss


def scaled_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """For `compute_loss_func`."""
    loss = F.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    return 0.5 * loss / (labels[:, 1:] != -100).sum()


class Shaking(TrainerCallback):
    """Draws from the global generators in the middle of training, and changes the learning rate once."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(float(torch.rand(()) + random.random() + np.random.rand()))  # noqa: NPY002
        if state.global_step == 3:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] *= 0.5

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        logs["shaken"] = sum(self.seen)


EXTRA = {
    "DoRA": Spec(lora={"use_dora": True, "lora_dropout": 0.1}),
    "modules_to_save": Spec(lora={"modules_to_save": ["norm"]}, args={"learning_rate": 5e-4}),
    "lora_bias": Spec(lora={"lora_bias": True, "lora_dropout": 0.1}, args={"gradient_checkpointing": True}),
    "NEFTune": Spec(args={"neftune_noise_alpha": 5.0}),
    "compute_loss_func": Spec(more={"compute_loss_func": scaled_loss}, lora={"lora_dropout": 0.1}),
    "own compute_loss": Spec(trainer=Doubled, lora={"lora_dropout": 0.1}, args={"gradient_accumulation_steps": 2}),
    "callbacks": Spec(
        lora={"lora_dropout": 0.1}, callbacks=[Shaking], args={"eval_strategy": "steps", "eval_steps": 2}
    ),
}
UNFUSED = {"DoRA", "modules_to_save", "lora_bias", "NEFTune"}


@pytest.mark.slow
def test_unfusable_adapters_own_losses_and_callbacks(base: LlamaForCausalLM, tmp_path: Path) -> None:
    """Beside each other and beside a trial that is in joint passes."""
    specs = [*EXTRA.values(), short(SFT["rsLoRA, dropout, ragged accumulation"])]
    together = train_together(base, specs, tmp_path)
    for name, result in zip(EXTRA, together, strict=False):
        assert result.record is not None
        assert result.record.fused == (name not in UNFUSED), (name, result.record.why_unfused)
        assert bool(result.record.why_unfused) == (name in UNFUSED)
    alone = [train_alone(base, spec, tmp_path / "alone") for spec in specs]
    assert_parity(together, alone, [*EXTRA, "fused"], logged_at_least={"loss", "grad_norm"})


def test_two_adapters_train_unfused(base: LlamaForCausalLM, tmp_path: Path) -> None:
    """A model wrapped by the user, whose second adapter stands beside the trained one."""

    def wrapped(model: LlamaForCausalLM) -> SFTTrainer:
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            peft_model = get_peft_model(model, config)
            peft_model.add_adapter("other", config)
        trainer = Spec().build(peft_model, tiny_tokenizer(), tmp_path, peft=False)
        assert isinstance(trainer, SFTTrainer)
        return trainer

    oracle = wrapped(copy.deepcopy(base))
    oracle.train()
    with open_executor(base, tmp_path) as executor:
        trainers = {}

        def objective(trial: optuna.Trial) -> SFTTrainer:
            trainers[trial.number] = wrapped(executor.model(trial))
            return trainers[trial.number]

        executor.optimize(optuna.create_study(), objective, n_trials=1)
        record = executor.records[0]
    assert record.why_unfused == "several adapters"
    assert max(differences(record.log_history, oracle.state.log_history).values()) < TOLERANCE


# -- precision ---------------------------------------------------------------------------------------------------------


class Gradients(TrainerCallback):
    """Keeps the first step's gradients."""

    def __init__(self, into: dict[str, torch.Tensor]) -> None:
        self.into = into

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.into.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def float64_kernel(hidden: torch.Tensor, weight: torch.Tensor, bias: None, targets: torch.Tensor, *_: Any) -> Any:
    """TRL's `ChunkedLogProbFunction.apply` without its rounding to float32, which one bit in `hidden` may tip."""
    log_p = (hidden @ weight.T).log_softmax(-1)
    log_probs = log_p.gather(1, targets[:, None])[:, 0]
    rest = log_p.detach()
    entropy = -(rest.exp() * rest).sum(-1)
    return log_probs, entropy, (2 * rest).exp().sum(-1).log(), rest.mean(-1), rest.argmax(-1) == targets


class Float64RMSNorm(LlamaRMSNorm):
    """Llama's without its rounding to float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def float64_llama() -> LlamaForCausalLM:
    """A tiny Llama that is float64 throughout."""
    model = tiny_llama(torch.float64)
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = Float64RMSNorm
    return model


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_step_gradients_in_float64(tmp_path: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters that already do something, dropout, accumulation, other widths and sites."""
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", SimpleNamespace(apply=float64_kernel))
    base = float64_llama()
    common = {"max_grad_norm": 0.0, "max_steps": 2, "gradient_checkpointing": checkpointing}
    dropout = {"init_lora_weights": False, "lora_dropout": 0.1}
    specs = [
        Spec(lora={**dropout, "r": 3, "target_modules": "all-linear"}, args=common),
        Spec(lora={**dropout, "r": 8}, args={**common, "gradient_accumulation_steps": 3}),
        Spec(lora=dropout, args={**common, "label_smoothing_factor": 0.2, "per_device_train_batch_size": 5}),
        Spec(lora={**dropout, "use_rslora": True}, args=common, trainer=Doubled),
        Spec(lora={**dropout, "r": 5}, args={**common, "disable_dropout": False}, trainer=DPOTrainer),
    ]
    kept: list[dict[str, torch.Tensor]] = [{} for _ in range(2 * len(specs))]
    watched = [replace(s, callbacks=[partial(Gradients, g)]) for s, g in zip([*specs, *specs], kept, strict=True)]
    together = train_together(base, watched[: len(specs)], tmp_path)
    assert all(result.record is not None and result.record.fused for result in together)
    for spec in watched[len(specs) :]:
        train_alone(base, spec, tmp_path / "alone")
    worst = 0.0
    for mine, oracle in zip(kept[: len(specs)], kept[len(specs) :], strict=True):
        assert mine.keys() == oracle.keys()
        assert len(oracle) >= 8
        for name, expected in oracle.items():
            assert expected.dtype == torch.float64
            assert expected.norm() > 0, name
            apart = float((mine[name] - expected).norm() / expected.norm())
            assert apart <= 1e-10, (name, apart)
            worst = max(worst, apart)
    print(f"float64 gradients: {worst:.1e}")


@pytest.mark.slow
def test_precisions_side_by_side(base: LlamaForCausalLM, tmp_path: Path) -> None:
    """TRL's default, bf16 autocast, on a float32 base, beside a trial in float32."""
    specs = [
        Spec(args={"bf16": True}),
        Spec(lora={"lora_dropout": 0.1}),
        Spec(args={"bf16": True, "gradient_checkpointing": True}, lora={"target_modules": "all-linear", "r": 7}),
        Spec(trainer=DPOTrainer, args={"bf16": True}),
    ]
    together = train_together(base, specs, tmp_path)
    alone = [train_alone(base, spec, tmp_path / "alone") for spec in specs]
    for spec, mine, oracle in zip(specs, together, alone, strict=True):
        assert mine.record is not None
        assert mine.record.fused
        worst = differences(mine.log, oracle.log)["loss"]
        print(f"{spec.args}: {worst:.1e}")
        assert worst < (5e-3 if spec.args.get("bf16") else TOLERANCE)


def distances(runs: Sequence[Result], others: Sequence[Result]) -> np.ndarray:
    """Root mean squares over all trials: of losses and gradient norms by step, of adapters in units of their way."""
    squares = []
    for one, other in zip(runs, others, strict=True):
        losses = np.array(one.losses) - np.array(other.losses)
        norms = [np.array([entry["grad_norm"] for entry in run.log if "grad_norm" in entry]) for run in (one, other)]
        apart = sum(float((one.weights[n] - other.weights[n]).norm() ** 2) for n in one.weights)
        moved = sum(float((one.weights[n] - one.initial[n]).norm() ** 2) for n in one.weights)
        squares.append([np.mean(losses**2), np.mean((norms[0] / norms[1] - 1) ** 2), apart / moved])
    return np.mean(squares, axis=0) ** 0.5


@pytest.mark.slow
def test_bfloat16_differs_no_more_than_plain_trl_from_itself(tmp_path: Path) -> None:
    """TRL's defaults (bf16, checkpointing), against the same examples in other batch layouts of plain TRL.

    Those differ from each other and, more, from the run in float32: the joint run is no further from plain TRL than
    that, and no further from float32 than they are. 1.25: what a root mean square of 80 roundings spreads by.
    """
    base = tiny_llama(torch.bfloat16)
    common = {"bf16": True, "gradient_checkpointing": True, "max_steps": 20, "per_device_train_batch_size": 4}
    specs = [
        Spec(args={**common, "seed": 1}),
        Spec(lora={"r": 8, "target_modules": "all-linear"}, args={**common, "seed": 2, "learning_rate": 1e-3}),
        Spec(lora={"r": 2, "lora_alpha": 16}, args={**common, "seed": 3, "lr_scheduler_type": "cosine"}),
        Spec(trainer=DPOTrainer, args=common),
    ]
    layouts: list[dict[str, Any]] = [
        {},
        {"pad_to_multiple_of": 16},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ]

    def serial(base: LlamaForCausalLM, **layout: Any) -> list[Result]:
        return [train_alone(base, replace(s, args={**s.args, **layout}), tmp_path / "a") for s in specs]

    together = train_together(base, specs, tmp_path)
    assert all(result.record is not None and result.record.fused for result in together)
    runs = [serial(base, **layout) for layout in layouts]
    among = np.max([distances(*pair) for pair in combinations(runs, 2)], axis=0)
    mine = distances(together, runs[0])
    exact = serial(base.to(torch.float32), bf16=False)
    their_error, error = np.max([distances(run, exact) for run in runs], axis=0), distances(together, exact)
    print("loss, gradient norm, adapter: joint to plain", mine, "layouts among them", among)
    print("to float32: joint", error, "layouts", their_error)
    assert (mine <= 1.25 * np.maximum(among, their_error)).all()
    assert (error <= 1.25 * their_error).all()


@pytest.mark.parametrize(
    ("steps", "least"),
    [((10, 11), 1.6), ((20, 10), 1.25), ((12, 9, 7), 1.8)],
    ids=["10 and 11", "20 and 10", "12, 9, 7"],
)
def test_trials_of_other_lengths_keep_in_step(
    base: LlamaForCausalLM, tmp_path: Path, steps: Sequence[int], least: float
) -> None:
    """Else they drift apart and each has passes of its own."""
    specs = [Spec(args={"max_steps": n, "per_device_train_batch_size": 1}) for n in steps]
    together = train_together(base, specs, tmp_path)
    assert together[0].trials_per_pass > least
