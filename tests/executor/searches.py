"""A base, data and objectives so small that a whole search takes about a second."""

from __future__ import annotations

import functools
import logging
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import datasets
import optuna
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from rapidfire_automl import PolicyPruner, RapidFireExecutor
from rapidfire_automl.events import Event
from rapidfire_automl.executor import executor as executor_module
from rapidfire_automl.plan import Plan
from rapidfire_policies import Decision, History, Policy, TrialState, Verdict

optuna.logging.set_verbosity(optuna.logging.ERROR)
datasets.disable_progress_bars()
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
logging.getLogger("rapidfire_automl").setLevel(logging.ERROR)

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +=.,?"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
VOCABULARY = 300
PLAN = Plan(budget_tokens=4096, reason="fixed for the tests")
"""Calibration is left out: it measures the machine."""
NO_COLLECTOR = SimpleNamespace(collect=lambda *_: 0, freeze=lambda: None, unfreeze=lambda: None)
"""Walking every object of torch and datasets, twice a search, would take longer than the search."""


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_model(hidden: int = 32, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A random Llama of two layers, the same each time."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype)


@functools.cache
def sums(count: int, seed: int = 0) -> Dataset:
    """Sums as token ids, e.g. "3+4=7."."""
    generator = random.Random(seed)
    ids = {character: i for i, character in enumerate([*SPECIAL, *CHARACTERS])}
    rows = []
    for _ in range(count):
        a, b = generator.randrange(50), generator.randrange(50)
        rows.append([ids[character] for character in f"{a}+{b}={a + b}."] + [ids["<eos>"]])
    return Dataset.from_dict({"input_ids": rows})


TRAIN, HELD_OUT = sums(12), sums(6, seed=1)


def sft(executor: RapidFireExecutor, trial: optuna.Trial, *, lr: float, r: int = 4, **given: Any) -> SFTTrainer:
    """An `SFTTrainer` of six steps; `given` overrides the config's fields and the trainer's arguments."""
    trainer = {
        name: given.pop(name)
        for name in ("model", "train_dataset", "eval_dataset", "peft_config", "callbacks", "processing_class")
        if name in given
    }
    cls = given.pop("cls", SFTTrainer)
    config = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": lr,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "seed": 0,
        **given,
    }
    arguments: dict[str, Any] = {
        "peft_config": LoraConfig(r=r, lora_alpha=2 * r, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "train_dataset": TRAIN,
        "eval_dataset": HELD_OUT,
        "processing_class": tokenizer(),
        **trainer,
    }
    arguments.setdefault("model", executor.model(trial))
    return cls(args=SFTConfig(**config), **arguments)


def make_executor(*, slots: int = 4, chunks: int = 3, **given: Any) -> RapidFireExecutor:
    """An executor on the tiny base, with a fixed plan."""
    given.setdefault("plan", PLAN)
    given.setdefault("tokenizer", tokenizer())
    return RapidFireExecutor(given.pop("model", None) or tiny_model(), slots=slots, chunks=chunks, **given)


LRS = (1e-2, 3e-3, 1e-3, 3e-2, 1e-1, 3e-4, 1e-4, 3e-1)
"""Far enough apart that no two trials' values come near each other."""


def by_lr(executor: RapidFireExecutor, **given: Any) -> Callable[[optuna.Trial], float]:
    """The usual objective: the learning rate is the whole configuration."""

    @executor.objective
    def objective(trial: optuna.Trial) -> SFTTrainer:
        return sft(executor, trial, lr=trial.suggest_float("lr", 1e-5, 1.0, log=True), **given)

    return objective


def study_of(lrs: Sequence[float] = (), policy: Policy | None = None, **given: Any) -> optuna.Study:
    """A study with these learning rates enqueued."""
    if policy is not None:
        given["pruner"] = PolicyPruner(policy)
    given.setdefault("sampler", optuna.samplers.RandomSampler(seed=0))
    given.setdefault("pruner", optuna.pruners.NopPruner())
    study = optuna.create_study(**given)
    for lr in lrs:
        study.enqueue_trial({"lr": lr})
    return study


@dataclass
class Done:
    """A search that has been run."""

    study: optuna.Study
    executor: RapidFireExecutor
    events: list[Event]

    def values(self) -> dict[int, list[float]]:
        return {number: record.values for number, record in self.executor.records.items()}

    def losses(self, number: int) -> list[float]:
        """What the trial's trainer logged at each step."""
        return [entry["loss"] for entry in self.executor.records[number].log_history if "loss" in entry]

    def states(self) -> list[str]:
        return [trial.state.name for trial in self.study.trials]

    def verdicts(self) -> dict[int, list[tuple[int, str]]]:
        return {n: [(chunk, verdict) for chunk, verdict, _ in r.verdicts] for n, r in self.executor.records.items()}

    def of_kind(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]


def search(
    lrs: Sequence[float] = LRS[:4],
    policy: Policy | None = None,
    *,
    study: optuna.Study | None = None,
    objective: Callable[[RapidFireExecutor], Callable[[optuna.Trial], Any]] = by_lr,
    threads: bool = False,
    n_trials: int | None = None,
    prepare: Callable[[RapidFireExecutor], None] = lambda executor: None,
    **given: Any,
) -> Done:
    """Run a search to its end.

    Args:
        lrs: Learning rates to enqueue.
        policy: Of the study's pruner.
        study: Instead of one made of `lrs` and `policy`.
        objective: Makes the objective of an executor.
        threads: `study.optimize` instead of `executor.optimize`.
        n_trials: As many as `lrs` by default.
        prepare: Called with the open executor before the search.
        given: For the executor.
    """
    events: list[Event] = []
    executor = make_executor(listeners=[events.append], **given)
    study = study or study_of(lrs, policy)
    count = n_trials or len(lrs)
    with patch.object(executor_module, "gc", NO_COLLECTOR), executor:
        prepare(executor)
        if threads:
            study.optimize(objective(executor), n_trials=count, n_jobs=executor.n_jobs)
        else:
            executor.optimize(study, objective(executor), n_trials=count)
    return Done(study, executor, events)


@dataclass(frozen=True)
class Scripted(Policy):
    """Plays a table: at `(trial, chunks done)` say this; everything else goes on, paused trials stay paused.

    Args:
        table: `(number, chunks done) -> verdict` for running trials.
        resume: `(number, most chunks any trial has done) -> verdict` for paused ones.
        seen: Every history it was asked about.
    """

    table: Mapping[tuple[int, int], str] = field(default_factory=dict)
    resume: Mapping[tuple[int, int], str] = field(default_factory=dict)
    seen: list[History] = field(default_factory=list, compare=False)

    def decide(self, history: History) -> Mapping[int, Decision]:
        self.seen.append(history)
        longest = max(trial.resource for trial in history.trials)
        decisions = {}
        for trial in history.trials:
            key = (trial.number, trial.resource)
            if trial.state is TrialState.RUNNING and key in self.table:
                decisions[trial.number] = Decision(Verdict(self.table[key]), f"scripted at {key}")
            elif trial.state is TrialState.PAUSED and (trial.number, longest) in self.resume:
                verdict = Verdict(self.resume[trial.number, longest])
                decisions[trial.number] = Decision(verdict, f"resumed at {longest}")
        return decisions


class Do(TrainerCallback):
    """Calls a function at the end of every step, or at another event."""

    def __init__(self, what: Callable[..., None], when: str = "on_step_end") -> None:
        def call(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            what(args=args, state=state, control=control, **kwargs)

        setattr(self, when, call)
