"""One way to train a cell's trials, in a process of its own, in blocks of steps that the parent asks for.

A process per way keeps the ways apart: plain TRL sees none of our patches, and peak memory is each way's own. A way
that is not asked for a block sleeps in the callback of its first trial.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import datasets
import optuna
import torch
import transformers
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from experiments.provenance import peak_rss_bytes
from rapidfire_automl.events import Event
from rapidfire_automl.executor import RapidFireExecutor
from rapidfire_automl.plan import Plan

Way = Literal["serial", "joint", "sliced"]
FOREVER = 100_000


@dataclass(frozen=True)
class Job:
    """A cell's trials in one way.

    Args:
        way: "serial": plain TRL, one trainer. "joint": our executor as it plans. "sliced": our executor with one trial
            a pass.
        trials: Trials that train together.
        tokens: Of a trial's step.
        base: `{"folder": path}` or `{"llama": configuration}`.
        plan: Of the executor; None to calibrate.
        memory_bytes: Most private memory of the process, or None.
        threads: Of torch, or None for its own choice.
        config: The experiment's.
        device: "cpu" or "cuda".
        folder: For what trainers write.
    """

    way: Way
    trials: int
    tokens: int
    base: Mapping[str, Any]
    plan: Plan | None
    memory_bytes: int | None
    threads: int | None
    config: Mapping[str, Any]
    device: str
    folder: Path


@dataclass(frozen=True)
class Block:
    """An order: so many optimizer steps of every trial, timed; with `profile`, the GPU's busy seconds too."""

    steps: int
    profile: bool = False


def serve(pipe: Connection, job: Job) -> None:
    """A worker's whole life: set up, then a block for every order, until the order is None."""
    with contextlib.suppress(OSError):  # if memory runs out, better this process than the parent
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    try:
        _limit(job.memory_bytes)
        _quiet()
        if job.threads:
            torch.set_num_threads(job.threads)
        (_serial if job.way == "serial" else _together)(pipe, job)
        pipe.send(("error", "the trials ended before they were told to"))
    except BaseException as error:
        with contextlib.suppress(OSError):
            pipe.send(("error", f"{type(error).__name__}: {error}".splitlines()[0]))
    finally:
        os._exit(1)  # trials still wait in their threads; nothing of them is needed


