"""`rapidfire-automl worker --storage URL --study NAME`: one more process, GPU or machine on a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rapidfire_automl.cli.run import Debug, Json, Quiet, Set, search
from rapidfire_automl.cli.terminal import Terminal
from rapidfire_automl.settings import parse_settings

Storage = Annotated[
    str,
    typer.Option(
        "--storage",
        envvar="RAPIDFIRE_STORAGE",
        metavar="URL",
        help="Of the study's storage; with a password better as $RAPIDFIRE_STORAGE: others can read a command line.",
        show_envvar=False,
    ),
]


def worker(
    storage: Storage,
    study: Annotated[str, typer.Option("--study", metavar="NAME", help="The study's name.")],
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "--out", "-o", metavar="DIR", help="The search's folder, if elsewhere here."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="DIR", help="The search file's folder, if it is elsewhere here.")
    ] = None,
    slots: Annotated[int | None, typer.Option(help="Trials that train at a time in this worker.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="Of this worker, like cuda:1.")] = None,
    overrides: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Work on a search that `rapidfire-automl run search.toml --storage URL --study NAME` has begun.

    What is searched stands in the study. Trials of a worker that has died are taken over from the search's folder,
    which all workers must see. It ends when nothing is left to do, for no worker.

    Exit codes: 0 done, 1 all its trials failed or the storage is away, 2 bad input, 130 interrupted.
    """
    from rapidfire_automl import sharing

    terminal = Terminal(as_json=as_json, quiet=quiet, debug=debug)
    with terminal.session():
        shared = sharing.find(storage, study)
        own = [*(overrides or [])]
        own += [] if slots is None else [f"search.slots={slots}"]
        own += [] if device is None else [f"base.device='{device}'"]
        settings = parse_settings(shared.settings.model_dump(mode="json", exclude_unset=True), own)
        result = search(
            settings, folder or shared.folder, study, terminal, joins=True, run_dir=output_dir or shared.run_dir
        )
        if result is not None:
            terminal.result(result)
