"""`rapidfire-automl pause 3 --run DIR` and the other verbs: to a search that runs in another terminal.

Exit codes: 0 it has taken effect, 1 it was refused, 2 bad input or nobody listens there, 3 no answer in time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rapidfire_automl.cli.terminal import FAILED, Terminal
from rapidfire_automl.cli.why import newest_run
from rapidfire_automl.control import ControlError, Sent
from rapidfire_automl.settings import toml_value
from rapidfire_automl.steering import Search

NO_ANSWER = 3

Trial = Annotated[int, typer.Argument(help="Number of the trial.", min=0)]
Run = Annotated[
    Path | None,
    typer.Option("--run", "-r", metavar="DIR", help="The run folder; by default this folder or the newest in runs/."),
]
Study = Annotated[str | None, typer.Option("--study", help="Or its study; then with --storage.")]
Storage = Annotated[str | None, typer.Option("--storage", help="URL of the study's storage.")]
Wait = Annotated[float, typer.Option("--wait", help="Seconds to wait for the effect; 0 sends only.", min=0)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="A value, as TOML, like learning_rate=1e-4; for a clone also =/2."
    ),
]
WAIT_S = 10.0


def pause(trial: Trial, run: Run = None, study: Study = None, storage: Storage = None, wait: Wait = WAIT_S) -> None:
    """Have a trial give up its slot and keep everything, until it is resumed by hand."""
    _steer(lambda search: search.pause(trial), run, study, storage, wait)


def resume(trial: Trial, run: Run = None, study: Study = None, storage: Storage = None, wait: Wait = WAIT_S) -> None:
    """Have a paused trial go on."""
    _steer(lambda search: search.resume(trial), run, study, storage, wait)


def stop(trial: Trial, run: Run = None, study: Study = None, storage: Storage = None, wait: Wait = WAIT_S) -> None:
    """Prune a trial now."""
    _steer(lambda search: search.stop(trial), run, study, storage, wait)


def clone(
    trial: Trial,
    changes: Set = None,
    warm_start: Annotated[
        bool, typer.Option("--warm-start", help="Begin with its adapter and optimizer state.")
    ] = False,
    run: Run = None,
    study: Study = None,
    storage: Storage = None,
    wait: Wait = WAIT_S,
) -> None:
    """Start a new trial with a trial's configuration, some of it changed."""
    _steer(lambda search: search.clone(trial, set=_values(changes), warm_start=warm_start), run, study, storage, wait)


def add(
    changes: Set = None, run: Run = None, study: Study = None, storage: Storage = None, wait: Wait = WAIT_S
) -> None:
    """Start one more trial; the sampler draws what is not set."""
    _steer(lambda search: search.add(_values(changes)), run, study, storage, wait)


def extend(
    trial: Trial,
    chunks: Annotated[int, typer.Option("--chunks", help="How many more.", min=1)],
    run: Run = None,
    study: Study = None,
    storage: Storage = None,
    wait: Wait = WAIT_S,
) -> None:
    """Train a trial for more chunks."""
    _steer(lambda search: search.extend(trial, chunks), run, study, storage, wait)


def set_policy(
    policy: Annotated[str, typer.Argument(help="Its name, like asha; off stops nobody any more.")],
    arguments: Set = None,
    run: Run = None,
    study: Study = None,
    storage: Storage = None,
    wait: Wait = WAIT_S,
) -> None:
    """Judge the rounds to come by another policy."""
    name = None if policy == "off" else policy
    _steer(lambda search: search.set_policy(name, **_values(arguments)), run, study, storage, wait)


def checkpoint(run: Run = None, study: Study = None, storage: Storage = None, wait: Wait = WAIT_S) -> None:
    """Put every trial that trains on disk, at the end of its step."""
    _steer(lambda search: search.checkpoint(), run, study, storage, wait)


def cancel(run: Run = None, study: Study = None, storage: Storage = None, wait: Wait = WAIT_S) -> None:
    """End the search; what has finished stays."""
    _steer(lambda search: search.cancel(), run, study, storage, wait)


COMMANDS: tuple[Callable[..., None], ...] = (pause, resume, stop, clone, add, extend, set_policy, checkpoint, cancel)


def _steer(
    send: Callable[[Search], Sent], run: Path | None, study: str | None, storage: str | None, wait_s: float
) -> None:
    terminal = Terminal(debug=None)
    with terminal.session():
        if storage is not None and study is None:
            raise ControlError("`--study` must be given beside `--storage`: a storage can hold several.")
        if run is None and study is None:
            run = newest_run(Path())
            terminal.say(f"run folder: {run}")
        sent = send(Search(run, study=study, storage=storage, source="command line"))
        terminal.say(f"sent: {sent.command.describe()}")
        if not wait_s:
            return
        effect = sent.wait(wait_s)
        if effect is None:
            terminal.say(f"no answer after {wait_s:g} s; it is applied at the trial's next step, if the search runs.")
            raise typer.Exit(NO_ANSWER)
        terminal.say(f"{effect.state}: {effect.text}")
        if not effect.applied:
            raise typer.Exit(FAILED)


def _values(lines: list[str] | None) -> dict[str, Any]:
    texts: dict[str, str] = {}
    for line in lines or []:
        name, equals, text = (part.strip() for part in line.partition("="))
        if not equals or not name:
            raise ControlError(f"A value must look like `learning_rate=1e-4`, got `{line}`.")
        if name in texts:
            raise ControlError(f"`{name}` is set twice, to {texts[name]} and to {text}. Leave one out.")
        texts[name] = text
    return {name: toml_value(text) for name, text in texts.items()}