class Gate(TrainerCallback):
    """Times blocks of steps at the first trial, and waits between them.

    Args:
        pipe: To the parent.
        job: Its warm-up and device.
        born_s: When the set-up began.
        counts: Counters to report, as their growth over the block.
        state: What else to report, as it is at the block's end.
    """

    def __init__(
        self,
        pipe: Connection,
        job: Job,
        born_s: float,
        counts: Callable[[], dict[str, float]] = dict,
        state: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._pipe, self._job, self._counts, self._state = pipe, job, counts, state
        self._begin_s, self._first_s = born_s, 0.0
        self._steps, self._due = 0, job.config["warmup"]
        self._last_s = born_s
        self._before = counts()
        self._profiler: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps += 1
        if self._first_s == 0.0:
            self._first_s = time.perf_counter() - self._begin_s
        if self._steps < self._due:
            self._last_s = time.perf_counter()
            return
        _synchronize(self._job)
        now = time.perf_counter()
        busy_s = self._stop_profile()
        after = self._counts()
        self._pipe.send(
            (
                "block",
                {
                    "seconds": now - self._begin_s,
                    "last_step_s": now - self._last_s,
                    "first_step_s": self._first_s,
                    "busy_s": busy_s,
                    "peak_bytes": _peak_bytes(self._job),
                    "counts": {name: after[name] - self._before.get(name, 0.0) for name in after},
                    "state": self._state(),
                },
            )
        )
        try:
            order: Block | None = self._pipe.recv()
        except EOFError:
            order = None
        if order is None:
            os._exit(0)
        self._due = self._steps + order.steps
        if order.profile:
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()
        _synchronize(self._job)
        self._before = self._counts()
        self._begin_s = self._last_s = time.perf_counter()

    def _stop_profile(self) -> float | None:
        """Seconds that kernels and copies ran since the profile was started."""
        if self._profiler is None:
            return None
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        on_device = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        return sum(e.self_device_time_total for e in on_device) / 1e6 or None


def _serial(pipe: Connection, job: Job) -> None:
    rows = data_set(job)
    tokenizer = tokenizer_of(job.base)
    _import_model(job)
    born_s = time.perf_counter()
    trainer = _trainer(load(job), job, rows, tokenizer, number=0)
    trainer.add_callback(Gate(pipe, job, born_s))
    trainer.train()


def _together(pipe: Connection, job: Job) -> None:
    rows = data_set(job)
    tokenizer = tokenizer_of(job.base)
    _import_model(job)

    def on_event(event: Event) -> None:
        if event.kind == "trial_ended":  # the others would go on without a clock
            pipe.send(("error", event.data.get("reason") or "a trial ended early"))
            os._exit(1)

    born_s = time.perf_counter()
    executor = RapidFireExecutor(
        job.base["folder"] if "folder" in job.base else load(job),
        slots=job.trials,
        chunks=1,
        tokenizer=tokenizer,
        dtype=getattr(torch, job.config["dtype"]),
        device=job.device,
        seed=job.config["seed"],
        metric=lambda trainer: 0.0,  # trials never reach the end of their one chunk
        plan=job.plan,
        output_dir=job.folder,
        listeners=[on_event],
    )

    def counts() -> dict[str, float]:
        return {} if executor._base is None else asdict(executor._base.multiplexer.timing)

    def state() -> dict[str, Any]:
        records = executor.records.values()
        return {
            "plan": None if executor.plan is None else asdict(executor.plan),
            "fused": all(record.fused for record in records),
            "why_unfused": next((record.why_unfused for record in records if record.why_unfused), None),
        }

    def objective(trial: optuna.Trial) -> SFTTrainer:
        trainer = _trainer(executor.model(trial), job, rows, tokenizer, trial.number)
        if trial.number == 0:
            trainer.add_callback(Gate(pipe, job, born_s, counts, state))
        return trainer

    with executor:
        executor.optimize(optuna.create_study(), objective, n_trials=job.trials)


def _trainer(model: Any, job: Job, rows: Any, tokenizer: Any, number: int) -> SFTTrainer:
    """The same for all ways: TRL's defaults but for what the experiment sets."""
    config = job.config
    trainer = SFTTrainer(
        model=model,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **config["lora"]),
        args=SFTConfig(
            output_dir=str(job.folder / str(number)),
            per_device_train_batch_size=config["batch_size"],
            max_steps=FOREVER,
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
    trainer.remove_callback(PrinterCallback)
    return trainer


# -- material ------------------------------------------------------------------------------------------------------


def data_set(job: Job) -> datasets.Dataset:
    """Random tokens, `rows` rows of `tokens / batch_size` each."""
    config = job.config
    vocabulary = config_of(job.base).vocab_size
    generator = torch.Generator().manual_seed(config["seed"])
    ids = torch.randint(5, vocabulary, (config["rows"], job.tokens // config["batch_size"]), generator=generator)
    return datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in ids.tolist()])


def config_of(base: Mapping[str, Any]) -> Any:
    if "folder" in base:
        return AutoConfig.from_pretrained(base["folder"])
    return AutoConfig.for_model("llama", max_position_embeddings=4096, bos_token_id=1, eos_token_id=1, **base["llama"])


def load(job: Job) -> Any:
    """The base as a user of plain TRL has it before each trial."""
    dtype = getattr(torch, job.config["dtype"])
    if "folder" in job.base:
        return AutoModelForCausalLM.from_pretrained(job.base["folder"], dtype=dtype)
    with torch.random.fork_rng(devices=[]), torch.device(job.device):
        torch.manual_seed(job.config["seed"])
        return AutoModelForCausalLM.from_config(config_of(job.base), dtype=dtype)


def tokenizer_of(base: Mapping[str, Any]) -> Any:
    """The base's own, or one of three words: the data comes as token ids."""
    if "folder" in base:
        return AutoTokenizer.from_pretrained(base["folder"])
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def _import_model(job: Job) -> None:
    """Import the model's code now: users pay for that once, not once a trial."""
    _ = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config_of(job.base))]


# -- the process ---------------------------------------------------------------------------------------------------


def _synchronize(job: Job) -> None:
    if job.device == "cuda":
        torch.cuda.synchronize()


def _peak_bytes(job: Job) -> int | None:
    return torch.cuda.max_memory_allocated() if job.device == "cuda" else peak_rss_bytes()


def _limit(memory_bytes: int | None) -> None:
    if memory_bytes is None:
        return
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))


def _quiet() -> None:
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("rapidfire_automl").setLevel(logging.ERROR)
