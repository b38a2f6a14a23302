"""The pictures: drawn for every shape of search, readable limits, no global state."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from rapidfire_automl.cost_picture import draw_cost
from rapidfire_automl.drawing import clock, colours_of, short_param, time_ticks
from rapidfire_automl.events import ENDED_WITH_SEARCH
from rapidfire_automl.pictures import _bars, _ending, _legend_line, draw_curves, draw_timeline, limits
from rapidfire_automl.records import TrialRecord
from rapidfire_policies.base import TrialState

PNG = b"\x89PNG\r\n"


def record(number: int, values: list[float], state: TrialState = TrialState.COMPLETE, **fields: Any) -> TrialRecord:
    spans = [(1.0, 1.0 + len(values))] if values else []
    return TrialRecord(number, {"r": 4 + number}, state, values=values, spans=spans, **fields)


SEARCHES = {
    "none": [],
    "failed before a chunk": [record(0, [], TrialState.FAILED, error="boom")],
    "nan from the start": [record(0, [math.nan, math.nan])],
    "one": [record(0, [2.0, 1.0])],
    "equal": [record(n, [1.0, 1.0]) for n in range(3)],
    "diverged": [record(0, [2.0, 1.0]), record(1, [9.0, 1e30]), record(2, [math.inf], TrialState.STOPPED)],
    "every state": [record(n, [2.0, 1.0 + n], state) for n, state in enumerate(TrialState)],
    "a crowd": [record(n, [2.0, 1.0 + n / 100]) for n in range(40)],
    "negative": [record(0, [-1.0, -2.0]), record(1, [-1.0, -3.0])],
}


@pytest.mark.parametrize(
    ("name", "base_value", "maximize"),
    [
        *((name, 2.5, False) for name in SEARCHES),
        ("none", None, False),
        ("one", None, True),
        ("one", math.nan, False),
        ("every state", None, True),
        ("diverged", 2.5, True),
    ],
)
def test_every_search_can_be_drawn(name: str, base_value: float | None, maximize: bool, tmp_path: Path) -> None:
    records = {r.number: r for r in SEARCHES[name]}
    best = next((n for n, r in records.items() if r.state is TrialState.COMPLETE), None)
    curves = draw_curves(tmp_path / "c.png", records, chunks=2, best=best, base_value=base_value, maximize=maximize)
    timeline = draw_timeline(tmp_path / "t.png", records, chunks=2, slots=4, best=best, maximize=maximize)
    assert curves.read_bytes().startswith(PNG)
    assert timeline.read_bytes().startswith(PNG)
    assert len(list(tmp_path.iterdir())) == 2


def test_pyplot_is_left_alone(tmp_path: Path) -> None:
    if "matplotlib.pyplot" in sys.modules:
        pytest.skip("another test has imported pyplot")
    draw_curves(tmp_path / "c.png", {0: record(0, [1.0])}, chunks=1, best=0, base_value=2.0)
    assert "matplotlib.pyplot" not in sys.modules


def test_a_diverged_trial_does_not_flatten_the_others() -> None:
    shown = {0: record(0, [2.0, 1.0]), 1: record(1, [5.0, 900.0], TrialState.STOPPED)}
    low, high, log = limits(shown, 2.3, maximize=False)
    assert low < 1.0
    assert 2.3 < high < 3.5
    assert not log


def test_log_axis_only_where_it_helps() -> None:
    assert limits({0: record(0, [1.0, 0.01])}, 2.3, maximize=False)[2]
    assert not limits({0: record(0, [1.0, 0.5])}, 2.3, maximize=False)[2]
    assert not limits({0: record(0, [0.1, 0.9])}, 0.01, maximize=True)[2]


def test_bars_are_cut_at_chunk_ends() -> None:
    assert _bars([(0.0, 2.0), (5.0, 6.0)], [1.0, 2.0, 6.0]) == [(0.0, 1.0), (1.0, 2.0), (5.0, 6.0)]
    assert _bars([(0.0, 2.001)], [1.0, 2.0]) == [(0.0, 1.0), (1.0, 2.0)]


def test_colours_tell_survivors_apart() -> None:
    shown = {n: record(n, [1.0 + n]) for n in range(3)} | {3: record(3, [9.0], TrialState.STOPPED)}
    colours = colours_of(shown, 1, maximize=False)
    assert len(set(colours.values())) == 4


def test_words() -> None:
    assert short_param("learning_rate", 2.1e-4) == "lr 2.1e-4"
    assert short_param("lr_scheduler_type", "cosine") == "cosine"
    assert short_param("r", 8) == "r 8"
    assert clock(90.0) == "1:30"
    assert clock(3690.0) == "1:01:30"
    assert clock(0.5) == "0.5 s"
    assert time_ticks(1.2, 9.0) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert all(len(time_ticks(3.0, end)) <= 9 for end in (3.1, 5.0, 100.0, 1e4, 1e6))


def test_who_ended_with_its_search_has_not_failed() -> None:
    shown = {
        0: record(0, [2.0], TrialState.FAILED, error=ENDED_WITH_SEARCH),
        1: record(1, [2.0], TrialState.FAILED, error="boom"),
    }
    assert [_ending(one, 6, best=False)[0] for one in shown.values()] == ["1/6", "failed at 1/6"]
    assert _legend_line(shown) == "1 cut short, 1 failed"


def test_the_cost_of_a_value(tmp_path: Path) -> None:
    records = {
        0: TrialRecord(0, {"num_generations": 4}, TrialState.COMPLETE, [0.2, 0.4], generated=[400, 420]),
        1: TrialRecord(1, {"num_generations": 16}, TrialState.COMPLETE, [0.3, 0.5], generated=[1600, 1500]),
        2: TrialRecord(2, {"num_generations": 8}, TrialState.STOPPED, [0.1], generated=[800]),
        3: TrialRecord(3, {"num_generations": 8}, TrialState.FAILED, [math.nan], generated=[800]),
        4: TrialRecord(4, {}, TrialState.COMPLETE, [0.3, 0.5], generated=[0, 0]),
    }
    assert draw_cost(tmp_path / "cost.png", records, best=1, maximize=True).stat().st_size > 10_000
    assert draw_cost(tmp_path / "none.png", {}, best=None).is_file()
