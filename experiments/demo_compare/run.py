"""The demo's search against the same search with plain TRL, one trial after the other: `make demo-compare`.

    python experiments/demo_compare/run.py                        # the whole demo; may take long
    python experiments/demo_compare/run.py --n-trials 2           # to try it out
    python experiments/demo_compare/run.py --ours runs/demo       # take our side from a run that is there
    python experiments/demo_compare/run.py --search my.toml       # any search file instead of the demo's

Ours runs first, in a process of its own, exactly as the demo does. Then plain TRL in another: for each trial the base
is loaded, a trainer built, trained to the end, evaluated **once, at the end**, as a user without pruning would do, on
the same held-out examples with the same metric, and its adapter saved. With `--chunk-evals` it is evaluated after every
chunk too, as a user who wants curves would do. `--trials same` (the default) gives plain TRL the very configurations
that ours tried, so that the two differ in scheduling alone and not in the sampler's luck; `--trials own` lets the same
sampler, with the same seed, propose them as it learns from finished trials.

Times are wall seconds from before the base is first loaded; imports and reading the data are outside on both sides,
calibrating the plan is inside on ours. A trial is *as good* when its value is no worse than the best of plain TRL by
more than a tolerance, given as a fraction of what the best gained over the untrained base. `ours_reached_s` is when
one of our trials had such a value at a chunk's end, `ours_finished_s` when such a trial had been trained to its end
and saved.

`results.json` is written after every trial; `figure.png` shows the best value so far over time.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import provenance  # noqa: E402
from experiments.demo_compare.compare import compare, draw  # noqa: E402
from experiments.demo_compare.sides import read_ours, search_jointly, search_serially  # noqa: E402
from rapidfire_automl.settings import Settings, apply_override, load_settings  # noqa: E402

# -- the whole run -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(target: Any, *arguments: Any) -> Iterator[Any]:
    """A fresh process and the pipe it sends on."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    child.start()
    theirs.close()
    try:
        yield mine
        child.join(60)
    finally:
        if child.is_alive():
            child.kill()
        child.join()


def material(given: argparse.Namespace, folder: Path) -> tuple[Settings, Path]:
    """The search to compare, and the folder its files are found in."""
    if given.search is not None:
        overrides = list(given.set or [])
        if given.n_trials is not None:
            overrides.append(f"search.n_trials={given.n_trials}")
        return load_settings(given.search, overrides), given.search.resolve().parent
    from rapidfire_automl.cli.demo import prepare
    from rapidfire_automl.cli.terminal import Terminal

    quiet = Terminal(as_json=False, quiet=True, debug=False)
    return prepare(folder, quiet, list(given.set or []), given.n_trials, None), folder


