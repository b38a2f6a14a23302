"""What the tests of GRPO and RLOO share: prompts, rewards, and trials that remember what they sampled."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rapidfire_automl import Sampling
from tests.executor.helpers import Spec, tiny_llama

SAMPLING = Sampling(num_generations=2, temperature=0.8, max_completion_length=5)
ENDS = [2, *range(4, 40)]
"""Tokens that end an answer: enough for a random model to end some of them early."""

Reward = Callable[..., Any]


def rollout_base() -> LlamaForCausalLM:
    """The tiny Llama, which ends its answers now and then."""
    base = tiny_llama()
    base.generation_config.eos_token_id = ENDS
    return base


def prompts(examples: int, seed: int = 0) -> Dataset:
    """Prompts of two to seven words, with a column for the rewards."""
    draw = random.Random(f"prompts {seed}")
    rows = [
        {"prompt": " ".join(f"w{draw.randrange(48)}" for _ in range(draw.randint(2, 7))), "wanted": draw.randrange(300)}
        for _ in range(examples)
    ]
    return Dataset.from_list(rows)


def evenness(completions: list[str], **columns: Any) -> list[float]:
    """The share of words with even numbers."""
    words = [[int(word[1:]) for word in text.split() if word[1:].isdigit()] for text in completions]
    return [sum(word % 2 == 0 for word in row) / max(1, len(row)) for row in words]


def near(completions: list[str], wanted: list[int], **columns: Any) -> list[float | None]:
    """How near the last word is to the wanted one; nothing to say of empty answers."""
    words = [[int(word[1:]) for word in text.split() if word[1:].isdigit()] for text in completions]
    return [-abs(row[-1] - want) / 300 if row else None for row, want in zip(words, wanted, strict=True)]


async def brevity(completions: list[str], **columns: Any) -> list[float]:
    """Short answers are better."""
    return [-len(text.split()) / 10 for text in completions]


@dataclass(frozen=True)
class RolloutSpec(Spec):
    """A GRPO or RLOO trial; its trainer keeps every completion in `seen`, by its token ids."""

    trainer: Any = GRPOTrainer
    rewards: Sequence[Reward] = (evenness,)
    examples: int = 12

    def build(self, model: Any, tokenizer: Any, folder: Path, *, peft: bool = True) -> Any:
        """What a user's objective does."""
        seen: list[Any] = []

        def remember(completion_ids: list[list[int]], trainer_state: Any, **columns: Any) -> list[None]:
            seen.append([list(ids) for ids in completion_ids])
            return [None] * len(completion_ids)

        settings = {
            "output_dir": str(folder),
            "max_steps": 4,
            "learning_rate": 2e-3,
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 6,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        } | dict(self.args)
        lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        weights = settings.get("reward_weights")
        if weights is not None:
            settings["reward_weights"] = [*weights, 1.0]
        trainer = self.trainer(
            model=model,
            args=(RLOOConfig if issubclass(self.trainer, RLOOTrainer) else GRPOConfig)(**settings),
            peft_config=LoraConfig(**(lora | dict(self.lora))) if peft else None,
            reward_funcs=[*self.rewards, remember],
            train_dataset=prompts(self.examples),
            eval_dataset=prompts(4, 1),
            processing_class=tokenizer,
            callbacks=[make() for make in self.callbacks],
            **self.more,
        )
        trainer.seen = seen
        return trainer
