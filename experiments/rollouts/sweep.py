"""What the demo's GRPO sweep saves by pruning itself: the same grid trained to the end, and with the demo's policy.

    python experiments/rollouts/sweep.py                    # three seeds
    python experiments/rollouts/sweep.py --seeds 0 --out runs/sweep.json

For every seed (prompts, draws, comparison) the grid of `make demo-grpo` is searched twice, each time in a process of
its own: with `Nop`, which trains all trials to the end, and with the policy. Trials that live in both do the same work
on the same prompts; in bfloat16 their numbers may differ in the last bits, and their samples with them.

`generated` are the tokens sampled to train on, of all trials; evaluations, the same for every trial and chunk, are not
in it. `reward` is the selected trial's mean over the held-out prompts at its end, with a 95% bootstrap interval over
the prompts; `difference` is the policy's less `Nop`'s, paired by prompt. `saving` is `Nop`'s generated tokens over the
policy's. `sweep.json` is written after every run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "policies")]

from experiments import provenance  # noqa: E402
from rapidfire_automl.demo import base_path  # noqa: E402
from rapidfire_automl.demo_grpo import POLICY, Sweep, Swept, prompts, run_sweep  # noqa: E402
from rapidfire_automl.group_sizes import LEVEL, bootstrap  # noqa: E402
from rapidfire_automl.jsonable import jsonable  # noqa: E402
from rapidfire_policies import Nop  # noqa: E402

POLICIES = {"nop": Nop(), "policy": POLICY}


def run(config: Mapping[str, Any], seeds: Sequence[int], base: Path, out: Path) -> dict[str, Any]:
    """Both searches of every seed; results are written as they come."""
    begin = time.monotonic()
    results: dict[str, Any] = {
        "experiment": "rollouts/sweep",
        "status": "running",
        "seed": list(seeds),
        "config": {**config, "policies": {name: str(policy) for name, policy in POLICIES.items()}, "level": LEVEL},
        **provenance.provenance(),
        "load": {"before": provenance.load(), "after": None},
        "wall_s": None,
        "model": {"name": base.name, "sha256": provenance.sha256(base)},
        "data": None,
        "runs": [],
        "comparison": None,
    }
    try:
        for seed in seeds:
            for name in POLICIES:
                found = in_process(dict(config["sweep"]), seed, name, str(base))
                results["data"] = {**(results["data"] or {}), str(seed): found.pop("data")}
                results["runs"].append(found)
                results["comparison"] = compare(results["runs"])
                results["wall_s"] = time.monotonic() - begin
                provenance.write(out, results)
                print(
                    f"seed {seed} {name}: {found['generated']} tokens generated, reward {found['reward']:.3f}, "
                    f"{found['wall_s']:.0f} s",
                    flush=True,
                )
        results["status"] = "complete"
    except KeyboardInterrupt:
        results["status"] = "cancelled"
    results["load"]["after"] = provenance.load()
    results["wall_s"] = time.monotonic() - begin
    provenance.write(out, results)
    return results


def in_process(sweep: dict[str, Any], seed: int, policy: str, base: str) -> dict[str, Any]:
    """A search in a fresh process, so that none finds the memory or the threads of another."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(search, (sweep, seed, policy, base))


def search(sweep: dict[str, Any], seed: int, policy: str, base: str) -> dict[str, Any]:
    """One run's entry in the results."""
    from rapidfire_automl.cli.terminal import quieten

    quieten()
    grid = Sweep(**sweep, seed=seed)
    rows = [part.to_list() for part in prompts(grid)]
    with tempfile.TemporaryDirectory(prefix="rapidfire-sweep-") as folder:
        found = facts(run_sweep(grid, POLICIES[policy], Path(folder), base=base))
    return {"seed": seed, "policy": policy, "data": provenance.sha256_of(rows), **found}


def facts(swept: Swept) -> dict[str, Any]:
    """What a search came to."""
    result, records = swept.result, swept.records
    best = None if result.best_trial is None else records[result.best_trial]
    scores = [] if best is None else [float(score) for score in best.scores[-1]]
    return {
        "generated": sum(sum(record.generated) for record in records.values()),
        "trained": sum(sum(record.tokens) for record in records.values()),
        "chunks": result.chunks_used,
        "wall_s": result.wall_s,
        "base_reward": result.base_value,
        "selected": result.best_trial,
        "params": result.best_params,
        "reward": result.best_value,
        "interval": bootstrap(scores) if scores else None,
        "scores": scores,
        "answer": result.summary["num_generations"]["answer"],
        "trials": [
            {
                "params": record.params,
                "state": str(record.state),
                "values": jsonable(record.values),
                "generated": record.generated,
                "trained": record.tokens,
                "seconds": record.seconds,
                "verdict": record.verdicts[-1][2] if record.verdicts else None,
            }
            for record in records.values()
        ],
    }


def compare(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The policy against `Nop`, seed by seed and in all; None before a seed has both."""
    by_seed: dict[int, dict[str, Mapping[str, Any]]] = {}
    for found in runs:
        by_seed.setdefault(found["seed"], {})[found["policy"]] = found
    seeds = []
    for seed, pair in by_seed.items():
        if pair.keys() != POLICIES.keys():
            continue
        nop, policy = pair["nop"], pair["policy"]
        both = bool(nop["scores"] and policy["scores"])
        seeds.append(
            {
                "seed": seed,
                "saving": nop["generated"] / policy["generated"],
                "difference": policy["reward"] - nop["reward"] if both else None,
                "interval": bootstrap([b - a for a, b in zip(nop["scores"], policy["scores"], strict=True)])
                if both
                else None,
                "speed_up": nop["wall_s"] / policy["wall_s"],
            }
        )
    if not seeds:
        return None
    known = [found["difference"] for found in seeds if found["difference"] is not None]
    return {
        "seeds": seeds,
        "least_saving": min(found["saving"] for found in seeds),
        "median_saving": statistics.median(found["saving"] for found in seeds),
        "mean_difference": statistics.fmean(known) if known else None,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "sweep.toml")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the config's")
    parser.add_argument("--base", type=Path, help="a model's folder instead of the demo's")
    parser.add_argument("--out", type=Path, default=HERE / "sweep.json")
    given = parser.parse_args(arguments)
    config = tomllib.loads(given.config.read_text(encoding="utf-8"))
    results = run(config, given.seeds or config["seeds"], given.base or base_path(), given.out)
    print(results["comparison"])


if __name__ == "__main__":
    main()
