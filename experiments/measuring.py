"""Ways of doing the same that take turns, each in a process of its own: what the experiments on speed share.

A cell is a base, a number of trials, and one more number of the experiment's own. A round times a block of steps of
every way, one after the other, so that a machine that gets slower slows all of them down.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments import provenance
from rapidfire_automl.plan import Plan


class CellError(RuntimeError):
    """A way of a cell cannot be measured; the message says why."""


@dataclass(frozen=True)
class Settings:
    """The configuration with what the command line changed."""

    config: Mapping[str, Any]
    device: str
    threads: int | None
    memory_bytes: int | None
    deadline_s: float

    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()

    def cell_s(self) -> float:
        """The most a cell may take."""
        return min(3 * self.config["cell_limit_s"], max(self.left_s(), 1.0))


@dataclass(frozen=True)
class Experiment:
    """What is measured.

    Args:
        name: Of its folder.
        axis: A cell's number beside `trials`.
        measure: From (processes, base, trials, the other number, folder) to a cell's entry.
        nulls: The fields of an entry that are null where a cell is missing.
        show: Prints an entry.
    """

    name: str
    axis: str
    measure: Callable[[Any, Mapping[str, Any], int, int, Path], dict[str, Any]]
    nulls: Sequence[str]
    show: Callable[[Mapping[str, Any]], None]


class Worker:
    """A way's process, seen from here.

    Args:
        context: Starts processes.
        serve: What the process does, called with its end of the pipe and the job.
        job: With the `way`.
        timeout_s: For an answer.
    """

    def __init__(self, context: Any, serve: Callable[[Any, Any], None], job: Any, timeout_s: float) -> None:
        self.way = job.way
        self._timeout_s = timeout_s
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()
        self.ready = self._receive()

    def block(self, steps: int, *, probe: bool = False) -> dict[str, Any]:
        """Time a block of optimizer steps; with `probe`, look closer, at the price of the time."""
        from experiments.worker import Block

        self._pipe.send(Block(steps, probe))
        return self._receive()

    def end(self) -> None:
        """Let the process go."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def _receive(self) -> dict[str, Any]:
        try:
            if not self._pipe.poll(self._timeout_s):
                raise CellError(f"{self.way}: no answer within {self._timeout_s:.0f} s")
            kind, content = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(5)
            raise CellError(f"{self.way}: the process died (exit code {self._process.exitcode})") from error
        if kind == "error":
            raise CellError(f"{self.way}: {content}")
        return content


# -- a cell --------------------------------------------------------------------------------------------------------


def schedule(workers: Mapping[str, Worker], settings: Settings, trials: int) -> tuple[dict[str, int], int]:
    """Steps of a block for each way, and rounds: as configured, or what fits into the cell's time."""
    config = settings.config
    step_s = {way: worker.ready["last_step_s"] for way, worker in workers.items()}
    for count in range(config["steps"], 0, -1):
        steps = {way: count * (min(trials, config["serial_factor"]) if way == "serial" else 1) for way in workers}
        round_s = sum(step_s[way] * steps[way] for way in workers)
        if config["rounds"] * round_s <= config["cell_limit_s"]:
            return steps, config["rounds"]
    affordable(config["min_rounds"] * round_s, settings.cell_s())
    return steps, max(config["min_rounds"], min(config["rounds"], int(config["cell_limit_s"] / round_s)))


def affordable(seconds: float, limit_s: float) -> None:
    if seconds > limit_s:
        raise CellError(f"skipped: it would take about {seconds:.0f} s, and {limit_s:.0f} s are left for a cell")


