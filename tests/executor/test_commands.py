"""Commands to a search that runs, sent at known moments: by listeners, in the trials' and the conductor's threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
import pytest

from rapidfire_automl import RapidFireExecutor
from rapidfire_automl.control import Sent
from rapidfire_automl.events import Event
from rapidfire_policies import TrialState
from tests.executor.searches import LRS, Done, Scripted, by_lr, search

pytestmark = pytest.mark.slow


class At:
    """Does something once, at the first event that fits, and keeps what it sends."""

    def __init__(self, executor: RapidFireExecutor) -> None:
        self._executor = executor
        self._plans: list[tuple[Callable[[Event], bool], Callable[[RapidFireExecutor], Any]]] = []
        self.sent: list[Sent] = []
        executor.add_listener(self)

    def when(self, kind: str, trial: int | None, do: Callable[[RapidFireExecutor], Any], **data: Any) -> At:
        def fits(event: Event) -> bool:
            return event.kind == kind and event.trial == trial and data.items() <= {**event.data, "chunk": event.chunk}.items()

        self._plans.append((fits, do))
        return self

    def __call__(self, event: Event) -> None:
        for plan in list(self._plans):
            if plan[0](event):
                self._plans.remove(plan)
                sent = plan[1](self._executor)
                self.sent += [one for one in (sent if isinstance(sent, (list, tuple)) else [sent]) if isinstance(one, Sent)]


def steer(plan: Callable[[At], Any], *args: Any, **given: Any) -> tuple[Done, At]:
    made: list[At] = []

    def prepare(executor: RapidFireExecutor) -> None:
        made.append(At(executor))
        plan(made[0])

    return search(*args, prepare=prepare, **given), made[0]


def effects(at: At) -> list[tuple[str, str]]:
    return [(sent.command.verb, sent.effect.state if sent.effect else "nothing") for sent in at.sent]


def texts(at: At) -> list[str]:
    return [sent.effect.text if sent.effect else "" for sent in at.sent]


def trains(done: Done) -> list[int | None]:
    """Who made each step, in order."""
    return [event.trial for event in done.of_kind("step")]


def test_pause_in_the_middle_of_a_chunk_and_resume_in_the_same_round() -> None:
    whole = search(LRS[:3])
    done, at = steer(
        lambda at: at.when("step", 0, lambda e: e.pause(0), step=2).when("step", 1, lambda e: e.resume(0), step=3),
        LRS[:3],
        chunks=2,
    )
    assert effects(at) == [("pause", "applied"), ("resume", "applied")]
    assert texts(at)[0] == "paused, at step 2 of 6, in chunk 1 of 2"
    assert done.states() == ["COMPLETE"] * 3
    assert done.losses(0) == pytest.approx(whole.losses(0), rel=1e-6)
    assert len(done.executor.records[0].spans) == 2
