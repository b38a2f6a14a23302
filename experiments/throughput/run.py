"""Joint training against plain serial TRL, and against our own executor with one trial per pass.

    python experiments/throughput/run.py                                  # the small grid: 4 x 4, two bases, CPU
    python experiments/throughput/run.py --grid full --time-limit 20000
    python experiments/throughput/run.py --grid 1,8x16,64 --bases random-35m --rounds 20
    python experiments/throughput/run.py --base path/to/model --gradient-checkpointing
    python experiments/throughput/run.py --device cuda --grid full --out runs/h100.json

A cell is a base, a number of trials, and the tokens of a trial's optimizer step. Its three ways live in a process each
and take turns, A B C A B C ...: a round times a block of steps of `serial` (one plain `SFTTrainer`; what a trial-step
costs there does not depend on how many trials follow each other), of `joint` (our executor as it plans) and of `sliced`
(the same plan with `trials_per_pass=1`). All times are wall seconds per *trial-step*, one optimizer step of one trial,
in the steady state: loading, building and warm-up are in `first_step_s` alone. `speedup` is the median over rounds of
serial / joint of the same round, `low` and `high` its 95% bootstrap interval over rounds. `host_s` is what is neither
decoder nor head nor their backward; on a GPU, where launches are asynchronous, what the GPU idles. `busy` is kernel
seconds of a profiled block over the median seconds of an unprofiled one. Peak memory is a process's resident set on a
CPU, PyTorch's allocations on a GPU, where the three ways' bases share the memory.

`results.json` is written after every cell; `figure.png` at the end (`figure.py` draws it again). Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import provenance  # noqa: E402
from rapidfire_automl.plan import Plan  # noqa: E402

WAYS = ("serial", "joint", "sliced")


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


class Worker:
    """A way's process, seen from here."""

    def __init__(self, context: Any, job: Any, timeout_s: float) -> None:
        from experiments.throughput.workers import serve

        self.way = job.way
        self._timeout_s = timeout_s
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()
        self.ready = self._receive()

    def block(self, steps: int, *, profile: bool = False) -> dict[str, Any]:
        """Time a block of optimizer steps."""
        from experiments.throughput.workers import Block

        self._pipe.send(Block(steps, profile))
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


def measure_cell(
    context: Any, settings: Settings, base: Mapping[str, Any], trials: int, tokens: int, folder: Path
) -> dict[str, Any]:
    """A cell's entry in the results."""
    from experiments.throughput.workers import Job

    config = settings.config
    job = Job(
        "serial", trials, tokens, base, None, settings.memory_bytes, settings.threads, config, settings.device, folder
    )
    limit_s = min(3 * config["cell_limit_s"], max(settings.left_s(), 1.0))
    with contextlib.ExitStack() as stack:

        def start(job: Job) -> Worker:
            worker = Worker(context, replace(job, folder=folder / job.way), timeout_s=max(300.0, 2 * limit_s))
            stack.callback(worker.end)
            return worker

        # One after the other: the planner calibrates in `joint`, and nobody should be at work beside it.
        workers = {"serial": start(job)}
        guess_s = workers["serial"].ready["last_step_s"] * trials
        _affordable(2 * guess_s * (config["warmup"] + config["min_rounds"]), limit_s)
        workers["joint"] = start(replace(job, way="joint"))
        plan = _plan(workers["joint"].ready["state"]["plan"])
        workers["sliced"] = start(replace(job, way="sliced", plan=replace(plan, trials_per_pass=1)))
        steps, rounds = _schedule(workers, settings, trials, limit_s)
        return _measure(workers, settings, trials, steps, rounds)


def _schedule(
    workers: Mapping[str, Worker], settings: Settings, trials: int, limit_s: float
) -> tuple[dict[str, int], int]:
    """Steps of a block for each way, and rounds: as configured, or what fits into the cell's time."""
    config = settings.config
    step_s = {way: worker.ready["last_step_s"] for way, worker in workers.items()}
    for count in range(config["steps"], 0, -1):
        steps = {"serial": count * min(trials, config["serial_factor"]), "joint": count, "sliced": count}
        round_s = sum(step_s[way] * steps[way] for way in WAYS)
        if config["rounds"] * round_s <= config["cell_limit_s"]:
            return steps, config["rounds"]
    _affordable(config["min_rounds"] * round_s, limit_s)
    return steps, max(config["min_rounds"], min(config["rounds"], int(config["cell_limit_s"] / round_s)))


def _affordable(seconds: float, limit_s: float) -> None:
    if seconds > limit_s:
        raise CellError(f"skipped: it would take about {seconds:.0f} s, and {limit_s:.0f} s are left for a cell")


