"""How often races stop a trial that is as good as any, and how many examples they need to stop a worse one.

    python experiments/policies/error_control.py
    python experiments/policies/error_control.py --searches 500 --out runs/error_control.json

A null simulation is a search over `trials` equal trials: the differences of trial 0 to its rivals are drawn
independently with mean 0, per example and at `chunks` looks, either anew at each look (`independent`) or with most of
the examples' differences carried over (`correlated`). A false elimination is a search that stops trial 0 at some look.
No rival is ever stopped, which leaves the most that could stop it. `low_99` is Clopper and Pearson's one-sided 99%
lower bound of the rate; a cell holds if it is at most alpha. The functions are the policies' own (`tests/experiments`
sees that `decide` stops trial 0 in the same searches); what is left out is what doesn't bear on trial 0.

Power: one look of `chunks`, trial 0 is best, all others are worse than it by `effect_sd` standard deviations of the
paired difference; the part of searches that stop trial 1, by the number of examples, and where it crosses 50% and 80%.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "policies")]

from experiments import provenance  # noqa: E402
from rapidfire_policies.betting_race import log_capitals  # noqa: E402
from rapidfire_policies.paired_race import lower_bounds  # noqa: E402
from rapidfire_policies.wilcoxon import p_values  # noqa: E402

LOOKS = ("independent", "correlated")
Array = NDArray[np.float64]


def draw(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Differences with mean 0; those of bounded kinds lie in [-1, 1]."""
    if kind == "normal":
        return rng.standard_normal(shape)
    if kind == "t3":
        return rng.standard_t(3, shape)
    if kind == "binary":
        return np.subtract(rng.integers(0, 2, shape), rng.integers(0, 2, shape), dtype=float)
    family, _, side = kind.partition(" ")
    if family == "exponential":
        drawn = rng.standard_exponential(shape) - 1
    elif family == "lognormal":
        drawn = np.exp(rng.standard_normal(shape)) - math.exp(0.5)
    elif family == "beta":
        drawn = rng.beta(0.5, 4.5, shape) - 0.1
    else:
        raise ValueError(f"`kinds` must name known distributions, got {kind!r}.")
    return drawn if side == "right" else -drawn


def null_looks(
    kind: str, looks: str, shape: tuple[int, int, int], chunks: int, carried: float, rng: np.random.Generator
) -> Iterator[Array]:
    """Differences of trial 0 to every rival, `(searches, rivals, examples)`, look after look."""
    now = draw(kind, shape, rng)
    yield now
    for _ in range(chunks - 1):
        fresh = draw(kind, shape, rng)
        if looks == "correlated":
            # All rivals' differences on an example stay or change together, as if the example had.
            fresh = np.where(rng.random((shape[0], 1, shape[2])) < carried, now, fresh)
        now = fresh
        yield now


def against_best(differences: Array) -> Array:
    """The differences to the rival with the best mean, `(searches, examples)`: `race` compares with it alone."""
    best = differences.mean(axis=2).argmax(axis=1)
    return differences[np.arange(len(differences)), best]


def stops(policy: str, differences: Array, level: float, alpha: float) -> NDArray[np.bool_]:
    """Where a policy stops the trial, given its differences to the best rival, `(searches, examples)`."""
    if policy == "PairedRace":
        worse = lower_bounds(differences, level) > 0
    elif policy == "BettingRace":
        worse = log_capitals(differences, level).max(axis=1) >= math.log(1 / level)
    else:
        worse = p_values(differences) < alpha
    # With a mean below 0 the trial is itself the best, and `race` doesn't judge the best.
    return worse & (differences.mean(axis=1) > 0)


