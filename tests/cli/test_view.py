"""What the screen shows, from events alone."""

from __future__ import annotations

import io
import logging
import math
from typing import Any

import pytest
from rich.console import Console

from rapidfire_automl.cli.display import PlainLines, bar, header, on_screen, table, visible
from rapidfire_automl.cli.view import Row, SearchView, against, clock, number
from rapidfire_automl.drawing import amount
from rapidfire_automl.events import Event, warn


def tell(view: SearchView, kind: str, trial: int | None = None, chunk: int | None = None, **data: Any) -> Event:
    event = Event(kind, 1.0, trial, chunk, data)
    view(event)
    return event


def start(view: SearchView, trial: int) -> None:
    tell(view, "trial_started", trial, params={"r": trial}, boundaries=[5, 10, 15, 20], max_steps=20)


def text(renderable: Any, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_trial_through_its_life() -> None:
    view = SearchView(2, 4)
    start(view, 0)
    row = view.rows[0]
    tell(view, "step", 0, 0, step=2, max_steps=20)
    assert (row.state, row.progress) == ("running", 0.4)
    tell(view, "chunk_done", 0, 1, value=1.5)
    tell(view, "verdict", 0, 1, verdict="pause", reason="wait")
    assert (row.state, row.chunk, row.progress, row.reason) == ("paused", 1, 1.0, "wait")
    tell(view, "verdict", 0, 1, verdict="continue", reason="")
    assert row.state == "running"
    tell(view, "trial_ended", 0, 4, state="complete", value=1.0, reason="")
    tell(view, "verdict", 0, 4, verdict="continue", reason="late")
    assert row.state == "complete"


def test_best_is_finite_and_not_failed() -> None:
    view = SearchView(4, 4)
    for trial, value in enumerate([math.nan, -math.inf, 0.5, 0.1]):
        start(view, trial)
        tell(view, "chunk_done", trial, 1, value=value)
    tell(view, "trial_ended", 3, 1, state="failed", value=None, reason="boom")
    assert view.best is view.rows[2]
    view.maximize = True
    assert view.best is view.rows[2]


def test_expected_chunks() -> None:
    view = SearchView(4, 4)
    start(view, 0)
    assert view.expected_chunks == 16
    tell(view, "chunk_done", 0, 1, value=1.0)
    tell(view, "trial_ended", 0, 1, state="pruned", value=1.0, reason="")
    assert view.expected_chunks == 4  # as short as the one that ended
    start(view, 1)
    tell(view, "chunk_done", 1, 1, value=0.5)
    assert view.expected_chunks == 1 + 4 + 2  # the second one outlived it
    assert view.left_s is not None


def test_table_header_and_room() -> None:
    view = SearchView(20, 4)
    assert "loading the base" in text(header(view))
    tell(view, "base_evaluated", value=2.0)
    for trial in range(12):
        start(view, trial)
        tell(view, "chunk_done", trial, 1, value=1.0 + trial)
        tell(view, "verdict", trial, 1, verdict="stop" if trial > 5 else "continue", reason=f"rank {trial}")
        if trial > 5:
            tell(view, "trial_ended", trial, 1, state="pruned", value=1.0, reason=f"rank {trial}")
    shown = text(table(view, view.rows.values()))
    assert "rank 3" in shown
    assert "stopped" in shown
    assert "12 of at most 80 chunks · 12/20 trials, 6 stopped" in text(header(view))
    assert "50% below base 2" in text(header(view))
    rows, hidden = visible(view, 7)
    assert [row.number for row in rows] == [0, 1, 2, 3, 4, 5, 11]
    assert hidden == 5


def test_plain_lines() -> None:
    view = SearchView(2, 4)
    console = Console(file=io.StringIO(), width=40)
    with on_screen(view, console, quiet=False) as listener:
        for event in [
            Event("base_evaluated", 1.0, data={"value": 2.0}),
            Event("trial_started", 2.0, 0, data={"params": {"r": 4}, "boundaries": [5]}),
            Event("step", 2.0, 0, data={"step": 1}),
            Event("chunk_done", 3.0, 0, 1, {"value": 1.5}),
            Event("verdict", 3.0, 0, 1, {"verdict": "stop", "reason": "rank [2] of 2"}),
            Event("trial_ended", 3.0, 0, 1, {"state": "pruned", "value": 1.5, "reason": "x"}),
            Event("chunk_done", 4.0, 1, 1, {"value": math.nan}),
            Event("trial_ended", 4.0, 1, 1, {"state": "failed", "value": None, "reason": "boom"}),
            Event("out_of_memory", 5.0, data={"budget_tokens": 64}),
        ]:
            listener(event)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == "  [0:01] untrained base: 2"
    assert lines[1] == "  [0:02] trial 0 starts: r 4"
    assert lines[2].startswith("  [0:03] trial 0 chunk 1/4: 1.5, stop (rank [2] of 2)")
    assert lines[3].startswith("  [0:04] trial 1 chunk 1/4: nan")
    assert lines[4] == "  [0:04] trial 1 failed: boom"
    assert lines[5].endswith("at most 64 tokens")
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("ended", "going_on", "says"),
    [(1, 1, "1 trial has ended, 1 goes on"), (0, 2, "0 trials have ended, 2 go on"), (3, 1, "3 trials have ended, 1 ")],
)
def test_one_is_not_several(ended: int, going_on: int, says: str) -> None:
    view, console = SearchView(1, 1), Console(file=io.StringIO(), width=200)
    plain = PlainLines(view, console)
    plain(Event("search_resumed", 1.0, data={"ended": ended, "going_on": going_on}))
    plain(Event("chunk_done", 1.0, 0, 1, {"value": 1.0}))
    view(Event("chunk_done", 1.0, 0, 1, {"value": 1.0}))
    plain(Event("verdict", 1.0, 0, 1, {"verdict": "complete"}))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"the search goes on: {says}" in said
    assert "complete  [1 chunk" in said
    assert "1 of at most 1 chunk · 1/1 trial · " in text(header(view))