def _measure(
    workers: Mapping[str, Worker], settings: Settings, trials: int, steps: Mapping[str, int], rounds: int
) -> dict[str, Any]:
    each = {"serial": 1, "joint": trials, "sliced": trials}
    blocks: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            blocks[way].append(workers[way].block(steps[way]))
        if settings.left_s() < 0 and len(blocks["sliced"]) >= settings.config["min_rounds"]:
            break
    step_s = {way: [block["seconds"] / (steps[way] * each[way]) for block in blocks[way]] for way in WAYS}
    entry: dict[str, Any] = {"steps": dict(steps), "rounds": _rounds(step_s)}
    for way in WAYS:
        busy = None
        if settings.device == "cuda":
            busy_s = workers[way].block(steps[way], profile=True)["busy_s"]
            busy = None if busy_s is None else busy_s / (statistics.median(step_s[way]) * steps[way] * each[way])
        entry[way] = _way(workers[way].ready, blocks[way], step_s[way], steps[way] * each[way], each[way], busy)
    seed = settings.config["seed"]
    entry["speedup"] = paired_ratio(step_s["serial"], step_s["joint"], seed)
    entry["speedup_sliced"] = paired_ratio(step_s["serial"], step_s["sliced"], seed)
    entry["joint_over_sliced"] = paired_ratio(step_s["sliced"], step_s["joint"], seed)
    return entry


