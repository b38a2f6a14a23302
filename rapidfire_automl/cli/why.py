"""`rapidfire-automl why 7`: why a trial stopped, and what it would have taken to go on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rapidfire_automl.cli.run import Debug
from rapidfire_automl.cli.terminal import Terminal
from rapidfire_automl.event_log import FILE, WORKERS, Log, read_events
from rapidfire_automl.settings import SettingsError
from rapidfire_automl.stories import explain
from rapidfire_policies.wording import counted

Run = Annotated[
    Path | None,
    typer.Option("--run", "-r", metavar="DIR", help="The run folder; by default this folder or the newest in runs/."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also say which lines of the log could not be read.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def why(
    trial: Annotated[int, typer.Argument(help="The trial's number.")],
    run_dir: Run = None,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Say in a sentence why a trial stopped, or how it stands, and what it would have taken to go on.

    Reads the events in the run folder, while the search runs or after it.

    Exit codes: 0 done, 2 no such trial or folder.
    """
    terminal = Terminal(as_json=as_json, debug=debug)
    with terminal.session():
        folder = run_dir if run_dir is not None else newest_run(Path())
        try:
            log = read_events(folder)
            sentence = explain(log, trial)
        except ValueError as error:
            raise SettingsError(str(error).replace("`run_dir`", "`--run`")) from error
        if as_json:
            terminal.json({"trial": trial, "why": sentence, "run": folder})
        else:
            terminal.say(sentence)
        if verbose:
            for note in notes(log):
                typer.echo(note, err=True)


def newest_run(here: Path) -> Path:
    """The folder itself if it has events, else the one in its `runs` whose events are newest; empty files don't count.

    Raises:
        SettingsError: There is none.
    """
    if (here / FILE).is_file() or any((here / WORKERS).glob(f"*/{FILE}")):
        return here
    runs = here / "runs"
    found = [(file.stat().st_mtime, file.parent) for file in runs.glob(f"*/{FILE}") if file.stat().st_size]
    found += [(file.stat().st_mtime, file.parents[2]) for file in runs.glob(f"*/{WORKERS}/*/{FILE}")]
    if not found:
        raise SettingsError(f"`--run` is needed: neither this folder nor any in runs/ has {FILE}.")
    return max(found)[1]


def notes(log: Log) -> list[str]:
    """What could not be read of a log, a line each."""
    said = ["the last line is cut off, as a kill leaves it; it was left out"] if log.torn else []
    if log.damaged:
        shown = ", ".join(map(str, log.damaged[:10])) + (", ..." if len(log.damaged) > 10 else "")
        said.append(f"{counted(len(log.damaged), 'damaged line was', many='damaged lines were')} left out: {shown}")
    return [f"{FILE}: {note}" for note in said]
