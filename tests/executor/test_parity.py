"""Joint training against plain TRL, one trial at a time: logs, evaluation losses, gradients and final adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM
from trl import DPOTrainer

from tests.executor.helpers import Result, Spec, differences, train_alone, train_together, weight_difference

TOLERANCE = 1e-4
STEPS = 30
EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 10}

# Adam turns a gradient of nothing but rounding into a full step: `k_proj` has such components (a softmax does not see what
# it adds to all keys), so the trials that adapt it with AdamW have a larger epsilon.
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
        lora={"r": 8, "target_modules": "all-linear"},
        args={
            "max_steps": STEPS,
            "loss_type": "hinge",
            "beta": 0.5,
            "per_device_train_batch_size": 3,
            "adam_epsilon": 1e-6,
            "learning_rate": 5e-4,
            **EVALUATED,
        },
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
        lora={"r": 8, "lora_dropout": 0.15, "target_modules": ["q_proj", "k_proj", "o_proj"]},
        args={"max_steps": STEPS, "label_smoothing": 0.1, "disable_dropout": False, "optim": "adamw_torch", **EVALUATED},
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


def assert_parity(together: Sequence[Result], alone: Sequence[Result], names: Sequence[str]) -> None:
    """Every logged number and every adapter tensor."""
    for name, mine, oracle in zip(names, together, alone, strict=True):
        logged = differences(mine.log, oracle.log)
        assert {"loss", "grad_norm", "entropy", "mean_token_accuracy", "learning_rate"} <= logged.keys()
        apart = {"adapter": weight_difference(mine, oracle)} | logged
        print(name, {key: f"{value:.1e}" for key, value in apart.items() if value})
        assert max(apart.values()) < TOLERANCE, (name, apart)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trials_that_differ_in_every_knob(base: LlamaForCausalLM, tmp_path: Path, kind: str) -> None:
    specs = {"sft": SFT, "dpo": DPO}[kind]
    together = train_together(base, list(specs.values()), tmp_path, chunks=3)
    alone = [train_alone(base, spec, tmp_path / "alone") for spec in specs.values()]
    assert all(result.record is not None and result.record.fused for result in together)
    assert_parity(together, alone, list(specs))
