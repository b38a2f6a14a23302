"""Every policy and its rivals over recorded curves: regret against cost.

    python experiments/policies/run.py                                   # all of config.toml, minutes
    python experiments/policies/run.py --processes 8
    python experiments/policies/run.py --policies Auto ASHA "Optuna Median" --seeds 5 --out runs/look.json
    python experiments/policies/run.py --config experiments/policies/heldout2_run.toml \
        --out experiments/policies/heldout2.json

A *table* is a recorded sweep (`tables.py`), a *cell* a table and a number of slots, a *setting* a policy or an Optuna
pruner with its arguments. Each seed draws trials from a table and the order in which they come, the same for every
setting and any number of slots; `replay` then searches as the executor would. Reported per cell and setting, as means
over seeds: `regret`, (final value of the trial it hands over - best) / (median - best) over finite finals, at most 1;
`speedup`, all chunks / chunks used; `cost_speedup`, the same in tokens where they were recorded; `best`, the share of
seeds that hand over the best trial, and `lost`, of those that hand over one no better than the median.
Intervals are 95% bootstrap intervals over seeds, paired: what is compared shares its draws. `Nop` has regret 0 and
speed-up 1 in every draw, so a setting's own interval is that of its difference from `Nop`.

A setting whose policy or argument does not exist is skipped, as is a table whose file is missing; both are listed in
`results.json` with the reason. `figure.png` and the generated section of policies/README.md follow from it, as
`heldout2.png` and another section follow from `heldout2.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
import time
import tomllib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import provenance  # noqa: E402
from experiments.policies import measure  # noqa: E402
from experiments.policies.measure import Outcome, Weights  # noqa: E402
from experiments.policies.tables import Table, load  # noqa: E402

KINDS = ("ours", "baseline", "rival")


@dataclass(frozen=True)
class Setting:
    """A policy or an Optuna pruner with its arguments, by name: it is built anew for every cell.

    Args:
        name: The policy's in the configuration.
        kind: "ours", "baseline" or "rival".
        source: "policy" or "pruner".
        what: The policy's name for `policy_from_name`, or the pruner's class.
        arguments: May hold {"is": name, ...} for another one, and "$chunks".
        first: Whether it is the first setting of its policy.
    """

    name: str
    kind: str
    source: str
    what: str
    arguments: Mapping[str, Any]
    first: bool

    @property
    def label(self) -> str:
        """Name and arguments."""
        words = ", ".join(_word(name, value) for name, value in self.arguments.items())
        return f"{self.name} ({words})" if words else self.name

    def build(self, chunks: int) -> Any:
        """The policy or pruner.

        Raises:
            ValueError: There is no such policy, pruner or argument.
        """
        return _build(self.source, self.what, self.arguments, chunks)


def _build(source: str, what: str, arguments: Mapping[str, Any], chunks: int) -> Any:
    given = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            inner = dict(value)
            value = _build(source, inner.pop("is"), inner, chunks)
        given[name] = chunks if value == "$chunks" else value
    if source == "policy":
        from rapidfire_automl.pruners import policy_from_name

        return policy_from_name(what, **given)
    import optuna

    if not hasattr(optuna.pruners, what):
        raise ValueError(f"optuna.pruners has no {what!r}.")
    try:
        return getattr(optuna.pruners, what)(**given)
    except TypeError as error:
        raise ValueError(f"{what} cannot be built from {given}: {error}.") from error


def _word(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value["is"])
    return f"{name}={'chunks' if value == '$chunks' else value}"


def settings_of(config: Mapping[str, Any]) -> list[Setting]:
    """The configuration's settings, in its order."""
    settings = []
    for given in config["policies"]:
        source = "policy" if "policy" in given else "pruner"
        kind = given.get("kind", "ours")
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
        for place, arguments in enumerate(given.get("settings", [{}])):
            settings.append(Setting(given["name"], kind, source, given[source], arguments, place == 0))
    return settings


# -- playing back ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One setting on one cell, all seeds."""

    cell: int
    table: Table
    slots: int
    setting: Setting
    seeds: range


def play(job: Job) -> Outcome | str:
    """What the setting does with the cell, or why it does nothing."""
    from rapidfire_automl import replay

    rows = []
    with _quiet():
        for seed in job.seeds:
            table = job.table.draw(seed)
            trials, chunks = table.curves.shape
            slots = job.slots or trials
            try:
                result = replay(
                    table.curves,
                    job.setting.build(chunks),
                    slots=slots,
                    scores=table.scores,
                    costs=table.costs,
                    params=table.params,
                    max_alive=2 * slots,
                )
            except ValueError as error:
                return str(error).splitlines()[0]
            finals = table.curves[:, -1]
            cost = trials * chunks if table.costs is None else table.costs.sum()
            rows.append((
                measure.regret(finals, result.selected),
                trials * chunks / result.chunks,
                cost / result.cost,
                measure.is_best(finals, result.selected),
            ))  # fmt: skip
    return Outcome(*np.array(rows, dtype=np.float64).T)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)  # PatientPruner's, of a diverged trial
        yield


