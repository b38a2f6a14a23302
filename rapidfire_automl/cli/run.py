"""`rapidfire-automl run search.toml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rapidfire_automl.cli.display import on_screen
from rapidfire_automl.cli.terminal import Terminal
from rapidfire_automl.cli.view import SearchView
from rapidfire_automl.search import SearchResult
from rapidfire_automl.settings import Settings, load_settings
from rapidfire_automl.storages import JOURNAL, url_of
from rapidfire_policies.wording import counted

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Set any key of the file, like search.n_trials=16; the last one counts.",
    ),
]
NTrials = Annotated[int | None, typer.Option("--n-trials", help="Short for --set search.n_trials=N.")]
Slots = Annotated[int | None, typer.Option(help="Short for --set search.slots=N.")]
Chunks = Annotated[int | None, typer.Option(help="Short for --set search.chunks=N.")]
Seed = Annotated[int | None, typer.Option(help="Short for --set search.seed=N.")]
Out = Annotated[
    Path | None, typer.Option("--output-dir", "--out", "-o", help="The run folder, short for --set output.dir=PATH.")
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        envvar="RAPIDFIRE_STORAGE",
        metavar="URL",
        help="Where the study is kept: postgresql+psycopg://user@host/db, sqlite:///study.db, journal:///study.log.",
        show_envvar=False,
    ),
]
Study = Annotated[str | None, typer.Option("--study", metavar="NAME", help="The study's name.")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout and all else on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing while the search runs.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and what the libraries log.")]


def run(
    file: Annotated[Path, typer.Argument(help="The search, a TOML file.")],
    overrides: Set = None,
    n_trials: NTrials = None,
    slots: Slots = None,
    chunks: Chunks = None,
    seed: Seed = None,
    out: Out = None,
    storage: Storage = None,
    study: Study = None,
    check: Annotated[bool, typer.Option("--check", help="Check the file and the data, and stop there.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Search: many LoRA trials on one frozen base, judged after every chunk.

    With --storage and --study `rapidfire-automl worker` can join from other processes, GPUs and machines.

    Ctrl-C or SIGTERM ends it in good order, a second Ctrl-C at once; the same command goes on with it.

    Exit codes: 0 done, 1 all trials failed, 2 bad input, 130 interrupted, 143 terminated.
    """
    terminal = Terminal(as_json=as_json, quiet=quiet, debug=debug)
    with terminal.session():
        short = shorthands(n_trials=n_trials, slots=slots, chunks=chunks, seed=seed, out=out)
        settings = load_settings(file, [*(overrides or []), *short, *places(storage, study)])
        result = search(settings, file.parent, file.stem, terminal, check_only=check)
        if result is not None:
            terminal.result(result)


def shorthands(
    *, n_trials: int | None, slots: int | None, chunks: int | None, seed: int | None, out: Path | None
) -> list[str]:
    """The short options as `--set` lines."""
    numbers = {"n_trials": n_trials, "slots": slots, "chunks": chunks, "seed": seed}
    lines = [f"search.{name}={value}" for name, value in numbers.items() if value is not None]
    return lines if out is None else [*lines, f"output.dir='{out}'"]


def places(storage: str | None, study: str | None) -> list[str]:
    """Where the study is, as `--set` lines; several workers can meet there if it is a database and has a name."""
    given = {"storage": storage, "study": study}
    lines = [f"search.{name}='{value}'" for name, value in given.items() if value is not None]
    if storage is not None and study is not None and not url_of(storage).startswith(JOURNAL):
        lines.append("search.shared=true")
    return lines


def search(
    settings: Settings,
    folder: Path,
    name: str,
    terminal: Terminal,
    *,
    check_only: bool = False,
    joins: bool = False,
    run_dir: Path | None = None,
) -> SearchResult | None:
    """Check a search and run it on the screen; None if it was only checked."""
    from rapidfire_automl import program as programs

    program = programs.prepare(settings, folder, name, run_dir)
    wanted = settings.search
    if not terminal.quiet:
        terminal.say(
            f"{settings.trainer.upper()} on {settings.base.model}: {counted(program.n_trials, 'trial')} over "
            f"{', '.join(program.space.names.values())}; {counted(wanted.chunks, 'chunk')} each, "
            f"{counted(wanted.slots, 'slot')}; {counted(len(program.train), 'example')} to train on, "
            f"{len(program.held_out)} held out"
        )
    if check_only:
        terminal.say("The search can be run.")
        return None
    terminal.goes_on = bool(program.facts)
    view = SearchView(program.n_trials, wanted.chunks, maximize=settings.direction == "maximize")
    with on_screen(view, terminal.console, quiet=terminal.quiet) as listener:
        return programs.execute(program, [listener], joins=joins)
