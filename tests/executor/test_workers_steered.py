"""Commands to trials that change hands: real processes, killed, frozen, thawed, and left in good order."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from rapidfire_automl import Search
from tests.executor.test_workers import ALL, counted_once, freeze
from tests.executor.working import Process, of, result

pytestmark = [pytest.mark.slow, pytest.mark.faults]
long = pytest.mark.skipif(not ALL, reason="`make test-faults` runs it: a quarter of a minute")

PAUSED = ("paused, at step", "paused, at the end of chunk")
"""Within a chunk, or at its end: it is the next safe point that counts."""


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def search_in(storage: str) -> Search:
    return Search(study="search", storage=storage)


def done_by(worker: Process) -> list[tuple[str, int, str]]:
    """Commands that a worker has answered: verb, trial, effect."""
    told = [event["data"] for event in worker.of_kind("command")]
    return sorted((one["verb"], one["of"], one["effect"]) for one in told)


def ruled_by(worker: Process) -> list[tuple[int, str]]:
    """What a worker has let people decide: trial, verdict."""
    told = [event for event in worker.of_kind("verdict") if " by Python" in event["data"]["reason"]]
    return sorted((event["trial"], event["data"]["verdict"]) for event in told)


ONCE = [("pause", 0, "applied"), ("stop", 1, "applied")]


def test_what_is_sent_while_the_owner_is_frozen_is_done_by_who_takes_over(tmp_path: Path, storage: str) -> None:
    frozen = Process(tmp_path, storage, name="frozen", n_trials=2, step_s=0.3)
    frozen.wait_for(of("step", trial=1))
    freeze(frozen, tmp_path / "study.db")
    search = search_in(storage)
    pause, stop = search.pause(0), search.stop(1)
    lives = Process(tmp_path, storage, name="lives", n_trials=2, step_s=0.3)
    for sent, text in ((pause, PAUSED), (stop, ("stopped, at",))):
        effect = sent.wait(60.0)
        assert effect is not None and effect.applied and effect.text.startswith(text)
    assert done_by(lives) == ONCE
    frozen.send(signal.SIGCONT)
    frozen.wait_for(of("trial_lost", trial=0))
    again = search.resume(0).wait(30.0)
    assert again is not None and again.applied
    frozen.finish()
    lives.finish()
    assert not done_by(frozen) and not ruled_by(frozen)
    assert ruled_by(lives) == [(0, "continue"), (0, "pause"), (1, "stop")]
    counted_once(frozen, lives)
    found = result(storage)
    assert [(trial["state"], trial["attempt"]) for trial in found.values()] == [("COMPLETE", 2), ("PRUNED", 2)]


@long
def test_a_thawed_owner_that_looks_first_leaves_it_to_who_has_taken_over(tmp_path: Path, storage: str) -> None:
    """It does not know yet that it has lost its trials; nor may the command be lost with them."""
    thaws = Process(tmp_path, storage, name="thaws", n_trials=2, step_s=0.3)
    thaws.wait_for(of("step", trial=1))
    freeze(thaws, tmp_path / "study.db")
    lives = Process(tmp_path, storage, name="lives", n_trials=2, step_s=0.3)
    lives.wait_for(of("trial_resumed", trial=1))
    freeze(lives, tmp_path / "study.db")
    search = search_in(storage)
    pause, stop = search.pause(0), search.stop(1)
    thaws.send(signal.SIGCONT)
    thaws.wait_for(of("trial_lost", trial=0))
    thaws.wait_for(of("trial_lost", trial=1))
    assert pause.effect is None and stop.effect is None
    lives.send(signal.SIGCONT)
    for sent, text in ((pause, PAUSED), (stop, ("stopped, at",))):
        effect = sent.wait(60.0)
        assert effect is not None and effect.applied and effect.text.startswith(text)
    assert search.cancel().wait(30.0) is not None
    thaws.finish()
    lives.finish()
    done = {(verb, trial, effect) for verb, trial, effect in done_by(lives) if verb != "cancel"}
    assert done == set(ONCE)
    assert not {verb for verb, _, _ in done_by(thaws)} - {"cancel"} and not ruled_by(thaws)


@long
def test_what_is_sent_while_a_trial_waits_to_be_taken_over(tmp_path: Path, storage: str) -> None:
    """The only other worker has no slot free for it."""
    options: dict[str, Any] = {"n_trials": 2, "slots": 1}
    lives = Process(tmp_path, storage, name="lives", step_s=1.0, **options)
    lives.wait_for(of("step", trial=0))
    leaves = Process(tmp_path, storage, name="leaves", step_s=0.2, **options)
    leaves.wait_for(of("step", trial=1))
    leaves.send(signal.SIGTERM)
    assert leaves.wait() == 128 + signal.SIGTERM
    search = search_in(storage)
    pause = search.pause(1)
    assert pause.wait(2.5) is None, "it waits, and so does the command"
    effect = pause.wait(60.0)
    assert effect is not None and effect.applied and effect.text.startswith(PAUSED)
    resumed = search.resume(1).wait(30.0)
    assert resumed is not None and resumed.applied
    lives.finish()
    assert [trial["state"] for trial in result(storage).values()] == ["COMPLETE"] * 2
    assert done_by(lives) == [("pause", 1, "applied"), ("resume", 1, "applied")]


def test_who_has_extended_a_trial_and_died_before_the_answer_has_extended_it_once(tmp_path: Path, storage: str) -> None:
    dies = Process(tmp_path, storage, "command.extended=kill@1", name="dies", n_trials=1, step_s=0.3)
    dies.wait_for(of("step", trial=0))
    lives = Process(tmp_path, storage, name="lives", n_trials=1)
    extend = search_in(storage).extend(0, 1)
    dies.killed()
    effect = extend.wait(60.0)
    assert effect is not None and effect.applied
    assert effect.text.startswith("4 chunks") and effect.text.endswith(" (by another worker)")
    lives.finish()
    assert len(result(storage)[0]["values"]) == 4


def test_a_trial_that_was_taken_over_is_extended_once_it_is_loaded(tmp_path: Path, storage: str) -> None:
    """It is paused: its new worker has not built its trainer."""
    dies = Process(tmp_path, storage, name="dies", n_trials=1, step_s=0.3)
    dies.wait_for(of("chunk_done", trial=0))
    search = search_in(storage)
    assert search.pause(0).wait(30.0)
    dies.send(signal.SIGKILL)
    dies.killed()
    lives = Process(tmp_path, storage, name="lives", n_trials=1)
    lives.wait_for(of("warning"))
    extend = search.extend(0, 2)
    assert extend.wait(2.5) is None
    assert search.resume(0).wait(30.0)
    effect = extend.wait(60.0)
    assert effect is not None and effect.applied and effect.text.startswith("5 chunks")
    lives.finish()
    found = result(storage)[0]
    assert (found["state"], len(found["values"])) == ("COMPLETE", 5)


@long
def test_a_workers_own_process_pauses_what_another_trains(tmp_path: Path, storage: str) -> None:
    options: dict[str, Any] = {"n_trials": 2, "slots": 1}
    trains = Process(tmp_path, storage, name="trains", step_s=1.0, **options)
    trains.wait_for(of("step", trial=0))
    pauses = Process(tmp_path, storage, name="pauses", step_s=0.5, pauses=0, **options)
    pauses.wait_for(of("answered"))
    (answered,) = pauses.of_kind("answered")
    assert answered["data"]["text"].startswith(PAUSED)
    assert done_by(trains) == [("pause", 0, "applied")]
    assert f"process {pauses.pid}" in trains.of_kind("command")[0]["data"]["source"]
    assert search_in(storage).resume(0).wait(30.0)
    pauses.finish()
    trains.finish()
    assert [trial["state"] for trial in result(storage).values()] == ["COMPLETE"] * 2
