"""From a configuration to the TRL trainer that trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rapidfire_automl import rl
from rapidfire_automl.configs import FieldConfig, RFModelConfig
from rapidfire_automl.generation import AnswerScores
from rapidfire_automl.rewards import as_rewards

if TYPE_CHECKING:
    from datasets import Dataset

TRAINERS: Mapping[str, str] = {
    "SFT": "SFTTrainer",
    "DPO": "DPOTrainer",
    "GRPO": "GRPOTrainer",
    "RLOO": "RLOOTrainer",
}
"""Trainer type -> TRL's class."""

SAMPLE_SIZE = 64
"""Training examples that stand in for a held-out set nobody gave."""


@dataclass
class Data:
    """The two data sets, and what formatting functions make of them, once each.

    Args:
        train: Training rows.
        evaluation: Held-out rows, or the training rows that stand in for them.
    """

    train: Dataset
    evaluation: Dataset
    _formatted: dict[int, tuple[Callable[..., Any], Dataset, Dataset]] = field(default_factory=dict)

    def formatted(self, func: Callable[..., Any] | None) -> tuple[Dataset, Dataset]:
        """Both data sets after `func`: new columns beside the old ones, or `text` where it returns text."""
        if func is None:
            return self.train, self.evaluation
        if id(func) not in self._formatted:

            def row_to_columns(row: dict[str, Any]) -> dict[str, Any]:
                made = func(row)
                return {"text": made} if isinstance(made, str) else made

            # The function is kept with the result: an id lives as long as its object.
            self._formatted[id(func)] = (func, self.train.map(row_to_columns), self.evaluation.map(row_to_columns))
        return self._formatted[id(func)][1:]


@dataclass(frozen=True)
class Logs:
    """Where a trial's training logs go.

    Args:
        add: Called with the optimizer step and what the trainer logged there.
    """

    add: Callable[[int, Mapping[str, Any]], None]


def as_dataset(name: str, rows: Any) -> Dataset:
    """A `datasets.Dataset` from one, or from a list of dicts.

    Raises:
        ValueError: Empty, or nothing whose rows can be counted.
    """
    from datasets import Dataset, DatasetDict

    if isinstance(rows, DatasetDict):
        raise ValueError(f'`{name}` must be one split, got {", ".join(rows)}. Write {name}=dataset["train"].')
    if isinstance(rows, (list, tuple)):
        if rows and not all(isinstance(row, Mapping) for row in rows):
            raise ValueError(f"`{name}` must hold dicts, one a row, got {rows[0]!r}.")
        rows = Dataset.from_list([dict(row) for row in rows])
    if not isinstance(rows, Dataset):
        raise ValueError(f"`{name}` must be a datasets.Dataset or a list of dicts, got {type(rows).__name__}.")
    if not len(rows):
        raise ValueError(f"`{name}` must not be empty.")
    return rows


def build_trainer(
    config: RFModelConfig,
    trainer_type: str,
    *,
    model: Any,
    tokenizer: Any,
    data: Data,
    output_dir: Path,
    seed: int,
    logs: Logs,
) -> Any:
    """The trainer of one configuration, TRL's own class.

    Args:
        config: Nothing left to choose.
        trainer_type: "SFT", "DPO", "GRPO" or "RLOO".
        model: The trial's clone of the base.
        tokenizer: The base's.
        data: The data sets, not formatted.
        output_dir: For whatever the trainer writes.
        seed: Where `training_args` name none.
        logs: Where the trainer's logs go.
    """
    import trl

    assert isinstance(config.training_args, FieldConfig)
    train, evaluation = data.formatted(config.formatting_func)
    args = config.training_args.build(
        defaults={"report_to": "none", "disable_tqdm": True, "seed": seed, **_device_defaults()},
        # The executor saves the adapter of every trial that completes.
        overrides={"output_dir": str(output_dir), "save_strategy": "no", "load_best_model_at_end": False},
    )
    adapter = config.peft_config
    if isinstance(adapter, FieldConfig):
        adapter = adapter.build(defaults={"task_type": "CAUSAL_LM"} if config.model_type == "causal_lm" else None)
    answers = None
    if config.compute_metrics is not None and config.generation_config is not None:
        answers = AnswerScores(
            evaluation, tokenizer, config.compute_metrics, config.generation_config, args.per_device_eval_batch_size
        )
    own: dict[str, Any] = {"compute_metrics": config.compute_metrics if answers is None else None}
    if trainer_type in rl.TRAINERS:
        own = {"reward_funcs": as_rewards(config.reward_funcs)}
    trainer = getattr(trl, TRAINERS[trainer_type])(
        model=model,
        args=args,
        peft_config=adapter,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        callbacks=[_callback(logs, answers)],
        **own,
    )
    trainer.answer_scores = answers
    trainer.answer_logs = logs
    return trainer


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Without the six progress bars that TRL's preparation of the data draws for every trial."""
    import datasets

    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def answer_metric(key: str) -> Callable[[Any], float]:
    """A metric for the executor: one of the numbers that `compute_metrics` makes of generated answers."""

    def metric(trainer: Any) -> float:
        scores = trainer.answer_scores.measure(trainer.model)
        trainer.answer_logs.add(trainer.state.global_step, scores)
        if key not in scores:
            raise ValueError(
                f"`metric` must be one of {', '.join(scores)}, which `compute_metrics` returns; got {key!r}."
            )
        return float(scores[key])

    metric.__name__ = key
    return metric


def _device_defaults() -> dict[str, Any]:
    """TRL asks for bf16 by default, and transformers refuses it on a CPU unless the CPU is asked for."""
    import torch

    return {} if torch.accelerator.is_available() else {"use_cpu": True}


def _callback(logs: Logs, answers: AnswerScores | None) -> Any:
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        """Copies the trainer's logs, and adds the answers' scores to its evaluations."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            recorder.add(state.global_step, logs or {})

        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if answers is not None and model is not None:
                scores = answers.measure(model)
                if state.log_history:
                    state.log_history[-1].update(scores)
                recorder.add(state.global_step, scores)

    recorder = logs
    return Recorder()
