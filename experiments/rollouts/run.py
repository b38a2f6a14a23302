"""Joint rollouts against plain serial TRL: decoding alone, and whole GRPO steps.

    python experiments/rollouts/run.py                                  # or make rollouts: 4 x 2, SmolLM2-135M, CPU
    python experiments/rollouts/run.py --grid full --time-limit 20000 --cell-limit 300
    python experiments/rollouts/run.py --grid 8x4 --rounds 20 --no-gradient-checkpointing
    python experiments/rollouts/run.py --bases smollm2-135m random-35m
    python experiments/rollouts/run.py --device cuda --grid full --cell-limit 300 --out runs/h100.json

A cell is a base, a number of trials, and the generations of a trial's step: so many answers to one prompt. Prompts
have `prompt_tokens`, and no answer ends before `new_tokens`, so that both ways decode the same number of tokens. The
ways live in a process each and take turns: a round times a block of optimizer steps of `serial` (one plain
`GRPOTrainer`; what a trial-step costs there does not depend on how many trials follow each other), then of `joint` (our
executor as it plans).

Step times are wall seconds per *trial-step*, one optimizer step of one trial, with rollout, reward, loss, backward and
optimizer, in the steady state. Decoding is what happens inside `generate`, prompts and the preparation by transformers
included; in `joint` that is what each trial does by itself there plus the joint rollout. `decode_speedup` and
`step_speedup` are medians over rounds of serial / joint of the same round, `low` and `high` their 95% bootstrap
interval. `parts` says where a trial-step goes; `rest` is what is in none of the others: rewards, losses, optimizers,
the trainers' own Python, the hand-over. `profile` says what that is in one cell, by sampled stacks.

`roofline`: a token takes at least the bytes of all Linear weights, LM head included, over the measured memory
bandwidth, and at least their multiplications over the measured rate of a large matrix product; `over` is how many times
that the measured time is. (A base that fits into the caches can beat the first.) On a GPU `parts` comes from one block
in which the clocks wait for the GPU; all else is measured without.

`results.json` is written after every cell; `figure.png` at the end (`figure.py` draws it again). Needs a quiet machine.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import measuring, provenance  # noqa: E402
from experiments.measuring import CellError, Settings, Worker, paired_ratio  # noqa: E402

WAYS = ("serial", "joint")
PARTS = ("prepare", "prefill", "decode", "choose", "forward", "head", "backward")


def measure_cell(
    settings: Settings,
    facts: Mapping[str, Any],
    context: Any,
    base: Mapping[str, Any],
    trials: int,
    generations: int,
    folder: Path,
) -> dict[str, Any]:
    """A cell's entry in the results."""
    from experiments.rollouts.workers import serve

    config = settings.config
    limit_s = settings.cell_s()
    job = _job(settings, base, trials, generations, folder)
    with contextlib.ExitStack() as stack:

        def start(job: Any) -> Worker:
            worker = Worker(context, serve, replace(job, folder=folder / job.way), timeout_s=max(300.0, 2 * limit_s))
            stack.callback(worker.end)
            return worker

        # One after the other: the planner calibrates in `joint`, and nobody should be at work beside it.
        workers = {"serial": start(job)}
        guess_s = workers["serial"].ready["last_step_s"] * trials / 2  # where joint gains little
        measuring.affordable(guess_s * (config["warmup"] + config["min_rounds"]), limit_s)
        workers["joint"] = start(replace(job, way="joint"))
        steps, rounds = measuring.schedule(workers, settings, trials)
        entry = _measure(workers, settings, trials, generations, steps, rounds)
        is_profiled = [trials, generations] == list(config["profile"])
        if is_profiled or settings.device == "cuda":
            block = workers["joint"].block(steps["joint"], probe=True)
            if settings.device == "cuda":
                entry["joint"]["parts"] = _joint_parts(block, steps["joint"] * trials)
                entry["joint"]["decode_step_s"] = block["counts"]["decode_s"] / block["counts"]["steps"]
            if is_profiled:
                facts["profile"][_name_of(facts, base)] = _profile(block, trials, generations, steps["joint"] * trials)
    linear_parameters = facts["linear_parameters"][_name_of(facts, base)]
    entry["roofline"] = _roofline(entry, config, facts["machine"], linear_parameters, generations)
    return entry


def _job(settings: Settings, base: Mapping[str, Any], trials: int, generations: int, folder: Path) -> Any:
    from experiments.rollouts.workers import Job

    return Job(
        way="serial", trials=trials, generations=generations, base=base, plan=None,
        memory_bytes=settings.memory_bytes, threads=settings.threads, config=settings.config, device=settings.device,
        folder=folder,
    )  # fmt: skip


