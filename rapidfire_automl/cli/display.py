"""The search on the screen: a live table in a terminal, one line per happening elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rapidfire_automl.cli.view import LIVE, Row, SearchView, against, clock, number, writing
from rapidfire_automl.drawing import amount, megabytes, short_param
from rapidfire_automl.events import ENDED_WITH_SEARCH, Event, Listener, on_view
from rapidfire_policies.wording import counted

_VERDICT_STYLE = {"continue": "green", "pause": "yellow", "stop": "red", "complete": "bold green"}
_STATE_STYLE = {"running": "cyan", "paused": "yellow", "complete": "bold green", "failed": "red"}
"""Of the others: dim."""
_STATE_NAME = {"pruned": "stopped"}
_OF_WORKERS = ("elsewhere", "storage_away", "storage_back", "trial_orphaned", "trial_given_up", "trial_lost")
_COSTS = ("generated", "trained", "seconds")
_EIGHTHS = " ▏▎▍▌▋▊▉"


@contextmanager
def on_screen(view: SearchView, console: Console, *, quiet: bool) -> Iterator[Listener]:
    """Show a search while it runs.

    Yields:
        The listener to run it with; it feeds `view`, too.
    """
    if quiet:
        yield view
    elif console.is_terminal:
        screen = Live(_Screen(view, console), console=console, refresh_per_second=5, vertical_overflow="ellipsis")
        with on_view(), screen:
            yield view
    else:
        plain = PlainLines(view, console)

        def both(event: Event) -> None:
            view(event)
            plain(event)

        with on_view():
            yield both


class PlainLines:
    """One line per happening, for logs and pipes."""

    def __init__(self, view: SearchView, console: Console) -> None:
        self._view, self._console = view, console
        self._unjudged: dict[int, str] = {}

    def __call__(self, event: Event) -> None:
        """Print what the event says, if it says something to a person."""
        for line in self._lines(event):
            stamp = f"[{clock(event.time_s)}]"
            self._console.print(f"{stamp:>8} {line}", markup=False, highlight=False, soft_wrap=True)

    def _lines(self, event: Event) -> Iterable[str]:
        data, trial = event.data, event.trial
        if event.kind in _OF_WORKERS:
            yield from self._of_workers(event)
        elif event.kind == "warning":
            yield f"warning: {data['message']}" if trial is None else f"warning: trial {trial}: {data['message']}"
        elif event.kind == "command":
            yield f"{self._view.commands[-1]} [{data['source']}]"
        elif trial is None:
            yield from _about_search(event)
        elif event.kind == "trial_started":
            yield f"trial {trial} starts: {_params(self._view.rows[trial])}"
        elif event.kind == "chunk_done":
            yield from self._flush(trial)
            generated = data.get("generated", 0)
            cost = f", {amount(generated)} generated and {amount(data['tokens'])} trained" if generated else ""
            value = f"{number(data['value'])}{cost}"
            self._unjudged[trial] = f"trial {trial} chunk {event.chunk}/{self._view.chunks}: {value}"
        elif event.kind == "verdict":
            chunk = self._unjudged.pop(trial, f"trial {trial}")
            reason = f" ({data['reason']})" if data.get("reason") else ""
            yield f"{chunk}, {data['verdict']}{reason}{self._progress()}"
        elif event.kind == "trial_ended":
            yield from self._flush(trial)
            yield from self._end(event)

    def _end(self, event: Event) -> Iterable[str]:
        data, trial = event.data, event.trial
        if data.get("reason") == ENDED_WITH_SEARCH:
            yield f"trial {trial} ended with the search"
        elif data["state"] == "failed":
            yield f"trial {trial} failed: {data.get('reason', '')}"
        elif data["state"] == "complete":
            yield f"trial {trial} is complete: {number(data.get('value'))}"

    def _of_workers(self, event: Event) -> Iterable[str]:
        """Of other workers' trials, and of the storage where they meet."""
        data = event.data
        if event.kind != "elsewhere":
            yield self._view.warnings[-1]
            return
        state = _STATE_NAME.get(data["state"], data["state"])
        yield f"trial {data['of']} at {data['worker']}: {state}, chunk {data['chunk']}, {number(data['value'])}"

    def _flush(self, trial: int) -> Iterable[str]:
        """The chunk nobody judged: a policy may leave a trial out."""
        if trial in self._unjudged:
            yield self._unjudged.pop(trial) + self._progress()

    def _progress(self) -> str:
        left = self._view.left_s
        return (
            f"  [{counted(self._view.chunks_done, 'chunk')}{f', about {clock(left)} left' if left is not None else ''}]"
        )


def _about_search(event: Event) -> Iterable[str]:
    """What an event says that is about no trial."""
    data = event.data
    if event.kind == "base_evaluated":
        yield f"untrained base: {number(data['value'])}"
    elif event.kind == "plan":
        yield f"plan: {data.get('reason', '')}"
    elif event.kind == "out_of_memory":
        yield f"out of memory: passes now have at most {counted(data['budget_tokens'], 'token')}"
    elif event.kind == "search_resumed":
        yield _goes_on(data["ended"], data["going_on"])
    elif event.kind.startswith("writing_"):
        yield writing(event)


def _goes_on(ended: int, going_on: int) -> str:
    over = counted(ended, "trial has ended", many="trials have ended")
    return f"the search goes on: {over}, {going_on} {'goes' if going_on == 1 else 'go'} on"


