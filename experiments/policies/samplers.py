"""Samplers at equal cost: `ChunkSampler` against Optuna's, on recorded curves with hyperparameters.

    python experiments/policies/samplers.py                          # everything, hours on one core
    python experiments/policies/samplers.py --resume                 # go on where it was left, at the same commit
    python experiments/policies/samplers.py --seeds 2 --samplers random chunk --out /tmp/samplers.json

A search is a replay with `slots` slots in which the sampler proposes and the nearest recorded configuration that has
not come yet is trained, until the budget is spent. Its value is the best that was seen within the budget
(`best_within`), as normalised regret: 0 is the best value in the whole table, 1 the median configuration's last value.
Without a policy ("nop") eight trials run to their end, then the next eight; with ASHA trials come and go all the time.

`samplers.json` is written after every block (a table, a policy, a sampler; one regret a seed and budget). `compared`
holds the mean regret of each sampler by group, policy and budget, and the mean of `chunk`'s minus the other's over the
same tables and seeds, with its 95% bootstrap interval: seeds are drawn again, tables are kept. `samplers_figure.py`
draws it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import provenance  # noqa: E402
from rapidfire_automl import ChunkSampler, replay  # noqa: E402
from rapidfire_automl.replay import hold_last  # noqa: E402
from rapidfire_policies import ASHA, Nop, Policy  # noqa: E402

OURS = "chunk"
POLICIES: Mapping[str, Policy] = {"asha": ASHA(), "nop": Nop()}


@dataclass(frozen=True)
class Table:
    """A recorded sweep: `(trials, chunks)` values, lower is better, and each row's hyperparameters."""

    name: str
    curves: NDArray[np.float64]
    params: Sequence[Mapping[str, float]]

    def regret(self, value: float) -> float:
        """0 for the best value anywhere, 1 for the median configuration's last; 1 as well before any value."""
        last = np.where(np.isfinite(self.curves[:, -1]), self.curves[:, -1], np.inf)
        best = float(self.curves[np.isfinite(self.curves)].min())
        return (value - best) / (float(np.median(last)) - best) if np.isfinite(value) else 1.0


def make(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """A sampler by the name that the configuration has for it."""
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    if name == "tpe-no-liar":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=False)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if name == "chunk":
        return ChunkSampler(seed=seed)
    raise ValueError(f"`samplers` must be some of random, tpe, tpe-no-liar, gp, chunk, got {name!r}.")


def tables(group: Mapping[str, Any], folder: Path) -> list[Table]:
    """The tables of a group, one for each of its files' values."""
    found = []
    for path in sorted(folder.glob(group["files"])):
        with np.load(path) as file:
            names = [str(name) for name in file["hp_names"]]
            params = [dict(zip(names, map(float, row), strict=True)) for row in file["hp"]]
            for value, direction in group["values"].items():
                curves = hold_last(file[value])
                found.append(Table(f"{path.stem}.{value}", curves if direction == "min" else -curves, params))
    return found


def block(table: Table, policy: str, sampler: str, seeds: Sequence[int], budgets: Sequence[int], slots: int) -> Any:
    """Regrets of one sampler on one table, `(seeds, budgets)`, and how many trials it took."""
    chunks = table.curves.shape[1]
    begin = time.process_time()
    regrets, trials = [], []
    for seed in seeds:
        result = replay(
            table.curves,
            POLICIES[policy],
            slots=slots,
            sampler=make(sampler, seed),
            params=table.params,
            budget=max(budgets) * chunks,
        )
        regrets.append([table.regret(result.best_within(budget * chunks)) for budget in budgets])
        trials.append(len(result.order))
    proposal_s = (time.process_time() - begin) / sum(trials)
    return {"regret": regrets, "trials": trials, "proposal_and_replay_s": proposal_s}


def compare(
    blocks: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], seed: int
) -> list[dict[str, Any]]:
    """Each sampler against ours, by group (what was tuned on apart), policy and budget."""
    rows = []
    for group in groups:
        names = {b["table"] for b in blocks if b["group"] == group["name"]}
        parts = {
            "all": names,
            "tuned on": names & set(group["tuned_on"]),
            "not tuned on": names - set(group["tuned_on"]),
        }
        for part, chosen in parts.items():
            for policy, budgets in group["budgets"].items():
                here = [b for b in blocks if b["table"] in chosen and b["policy"] == policy]
                for other in dict.fromkeys(b["sampler"] for b in here):
                    entry = {
                        "group": group["name"],
                        "part": part,
                        "policy": policy,
                        "budgets": budgets,
                        "sampler": other,
                    }
                    rows.append(entry | _against(here, other, seed))
    return rows