def test_quiet_shows_nothing() -> None:
    console = Console(file=io.StringIO())
    view = SearchView(1, 1)
    with on_screen(view, console, quiet=True) as listener:
        listener(Event("base_evaluated", 1.0, data={"value": 2.0}))
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
    assert view.base_value == 2.0
    assert not isinstance(listener, PlainLines)


def test_live_table_in_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=20)
    view = SearchView(1, 4)
    with on_screen(view, console, quiet=False) as listener:
        listener(Event("trial_started", 2.0, 0, data={"params": {"r": 4}, "boundaries": [1, 2, 3, 4]}))
        listener(Event("warning", 2.0, data={"message": "look [here]"}))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "look [here]" in shown
    assert "#0" in shown


def test_words() -> None:
    row = Row(0, chunk=1, boundaries=(5, 10), state="paused")
    assert bar(row, 2).plain == "█████      1/2"
    assert (clock(90.2), clock(3690)) == ("1:30", "1:01:30")
    assert (number(None), number(math.inf), number(1.23456)) == ("-", "inf", "1.235")
    assert against(1.0, 2.0) == "50% below base 2"
    assert against(1.0, None) == against(math.nan, 2.0) == ""


def test_costs_show_where_trials_generate() -> None:
    view = SearchView(2, 4)
    start(view, 0)
    start(view, 1)
    plain = text(table(view, view.rows.values()), 160)
    assert "generated" not in plain
    out = io.StringIO()
    lines = PlainLines(view, Console(file=out, width=160))
    for chunk in (1, 2):
        event = tell(view, "chunk_done", 1, chunk, value=0.5, seconds=1.25, tokens=900, generated=6200)
        lines(event)
        lines(tell(view, "verdict", 1, chunk, verdict="continue", reason=""))
    tell(view, "chunk_done", 0, 1, value=0.5, seconds=1.0, tokens=900)
    shown = text(table(view, view.rows.values()), 160)
    assert "generated" in shown
    row = next(line for line in shown.splitlines() if "#1" in line).split()
    assert [cell in row for cell in ("12.4k", "1.8k", "2.5")] == [True] * 3
    assert "trial 1 chunk 2/4: 0.5, 6.2k generated and 900 trained, continue" in out.getvalue()


def test_amounts_in_three_digits() -> None:
    assert [amount(n) for n in (0, 999, 1000, 12345, 4_560_000)] == ["0", "999", "1k", "12.3k", "4.56M"]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_warning_is_on_the_screen_once(caplog: pytest.LogCaptureFixture, quiet: bool) -> None:
    """And in the log where events are not shown; what is no event is in the log in any case."""
    log, console = logging.getLogger("rapidfire_automl"), Console(file=io.StringIO(), width=120)
    told: list[str] = []
    with caplog.at_level(logging.WARNING, "rapidfire_automl"):
        with on_screen(SearchView(2, 4), console, quiet=quiet) as listener:

            def emit(kind: str, arm: None, **data: Any) -> None:
                told.append(kind)
                listener(Event(kind, 1.0, data=data))

            warn(emit, "the disk is slow")
            log.warning("a listener failed")
        warn(lambda kind, arm, **data: told.append(kind), "after it")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert told == ["warning", "warning"]
    assert (shown + caplog.text).count("the disk is slow") == 1
    assert caplog.messages == [*(["the disk is slow"] if quiet else []), "a listener failed", "after it"]
