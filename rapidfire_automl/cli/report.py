"""What stands on the screen when a search is over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rapidfire_automl.cli.view import against, clock, number
from rapidfire_automl.drawing import amount, megabytes, short_param
from rapidfire_automl.events import ENDED_WITH_SEARCH
from rapidfire_automl.search import SearchResult
from rapidfire_policies.wording import counted

_STATES = {
    "complete": "complete",
    "stopped": "stopped early",
    "failed": "failed",
    "cancelled": "ended with the search",
    "paused": "paused",
    "running": "cut short",
}


def show_result(result: SearchResult, console: Console, *, rankings: bool = True) -> None:
    """Print the best trial, where its adapter lies, what the search cost, and where the pictures are.

    Args:
        result: What was found.
        console: Where to.
        rankings: Whether to print the table of ranks of a search whose trials generate.
    """

    def line(label: str, text: str, style: str = "") -> None:
        console.print(Text.assemble((f"{label:<10}", "dim"), (text, style)), soft_wrap=True, highlight=False)

    def best(label: str, words: str, value: float | None, params: Mapping[str, Any], adapter: Path | None) -> None:
        gain = against(value, result.base_value)
        line(label, words + (f", {gain}" if gain else ""), "bold green")
        line("", "  ".join(f"{name}={_value(value)}" for name, value in params.items()))
        if adapter is not None:
            line("Adapter", _short(adapter))

    console.print()
    so_far = result.summary.get("best_so_far")
    if result.best_trial is not None:
        words = f"trial {result.best_trial} at {number(result.best_value)}"
        best("Best", words, result.best_value, result.best_params, result.best_adapter)
    elif so_far is None:
        line("Best", "none: no trial completed with a finite value", "yellow")
    if so_far is not None and so_far["trial"] != result.best_trial:
        label, so = ("Best", " so far") if result.best_trial is None else ("So far", "")
        words = (
            f"trial {so_far['trial']} at {number(so_far['value'])}{so}, after chunk {so_far['chunk']} of {so_far['of']}"
        )
        adapter = Path(so_far["adapter"]) if so_far["adapter"] else None
        best(label, words, so_far["value"], so_far["params"], adapter)
    line("Cost", cost(result))
    states = [
        "cancelled" if trial["error"] == ENDED_WITH_SEARCH else str(trial["state"])
        for trial in result.summary["trials"]
    ]
    line("Trials", ", ".join(f"{states.count(s)} {name}" for s, name in _STATES.items() if states.count(s)) or "none")
    kept = [
        Path(trial["adapter"])
        for trial, state in zip(result.summary["trials"], states, strict=True)
        if state == "cancelled" and trial["adapter"]
    ]
    if kept:
        line("", f"their adapters are kept, like {_short(kept[0])}")
    failed = [trial for trial, state in zip(result.summary["trials"], states, strict=True) if state == "failed"]
    for trial in failed[:3]:
        line(
            "",
            f"trial {trial['number']} failed: {(trial['error'] or 'no reason recorded').strip().splitlines()[-1]}",
            "red",
        )
    line("Time", clock(result.wall_s) + _first_verdict(result))
    if (spent := result.summary.get("checkpoints")) and spent["checkpoints"]:
        line("Disk", checkpoints(spent, result.wall_s))
    if rankings and "rankings" in result.summary:
        line("Ranked", _equal(result.summary["rankings"]))
        console.print(_rankings(result))
    for name, path in result.summary.get("pictures", {}).items():
        line(name.capitalize(), _short(Path(path)))
    line("Summary", _short(result.run_dir / "summary.json"))


def _equal(found: Mapping[str, Any]) -> str:
    """What is equal in the two rankings."""
    steps = f"after {counted(found['chunks'], 'chunk')} each"
    if found["tokens"] is None:
        return steps
    tokens = f"{amount(found['tokens'])} generated and trained tokens, the cost of the cheapest complete trial"
    cut = " (+: stopped before that)" if any(place["cut"] for place in found["equal_cost"]) else ""
    return f"{steps}, and by the best value within {tokens}{cut}"


def _rankings(result: SearchResult) -> Table:
    """Every trial's place at equal steps and at equal cost, beside what it cost."""
    found = result.summary["rankings"]
    steps = {place["trial"]: (rank, place) for rank, place in enumerate(found["equal_steps"], start=1)}
    cost = {place["trial"]: (rank, place) for rank, place in enumerate(found["equal_cost"], start=1)}
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    grid.add_column("trial", justify="right", no_wrap=True)
    grid.add_column("parameters", no_wrap=True, overflow="ellipsis", ratio=1)
    for name in ("equal steps", "equal cost", "generated", "trained", "seconds"):
        grid.add_column(name, justify="right", no_wrap=True, min_width=len(name))

    def order(trial: Mapping[str, Any]) -> tuple[int, int, int]:
        last = len(result.summary["trials"]) + 1
        number = trial["number"]
        return steps.get(number, (last,))[0], cost.get(number, (last,))[0], number

    for trial in sorted(result.summary["trials"], key=order):
        grid.add_row(
            f"#{trial['number']}",
            ", ".join(short_param(name, value) for name, value in trial["params"].items()),
            _place(steps.get(trial["number"])),
            _place(cost.get(trial["number"])),
            amount(sum(trial["generated"])),
            amount(sum(trial["tokens"])),
            f"{sum(trial['seconds']):.1f}",
        )
    return grid


def _place(found: tuple[int, Mapping[str, Any]] | None) -> Text:
    """`2. 0.61`: the rank and the value; `+` for a trial that was stopped before it had spent the cost."""
    if found is None:
        return Text("-", style="dim")
    rank, place = found
    return Text(
        f"{rank}. {number(place['value'])}{'+' if place['cut'] else ''}", style="bold green" if rank == 1 else ""
    )


def cost(result: SearchResult) -> str:
    """What the search cost against running every trial to the end."""
    if not result.chunks_if_all_ran:
        return "0 chunks"
    share = result.chunks_used / result.chunks_if_all_ran
    return (
        f"{counted(result.chunks_used, 'chunk')}, {share:.0%} of the {result.chunks_if_all_ran} it takes to train "
        "every trial to its end"
    )


def checkpoints(spent: Mapping[str, Any], wall_s: float) -> str:
    """What checkpoints have cost in bytes and seconds."""
    share = f" ({spent['packing_s'] / wall_s:.1%} of the time)" if wall_s else ""
    return (
        f"{megabytes(spent['disk_bytes'])} of checkpoints left, {megabytes(spent['written_bytes'])} written in "
        f"{spent['checkpoints']}; training waited {spent['packing_s']:.1f} s for them{share}"
    )


def _first_verdict(result: SearchResult) -> str:
    return f", first verdict after {clock(result.first_verdict_s)}" if result.first_verdict_s is not None else ""


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(path: Path) -> str:
    """The path as one would type it from here."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