def _against(blocks: Sequence[Mapping[str, Any]], other: str, seed: int) -> dict[str, Any]:
    theirs = {b["table"]: np.array(b["regret"]) for b in blocks if b["sampler"] == other}
    ours = {b["table"]: np.array(b["regret"]) for b in blocks if b["sampler"] == OURS}
    mean = np.mean([table.mean(0) for table in theirs.values()], axis=0)
    result: dict[str, Any] = {"tables": len(theirs), "regret": mean.tolist(), "ours_minus_theirs": None}
    paired = [ours[name][: len(theirs[name])] - theirs[name] for name in theirs if name in ours]
    seeds = min((len(table) for table in theirs.values()), default=0)
    result["seeds"] = seeds
    if paired and other != OURS:
        stacked = np.stack([table[:seeds] for table in paired])  # (tables, seeds, budgets)
        rng = np.random.default_rng(seed)
        drawn = [stacked[:, rng.integers(0, seeds, seeds)].mean((0, 1)) for _ in range(4000)]
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        result["ours_minus_theirs"] = {
            "mean": stacked.mean((0, 1)).tolist(), "low": low.tolist(), "high": high.tolist()
        }  # fmt: skip
    return result


def run(config: Mapping[str, Any], folder: Path, out: Path, resume: bool) -> dict[str, Any]:
    """All blocks, those of the fast samplers first; the results are written after each."""
    results: dict[str, Any] = {
        "experiment": "samplers",
        "status": "running",
        "seed": config["seed"],
        "config": config,
        **provenance.provenance(),
        "load": {"before": provenance.load(), "after": None},
        "wall_s": None,
        "data": {},
        "blocks": [],
        "compared": [],
    }
    begin = time.monotonic()
    before = json.loads(out.read_text(encoding="utf-8")) if resume and out.exists() else None
    done = {}
    if before is not None and (before["commit"], before["config"]) == (results["commit"], config):
        done = {(b["table"], b["policy"], b["sampler"]): b for b in before["blocks"]}
        begin -= before["wall_s"]
    work = []
    for group in config["groups"]:
        for path in sorted(folder.glob(group["files"])):
            results["data"][path.name] = provenance.sha256(path)
        for table in tables(group, folder):
            work += [(s, group, table, p) for p in group["budgets"] for s in config["samplers"]]
    work.sort(key=lambda item: item[0] in config["seeds_of"])
    if not work:
        raise SystemExit(f"There are no recorded curves in {folder}.")
    status = "complete"
    try:
        for sampler, group, table, policy in work:
            entry = done.get((table.name, policy, sampler))
            if entry is None:
                seeds = range(config["seed"], config["seed"] + config["seeds_of"].get(sampler, config["seeds"]))
                entry = {"group": group["name"], "table": table.name, "policy": policy, "sampler": sampler}
                entry |= block(table, policy, sampler, seeds, group["budgets"][policy], config["slots"])
                print(f"{table.name:45} {policy:5} {sampler:9} {np.mean(entry['regret'], 0).round(3)}", flush=True)
            results["blocks"].append(entry)
            results["compared"] = compare(results["blocks"], config["groups"], config["seed"])
            results["wall_s"], results["load"]["after"] = time.monotonic() - begin, provenance.load()
            provenance.write(out, results)
    except KeyboardInterrupt:
        status = "cancelled"
    results["status"] = status
    provenance.write(out, results)
    return results


def main() -> None:
    config = tomllib.loads((HERE / "samplers.toml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=provenance.ROOT / ".." / "shared" / "data" / "curves")
    parser.add_argument("--out", type=Path, default=HERE / "samplers.json")
    parser.add_argument("--seeds", type=int, default=config["seeds"], help="of every sampler")
    parser.add_argument("--samplers", nargs="+", default=config["samplers"])
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    config |= {"seeds": given.seeds, "samplers": given.samplers}
    config["seeds_of"] = {name: min(n, given.seeds) for name, n in config["seeds_of"].items()}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    results = run(config, given.curves, given.out, given.resume)
    from experiments.policies.samplers_figure import draw

    if draw(results, given.out.with_suffix(".png")) is None:
        print("Nothing was measured: there is nothing to draw.")


if __name__ == "__main__":
    main()
