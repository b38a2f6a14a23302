"""The ways of the rollouts experiment, plain TRL and our executor, with clocks inside `generate`; and the machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from peft import LoraConfig
from torch.nn import functional as F
from trl import GRPOConfig, GRPOTrainer

from experiments import worker
from experiments.rollouts.sampling import StackSampler
from rapidfire_automl.executor import RapidFireExecutor, passes, rollouts
from rapidfire_automl.executor.requests import Generate


@dataclass(frozen=True)
class Job(worker.Job):
    """A cell's trials in one way, "serial" or "joint".

    Args:
        generations: Rows of a trial's step, all of one prompt.
    """

    generations: int


def serve(pipe: Connection, job: Job) -> None:
    """A worker's whole life."""
    worker.serve(pipe, job, {"serial": _serial, "joint": _joint, "machine": _machine})


class Clock:
    """Seconds and tokens of `generate`; a thread that waits for others stops it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self._local = threading.local()

    def start(self) -> None:
        self._local.begin = time.perf_counter()

    def stop(self) -> bool:
        """Whether it was running in this thread."""
        begin = getattr(self._local, "begin", None)
        if begin is None:
            return False
        self.seconds += time.perf_counter() - begin
        self._local.begin = None
        return True

    def watch(self, trainer: GRPOTrainer, device: str) -> None:
        """Run while a trainer's model generates."""
        own = trainer.model.generate

        def generate(*args: Any, **kwargs: Any) -> Any:
            worker.synchronize(device)
            self.start()
            made = own(*args, **kwargs)
            worker.synchronize(device)
            self.stop()
            prompts = kwargs["input_ids"]
            self.tokens += made.shape[0] * (made.shape[1] - prompts.shape[1])
            return made

        trainer.model.generate = generate


def _serial(pipe: Connection, job: Job) -> None:
    tokenizer, rows = _material(job)
    clock = Clock()

    def build(model: Any) -> GRPOTrainer:
        trainer = _trainer(model, job, rows, tokenizer, number=0)
        clock.watch(trainer, job.device)
        return trainer

    worker.serial(pipe, job, build, lambda: {"generate_s": clock.seconds, "tokens": clock.tokens})


def _joint(pipe: Connection, job: Job) -> None:
    tokenizer, rows = _material(job)
    clock = Clock()
    served = SimpleNamespace(seconds=0.0)

    def build(executor: RapidFireExecutor, model: Any, number: int) -> GRPOTrainer:
        if number == 0:
            _watch_conductor(executor, clock, served)
        trainer = _trainer(model, job, rows, tokenizer, number)
        clock.watch(trainer, job.device)
        return trainer

    def counts(executor: RapidFireExecutor) -> dict[str, float]:
        assert executor._conductor is not None
        rolling = asdict(executor._conductor.rolling.counts)
        return {
            "generate_s": clock.seconds + served.seconds,
            "prepare_s": clock.seconds,
            "rolled_tokens": rolling.pop("tokens"),
            **rolling,
            **{name: value for name, value in worker.timing(executor).items() if name.endswith("_s")},
            "tokens": clock.tokens,
        }

    worker.together(pipe, job, tokenizer, build, counts, _Probe(job.device))