def null_cells(config: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """The rate of false eliminations of every policy, kind, look, number of trials and examples, and alpha."""
    kinds = dict.fromkeys(kind for names in config["kinds"].values() for kind in names)
    sizes = sorted({n for counts in config["examples"].values() for n in counts})
    chunks, alphas, total = config["chunks"], config["alphas"], config["searches"]
    index = 0
    for kind in kinds:
        for looks in LOOKS:
            for trials in config["trials"]:
                for n in sizes:
                    index += 1
                    policies = [p for p in config["kinds"] if kind in config["kinds"][p] and n in config["examples"][p]]
                    if not policies:
                        continue
                    rng = np.random.default_rng((seed, index))
                    errors = {(policy, alpha): 0 for policy in policies for alpha in alphas}
                    for begin in range(0, total, config["batch"]):
                        shape = (min(config["batch"], total - begin), trials - 1, n)
                        ever = {key: np.zeros(shape[0], dtype=bool) for key in errors}
                        for differences in null_looks(kind, looks, shape, chunks, config["carried"], rng):
                            best = against_best(differences)
                            for policy, alpha in errors:
                                level = alpha / (chunks * (trials - 1))
                                ever[policy, alpha] |= stops(policy, best, level, alpha)
                        for key in errors:
                            errors[key] += int(ever[key].sum())
                    for (policy, alpha), count in errors.items():
                        yield {
                            "policy": policy, "kind": kind, "looks": looks, "trials": trials, "examples": n,
                            "alpha": alpha, "searches": total, "errors": count, "rate": count / total,
                            "low_99": float(beta.ppf(0.01, count, total - count + 1)) if count else 0.0,
                        }  # fmt: skip


def worse_scores(kind: str, shape: tuple[int, int, int], effect_sd: float, rng: np.random.Generator) -> Array:
    """Scores `(searches, trials, examples)`, all trials but the first worse than it by an effect."""
    worse = np.arange(shape[1])[:, None] > 0
    if kind == "normal":
        return rng.standard_normal(shape) / math.sqrt(2) + effect_sd * worse
    # On 60% of the examples all trials answer alike, else trial 0 errs with chance 1/2 - x, the others with 1/2 + x:
    # the mean difference is 0.8 x and its variance 0.32 + 0.32 x**2 - 0.64 x**2.
    x = math.sqrt(0.32 / (0.64 / effect_sd**2 + 0.32))
    alike = rng.random((shape[0], shape[1], shape[2])) < 0.6
    shared = rng.random((shape[0], 1, shape[2])) < 0.5
    own = rng.random(shape) < np.where(worse, 0.5 + x, 0.5 - x)
    return np.where(alike, shared, own).astype(float)


def power_curves(config: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """The part of searches that stop trial 1, a curve per policy, kind and number of trials."""
    kinds = {"PairedRace": ("normal", "binary"), "Wilcoxon": ("normal", "binary"), "BettingRace": ("binary",)}
    alpha, total = config["power_alpha"], config["power_searches"]
    for trials in config["trials"]:
        level = alpha / (config["chunks"] * (trials - 1))
        for kind in ("normal", "binary"):
            policies = [policy for policy, names in kinds.items() if kind in names]
            curves: dict[str, list[float]] = {policy: [] for policy in policies}
            for n in config["power_examples"]:
                rng = np.random.default_rng((seed, trials, n))
                found = dict.fromkeys(policies, 0)
                for begin in range(0, total, config["batch"]):
                    shape = (min(config["batch"], total - begin), trials, n)
                    scores = worse_scores(kind, shape, config["effect_sd"], rng)
                    rivals = np.delete(scores, 1, axis=1)
                    best = against_best(scores[:, 1:2] - rivals)
                    for policy in policies:
                        found[policy] += int(stops(policy, best, level, alpha).sum())
                for policy in policies:
                    curves[policy].append(found[policy] / total)
            for policy, curve in curves.items():
                yield {
                    "policy": policy, "kind": kind, "trials": trials, "alpha": alpha, "level": level,
                    "examples": config["power_examples"], "stopped": curve, "searches": total,
                    "examples_50": crossing(config["power_examples"], curve, 0.5),
                    "examples_80": crossing(config["power_examples"], curve, 0.8),
                }  # fmt: skip


def crossing(examples: Sequence[int], curve: Sequence[float], part: float) -> float | None:
    """Where a curve first reaches a part, linearly between its points; None if it doesn't, or starts above it."""
    for left in range(len(curve) - 1):
        low, high = curve[left], curve[left + 1]
        if low < part <= high:
            return examples[left] + (part - low) / (high - low) * (examples[left + 1] - examples[left])
    return None


def summarise(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each policy: how many cells hold, and the worst rate at each alpha."""
    summary = {}
    for policy in dict.fromkeys(cell["policy"] for cell in cells):
        own = [cell for cell in cells if cell["policy"] == policy]
        worst = {}
        for alpha in dict.fromkeys(cell["alpha"] for cell in own):
            cell = max((c for c in own if c["alpha"] == alpha), key=lambda c: c["rate"])
            worst[str(alpha)] = {key: cell[key] for key in ("kind", "looks", "trials", "examples", "rate", "low_99")}
        holds = sum(cell["low_99"] <= cell["alpha"] for cell in own)
        summary[policy] = {"cells": len(own), "hold": holds, "worst": worst}
    return summary


def run(config: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Simulate, write the results."""
    begin = time.monotonic()
    seed = config["seed"]
    results: dict[str, Any] = {
        "experiment": "policies/error_control",
        "status": "running",
        "seed": seed,
        "config": dict(config),
        **provenance.provenance(),
        "load": {"before": provenance.load(), "after": None},
        "wall_s": None,
        "data": {"kind": "simulated", "sha256": provenance.sha256_of(dict(config))},
        "summary": None,
        "power": None,
        "cells": [],
    }
    try:
        for cell in null_cells(config, seed):
            results["cells"].append(cell)
        results["power"] = list(power_curves(config, seed))
        results["summary"] = summarise(results["cells"])
        results["status"] = "complete"
    except KeyboardInterrupt:
        results["status"] = "cancelled"
    results["wall_s"] = time.monotonic() - begin
    results["load"]["after"] = provenance.load()
    provenance.write(out, results)
    return results


def main() -> None:
    from experiments.policies.error_control_figure import draw_figure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "error_control.toml")
    parser.add_argument("--searches", type=int, help="null simulations of a cell, and of a point of a power curve")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path, default=HERE / "error_control.json")
    given = parser.parse_args()
    config = tomllib.loads(given.config.read_text(encoding="utf-8"))
    if given.searches is not None:
        if given.searches < 1:
            parser.error("`--searches` must be >= 1.")
        config |= {"searches": given.searches, "power_searches": given.searches}
    if given.seed is not None:
        config["seed"] = given.seed
    results = run(config, given.out)
    print(json.dumps(results["summary"], indent=1))
    for curve in results["power"] or ():
        print({key: curve[key] for key in ("policy", "kind", "trials", "examples_50", "examples_80")})
    if results["status"] == "complete":
        print(draw_figure(results, given.out.with_suffix(".png")))


if __name__ == "__main__":
    main()