def play_all(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, Outcome | str]]:
    """Every job and what came of it, in order."""
    if processes == 1:
        yield from ((job, play(job)) for job in jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from zip(jobs, pool.imap(play, jobs, chunksize=4), strict=True)


# -- the whole run -----------------------------------------------------------------------------------------------------


def run(config: Mapping[str, Any], out: Path, processes: int = 1) -> dict[str, Any]:
    """Play everything back, compare, and write the results."""
    begin = time.monotonic()
    tables, missing, hashes = load(config)
    with _quiet():
        settings, skipped = _built(settings_of(config))
    cells = [(table, slots) for slots in config["slots"] for table in tables]
    results: dict[str, Any] = {
        "experiment": "policies",
        "status": "complete",
        "seed": config["seed"],
        "config": config,
        **provenance.provenance(),
        "wall_s": None,
        "data": hashes,
        "missing_tables": missing,
        "missing_settings": skipped,
        "cells": [_describe(table, slots, config) for table, slots in cells],
    }
    seeds = range(config["seed"], config["seed"] + config["seeds"])
    jobs = [
        Job(cell, table, slots, setting, seeds)
        for setting in settings
        for cell, (table, slots) in enumerate(cells)
    ]  # fmt: skip
    outcomes: dict[str, list[Outcome | None]] = {setting.label: [None] * len(cells) for setting in settings}
    for job, outcome in play_all(jobs, processes):
        if isinstance(outcome, str):
            where = f"{job.setting.label} on {job.table.name}"
            skipped.append({"setting": where, "reason": outcome})
        else:
            outcomes[job.setting.label][job.cell] = outcome
        if job.cell == len(cells) - 1:
            print(f"{time.monotonic() - begin:6.0f} s  {job.setting.label}", flush=True)
    resampled = measure.weights(config["seeds"], config["draws"], config["seed"])
    results["settings"] = [_columns(setting, outcomes[setting.label], resampled) for setting in settings]
    results["groups"] = groups(results["cells"], outcomes, resampled)
    for key, kinds in (("auto", ("baseline", "rival")), ("auto_among_ours", ("ours",))):
        results[key] = against(kinds, config["auto"], settings, results["cells"], outcomes, resampled)
    results["wall_s"] = time.monotonic() - begin
    results = rounded(results)
    provenance.write(out, results)
    return results


def _built(settings: Sequence[Setting]) -> tuple[list[Setting], list[dict[str, str]]]:
    """The settings that can be built, and why the others can't."""
    good, skipped = [], []
    for setting in settings:
        try:
            setting.build(chunks=10)
        except ValueError as error:
            skipped.append({"setting": setting.label, "reason": str(error).splitlines()[0]})
        else:
            good.append(setting)
    return good, skipped


def _describe(table: Table, slots: int, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "table": table.name,
        "group": table.group,
        "slots": slots,
        "trials": min(table.trials, len(table.curves)),
        "rows": len(table.curves),
        "chunks": table.curves.shape[1],
        "held_out": table.name not in config["tuned_on"],
    }


def _columns(setting: Setting, outcomes: Sequence[Outcome | None], resampled: Weights) -> dict[str, Any]:
    """One setting's numbers, a list each with an entry a cell."""
    entry: dict[str, Any] = {
        "label": setting.label,
        "name": setting.name,
        "kind": setting.kind,
        "arguments": dict(setting.arguments),
        "first": setting.first,
    }
    for name in ("regret", "speedup", "cost_speedup", "best"):
        entry[name] = [None if one is None else float(getattr(one, name).mean()) for one in outcomes]
    entry["lost"] = [None if one is None else float((one.regret >= 1).mean()) for one in outcomes]
    for name in ("regret", "speedup"):
        both = [None if one is None else measure.interval(getattr(one, name), resampled) for one in outcomes]
        for side, which in enumerate(("low", "high")):
            entry[f"{name}_{which}"] = [None if one is None else one[side] for one in both]
    return entry


def groups(
    cells: Sequence[Mapping[str, Any]], outcomes: Mapping[str, Sequence[Outcome | None]], resampled: Weights
) -> list[dict[str, Any]]:
    """Means over the tables of a group, each with its interval over seeds; None where a table is missing."""
    made = []
    for group, slots in dict.fromkeys((cell["group"], cell["slots"]) for cell in cells):
        places = [i for i, cell in enumerate(cells) if (cell["group"], cell["slots"]) == (group, slots)]
        entry: dict[str, Any] = {"group": group, "slots": slots, "tables": len(places), "settings": {}}
        for label, by_cell in outcomes.items():
            mine = [one for place in places if (one := by_cell[place]) is not None]
            entry["settings"][label] = None if len(mine) < len(places) else _mean(mine, resampled)
        made.append(entry)
    return made


def _mean(outcomes: Sequence[Outcome], resampled: Weights) -> dict[str, Any]:
    """Of several cells at the same seeds."""
    regret = np.mean([one.regret for one in outcomes], axis=0)
    return {
        "regret": float(regret.mean()),
        "regret_interval": measure.interval(regret, resampled),
        **{name: float(np.mean([getattr(o, name) for o in outcomes])) for name in ("speedup", "cost_speedup", "best")},
    }


def against(
    kinds: Collection[str],
    auto: str,
    settings: Sequence[Setting],
    cells: Sequence[Mapping[str, Any]],
    outcomes: Mapping[str, Sequence[Outcome | None]],
    resampled: Weights,
) -> dict[str, Any] | None:
    """Who beats `auto` where: the front of the settings of some kinds, and each one's difference, cell by cell.

    `share` is that of cells where none of them is both faster and better beyond the noise; `share_in_means` the same by
    the means alone, ties included. None where `auto` was not run.
    """
    mine = next((setting.label for setting in settings if setting.name == auto and setting.first), None)
    if mine is None:
        return None
    rivals = [setting.label for setting in settings if setting.kind in kinds and setting.name != auto]
    entries = []
    for place, cell in enumerate(cells):
        own = outcomes[mine][place]
        if own is None:
            continue
        others = {label: one for label in rivals if (one := outcomes[label][place]) is not None}
        differences = {label: measure.difference(one, own, resampled) for label, one in others.items()}
        points = [(float(one.speedup.mean()), float(one.regret.mean())) for one in others.values()]
        entries.append({
            "table": cell["table"],
            "slots": cell["slots"],
            "held_out": cell["held_out"],
            "front": [list(others)[i] for i in measure.front(points)],
            "beaten_by": [label for label, one in differences.items() if measure.dominates(one)],
            "beaten_in_means_by": [label for label, one in differences.items() if measure.dominates_in_means(one)],
            "rival_minus_auto": differences,
        })  # fmt: skip
    held_out = [entry for entry in entries if entry["held_out"]]
    return {
        "setting": mine,
        "cells": len(entries),
        "share": _share(entries, "beaten_by"),
        "share_in_means": _share(entries, "beaten_in_means_by"),
        "held_out_cells": len(held_out),
        "held_out_share": _share(held_out, "beaten_by"),
        "held_out_share_in_means": _share(held_out, "beaten_in_means_by"),
        "by_cell": entries,
    }


def _share(entries: Sequence[Mapping[str, Any]], beaten: str) -> float | None:
    return sum(not entry[beaten] for entry in entries) / len(entries) if entries else None


def rounded(value: Any) -> Any:
    """The same with numbers to five digits: what follows is noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def parse(words: Sequence[str] | None = None) -> tuple[dict[str, Any], argparse.Namespace]:
    """The configuration with what the command line changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--policies", nargs="+", help="names in the configuration; all by default")
    parser.add_argument("--groups", nargs="+", help="groups of tables in the configuration; all by default")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    given = parser.parse_args(words)
    config = tomllib.loads(given.config.read_text(encoding="utf-8"))
    config["seeds"] = given.seeds or config["seeds"]
    if isinstance(config["policies"], str):  # those of another configuration
        config["policies"] = tomllib.loads((given.config.parent / config["policies"]).read_text("utf-8"))["policies"]
    for key, field, chosen in (("policies", "name", given.policies), ("tables", "group", given.groups)):
        known = [entry[field] for entry in config[key]]
        if unknown := [name for name in chosen or () if name not in known]:
            parser.error(f"`{key}` must be of {', '.join(dict.fromkeys(known))}, got {unknown[0]}.")
        config[key] = [entry for entry in config[key] if not chosen or entry[field] in chosen]
    if min(config["seeds"], given.processes) < 1:
        parser.error("`--seeds` and `--processes` must be >= 1.")
    return config, given


def main() -> None:
    from experiments.policies.figure import draw
    from experiments.policies.section import README, write_section

    config, given = parse()
    results = run(config, given.out, given.processes)
    for one in (*results["missing_tables"], *results["missing_settings"]):
        print("skipped: " + ": ".join(one.values()))
    print(draw(results, given.out.with_name("figure.png" if given.out.stem == "results" else f"{given.out.stem}.png")))
    if given.out.resolve() in (HERE / "results.json", HERE / "heldout2.json"):
        write_section(README, results)


if __name__ == "__main__":
    main()