def _watch_conductor(executor: RapidFireExecutor, clock: Clock, served: Any) -> None:
    """Stop a trial's clock while others have the baton, and time what is done for all of them."""
    conductor = executor._conductor
    assert conductor is not None
    own_submit, own_serve = conductor.submit, conductor.rolling.serve

    def submit(arm: Any, request: Any) -> Any:
        running = isinstance(request, Generate) and clock.stop()
        answer = own_submit(arm, request)
        if running:
            clock.start()
        return answer

    def serve(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        answered = own_serve(*args, **kwargs)
        served.seconds += time.perf_counter() - begin
        return answered

    conductor.submit, conductor.rolling.serve = submit, serve  # type: ignore[method-assign]


class _Probe:
    """Samples the stacks of a block; on a GPU the joint passes' clocks wait for its kernels, so that each has its own.

    Without that, a kernel's time falls to whoever next wants a number from the GPU.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    def start(self) -> None:
        if self._device == "cuda":
            for module in (passes, rollouts):
                module.time = SimpleNamespace(perf_counter=_synchronized_clock)  # type: ignore[assignment]
        self._sampler = StackSampler(
            {
                "prefill": (rollouts.Decoding.__init__,),
                "decode and choose": (rollouts.Decoding.advance,),
                "forward and head": (passes.Multiplexer.forward,),
                "backward": (passes.Multiplexer.backward,),
            }
        )
        self._sampler.start()

    def stop(self) -> dict[str, Any]:
        report = self._sampler.stop()
        for module in (passes, rollouts):
            module.time = time
        return report


def _synchronized_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def letters(completions: list[str], **columns: Any) -> list[float]:
    """A reward that costs nothing and tells answers apart."""
    return [float(sum(map(str.isalpha, text)) % 7) for text in completions]


def _trainer(model: Any, job: Job, rows: Any, tokenizer: Any, number: int) -> GRPOTrainer:
    """The same for all ways: TRL's defaults but for what the experiment sets."""
    config = job.config
    never = worker.config_of(job.base).vocab_size
    trainer = GRPOTrainer(
        model=model,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **config["lora"]),
        reward_funcs=letters,
        args=GRPOConfig(
            output_dir=str(job.folder / str(number)),
            per_device_train_batch_size=job.generations,
            num_generations=job.generations,
            max_completion_length=config["new_tokens"],
            generation_kwargs={"eos_token_id": never},
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
    trainer.eos_token_ids = [never]  # by which TRL cuts the answers after they are sampled
    return trainer


# -- material ------------------------------------------------------------------------------------------------------


def _material(job: Job) -> tuple[Any, datasets.Dataset]:
    tokenizer = worker.tokenizer_of(job.base, worker.config_of(job.base).vocab_size)
    config = job.config
    rows = prompts(tokenizer, config["rows"], config["prompt_tokens"], config["seed"])
    return tokenizer, datasets.Dataset.from_dict({"prompt": rows})


def prompts(tokenizer: Any, rows: int, tokens: int, seed: int, pool: int = 512) -> list[str]:
    """Random words, so many tokens a prompt: of the words that are a token each.

    Raises:
        ValueError: The tokenizer has no such words, or no prompts of so few tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    words: list[str] = []
    for token in torch.randperm(len(tokenizer), generator=generator).tolist():
        word = tokenizer.decode([token]).strip()
        known = len(word) > 1 and word.isascii() and word.isalnum() and word not in words
        if known and len(tokenizer(" ".join([word] * 3), add_special_tokens=False)["input_ids"]) == 3:
            words.append(word)
        if len(words) == pool:
            break
    count = tokens - len(tokenizer("")["input_ids"])
    if not words or count < 1:
        raise ValueError(f"`prompt_tokens` must be a length of prompts that this tokenizer can give, got {tokens}.")
    picks = torch.randint(len(words), (rows, count), generator=generator).tolist()
    made = [" ".join(words[pick] for pick in row) for row in picks]
    if {len(ids) for ids in tokenizer(made)["input_ids"]} != {tokens}:
        raise ValueError(f"No prompts of {tokens} tokens: in this tokenizer what a word becomes depends on the others.")
    return made


# -- the machine ---------------------------------------------------------------------------------------------------


def _machine(pipe: Connection, job: Job) -> None:
    """Report what this machine reads from memory and multiplies in a second, at best."""
    config, device = job.config, torch.device(job.device)
    dtype = getattr(torch, config["dtype"])
    with torch.no_grad():
        read = _bandwidth(torch.ones(config["machine_bytes"] // 4, dtype=torch.float32, device=device))
        size = 1024 if job.device == "cpu" else 8192
        weight = torch.randn(size, size, dtype=dtype, device=device)
        x = torch.randn(size, size, dtype=dtype, device=device)
        flops = _best_rate(job.device, lambda: F.linear(x, weight), 2 * size**3)
    ready = {"bytes_per_s": max(read.values()), "bytes_per_s_by": read, "flops_per_s": flops}
    pipe.send(("block", {**ready, "threads": torch.get_num_threads()}))
    pipe.recv()


def _bandwidth(large: torch.Tensor) -> dict[str, float]:
    """Bytes a second, by what is done with a tensor that no cache can hold."""
    device, other = large.device.type, torch.empty_like(large)
    return {
        "sum": _best_rate(device, large.sum, large.nbytes),
        "copy": _best_rate(device, lambda: other.copy_(large), 2 * large.nbytes),
    }


def _best_rate(device: str, work: Callable[[], Any], amount: float, repeats: int = 9) -> float:
    best = float("inf")
    for _ in range(repeats):
        worker.synchronize(device)
        begin = time.perf_counter()
        work()
        worker.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return amount / best