def _rounds(step_s: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    return [{f"{way}_s": step_s[way][i] for way in WAYS} for i in range(len(step_s["serial"]))]


def _way(
    ready: Mapping[str, Any],
    blocks: Sequence[Mapping[str, Any]],
    step_s: Sequence[float],
    trial_steps: int,
    trials: int,
    busy: float | None,
) -> dict[str, Any]:
    """What one way took, per trial-step."""
    entry: dict[str, Any] = {
        "step_s": {"median": statistics.median(step_s), "min": min(step_s), "max": max(step_s)},
        "first_step_s": ready["first_step_s"] / trials,
        "peak_bytes": blocks[-1]["peak_bytes"],
        "busy": busy,
        "host_s": None,
        "decoder_and_head_s": None,
        "passes_per_step": None,
        **{name: blocks[-1]["state"].get(name) for name in ("plan", "fused", "why_unfused")},
    }
    if busy is not None:
        entry["host_s"] = (1 - busy) * statistics.median(step_s)
    counts = [block["counts"] for block in blocks]
    if counts[-1].get("passes"):
        steps = trial_steps / trials
        entry["passes_per_step"] = statistics.median(count["passes"] for count in counts) / steps
        if busy is None:
            inside = [(c["forward_s"] + c["head_s"] + c["backward_s"]) / trial_steps for c in counts]
            entry["decoder_and_head_s"] = statistics.median(inside)
            entry["host_s"] = statistics.median(all_s - in_s for all_s, in_s in zip(step_s, inside, strict=True))
    return entry


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


def merge(kept: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
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
    new = {(c["base"], c["trials"], c["tokens"]): c for c in results["cells"] if c["status"] == "complete"}
    cells = [
        cell if cell["status"] == "complete" else new.get((cell["base"], cell["trials"], cell["tokens"]), cell)
        for cell in kept["cells"]
    ]
    return {**kept, "cells": cells, "wall_s": kept["wall_s"] + results["wall_s"]}


def _plan(fields: dict[str, Any] | None) -> Plan:
    return Plan() if fields is None else Plan(**fields)


# -- the whole run -------------------------------------------------------------------------------------------------


def run(settings: Settings, bases: Mapping[str, Any], grid: Mapping[str, Sequence[int]], out: Path) -> dict[str, Any]:
    """Measure every cell, cheap ones first, and write the results after each."""
    begin = time.monotonic()
    results: dict[str, Any] = {
        "experiment": "throughput",
        "status": "running",
        "seed": settings.config["seed"],
        "config": {
            **settings.config, "grid": grid, "device": settings.device, "threads": settings.threads,
            "memory_bytes": settings.memory_bytes,
        },
        **provenance.provenance(),
        "load": {"before": provenance.load(), "after": None},
        "wall_s": None,
        "bases": {name: _describe(base) for name, base in bases.items()},
        "data": _describe_data(settings.config, grid),
        "cells": [],
    }  # fmt: skip
    cells = [(name, n, tokens) for name in bases for n in grid["trials"] for tokens in grid["tokens"]]
    cells.sort(key=lambda cell: (cell[1] * cell[2], cell[1]))
    status = "complete"
    try:
        with _context(settings) as context, tempfile.TemporaryDirectory(prefix="throughput-") as folder:
            os.environ["RAPIDFIRE_AUTOML_CACHE"] = folder  # the plan is calibrated in this run, once a base
            for number, (name, trials, tokens) in enumerate(cells):
                entry: dict[str, Any] = {"base": name, "trials": trials, "tokens": tokens, "status": "complete"}
                try:
                    if settings.left_s() < 0:
                        status = "time limit"
                        raise CellError("skipped: the time limit is over")
                    cell_folder = Path(folder) / str(number)
                    entry |= measure_cell(context, settings, bases[name], trials, tokens, cell_folder)
                except CellError as error:
                    entry |= {"status": "missing", "reason": str(error), **dict.fromkeys((*WAYS, "speedup"))}
                results["cells"].append(entry)
                _show(entry)
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
def _context(settings: Settings) -> Iterator[Any]:
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


def _describe(base: Mapping[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from experiments.throughput.workers import config_of

    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config_of(base)).num_parameters()
    folder = base.get("folder")
    return {
        "name": Path(folder).name if folder else "random weights",
        "parameters": parameters,
        "sha256": provenance.sha256(Path(folder)) if folder else provenance.sha256_of(base["llama"]),
    }


def _describe_data(config: Mapping[str, Any], grid: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The tokens are drawn from the seed: what they are drawn from is their identity."""
    drawn = {"rows": config["rows"], "seed": config["seed"], "tokens": list(grid["tokens"])}
    return {"kind": "uniform random tokens", **drawn, "sha256": provenance.sha256_of(drawn)}


def _show(entry: Mapping[str, Any]) -> None:
    where = f"{entry['base']:>16} {entry['trials']:>3} trials x {entry['tokens']:>4} tokens"
    if entry["speedup"] is None:
        print(f"{where}  {entry['reason']}", flush=True)
        return
    ms = {way: 1e3 * entry[way]["step_s"]["median"] for way in WAYS}
    ratio, host_s = entry["speedup"], entry["joint"]["host_s"]
    host = "" if host_s is None else f"  host {1e3 * host_s:.1f} ms"
    peaks = " ".join("?" if (b := entry[way]["peak_bytes"]) is None else f"{b / 2**30:.2f}" for way in WAYS)
    print(
        f"{where}  serial {ms['serial']:7.1f}  joint {ms['joint']:7.1f}  sliced {ms['sliced']:7.1f} ms"
        f"  speedup {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        f" n={len(entry['rounds'])}{host}  peak {peaks} GiB",
        flush=True,
    )


def parse(
    words: Sequence[str] | None = None,
) -> tuple[Settings, dict[str, Any], dict[str, list[int]], argparse.Namespace]:
    """Settings, bases and grid from the command line and the configuration file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--grid", default="small", help="small, full, or trials x tokens like 1,8x16,64")
    parser.add_argument("--bases", nargs="+", help="names in the configuration; by default all of the device")
    parser.add_argument("--base", type=Path, help="a model's folder, instead of the configuration's")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, help="optimizer steps of a block")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"])
    parser.add_argument("--gradient-checkpointing", action="store_true", default=None)
    parser.add_argument("--time-limit", type=float, help="seconds; cells that have not begun by then are missing")
    parser.add_argument("--cell-limit", type=float, help="seconds of a cell")
    parser.add_argument("--threads", type=int, help="torch's threads; default: its own choice")
    parser.add_argument("--memory-limit", type=float, help="GiB of a process; default: 80%% of what is free, on a CPU")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--fill", type=Path, help="results whose missing cells this run's cells are to fill in --out")
    given = parser.parse_args(words)
    config = tomllib.loads(given.config.read_text(encoding="utf-8"))
    bases, grids = config.pop("bases"), config.pop("grids")
    changed = {
        "rounds": given.rounds, "steps": given.steps, "seed": given.seed, "dtype": given.dtype,
        "gradient_checkpointing": given.gradient_checkpointing,
        "time_limit_s": given.time_limit, "cell_limit_s": given.cell_limit,
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
        names = given.bases or [name for name, base in bases.items() if base["device"] == given.device]
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
        grid = grids[given.grid] if given.grid in grids else _grid(given.grid)
    except ValueError:
        parser.error(f"`--grid` must be {', '.join(grids)}, or trials x tokens like 1,8x16,64; got {given.grid!r}.")
    return settings, chosen, grid, given


def _located(base: Mapping[str, Any]) -> dict[str, Any]:
    if "llama" in base:
        return {"llama": base["llama"]}
    if base["folder"] != "demo":
        return {"folder": base["folder"]}
    from rapidfire_automl.demo import base_path

    return {"folder": str(base_path())}


def _grid(text: str) -> dict[str, list[int]]:
    trials, tokens = ([int(number) for number in part.split(",")] for part in text.split("x"))
    if min(*trials, *tokens) < 1:
        raise ValueError
    return {"trials": trials, "tokens": tokens}


def main() -> None:
    from experiments.throughput.figure import draw

    settings, bases, grid, given = parse()
    out = given.out
    results = run(settings, bases, grid, out)
    if given.fill is not None:
        results = merge(json.loads(given.fill.read_text(encoding="utf-8")), results)
        provenance.write(out, results)
    drawn = draw(results, out.with_name("figure.png" if out.stem == "results" else f"{out.stem}.png"))
    print(f"{results['status']} in {results['wall_s']:.0f} s: {out}" + (f", {drawn}" if drawn else ""))


if __name__ == "__main__":
    main()