def _measure(
    workers: Mapping[str, Worker],
    settings: Settings,
    trials: int,
    generations: int,
    steps: Mapping[str, int],
    rounds: int,
) -> dict[str, Any]:
    each = {"serial": 1, "joint": trials}
    blocks = measuring.take_turns(workers, settings, steps, rounds)
    step_s: dict[str, list[float]] = {}
    token_s: dict[str, list[float]] = {}
    for way in WAYS:
        trial_steps = steps[way] * each[way]
        tokens = trial_steps * generations * settings.config["new_tokens"]
        if got := next((b["counts"]["tokens"] for b in blocks[way] if b["counts"]["tokens"] != tokens), None):
            raise CellError(f"{way}: decoded {got:g} tokens instead of {tokens}")
        step_s[way] = [block["seconds"] / trial_steps for block in blocks[way]]
        token_s[way] = [block["counts"]["generate_s"] / tokens for block in blocks[way]]
    columns = {f"{way}_s": step_s[way] for way in WAYS} | {f"{way}_token_s": token_s[way] for way in WAYS}
    entry: dict[str, Any] = {"steps": dict(steps), "rounds": measuring.rounds_of(columns)}
    for way in WAYS:
        ready, last = workers[way].ready, blocks[way][-1]
        entry[way] = {
            "step_s": _spread(step_s[way]),
            "tokens_per_s": _spread([1 / seconds for seconds in token_s[way]]),
            "first_step_s": ready["first_step_s"] / each[way],
            "peak_bytes": last["peak_bytes"],
            **{name: last["state"].get(name) for name in ("plan", "fused", "why_unfused")},
        }
    of_serial = [block["counts"]["generate_s"] / steps["serial"] for block in blocks["serial"]]
    entry["serial"]["parts"] = {
        "generate": statistics.median(of_serial),
        "rest": statistics.median(all_s - s for all_s, s in zip(step_s["serial"], of_serial, strict=True)),
    }
    of_joint = [_joint_parts(block, steps["joint"] * trials) for block in blocks["joint"]]
    entry["joint"]["parts"] = {name: statistics.median(parts[name] for parts in of_joint) for name in of_joint[0]}
    counts = blocks["joint"][-1]["counts"]
    entry["joint"]["rows_of_a_decode_step"] = counts["row_steps"] / counts["steps"]
    entry["joint"]["decode_step_s"] = statistics.median(
        block["counts"]["decode_s"] / block["counts"]["steps"] for block in blocks["joint"]
    )
    seed = settings.config["seed"]
    entry["decode_speedup"] = paired_ratio(token_s["serial"], token_s["joint"], seed)
    entry["step_speedup"] = paired_ratio(step_s["serial"], step_s["joint"], seed)
    return entry


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _joint_parts(block: Mapping[str, Any], trial_steps: int) -> dict[str, float]:
    """Seconds of a trial-step by what they went into."""
    parts = {name: block["counts"][f"{name}_s"] / trial_steps for name in PARTS}
    return {**parts, "rest": block["seconds"] / trial_steps - sum(parts.values())}


def _profile(block: Mapping[str, Any], trials: int, generations: int, trial_steps: int) -> dict[str, Any]:
    """What the sampler saw, in seconds of a trial-step."""
    seen = dict(block["probed"])
    for name in ("parts_s", "inside_s", "lines_s"):
        seen[name] = {where: seconds / trial_steps for where, seconds in seen[name].items()}
    return {"trials": trials, "generations": generations, "trial_steps": trial_steps, **seen}


def _roofline(
    entry: Mapping[str, Any],
    config: Mapping[str, Any],
    machine: Mapping[str, Any],
    linear_parameters: int,
    generations: int,
) -> dict[str, Any]:
    """The least a token of all rows can take, and what it takes."""
    weight_bytes = linear_parameters * {"bfloat16": 2, "float32": 4}[config["dtype"]]
    entries: dict[str, Any] = {"weight_bytes": weight_bytes}
    for way, rows in (("serial", generations), ("joint", entry["joint"]["rows_of_a_decode_step"])):
        memory_s = weight_bytes / machine["bytes_per_s"]
        compute_s = 2 * linear_parameters * rows / machine["flops_per_s"]
        bound_s = max(memory_s, compute_s)
        token_s = rows / entry[way]["tokens_per_s"]["median"]
        entries[way] = {
            "rows": rows, "memory_s": memory_s, "compute_s": compute_s, "bound_s": bound_s,
            "token_s": token_s, "over": token_s / bound_s,
        }  # fmt: skip
    joint = entries["joint"]
    joint["decode_step_s"] = entry["joint"]["decode_step_s"]
    joint["decode_step_over"] = joint["decode_step_s"] / joint["bound_s"]
    return entries


