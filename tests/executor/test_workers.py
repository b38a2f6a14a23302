"""Several workers on one study: real processes and signals, SQLite and a real PostgreSQL server."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rapidfire_automl import Search
from rapidfire_automl.workers import MOST_DEATHS
from tests import postgres
from tests.executor.working import Process, of, result

pytestmark = [pytest.mark.slow, pytest.mark.faults]

ALL = bool(os.environ.get("RAPIDFIRE_FAULTS"))
AWAY_S = 10.0 if ALL else 3.0
KILLS = ["step=kill@9"]
if ALL:
    KILLS += ["worker.claimed=kill@2", "round.reported=kill@2", "round.judged=kill@1", "trial.ended=kill@1"]
    KILLS += ["checkpoint.renaming=kill@2", "worker.beat=kill@2"]


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    with postgres.server() as one:
        yield one


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What one worker comes to by itself."""
    folder = tmp_path_factory.mktemp("alone")
    storage = f"sqlite:///{folder / 'study.db'}"
    Process(folder, storage, slots=4).finish()
    return result(storage)


def adapters(found: dict[int, dict[str, Any]]) -> dict[int, str]:
    return {
        number: hashlib.sha256((Path(trial["adapter"]) / "adapter_model.safetensors").read_bytes()).hexdigest()
        for number, trial in found.items()
    }


def same(found: dict[int, dict[str, Any]], alone: dict[int, dict[str, Any]], trials: tuple[int, ...]) -> None:
    """What does not depend on which proposals came first is bit by bit what one worker comes to."""
    for number in trials:
        for name in ("params", "values", "value"):
            assert found[number][name] == alone[number][name], number
        assert adapters({0: found[number]}) == adapters({0: alone[number]})


def counted_once(*workers: Process) -> None:
    """Every trial has ended once, in one worker."""
    ended = Counter(event["trial"] for worker in workers for event in worker.of_kind("trial_ended"))
    assert set(ended.values()) == {1}, ended


@pytest.mark.parametrize("where", KILLS)
def test_a_killed_workers_trials_are_taken_over(alone: dict[int, dict[str, Any]], tmp_path: Path, where: str) -> None:
    """Two processes on one SQLite file; nothing of "database is locked" is heard of."""
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    inherited = tmp_path / "clones" / "a-command"
    inherited.mkdir(parents=True)
    dies = Process(tmp_path, storage, where, name="dies", step_s=0.1)
    lives = Process(tmp_path, storage, name="lives", step_s=0.1)
    dies.killed()
    lives.finish()
    found = result(storage)
    assert [trial["state"] for trial in found.values()] == ["COMPLETE"] * 4
    assert {trial["attempt"] for trial in found.values()} == {1, 2}
    same(found, alone, (0, 1))
    assert "locked" not in dies.err + lives.err
    assert not inherited.exists()
    assert all(event["data"]["attempt"] == 2 for event in lives.of_kind("trial_resumed"))


