"""The ways of the throughput experiment: plain TRL, and our executor."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import datasets
import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from experiments import worker


@dataclass(frozen=True)
class Job(worker.Job):
    """A cell's trials in one way.

    Args:
        way: "serial": plain TRL, one trainer. "joint": our executor as it plans. "sliced": our executor with one trial
            a pass.
        tokens: Of a trial's step.
    """

    tokens: int


def serve(pipe: Connection, job: Job) -> None:
    """A worker's whole life."""
    worker.serve(pipe, job, {"serial": _serial, "joint": _together})


def _serial(pipe: Connection, job: Job) -> None:
    rows = data_set(job)
    tokenizer = worker.tokenizer_of(job.base)
    worker.serial(pipe, job, lambda model: _trainer(model, job, rows, tokenizer, number=0))


def _together(pipe: Connection, job: Job) -> None:
    rows = data_set(job)
    tokenizer = worker.tokenizer_of(job.base)
    worker.together(
        pipe,
        job,
        tokenizer,
        lambda executor, model, number: _trainer(model, job, rows, tokenizer, number),
        worker.timing,
        worker.KernelSeconds() if job.device == "cuda" else None,
    )


def _trainer(model: Any, job: Job, rows: Any, tokenizer: Any, number: int) -> SFTTrainer:
    """The same for all ways: TRL's defaults but for what the experiment sets."""
    config = job.config
    return SFTTrainer(
        model=model,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **config["lora"]),
        args=SFTConfig(
            output_dir=str(job.folder / str(number)),
            per_device_train_batch_size=config["batch_size"],
            max_steps=worker.FOREVER,
            bf16=config["dtype"] == "bfloat16",
            gradient_checkpointing=config["gradient_checkpointing"],
            use_cpu=job.device == "cpu",
            seed=config["seed"],
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def data_set(job: Job) -> datasets.Dataset:
    """Random tokens, `rows` rows of `tokens / batch_size` each."""
    config = job.config
    vocabulary = worker.config_of(job.base).vocab_size
    generator = torch.Generator().manual_seed(config["seed"])
    ids = torch.randint(5, vocabulary, (config["rows"], job.tokens // config["batch_size"]), generator=generator)
    return datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in ids.tolist()])