def run(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both searches and the comparison; results are written as they come."""
    begin = time.monotonic()
    settings, data_folder = material(given, folder)
    results: dict[str, Any] = {
        "experiment": "demo_compare",
        "status": "running",
        "seed": settings.search.seed,
        "config": {
            "settings": _without_paths(settings),
            "configurations": given.trials,
            "evaluated": "after every chunk" if given.chunk_evals else "at the end of a trial",
        },
        **provenance.provenance(),
        "load": {"before": provenance.load(), "between": None, "after": None},
        "wall_s": None,
        "model": _model(settings, data_folder),
        "data": {name: _hash(data_folder, getattr(settings.data, name)) for name in ("train", "eval")},
        "ours": None,
        "serial": None,
        "comparison": None,
    }
    # A fresh cache: the plan is calibrated in this run, and its time counts.
    os.environ["RAPIDFIRE_AUTOML_CACHE"] = str(folder / "cache")
    try:
        results["ours"] = _ours(given, settings, folder, data_folder)
        print(f"ours: {results['ours']['wall_s']:.1f} s, best {results['ours']['best_value']}", flush=True)
        results["load"]["between"] = provenance.load()
        results["status"] = _serial(given, settings, folder, data_folder, results)
    except KeyboardInterrupt:
        results["status"] = "cancelled"
    if results["serial"] is not None:
        results["comparison"] = compare(results["ours"], results["serial"])
    results["load"]["after"] = provenance.load()
    results["wall_s"] = time.monotonic() - begin
    provenance.write(given.out, results)
    return results


def _ours(given: argparse.Namespace, settings: Settings, folder: Path, data_folder: Path) -> dict[str, Any]:
    if given.ours is not None:
        return read_ours(given.ours)
    with process(search_jointly, _into(settings, folder / "ours"), data_folder) as pipe:
        try:
            peak = pipe.recv()["peak_bytes"]
        except EOFError:
            raise SystemExit("Our search broke off; see its message above.") from None
    return {**read_ours(folder / "ours"), "peak_bytes": peak}


def _serial(
    given: argparse.Namespace, settings: Settings, folder: Path, data_folder: Path, results: dict[str, Any]
) -> str:
    """Fill in `results["serial"]`, trial by trial; returns the status of the whole."""
    ours = sorted(results["ours"]["trials"], key=lambda trial: trial["number"])
    same = given.trials == "same"
    count = len(ours)
    serial = results["serial"] = {
        "configurations": given.trials, "wall_s": None, "estimated_wall_s": None, "best_trial": None,
        "best_value": None, "peak_bytes": None, "trials": [],
    }  # fmt: skip
    maximize = settings.direction == "maximize"
    deadline = None if given.time_limit is None else time.monotonic() + given.time_limit
    arguments = (_into(settings, folder / "serial"), data_folder, [t["params"] for t in ours] if same else [], count)
    with process(search_serially, *arguments, given.chunk_evals) as pipe:
        while True:
            if deadline is not None and not pipe.poll(max(0.0, deadline - time.monotonic())):
                return "time limit"
            try:
                entry = pipe.recv()
            except EOFError:
                raise SystemExit("Plain TRL broke off; see its message above.") from None
            if "number" not in entry:
                serial["peak_bytes"] = entry["peak_bytes"]
                serial["wall_s"] = serial["trials"][-1]["end_s"]
                return "complete"
            serial["trials"].append(entry)
            taken = [trial["end_s"] - trial["start_s"] for trial in serial["trials"]]
            serial["estimated_wall_s"] = statistics.mean(taken) * count
            finals = {t["number"]: t["value"] for t in serial["trials"] if t["value"] is not None}
            if finals:
                serial["best_trial"] = (max if maximize else min)(finals, key=lambda number: finals[number])
                serial["best_value"] = finals[serial["best_trial"]]
            print(f"serial: trial {entry['number']} {taken[-1]:.1f} s, value {entry['value']}", flush=True)
            provenance.write(given.out, results)


def _into(settings: Settings, folder: Path) -> Settings:
    return Settings.model_validate(apply_override(settings.model_dump(exclude_defaults=True), f"output.dir='{folder}'"))


def _without_paths(settings: Settings) -> dict[str, Any]:
    """The settings, files and folders by their last names: they are known by their hashes."""
    fields = settings.model_dump()
    for table, key in (("base", "model"), ("data", "train"), ("data", "eval")):
        if fields[table][key] is not None and Path(fields[table][key]).is_absolute():
            fields[table][key] = Path(fields[table][key]).name
    return {**fields, "output": None}


def _model(settings: Settings, folder: Path) -> dict[str, Any]:
    for path in (folder / settings.base.model, Path(settings.base.model)):
        if path.is_dir():
            return {"name": path.name, "sha256": provenance.sha256(path)}
    return {"name": settings.base.model, "sha256": None}


def _hash(folder: Path, source: str | None) -> str | None:
    if source is None:
        return None
    return next((provenance.sha256(p) for p in (folder / source, Path(source)) if p.is_file()), None)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", type=Path, help="a search file instead of the demo's")
    parser.add_argument("--set", "-s", action="append", metavar="KEY=VALUE", help="any key of the search file")
    parser.add_argument("--n-trials", type=int)
    parser.add_argument("--trials", choices=["same", "own"], default="same", help="which trials plain TRL trains")
    parser.add_argument("--chunk-evals", action="store_true", help="plain TRL evaluates after every chunk")
    parser.add_argument("--ours", type=Path, help="a run folder of ours; default: run it now")
    parser.add_argument("--time-limit", type=float, help="seconds for plain TRL")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    return parser.parse_args(words)


def main() -> None:
    given = parse()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory(prefix="demo-compare-") as folder:
        results = run(given, Path(folder))
    stem = given.out.stem
    drawn = draw(results, given.out.with_name("figure.png" if stem == "results" else f"{stem}.png"))
    print(f"{results['status']}: {given.out}" + (f", {drawn}" if drawn else ""))
    if results["comparison"] is None:
        return
    print(f"Full serial search / ours: {results['comparison']['wall_ratio']}")
    for one in results["comparison"]["as_good"]:
        print(
            f"As good within {one['tolerance']:.0%}: ours after {one['ours_reached_s']} s (finished "
            f"{one['ours_finished_s']} s), plain TRL after {one['serial_reached_s']} s"
        )


if __name__ == "__main__":
    main()
