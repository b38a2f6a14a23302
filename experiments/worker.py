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
from typing import Any, Protocol

import datasets
import optuna
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from experiments.provenance import peak_rss_bytes
from rapidfire_automl.events import Event
from rapidfire_automl.executor import RapidFireExecutor
from rapidfire_automl.plan import Plan

FOREVER = 100_000
"""Optimizer steps of a trial: more than anybody asks for."""


@dataclass(frozen=True)
class Job:
    """A cell's trials in one way.

    Args:
        way: "serial": plain TRL, one trainer. Any other: our executor.
        trials: Trials that train together.
        base: `{"folder": path}` or `{"llama": configuration}`.
        plan: Of the executor; None to calibrate.
        memory_bytes: Most private memory of the process, or None.
        threads: Of torch, or None for its own choice.
        config: The experiment's.
        device: "cpu" or "cuda".
        folder: For what trainers write.
    """

    way: str
    trials: int
    base: Mapping[str, Any]
    plan: Plan | None
    memory_bytes: int | None
    threads: int | None
    config: Mapping[str, Any]
    device: str
    folder: Path


@dataclass(frozen=True)
class Block:
    """An order: so many optimizer steps of every trial, timed; with `probe`, looked at closer."""

    steps: int
    probe: bool = False


class Probe(Protocol):
    """Looks closer at a block."""

    def start(self) -> None:
        """The block begins."""

    def stop(self) -> dict[str, Any]:
        """The block is over; returns what is to be reported of it."""


class KernelSeconds:
    """Seconds that the GPU's kernels and copies run in a block."""

    def start(self) -> None:
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profiler.start()

    def stop(self) -> dict[str, Any]:
        self._profiler.stop()
        on_device = [e for e in self._profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        return {"busy_s": sum(e.self_device_time_total for e in on_device) / 1e6 or None}


def serve(pipe: Connection, job: Job, ways: Mapping[str, Callable[[Connection, Any], None]]) -> None:
    """A worker's whole life: set up, then a block for every order, until the order is None.

    Args:
        pipe: To the parent.
        job: What to train.
        ways: By name, "joint" for any that is not named.
    """
    with contextlib.suppress(OSError):  # if memory runs out, better this process than the parent
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    try:
        _limit(job.memory_bytes)
        _quiet()
        if job.threads:
            torch.set_num_threads(job.threads)
        ways.get(job.way, ways["joint"])(pipe, job)
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
        probe: Looks closer at a block where that is asked for.
    """

    def __init__(
        self,
        pipe: Connection,
        job: Job,
        born_s: float,
        counts: Callable[[], dict[str, float]] = dict,
        state: Callable[[], dict[str, Any]] = dict,
        probe: Probe | None = None,
    ) -> None:
        self._pipe, self._job, self._counts, self._state, self._probe = pipe, job, counts, state, probe
        self._begin_s, self._first_s = born_s, 0.0
        self._steps, self._due = 0, job.config["warmup"]
        self._last_s = born_s
        self._before = counts()
        self._probing = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps += 1
        if self._first_s == 0.0:
            self._first_s = time.perf_counter() - self._begin_s
        if self._steps < self._due:
            self._last_s = time.perf_counter()
            return
        synchronize(self._job.device)
        now = time.perf_counter()
        probed = self._probe.stop() if self._probing and self._probe is not None else None
        after = self._counts()
        self._pipe.send(
            (
                "block",
                {
                    "seconds": now - self._begin_s,
                    "last_step_s": now - self._last_s,
                    "first_step_s": self._first_s,
                    "probed": probed,
                    "peak_bytes": _peak_bytes(self._job.device),
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
        self._probing = order.probe
        if self._probing and self._probe is not None:
            self._probe.start()
        synchronize(self._job.device)
        self._before = self._counts()
        self._begin_s = self._last_s = time.perf_counter()


def serial(
    pipe: Connection, job: Job, build: Callable[[Any], Any], counts: Callable[[], dict[str, float]] = dict
) -> None:
    """Plain TRL, one trainer.

    Args:
        pipe: To the parent.
        job: What to train.
        build: From a loaded base to a trainer.
        counts: See `Gate`.
    """
    import_model(job)
    born_s = time.perf_counter()
    trainer = build(load(job))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Gate(pipe, job, born_s, counts, probe=KernelSeconds() if job.device == "cuda" else None))
    trainer.train()


def together(
    pipe: Connection,
    job: Job,
    tokenizer: Any,
    build: Callable[[RapidFireExecutor, Any, int], Any],
    counts: Callable[[RapidFireExecutor], dict[str, float]],
    probe: Probe | None = None,
) -> None:
    """Our executor.

    Args:
        pipe: To the parent.
        job: What to train.
        tokenizer: Of the base.
        build: From the executor, a trial's model and its number to a trainer.
        counts: See `Gate`; called once the executor is open.
        probe: See `Gate`.
    """
    import_model(job)

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

    def state() -> dict[str, Any]:
        records = executor.records.values()
        return {
            "plan": None if executor.plan is None else asdict(executor.plan),
            "fused": all(record.fused for record in records),
            "why_unfused": next((record.why_unfused for record in records if record.why_unfused), None),
        }

    def objective(trial: optuna.Trial) -> Any:
        trainer = build(executor, executor.model(trial), trial.number)
        trainer.remove_callback(PrinterCallback)
        if trial.number == 0:
            trainer.add_callback(Gate(pipe, job, born_s, lambda: counts(executor), state, probe))
        return trainer

    with executor:
        executor.optimize(optuna.create_study(), objective, n_trials=job.trials)


def timing(executor: RapidFireExecutor) -> dict[str, float]:
    """What the joint passes count."""
    return {} if executor._base is None else asdict(executor._base.multiplexer.timing)


# -- material ------------------------------------------------------------------------------------------------------


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


def tokenizer_of(base: Mapping[str, Any], words: int = 3) -> Any:
    """The base's own, or one that splits at blanks and knows `<pad>`, `<eos>`, `<unk>`, `w3`, `w4`, ..."""
    if "folder" in base:
        return AutoTokenizer.from_pretrained(base["folder"])
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def import_model(job: Job) -> None:
    """Import the model's code now: users pay for that once, not once a trial."""
    _ = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config_of(job.base))]


# -- the process ---------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_bytes(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_rss_bytes()


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