def take_turns(
    workers: Mapping[str, Worker], settings: Settings, steps: Mapping[str, int], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """The blocks of every way; fewer rounds where the time limit is over."""
    blocks: dict[str, list[dict[str, Any]]] = {way: [] for way in workers}
    for done in range(1, rounds + 1):
        for way, worker in workers.items():
            blocks[way].append(worker.block(steps[way]))
        if settings.left_s() < 0 and done >= settings.config["min_rounds"]:
            break
    return blocks


def rounds_of(seconds: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    return [dict(zip(seconds, values, strict=True)) for values in zip(*seconds.values(), strict=True)]


def paired_ratio(above: Sequence[float], below: Sequence[float], seed: int, draws: int = 10_000) -> dict[str, float]:
    """The median of the rounds' ratios, their range, and a 95% bootstrap interval of the median over rounds."""
    ratios = np.asarray(above) / np.asarray(below)
    picks = np.random.default_rng(seed).integers(0, len(ratios), size=(draws, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return {
        "median": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "min": float(ratios.min()),
        "max": float(ratios.max()),
    }


def plan_of(fields: dict[str, Any] | None) -> Plan:
    return Plan() if fields is None else Plan(**fields)


# -- the whole run -------------------------------------------------------------------------------------------------


def run(
    experiment: Experiment,
    settings: Settings,
    bases: Mapping[str, Any],
    grid: Mapping[str, Sequence[int]],
    facts: Mapping[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Measure every cell, cheap ones first, and write the results after each.

    Args:
        experiment: What is measured.
        settings: How.
        bases: By name.
        grid: `trials` and the experiment's axis.
        facts: What the results say beside the cells; read anew whenever they are written.
        out: Where they go.
    """
    begin = time.monotonic()
    results: dict[str, Any] = {
        "experiment": experiment.name,
        "status": "running",
        "seed": settings.config["seed"],
        "config": {
            **settings.config, "grid": grid, "device": settings.device, "threads": settings.threads,
            "memory_bytes": settings.memory_bytes,
        },
        **provenance.provenance(),
        "load": {"before": provenance.load(), "after": None},
        "wall_s": None,
        "bases": {name: describe(base) for name, base in bases.items()},
        **facts,
        "cells": [],
    }  # fmt: skip
    cells = [(name, n, size) for name in bases for n in grid["trials"] for size in grid[experiment.axis]]
    cells.sort(key=lambda cell: (cell[1] * cell[2], cell[1]))
    status = "complete"
    try:
        with processes(settings) as context, tempfile.TemporaryDirectory(prefix=f"{experiment.name}-") as folder:
            os.environ["RAPIDFIRE_AUTOML_CACHE"] = folder  # the plan is calibrated in this run, once a base
            for number, (name, trials, size) in enumerate(cells):
                entry: dict[str, Any] = {"base": name, "trials": trials, experiment.axis: size, "status": "complete"}
                try:
                    if settings.left_s() < 0:
                        status = "time limit"
                        raise CellError("skipped: the time limit is over")
                    entry |= experiment.measure(context, bases[name], trials, size, Path(folder) / str(number))
                except CellError as error:
                    entry |= {"status": "missing", "reason": str(error), **dict.fromkeys(experiment.nulls)}
                results["cells"].append(entry)
                experiment.show(entry)
                results["wall_s"] = time.monotonic() - begin
                results["load"]["after"] = provenance.load()
                provenance.write(out, results)
    except KeyboardInterrupt:
        status = "cancelled"
    results["status"] = status
    results["wall_s"] = time.monotonic() - begin
    provenance.write(out, results)
    return results


@contextlib.contextmanager
def processes(settings: Settings) -> Iterator[Any]:
    """How processes start: with the libraries imported, where no GPU forbids that."""
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # what libraries warn each other of, once a worker
    os.environ.setdefault("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    if settings.device == "cpu" and "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "trl", "peft", "rapidfire_automl.executor"])
        yield context
    else:
        yield multiprocessing.get_context("spawn")


def describe(base: Mapping[str, Any]) -> dict[str, Any]:
    """A base by name and size; `linear_parameters` are those that a token has to go through, the LM head's included."""
    import torch
    from transformers import AutoModelForCausalLM

    from experiments.worker import config_of

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(base))
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    folder = base.get("folder")
    return {
        "name": Path(folder).name if folder else "random weights",
        "parameters": model.num_parameters(),
        "linear_parameters": sum(linear.weight.numel() for linear in linears),
        "sha256": provenance.sha256(Path(folder)) if folder else provenance.sha256_of(base["llama"]),
    }


def merge(kept: Mapping[str, Any], results: Mapping[str, Any], axis: str) -> dict[str, Any]:
    """Fill the cells that are missing in `kept` with those of a later run of the same code on the same machine.

    Raises:
        ValueError: They differ in more than how long a cell may take and which cells there are.
    """
    for name in ("experiment", "seed", "commit", "dirty", "versions", "hardware"):
        if kept[name] != results[name]:
            raise ValueError(f"Results of two runs can't be merged: `{name}` is {kept[name]!r} and {results[name]!r}.")
    free = ("rounds", "min_rounds", "cell_limit_s", "time_limit_s", "grid", "memory_bytes")
    one, other = ({k: v for k, v in each["config"].items() if k not in free} for each in (kept, results))
    if one != other:
        raise ValueError(f"Results of two runs can't be merged: their configurations are {one} and {other}.")
    new = {(c["base"], c["trials"], c[axis]): c for c in results["cells"] if c["status"] == "complete"}
    cells = [
        cell if cell["status"] == "complete" else new.get((cell["base"], cell["trials"], cell[axis]), cell)
        for cell in kept["cells"]
    ]
    return {**kept, "cells": cells, "wall_s": kept["wall_s"] + results["wall_s"]}


# -- the command line ----------------------------------------------------------------------------------------------


def options(description: str | None, folder: Path, grid_example: str) -> argparse.ArgumentParser:
    """A parser with the options that all have; an experiment adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=folder / "config.toml")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--grid", default="small", help=f"small, full, or numbers like {grid_example}")
    parser.add_argument("--bases", nargs="+", help="names in the configuration; by default those of the device")
    parser.add_argument("--base", type=Path, help="a model's folder, instead of the configuration's")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, help="optimizer steps of a block")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"])
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction)
    parser.add_argument("--time-limit", type=float, help="seconds; cells that have not begun by then are missing")
    parser.add_argument("--cell-limit", type=float, help="seconds of a cell")
    parser.add_argument("--threads", type=int, help="torch's threads; default: its own choice")
    parser.add_argument("--memory-limit", type=float, help="GiB of a process; default: 80%% of what is free, on a CPU")
    parser.add_argument("--out", type=Path, default=folder / "results.json")
    parser.add_argument("--fill", type=Path, help="results whose missing cells this run's cells are to fill in --out")
    return parser


def read(
    parser: argparse.ArgumentParser, words: Sequence[str] | None, axis: str, own: Sequence[str] = ()
) -> tuple[Settings, dict[str, Any], dict[str, list[int]], argparse.Namespace]:
    """Settings, bases and grid from the command line and the configuration file.

    `bases` there is a table by name, or the path of the configuration that has it.

    Args:
        parser: From `options`.
        words: The command line, None for the process's.
        axis: A cell's number beside `trials`.
        own: Options of the experiment's own that change the key of the same name.
    """
    given = parser.parse_args(words)
    config = tomllib.loads(given.config.read_text(encoding="utf-8"))
    bases, grids, by_default = config.pop("bases"), config.pop("grids"), config.pop("default_bases", {})
    if isinstance(bases, str):
        bases = tomllib.loads((given.config.parent / bases).read_text(encoding="utf-8"))["bases"]
    changed = {
        "rounds": given.rounds, "steps": given.steps, "seed": given.seed, "dtype": given.dtype,
        "gradient_checkpointing": given.gradient_checkpointing,
        "time_limit_s": given.time_limit, "cell_limit_s": given.cell_limit,
        **{name: getattr(given, name) for name in own},
    }  # fmt: skip
    config |= {name: value for name, value in changed.items() if value is not None}
    config["min_rounds"] = min(config["min_rounds"], config["rounds"])
    if min(config["rounds"], config["steps"]) < 1:
        parser.error("`--rounds` and `--steps` must be >= 1.")
    if config["warmup"] < 2:
        parser.error("`warmup` must be >= 2: the last step of the warm-up is what the schedule goes by.")
    if given.base is not None:
        chosen = {given.base.resolve().name: {"folder": str(given.base.resolve())}}
    else:
        of_device = [name for name, base in bases.items() if base["device"] == given.device]
        names = given.bases or by_default.get(given.device, of_device)
        if unknown := [name for name in names if name not in bases]:
            parser.error(f"`--bases` must be of {', '.join(bases)}, got {unknown[0]}.")
        chosen = {name: _located(bases[name]) for name in names}
    memory = None
    if given.memory_limit is not None:
        memory = int(given.memory_limit * 2**30)
    elif given.device == "cpu" and (free := provenance.memory_bytes("MemAvailable")):
        memory = int(0.8 * free)
    settings = Settings(config, given.device, given.threads, memory, time.monotonic() + config["time_limit_s"])
    try:
        grid = grids[given.grid] if given.grid in grids else _grid(given.grid, axis)
    except ValueError:
        parser.error(f"`--grid` must be {', '.join(grids)}, or trials x {axis} like 1,8x4,16; got {given.grid!r}.")
    return settings, chosen, grid, given


def _located(base: Mapping[str, Any]) -> dict[str, Any]:
    if "llama" in base:
        return {"llama": base["llama"]}
    if base["folder"] != "demo":
        return {"folder": base["folder"]}
    from rapidfire_automl.demo import base_path

    return {"folder": str(base_path())}


def _grid(text: str, axis: str) -> dict[str, list[int]]:
    trials, sizes = ([int(number) for number in part.split(",")] for part in text.split("x"))
    if min(*trials, *sizes) < 1:
        raise ValueError
    return {"trials": trials, axis: sizes}
