"""What the executor's tests share: a tiny random Llama, a trivial tokenizer, data, and the oracle (plain TRL alone)."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from rapidfire_automl import RapidFireExecutor
from rapidfire_automl.plan import Plan
from rapidfire_automl.records import TrialRecord

VOCAB = 304
JOINT = Plan(budget_tokens=1 << 20, max_padding=1e9, reason="a test: all in one pass")
ALONE = Plan(trials_per_pass=1, reason="a test: one trial per pass")
_WORDS = VOCAB - 4


def tiny_llama(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """Random weights, two layers, grouped-query attention; the same at every call."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**settings))
    return model.to(dtype)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: `w0` to `w299`."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": 4 + i for i in range(_WORDS)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sft_data(examples: int, seed: int = 0, *, shortest: int = 4, longest: int = 12) -> Dataset:
    """Counting up with a stutter, lengths mixed; the first two tokens are prompt and are not scored.

    A random model with tied embeddings predicts the token it sees, so the stutter makes accuracies neither 0 nor 1.
    Rows of one token alone would not do: their attention has no gradient but rounding, and Adam makes steps of that.
    """
    draw = random.Random(seed)
    rows = []
    for _ in range(examples):
        length, start, stride = draw.randint(shortest, longest), draw.randrange(40), draw.randint(1, 3)
        ids = [4 + (start + stride * (i // 2)) % 48 for i in range(length)]
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return Dataset.from_list(rows)


def dpo_data(examples: int, seed: int = 0) -> Dataset:
    """Counting up is chosen, noise is rejected."""
    draw = random.Random(seed)
    rows = []
    for _ in range(examples):
        start, stride = draw.randrange(40), draw.randint(1, 3)
        count = [f"w{(start + stride * (i // 2)) % 48}" for i in range(draw.randint(4, 9))]
        noise = [f"w{draw.randrange(48)}" for _ in range(draw.randint(2, 7))]
        rows.append(
            {"prompt": " ".join(count[:2]), "chosen": " " + " ".join(count[2:]), "rejected": " " + " ".join(noise)}
        )
    return Dataset.from_list(rows)


@dataclass(frozen=True)
class Spec:
    """One trial's configuration.

    Args:
        lora: Of `LoraConfig`.
        args: Of `SFTConfig` or `DPOConfig`.
        trainer: TRL's class or a subclass.
        more: Further arguments of the trainer.
        callbacks: Made anew for every trainer.
        data: Another training set than the default.
    """

    lora: Mapping[str, Any] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)
    trainer: type[Trainer] = SFTTrainer
    more: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Sequence[Callable[[], TrainerCallback]] = ()
    data: Dataset | None = None

    def build(self, model: Any, tokenizer: Any, folder: Path, *, peft: bool = True) -> Trainer:
        """What a user's objective does; without `peft` the model has adapters already."""
        dpo = issubclass(self.trainer, DPOTrainer)
        settings = {
            "output_dir": str(folder),
            "max_steps": 6,
            "learning_rate": 2e-3,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 4,
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
        return self.trainer(
            model=model,
            args=(DPOConfig if dpo else SFTConfig)(**settings),
            peft_config=LoraConfig(**(lora | dict(self.lora))) if peft else None,
            train_dataset=self.data or (dpo_data(20) if dpo else sft_data(22)),
            eval_dataset=dpo_data(9, 1) if dpo else sft_data(9, 1),
            processing_class=tokenizer,
            callbacks=[make() for make in self.callbacks],
            **self.more,
        )


@dataclass
class Result:
    """What a trial came to.

    Args:
        log: The trainer's log.
        weights: The adapter.
        initial: The adapter before training.
        trainer: The trainer.
        record: The executor's only.
        trials_per_pass: Trials of a joint pass, on average; the executor's only.
    """

    log: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]
    initial: dict[str, torch.Tensor]
    trainer: Trainer
    record: TrialRecord | None = None
    trials_per_pass: float = 0.0

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.log if "loss" in entry]


def adapter_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """A copy of the adapter's tensors."""
    return {name: x.detach().clone() for name, x in get_peft_model_state_dict(model).items()}


def train_alone(base: LlamaForCausalLM, spec: Spec, folder: Path) -> Result:
    """The oracle: plain TRL on a fresh copy of the base."""
    trainer = spec.build(copy.deepcopy(base), tiny_tokenizer(), folder)
    initial = adapter_of(trainer.model)
    trainer.train()
    log = list(trainer.state.log_history)
    return Result(log, adapter_of(trainer.model), initial, trainer)


def open_executor(base: LlamaForCausalLM, folder: Path, **options: Any) -> RapidFireExecutor:
    """An executor over a copy of the base."""
    settings = {"chunks": 2, "plan": JOINT, "tokenizer": tiny_tokenizer(), "output_dir": folder / "out"} | options
    return RapidFireExecutor(copy.deepcopy(base), **settings)


def train_together(
    base: LlamaForCausalLM,
    specs: Sequence[Spec],
    folder: Path,
    *,
    plan: Plan = JOINT,
    chunks: int = 2,
    slots: int | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    **options: Any,
) -> list[Result]:
    """The same trials through the executor; failed ones raise, unless `allow_failures`."""
    allow_failures = options.pop("allow_failures", False)
    trainers: dict[int, Trainer] = {}
    initial: dict[int, dict[str, torch.Tensor]] = {}
    executor = open_executor(base, folder, slots=slots or len(specs), chunks=chunks, plan=plan, **options)

    def objective(trial: optuna.Trial) -> Trainer:
        spec = specs[trial.number]
        trainer = spec.build(executor.model(trial), executor.tokenizer, folder / f"trial-{trial.number}")
        initial[trial.number] = adapter_of(trainer.model)
        trainers[trial.number] = trainer
        return trainer

    study = optuna.create_study(pruner=pruner or optuna.pruners.NopPruner())
    with executor:
        executor.optimize(study, objective, n_trials=len(specs))
        records = dict(executor.records)
        assert executor._base is not None
        timing = executor._base.multiplexer.timing
    errors = {number: record.error for number, record in records.items() if record.error}
    assert allow_failures or not errors, errors
    return [
        Result(
            records[i].log_history,
            adapter_of(trainers[i].model),
            initial[i],
            trainers[i],
            record=records[i],
            trials_per_pass=timing.trials / max(1, timing.passes),
        )
        for i in sorted(records)
    ]


def differences(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The largest relative difference of each logged quantity, over all entries.

    Rewards, margins and mean logits are small differences of large numbers, so they are measured in units of the
    largest of their family in the log; everything else in units of the very number it is compared with. An accuracy
    is not compared where the oracle's own margin is zero: a policy that still is the reference ranks a pair by rounding.
    """
    assert [sorted(entry) for entry in one] == [sorted(entry) for entry in other], "the logs have other entries"
    # TRL logs None where no answer was scored.
    one, other = (
        [{name: math.nan if value is None else value for name, value in entry.items()} for entry in log]
        for log in (one, other)
    )
    worst: dict[str, float] = {}
    for name in {name for entry in other for name in entry if not name.endswith(("time", "per_second"))}:
        margin = name.replace("accuracies", "margins")
        pairs = [
            (mine[name], theirs[name])
            for mine, theirs in zip(one, other, strict=True)
            if name in theirs and (margin == name or theirs[margin] != 0.0)
        ]
        family = name.removeprefix("eval_").partition("/")[0]
        kin = [
            abs(entry[key]) for entry in other for key in entry if key.removeprefix("eval_").startswith(family + "/")
        ]
        unit = max(kin) if family in ("rewards", "logits") else 0.0
        worst[name] = max((relative(value, expected, unit) for value, expected in pairs), default=0.0)
    return worst


def relative(value: float, expected: float, unit: float = 0.0) -> float:
    """The relative difference; infinite where only one is finite."""
    if value == expected or (math.isnan(value) and math.isnan(expected)):
        return 0.0
    if not (math.isfinite(value) and math.isfinite(expected)):
        return math.inf
    return abs(value - expected) / max(abs(expected), unit, 1e-12)


def weight_difference(result: Result, oracle: Result) -> float:
    """How far the adapters are apart, in units of how far training moved the oracle's; the worst tensor."""
    worst = 0.0
    assert result.weights.keys() == oracle.weights.keys()
    for name, expected in oracle.weights.items():
        assert torch.equal(result.initial[name], oracle.initial[name]), name
        moved = (expected - oracle.initial[name]).norm()
        apart = (result.weights[name] - expected).norm()
        worst = max(worst, float(apart / moved.clamp(min=1e-12)) if apart else 0.0)
    return worst
