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

import contextlib
import json
import statistics
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import measuring, provenance  # noqa: E402
from experiments.measuring import Settings, Worker, paired_ratio  # noqa: E402

WAYS = ("serial", "joint", "sliced")


def measure_cell(
    settings: Settings, context: Any, base: Mapping[str, Any], trials: int, tokens: int, folder: Path
) -> dict[str, Any]:
    """A cell's entry in the results."""
    from experiments.throughput.workers import Job, serve

    config = settings.config
    limit_s = settings.cell_s()
    job = Job(
        way="serial", trials=trials, tokens=tokens, base=base, plan=None, memory_bytes=settings.memory_bytes,
        threads=settings.threads, config=config, device=settings.device, folder=folder,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:

        def start(job: Job) -> Worker:
            worker = Worker(context, serve, replace(job, folder=folder / job.way), timeout_s=max(300.0, 2 * limit_s))
            stack.callback(worker.end)
            return worker

        # One after the other: the planner calibrates in `joint`, and nobody should be at work beside it.
        workers = {"serial": start(job)}
        guess_s = workers["serial"].ready["last_step_s"] * trials
        measuring.affordable(2 * guess_s * (config["warmup"] + config["min_rounds"]), limit_s)
        workers["joint"] = start(replace(job, way="joint"))
        plan = measuring.plan_of(workers["joint"].ready["state"]["plan"])
        workers["sliced"] = start(replace(job, way="sliced", plan=replace(plan, trials_per_pass=1)))
        steps, rounds = measuring.schedule(workers, settings, trials)
        return _measure(workers, settings, trials, steps, rounds)


def _measure(
    workers: Mapping[str, Worker], settings: Settings, trials: int, steps: Mapping[str, int], rounds: int
) -> dict[str, Any]:
    each = {"serial": 1, "joint": trials, "sliced": trials}
    blocks = measuring.take_turns(workers, settings, steps, rounds)
    step_s = {way: [block["seconds"] / (steps[way] * each[way]) for block in blocks[way]] for way in WAYS}
    entry: dict[str, Any] = {
        "steps": dict(steps),
        "rounds": measuring.rounds_of({f"{way}_s": step_s[way] for way in WAYS}),
    }
    for way in WAYS:
        busy = None
        if settings.device == "cuda":
            busy_s = workers[way].block(steps[way], probe=True)["probed"]["busy_s"]
            busy = None if busy_s is None else busy_s / (statistics.median(step_s[way]) * steps[way] * each[way])
        entry[way] = _way(workers[way].ready, blocks[way], step_s[way], steps[way] * each[way], each[way], busy)
    seed = settings.config["seed"]
    entry["speedup"] = paired_ratio(step_s["serial"], step_s["joint"], seed)
    entry["speedup_sliced"] = paired_ratio(step_s["serial"], step_s["sliced"], seed)
    entry["joint_over_sliced"] = paired_ratio(step_s["sliced"], step_s["joint"], seed)
    return entry


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


# -- the whole run -------------------------------------------------------------------------------------------------


def run(settings: Settings, bases: Mapping[str, Any], grid: Mapping[str, Sequence[int]], out: Path) -> dict[str, Any]:
    """Measure every cell, cheap ones first, and write the results after each."""
    experiment = measuring.Experiment(
        name="throughput",
        axis="tokens",
        measure=partial(measure_cell, settings),
        nulls=(*WAYS, "speedup"),
        show=_show,
    )
    facts = {"data": _describe_data(settings.config, grid)}
    return measuring.run(experiment, settings, bases, grid, facts, out)


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
) -> tuple[Settings, dict[str, Any], dict[str, list[int]], Namespace]:
    """Settings, bases and grid from the command line and the configuration file."""
    return measuring.read(measuring.options(__doc__, HERE, "1,8x16,64"), words, "tokens")


def main() -> None:
    from experiments.throughput.figure import draw

    settings, bases, grid, given = parse()
    out = given.out
    results = run(settings, bases, grid, out)
    if given.fill is not None:
        results = measuring.merge(json.loads(given.fill.read_text(encoding="utf-8")), results, "tokens")
        provenance.write(out, results)
    drawn = draw(results, out.with_name("figure.png" if out.stem == "results" else f"{out.stem}.png"))
    print(f"{results['status']} in {results['wall_s']:.0f} s: {out}" + (f", {drawn}" if drawn else ""))


if __name__ == "__main__":
    main()
