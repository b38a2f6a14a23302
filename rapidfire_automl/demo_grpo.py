"""What `make demo-grpo` runs: a sweep over `num_generations`, the learning rate and `beta` of GRPO.

The base is that of `make demo`, untrained: SmolLM2-135M-Instruct, which knows its sums but not when to stop talking.
The task is `chain_sum` of reasoning-gym, sums and differences of two digits. Torch is imported inside the functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rapidfire_automl.attempts import number_of
from rapidfire_automl.demo import base_path
from rapidfire_automl.events import Listener
from rapidfire_automl.group_sizes import Worth, as_facts, compare
from rapidfire_automl.precision import is_bfloat16_fast
from rapidfire_automl.pruners import PolicyPruner
from rapidfire_automl.reasoning import Task, reasoning_rows
from rapidfire_automl.records import TrialRecord
from rapidfire_automl.rewards import reasoning_gym
from rapidfire_automl.sampling import Sampling
from rapidfire_automl.search import SearchResult, add_to_summary, run_search
from rapidfire_policies import NonInferior, Policy

if TYPE_CHECKING:
    from datasets import Dataset

    from rapidfire_automl.executor import RapidFireExecutor

POLICY: Policy = NonInferior(margin=0.05)
"""Judges the demo's sweep: a dear trial goes on only for as long as no cheaper one might be as good."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """A grid of GRPO trials that see the same prompts at the same step, so that their costs differ by their answers.

    Args:
        groups: Values of `num_generations`.
        learning_rates: Values of `learning_rate`.
        betas: Values of `beta`, the weight of the KL penalty.
        prompts_per_step: Prompts of an optimizer step; its batch is so many times `num_generations` answers.
        steps: Optimizer steps of a whole trial.
        chunks: Parts that they are cut into; a verdict after each.
        train: Prompts to train on.
        held_out: Prompts to compare by.
        answers: Answers to each of those.
        longest: Most tokens of an answer.
        seed: Of the prompts, of every trial's draws, and of the comparison's.
    """

    groups: Sequence[int] = (4, 8, 16)
    learning_rates: Sequence[float] = (1e-4, 4e-4)
    betas: Sequence[float] = (0.0, 0.04)
    prompts_per_step: int = 4
    steps: int = 10
    chunks: int = 5
    train: int = 128
    held_out: int = 64
    answers: int = 2
    longest: int = 5
    seed: int = 0

    @property
    def points(self) -> list[dict[str, Any]]:
        """The trials' parameters."""
        names = ("num_generations", "learning_rate", "beta")
        return [dict(zip(names, point)) for point in product(self.groups, self.learning_rates, self.betas)]


@dataclass(frozen=True, slots=True)
class Swept:
    """A sweep's result, its trials with their scores on each prompt, and what it says of `num_generations`."""

    result: SearchResult
    records: Mapping[int, TrialRecord]
    worth: Worth


def run_sweep(
    sweep: Sweep,
    policy: Policy,
    run_dir: Path,
    *,
    base: str | os.PathLike[str] | None = None,
    listeners: Sequence[Listener] = (),
) -> Swept:
    """Train the trials of a grid together, and hold their group sizes against each other.

    Args:
        sweep: The grid and the task.
        policy: Judges after every chunk.
        run_dir: The run folder; the comparison is added to its summary.
        base: A folder or hub id; SmolLM2-135M-Instruct by default.
        listeners: Called with every event.

    Raises:
        ModuleNotFoundError: A package of the demo is missing; names the pip line.
        SearchFailed: Every trial failed.
        SearchInterrupted: Ctrl-C.
    """
    import optuna

    from rapidfire_automl.executor import RapidFireExecutor

    train, held_out = prompts(sweep)
    executor = RapidFireExecutor(
        os.fspath(base_path() if base is None else base),
        dtype="bfloat16" if is_bfloat16_fast() else "float32",
        slots=len(sweep.points),
        chunks=sweep.chunks,
        seed=sweep.seed,
        eval_batch_size=16,
        eval_sampling=Sampling(num_generations=sweep.answers, max_completion_length=sweep.longest),
        output_dir=run_dir,
    )
    study = optuna.create_study(direction="maximize", pruner=PolicyPruner(policy, chunks=sweep.chunks))
    for point in sweep.points:
        study.enqueue_trial(point)
    result = run_search(
        executor,
        build_objective(sweep, executor, train, held_out, run_dir),
        study=study,
        n_trials=len(sweep.points),
        run_dir=run_dir,
        listeners=listeners,
        facts={"sweep": sweep, "policy": str(policy)},
        own=True,
    )
    worth = compare(executor.records)
    add_to_summary(result, {"num_generations": as_facts(worth)})
    return Swept(result, executor.records, worth)


def prompts(sweep: Sweep) -> tuple[Dataset, Dataset]:
    """The prompts to train on and those to compare by: "State the final answer to the ... problem: 7 - 2 ="."""
    from datasets import Dataset

    task = Task("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    train, held_out = reasoning_rows(task, sweep.train, sweep.held_out, seed=sweep.seed)
    return Dataset.from_list(train), Dataset.from_list(held_out)


def build_objective(
    sweep: Sweep, executor: RapidFireExecutor, train: Dataset, held_out: Dataset, run_dir: Path
) -> Callable[[Any], Any]:
    """The function a TRL and Optuna user would have written."""

    def build(trial: Any) -> Any:
        import torch
        from peft import LoraConfig
        from transformers.trainer_callback import PrinterCallback
        from trl import GRPOConfig, GRPOTrainer

        answers = trial.suggest_categorical("num_generations", sweep.groups)
        trainer = GRPOTrainer(
            model=executor.model(trial),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            reward_funcs=reasoning_gym,
            args=GRPOConfig(
                num_generations=answers,
                learning_rate=trial.suggest_categorical("learning_rate", sweep.learning_rates),
                beta=trial.suggest_categorical("beta", sweep.betas),
                per_device_train_batch_size=sweep.prompts_per_step * answers,
                max_steps=sweep.steps,
                max_completion_length=sweep.longest,
                lr_scheduler_type="constant",
                gradient_checkpointing=False,
                seed=sweep.seed,
                bf16=is_bfloat16_fast(),
                use_cpu=not torch.accelerator.is_available(),
                output_dir=str(run_dir / "trials" / str(number_of(trial))),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=executor.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)  # it prints each log line to stdout when tqdm is off
        return trainer

    return build