class _Screen:
    """The live table; built anew at every refresh."""

    def __init__(self, view: SearchView, console: Console) -> None:
        self._view, self._console = view, console

    def __rich__(self) -> RenderableType:
        with self._view.lock:
            parts: list[RenderableType] = [header(self._view)]
            room = max(self._console.size.height - 7 - min(len(self._view.warnings), 2), 4)
            rows, hidden = visible(self._view, room)
            if rows:
                parts.append(table(self._view, rows))
            if hidden:
                parts.append(Text(f"  and {hidden} more", style="dim"))
            parts += [Text(f"  {line}", style="yellow") for line in self._view.warnings[-2:]]
            return Group(*parts)


def visible(view: SearchView, room: int) -> tuple[list[Row], int]:
    """The rows that fit, by number, and how many do not: live trials and the best go first, then late ones."""
    best = view.best

    def weight(row: Row) -> tuple[bool, bool, bool, int]:
        return row is not best, row.state not in LIVE, row.state != "complete", -row.number

    chosen = sorted(view.rows.values(), key=weight)[:room]
    return sorted(chosen, key=lambda row: row.number), len(view.rows) - len(chosen)


def header(view: SearchView) -> RenderableType:
    """Progress, cost, the best so far, time."""
    line = Table.grid(padding=(0, 2))
    line.add_column(width=24)
    line.add_column()
    if not view.rows:
        waiting = "loading the base" if view.base_value is None else f"untrained base {number(view.base_value)}"
        line.add_row(
            ProgressBar(total=1.0, completed=0, width=24, pulse=True), Text(f"{waiting} · {clock(view.elapsed_s)}")
        )
        return line
    expected = max(view.expected_chunks, 1.0)
    done = sum(row.progress for row in view.rows.values())
    left = view.left_s
    time = clock(view.elapsed_s) + (f", about {clock(left)} left" if left is not None else "")
    if view.disk_bytes:
        time += f" · {megabytes(view.disk_bytes)} of checkpoints" + (", disk full" if view.disk_is_full else "")
    states = [f"{len(view.rows)}/{counted(view.n_trials, 'trial')}"]
    for states_of, name in ((("pruned",), "stopped"), (("paused",), "paused"), (("failed",), "failed")):
        if count := view.count(*states_of):  # type: ignore[arg-type]
            states.append(f"{count} {name}")
    line.add_row(
        ProgressBar(total=expected, completed=min(done, expected), width=24),
        Text.assemble(
            (f"{view.chunks_done}", "bold"),
            f" of at most {counted(view.chunks_if_all_run, 'chunk')} · ",
            f"{', '.join(states)} · {time}",
        ),
    )
    best = view.best
    if best is not None:
        gain = against(best.value, view.base_value)
        line.add_row(
            "",
            Text.assemble("best so far ", (f"#{best.number}  {number(best.value)}", "bold green"), f"  {gain}"),
        )
    return line


def table(view: SearchView, rows: Iterable[Row]) -> Table:
    """A row a trial."""
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    grid.add_column("trial", justify="right", no_wrap=True)
    grid.add_column("parameters", no_wrap=True, overflow="ellipsis", ratio=3, min_width=16)
    grid.add_column("chunk", no_wrap=True)
    grid.add_column("value", justify="right", no_wrap=True)
    for name in _COSTS if view.generates else ():
        grid.add_column(name, justify="right", no_wrap=True)
    if shared := any(row.worker for row in view.rows.values()):
        grid.add_column("worker", no_wrap=True, overflow="ellipsis", max_width=20)
    grid.add_column("state", no_wrap=True)
    grid.add_column("verdict", no_wrap=True, overflow="ellipsis", ratio=4, min_width=12)
    best = view.best
    for row in rows:
        fade = "dim" if row.state == "pruned" else ""
        is_best = row is best
        verdict = Text(row.verdict, style=_VERDICT_STYLE.get(row.verdict, ""))
        if row.reason:
            verdict.append(f"  {row.reason}" if row.verdict else row.reason, style="dim")
        grid.add_row(
            Text(f"#{row.number}", style="bold green" if is_best else fade),
            Text(_params(row), style=fade),
            bar(row, view.chunks),
            Text(number(row.value), style=_value_style(row, view, is_best=is_best)),
            *(Text(text, style=fade) for text in (_costs(row) if view.generates else ())),
            *((Text(row.worker or "this one", style="dim"),) if shared else ()),
            Text(_STATE_NAME.get(row.state, row.state), style=_STATE_STYLE.get(row.state, "dim")),
            verdict,
        )
    return grid


def bar(row: Row, chunks: int, width: int = 10) -> Text:
    """`██████▌    3/5`: chunks done, the current one in eighths of a letter."""
    eighths = round(row.progress / chunks * width * 8)
    full, rest = divmod(min(eighths, width * 8), 8)
    drawn = "█" * full + (_EIGHTHS[rest] if rest else "")
    colors = {"running": "green", "complete": "green", "failed": "red", "paused": "yellow"}
    style = colors.get(row.state, "bright_black")
    return Text.assemble((drawn.ljust(width), f"{style} on grey15"), f" {row.chunk:>{len(str(chunks))}}/{chunks}")


def _value_style(row: Row, view: SearchView, *, is_best: bool) -> str:
    if row.value is not None and not math.isfinite(row.value):
        return "red"
    if is_best:
        return "bold green"
    return "dim" if row.state == "pruned" else ""


def _costs(row: Row) -> tuple[str, str, str]:
    """Tokens generated, tokens trained, and seconds, in the order of `_COSTS`."""
    return amount(row.generated), amount(row.tokens), f"{row.seconds:.1f}"


def _params(row: Row) -> str:
    return ", ".join(short_param(name, value) for name, value in row.params.items())
