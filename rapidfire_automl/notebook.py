"""`panel(search)`: the live table and the verbs as buttons, in a notebook."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from rapidfire_automl.cli.view import LIVE, Row, SearchView, number
from rapidfire_automl.control import Command, ControlError, Controls, Sent
from rapidfire_automl.events import Event
from rapidfire_automl.settings import toml_value
from rapidfire_automl.steering import Search

_COLORS = {"running": "#0a7", "paused": "#b80", "complete": "#073", "failed": "#c00"}


class Panel(Controls):
    """The widgets of a search; show it as a cell's last line. Its buttons are its own verbs.

    Args:
        search: An executor, `Experiment`, `AutoML`, or `Search` of another process.
        every_s: Between two looks at another process's events; 0 looks at `refresh()` only.

    Raises:
        ImportError: ipywidgets is missing; the message has the `pip install` line.
    """

    def __init__(self, search: Controls, *, every_s: float = 1.0) -> None:
        try:
            import ipywidgets
        except ImportError as error:
            raise ImportError("`panel` needs ipywidgets: pip install 'rapidfire_automl[notebook]'") from error
        self.search = search
        self._view = SearchView(0, getattr(search, "chunks", 1))
        self._closed = threading.Event()
        self.table = ipywidgets.HTML()
        self.message = ipywidgets.HTML()
        self.trial = ipywidgets.Dropdown(options=[], description="Trial")
        self.changes = ipywidgets.Text(description="Set", placeholder="learning_rate=/2, r=8")
        self.warm_start = ipywidgets.Checkbox(value=True, description="warm start")
        self.chunks = ipywidgets.BoundedIntText(value=1, min=1, max=10_000, description="Chunks")
        self.policy = ipywidgets.Text(description="Policy", placeholder="asha; empty: none")
        verbs: Mapping[str, Callable[[], Sent]] = {
            "pause": lambda: self.pause(self._trial()),
            "resume": lambda: self.resume(self._trial()),
            "stop": lambda: self.stop(self._trial()),
            "clone": lambda: self.clone(
                self._trial(), set=_values(self.changes.value), warm_start=self.warm_start.value
            ),
            "add": lambda: self.add(_values(self.changes.value)),
            "extend": lambda: self.extend(self._trial(), self.chunks.value),
            "set-policy": lambda: self.set_policy(self.policy.value.strip() or None, **_values(self.changes.value)),
            "checkpoint": lambda: self.checkpoint(),
            "cancel": lambda: self.cancel(),
        }
        self.buttons = {verb: ipywidgets.Button(description=verb) for verb in verbs}
        for verb, button in self.buttons.items():
            button.on_click(self._clicked(verbs[verb]))
        row = ipywidgets.HBox
        self.widget = ipywidgets.VBox(
            [
                self.table,
                row([self.trial, *(self.buttons[verb] for verb in ("pause", "resume", "stop"))]),
                row([self.changes, self.warm_start, self.buttons["clone"], self.buttons["add"]]),
                row([self.chunks, self.buttons["extend"], self.policy, self.buttons["set-policy"]]),
                row([self.buttons["checkpoint"], self.buttons["cancel"]]),
                self.message,
            ]
        )
        if isinstance(search, Search):
            if every_s:
                threading.Thread(target=self._follow, args=(every_s,), name="panel", daemon=True).start()
        else:
            search.add_listener(self._hear)  # type: ignore[attr-defined]
        self.refresh()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)

    def _send(self, command: Command) -> Sent:
        return self.search._send(replace(command, source="notebook panel"))

    def refresh(self) -> None:
        """Show what has happened by now."""
        if isinstance(self.search, Search):
            for event in self.search.events():
                self._take(event)
        self._draw()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _follow(self, every_s: float) -> None:
        while not self._closed.wait(every_s):
            try:
                self.refresh()
            except Exception as error:  # a storage that is away for a while
                self._say(f"The search can't be looked at: {error}", good=False)

    def _hear(self, event: Event) -> None:
        """Called in the search's threads: a step is no reason to send a whole table to a browser."""
        self._take(event)
        if event.kind != "step" and not self._closed.is_set():
            self._draw()

    def _take(self, event: Event) -> None:
        value = event.data.get("value")
        if isinstance(value, str):  # JSON has no NaN
            event = Event(event.kind, event.time_s, event.trial, event.chunk, {**event.data, "value": float(value)})
        self._view(event)
        if event.kind == "command":
            self._say(self._view.commands[-1], good=event.data["effect"] == "applied")

    def _draw(self) -> None:
        with self._view.lock:
            rows = sorted(self._view.rows.values(), key=lambda row: row.number)
            self._view.chunks = max([self._view.chunks, *(len(row.boundaries) for row in rows)])
            self.table.value = table(rows, self._view.chunks, best=self._view.best)
            numbers = [row.number for row in rows]
            if numbers != list(self.trial.options):
                kept = self.trial.value
                self.trial.options = numbers
                live = [row.number for row in rows if row.state in LIVE]
                self.trial.value = kept if kept in numbers else next(iter(live or numbers), None)

    def _trial(self) -> int:
        if self.trial.value is None:
            raise ControlError("No trial has begun yet.")
        return int(self.trial.value)

    def _clicked(self, send: Callable[[], Sent]) -> Callable[[Any], None]:
        def clicked(_: Any) -> None:
            try:
                sent = send()
            except ControlError as error:
                self._say(str(error), good=False)
            else:
                self._say(f"sent: {sent.command.describe()}", good=True)

        return clicked

    def _say(self, text: str, *, good: bool) -> None:
        self.message.value = f'<span style="color:{"#073" if good else "#c00"}">{html.escape(text)}</span>'


def panel(search: Controls, *, every_s: float = 1.0) -> Panel:
    """Show and steer a search that runs `in_background`, or in another process.

    Args:
        search: An executor, `Experiment`, `AutoML`, or `Search`.
        every_s: Between two looks at another process's events.

    Raises:
        ImportError: ipywidgets is missing.
    """
    return Panel(search, every_s=every_s)


def table(rows: Iterable[Row], chunks: int, *, best: Row | None) -> str:
    """The trials as HTML; whatever comes from outside is escaped."""
    lines = ["<table><tr><th>trial<th>parameters<th>chunk<th>value<th>state<th>why</tr>"]
    for row in rows:
        params = ", ".join(f"{name}={value}" for name, value in row.params.items())
        cells = [f"{row.number}{' ★' if row is best else ''}", params, f"{row.chunk}/{chunks}", number(row.value)]
        cells = [html.escape(cell) for cell in cells]
        state = f'<span style="color:{_COLORS.get(row.state, "#888")}">{row.state}</span>'
        lines.append(f"<tr><td>{'<td>'.join(cells)}<td>{state}<td>{html.escape(row.reason)}</tr>")
    return "".join(lines) + "</table>"


def _values(text: str) -> dict[str, Any]:
    """`learning_rate=1e-4, r=8` as values; a list keeps its commas."""
    values = {}
    parts: list[str] = []
    for part in text.split(","):
        inside = bool(parts) and parts[-1].count("[") > parts[-1].count("]")
        if inside or (parts and part.strip() and "=" not in part):
            parts[-1] += "," + part
        elif part.strip():
            parts.append(part)
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise ControlError(f"Values must look like `learning_rate=1e-4, r=8`, got `{text}`.")
        values[name.strip()] = toml_value(value)
    return values