# -- the whole run -------------------------------------------------------------------------------------------------


def run(settings: Settings, bases: Mapping[str, Any], grid: Mapping[str, Sequence[int]], out: Path) -> dict[str, Any]:
    """Measure every cell, cheap ones first, and write the results after each."""
    facts: dict[str, Any] = {
        "machine": measure_machine(settings),
        "data": _describe_data(settings.config),
        "profile": {},
    }
    private = {
        **facts,
        "bases": bases,
        "linear_parameters": {name: measuring.describe(base)["linear_parameters"] for name, base in bases.items()},
    }
    experiment = measuring.Experiment(
        name="rollouts",
        axis="generations",
        measure=partial(measure_cell, settings, private),
        nulls=(*WAYS, "decode_speedup", "step_speedup", "roofline"),
        show=_show,
    )
    return measuring.run(experiment, settings, bases, grid, facts, out)


def measure_machine(settings: Settings) -> dict[str, Any]:
    """Bytes a second from memory and multiplications a second, of this machine at its best."""
    from experiments.rollouts.workers import serve

    job = replace(_job(settings, {}, 1, 1, Path()), way="machine", memory_bytes=None)
    with measuring.processes(settings) as context:
        worker = Worker(context, serve, job, timeout_s=300.0)
        worker.end()
    return {**worker.ready, "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def _name_of(facts: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    return next(name for name, other in facts["bases"].items() if other is base)


def _describe_data(config: Mapping[str, Any]) -> dict[str, Any]:
    """The prompts are drawn from the seed: what they are drawn from is their identity."""
    drawn = {name: config[name] for name in ("rows", "seed", "prompt_tokens")}
    return {"kind": "random words", **drawn, "sha256": provenance.sha256_of(drawn)}


def _show(entry: Mapping[str, Any]) -> None:
    where = f"{entry['base']:>16} {entry['trials']:>3} trials x {entry['generations']:>2} generations"
    if entry["step_speedup"] is None:
        print(f"{where}  {entry['reason']}", flush=True)
        return
    rates = " ".join(f"{way} {entry[way]['tokens_per_s']['median']:.0f}" for way in WAYS)
    ms = " ".join(f"{way} {1e3 * entry[way]['step_s']['median']:.0f}" for way in WAYS)
    ratios = [
        f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        for ratio in (entry["decode_speedup"], entry["step_speedup"])
    ]
    parts = " ".join(f"{name} {1e3 * seconds:.0f}" for name, seconds in entry["joint"]["parts"].items())
    over = entry["roofline"]["joint"]["decode_step_over"]
    print(
        f"{where}  tokens/s {rates}: {ratios[0]}  ms/step {ms}: {ratios[1]}  n={len(entry['rounds'])}"
        f"  {over:.1f}x roofline\n{'':>18}joint, ms: {parts}",
        flush=True,
    )


def parse(
    words: Sequence[str] | None = None,
) -> tuple[Settings, dict[str, Any], dict[str, list[int]], Namespace]:
    """Settings, bases and grid from the command line and the configuration file."""
    parser = measuring.options(__doc__, HERE, "1,8x4,16")
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--new-tokens", type=int)
    settings, bases, grid, given = measuring.read(parser, words, "generations", ("prompt_tokens", "new_tokens"))
    if min(grid["generations"]) < 2:
        parser.error("`--grid` must have >= 2 generations: GRPO compares the answers to a prompt with each other.")
    if settings.config["new_tokens"] < 2 or settings.config["prompt_tokens"] < 1:
        parser.error("`--new-tokens` must be >= 2 and `--prompt-tokens` >= 1.")
    return settings, bases, grid, given


def main() -> None:
    from experiments.rollouts.figure import draw

    settings, bases, grid, given = parse()
    out = given.out
    results = run(settings, bases, grid, out)
    if given.fill is not None:
        results = measuring.merge(json.loads(given.fill.read_text(encoding="utf-8")), results, "generations")
        provenance.write(out, results)
    drawn = draw(results, out.with_name("figure.png" if out.stem == "results" else f"{out.stem}.png"))
    print(f"{results['status']} in {results['wall_s']:.0f} s: {out}" + (f", {drawn}" if drawn else ""))


if __name__ == "__main__":
    main()