@pytest.mark.skipif(not ALL, reason="`make test-faults` runs it: a minute")
def test_trials_that_kill_every_worker_are_given_up(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    for number in range(MOST_DEATHS):
        Process(tmp_path, storage, "step=kill@2", name=f"victim-{number}", n_trials=2).killed()
    last = Process(tmp_path, storage, name="last", n_trials=2)
    last.finish()
    assert sorted(event["data"]["of"] for event in last.of_kind("trial_given_up")) == [0, 1]
    assert not last.of_kind("trial_ended")
    assert [(trial["state"], trial["attempt"]) for trial in result(storage).values()] == [("FAIL", MOST_DEATHS)] * 2


def test_a_killed_workers_trials_are_judged_once(alone: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    """A rule that stops: each verdict stands once, whoever was first, and the best of those judged is never stopped."""
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    options: dict[str, Any] = {"policy": "asha", "n_trials": 6, "step_s": 0.1}
    dies = Process(tmp_path, storage, "step=kill@9", name="dies", **options)
    lives = Process(tmp_path, storage, name="lives", **options)
    dies.killed()
    lives.finish()
    found = result(storage)
    counted_once(dies, lives)
    assert len(found) == 6 and {trial["state"] for trial in found.values()} == {"COMPLETE", "PRUNED"}
    assert max(trial["attempt"] for trial in found.values()) == 2
    for number, trial in found.items():
        chunks, stops = len(trial["values"]), [one for one in trial["verdicts"] if one[1] == "stop"]
        assert trial["value"] == trial["values"][-1]
        if trial["state"] == "COMPLETE":
            assert (chunks, stops) == (3, [])
            continue
        assert [chunk for chunk, _, _ in stops] == [chunks] and chunks < 3
        others = [other["values"][chunks - 1] for other in found.values() if len(other["values"]) >= chunks]
        assert min(others) < trial["value"], number
    for number in (0, 1):
        trained = found[number]["values"]
        assert found[number]["params"] == alone[number]["params"]
        assert trained == alone[number]["values"][: len(trained)]


def stands_still(task: Path) -> bool:
    """Whether SIGSTOP has come to a thread, or it has ended."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return True


def freeze(worker: Process, database: Path) -> None:
    """SIGSTOP, but not while it has a lock on SQLite's file, which would stop everybody until it thaws."""
    for _ in range(100):
        worker.send(signal.SIGSTOP)
        worker.until(lambda: all(stands_still(task) for task in Path(f"/proc/{worker.pid}/task").iterdir()))
        if not database.exists():  # a server takes locks from who is silent
            return
        try:
            with sqlite3.connect(database, timeout=0.1, isolation_level=None) as connection:
                connection.execute("BEGIN EXCLUSIVE")
                connection.execute("ROLLBACK")
            return
        except sqlite3.OperationalError:
            worker.send(signal.SIGCONT)
            time.sleep(0.05)
    raise AssertionError("it always has a lock")


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_frozen_worker_does_not_count_twice_when_it_thaws(
    request: pytest.FixtureRequest, alone: dict[int, dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    on_server = kind == "postgresql"
    storage = request.getfixturevalue("server").fresh() if on_server else f"sqlite:///{tmp_path / 'study.db'}"
    frozen = Process(tmp_path, storage, name="frozen", step_s=0.1)
    frozen.wait_for(of("chunk_done"))
    freeze(frozen, tmp_path / "study.db")
    lives = Process(tmp_path, storage, name="lives")
    lives.wait_for(of("chunk_done", trial=0))
    frozen.send(signal.SIGCONT)
    frozen.finish()
    lives.finish()
    found = result(storage)
    assert [trial["state"] for trial in found.values()] == ["COMPLETE"] * 4
    assert (found[0]["attempt"], found[1]["attempt"]) == (2, 2)
    lost = {event["trial"] for event in frozen.of_kind("trial_lost")}
    assert lost == {0, 1}
    assert not lost & {event["trial"] for event in frozen.of_kind("trial_ended")}
    counted_once(frozen, lives)
    same(found, alone, (0, 1))
    assert {Path(found[number]["adapter"]).name for number in lost} == {"adapter-2"}
    assert not (tmp_path / "trials" / "0" / "adapter").exists()


def test_commands_reach_whoever_has_the_trial_and_are_done_once(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    a, b = [Process(tmp_path, storage, name=name, step_s=0.2) for name in ("a", "b")]
    for worker in (a, b):
        worker.wait_for(of("step"))
    of_a, of_b = [worker.of_kind("step")[0]["trial"] for worker in (a, b)]
    search = Search(study="search", storage=storage)
    sent = [search.pause(of_a), search.stop(of_b), search.add({"lr": 0.01})]
    assert [effect and effect.state for effect in (one.wait(20.0) for one in sent)] == ["applied"] * 3
    done = [{event["data"]["verb"] for event in worker.of_kind("command")} - {"add"} for worker in (a, b)]
    assert done == [{"pause"}, {"stop"}]
    b.send(signal.SIGTERM)  # what it has is taken up at once, not after the grace period
    assert b.wait() == 128 + signal.SIGTERM
    a.wait_for(of("trial_resumed"))
    last = search.cancel()
    assert last.wait(20.0) is not None
    a.finish()
    found = result(storage)
    assert set(found) == {0, 1, 2, 3, 4}
    assert found[of_b]["state"] == "PRUNED"


def test_who_was_resumed_by_hand_goes_on_with_another_worker(tmp_path: Path) -> None:
    """It had waited for a slot when its worker died: nothing is left to wait for."""
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    dies = Process(tmp_path, storage, name="dies", slots=1, n_trials=2, step_s=0.2)
    dies.wait_for(of("step", trial=0))
    search = Search(study="search", storage=storage)
    assert search.pause(0).wait(20.0)
    dies.wait_for(of("step", trial=1))
    effect = search.resume(0).wait(20.0)
    assert effect and effect.text.startswith("goes on when a slot is free")
    dies.send(signal.SIGKILL)
    dies.killed()
    lives = Process(tmp_path, storage, name="lives", slots=1, n_trials=2)
    lives.finish()
    assert [trial["state"] for trial in result(storage).values()] == ["COMPLETE"] * 2
    assert not [event for event in lives.of_kind("warning") if "paused by hand" in event["data"]["message"]]
    counted_once(dies, lives)


def test_the_server_is_away_while_two_workers_are_at_work(server: postgres.Server, tmp_path: Path) -> None:
    """Nobody takes anything over, nothing is done twice, and the screen says what is waited for."""
    workers = [Process(tmp_path, server.url(), name=name, step_s=0.1) for name in ("a", "b")]
    for worker in workers:
        worker.wait_for(of("chunk_done"))
    server.stop()
    time.sleep(AWAY_S)
    server.start()
    for worker in workers:
        worker.finish()
    found = result(server.url())
    assert [(trial["state"], trial["attempt"]) for trial in found.values()] == [("COMPLETE", 1)] * 4
    assert len({trial["worker"] for trial in found.values()}) == 2
    counted_once(*workers)
    assert any(worker.of_kind("storage_back") for worker in workers), (
        "who asked it nothing meanwhile has nothing to say"
    )
    assert "a-secret" not in "".join(worker.out + worker.err for worker in workers)
