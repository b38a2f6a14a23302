"""The settings of `Auto`'s rule, `Spare` around `RisingBound`, on every table known before the second held-out ones.

    python experiments/policies/tune.py

Chosen: of the settings whose mean speed-up over the TaskSet tables is at least `LEAST_SPEEDUP` at every number of
slots, the one whose worst mean regret on a pair of a table and a number of slots is lowest; of those within `TIE` of it
the one with the lowest mean regret. So speed counts where it is asked for, and the grid bounds how gentle it gets.

No blind choice: the form of the rule and the ends of the grid were found on the same tables (LOG.md tells). How much
the choice hangs on one table is in `left_out`: for each table, what is chosen without it, and how that fares on it.
What `Auto` is worth on tables that nobody had seen is in `heldout2.json`. `tune.json` has every setting on every pair.
"""

from __future__ import annotations

import itertools
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import provenance  # noqa: E402
from experiments.policies.run import Job, Setting, play, rounded  # noqa: E402
from experiments.policies.tables import Table, load  # noqa: E402

GRID = {"window": (2, 3), "errors": (0.0, 1.0, 1.5, 2.0), "share": (0.25, 1 / 3, 0.5)}
LEAST_SPEEDUP = 6.0
TIE = 1e-3
CONFIGS = ("config.toml", "heldout_run.toml")

Kept = Callable[[Mapping[str, Any]], bool]


def main() -> None:
    begin = time.monotonic()
    config = tomllib.loads((HERE / CONFIGS[0]).read_text(encoding="utf-8"))
    tables, hashes = _tables()
    seeds = range(config["seed"], config["seed"] + config["seeds"])
    settings: list[dict[str, Any]] = []
    for values in itertools.product(*GRID.values()):
        arguments = dict(zip(GRID, values, strict=True))
        # Without scores no error is known, so that the setting without any is the same.
        like = next((one for one in settings if {**one["arguments"], "errors": arguments["errors"]} == arguments), None)
        pairs = [
            pair
            for table in tables
            for pair in (
                [one for one in like["pairs"] if one["table"] == table.name]
                if like and table.scores is None
                else measure(table, arguments, config["slots"], seeds)
            )
        ]
        settings.append({"arguments": arguments, "pairs": pairs})
        print(f"{time.monotonic() - begin:5.0f} s  {arguments}", flush=True)
    results = {
        "experiment": "policies/tune",
        "status": "complete",
        "seed": config["seed"],
        "config": {"grid": GRID, "least_speedup": LEAST_SPEEDUP, "tie": TIE, "tables": CONFIGS},
        **provenance.provenance(),
        "wall_s": time.monotonic() - begin,
        "data": hashes,
        "settings": [{**one, **summary(one["pairs"])} for one in settings],
        "chosen": choose(settings)["arguments"],
        "left_out": [left_out(settings, table.name) for table in tables],
    }
    provenance.write(HERE / "tune.json", rounded(results))
    print(results["chosen"])


def _tables() -> tuple[list[Table], dict[str, str | None]]:
    tables: list[Table] = []
    hashes: dict[str, str | None] = {}
    for name in CONFIGS:
        found, missing, read = load(tomllib.loads((HERE / name).read_text(encoding="utf-8")))
        if missing:
            raise SystemExit(f"Recorded curves are missing: {missing[0]['reason']}.")
        tables += found
        hashes |= read
    return tables, hashes


def measure(table: Table, arguments: Mapping[str, Any], slots: Sequence[int], seeds: range) -> list[dict[str, Any]]:
    """Mean regret and speed-up of a setting on a table, for each number of slots."""
    inner = {"is": "rising_bound", "keep": 1, "window": arguments["window"], "errors": arguments["errors"]}
    setting = Setting("Spare", "ours", "policy", "spare", {"policy": inner, "share": arguments["share"]}, True)
    pairs = []
    for many in slots:
        outcome = play(Job(0, table, many, setting, seeds))
        assert not isinstance(outcome, str), outcome
        means = {"regret": float(outcome.regret.mean()), "speedup": float(outcome.speedup.mean())}
        pairs.append({"table": table.name, "group": table.group, "slots": many, **means})
    return pairs


def summary(pairs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The worst and the mean regret, and the least of the speed-ups on TaskSet by number of slots (inf without any)."""
    regrets = [pair["regret"] for pair in pairs]
    taskset = [pair for pair in pairs if pair["group"] == "TaskSet"]
    by_slots = [
        [pair["speedup"] for pair in taskset if pair["slots"] == many] for many in {p["slots"] for p in taskset}
    ]
    return {
        "worst_regret": max(regrets),
        "mean_regret": float(np.mean(regrets)),
        "mean_speedup": float(np.mean([pair["speedup"] for pair in pairs])),
        "taskset_speedup": float(min((np.mean(speedups) for speedups in by_slots), default=np.inf)),
    }


def choose(settings: Sequence[Mapping[str, Any]], kept: Kept = lambda pair: True) -> Mapping[str, Any]:
    """The setting that the rule above picks, on the pairs that are kept."""
    summed = [(setting, summary([pair for pair in setting["pairs"] if kept(pair)])) for setting in settings]
    fast = [(setting, one) for setting, one in summed if one["taskset_speedup"] >= LEAST_SPEEDUP]
    least = min(one["worst_regret"] for _, one in fast)
    ties = [(setting, one) for setting, one in fast if one["worst_regret"] <= least + TIE]
    return min(ties, key=lambda pair: pair[1]["mean_regret"])[0]


def left_out(settings: Sequence[Mapping[str, Any]], table: str) -> dict[str, Any]:
    """What is chosen without a table, and how that fares on it."""
    chosen = choose(settings, lambda pair: pair["table"] != table)
    mine = [pair for pair in chosen["pairs"] if pair["table"] == table]
    return {
        "table": table,
        "arguments": chosen["arguments"],
        **{name: [pair[name] for pair in mine] for name in ("slots", "regret", "speedup")},
    }


if __name__ == "__main__":
    main()
