"""Who has which trial: budgets, claims, and doubles; two processes on one SQLite file."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from rapidfire_automl import attempts, workers
from rapidfire_automl.cli.view import SearchView
from rapidfire_automl.event_log import read_events
from rapidfire_automl.events import Event
from rapidfire_automl.storages import open_storage
from rapidfire_automl.stories import why
from tests import postgres
from tests.executor.forking import Forked

N_TRIALS, N_RACED = 12, 80


def study_in(path: str, heartbeat_s: int | None = 1, grace_s: int = 3) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = open_storage(path, heartbeat_s=heartbeat_s, grace_s=None if heartbeat_s is None else grace_s)
    return optuna.create_study(study_name="s", storage=storage, load_if_exists=True)


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return study_in(str(tmp_path / "study.db"))


def test_a_number_that_no_process_can_have_is_not_known_to_be_gone() -> None:
    here = workers.Worker.here().to_json(0)
    assert not workers.is_gone(here)
    assert not workers.is_gone({**here, "pid": 2**70})


def leave_one_behind(study: optuna.Study) -> None:
    """A trial whose worker is a process of this machine that is no more."""
    worker, gone = workers.Worker.here(), Forked(int)
    gone.wait()
    workers.fill(study, 1)
    dead = workers.claim(study, workers.claimable(study)[0], worker)
    assert dead is not None
    dead.set_user_attr(workers.WORKER_ATTR, {**worker.to_json(dead.number), "pid": gone.pid})


def work(path: str) -> list[int]:
    """Fill the study and take what one can; the numbers of the trials."""
    study, worker = study_in(path), workers.Worker.here()
    workers.fill(study, N_TRIALS)
    mine = []
    while waiting := workers.claimable(study):
        trial = workers.claim(study, waiting[0], worker)
        if trial is not None:
            trial.suggest_float("x", 0.0, 1.0)
            trial.report(1.0, step=1)
            mine.append(attempts.label(study, trial))
            study.tell(trial, 1.0)
    return mine


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'study.db'}"
    else:
        with postgres.server() as server:
            yield server.url()


def test_workers_that_join_at_once_agree(url: str, tmp_path: Path) -> None:
    """On the search's name, what proposals are drawn from and whose folder it is, whoever was first."""
    from rapidfire_automl.executor.durability import Durability
    from rapidfire_automl.executor.ledger import FACTS_ATTR, Ledger

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storages = [open_storage(url, heartbeat_s=1, grace_s=3) for _ in range(4)]
    together = threading.Barrier(len(storages))

    def join(name: str, storage: Any) -> tuple[str, int]:
        study = optuna.load_study(study_name=name, storage=storage)
        durability = Durability(tmp_path / name, lambda *_, **data: None, Ledger(study))
        together.wait(30.0)
        durability.join({"base": "a base"})
        return (tmp_path / name / "study.txt").read_text(), durability.sampler_seed

    with ThreadPoolExecutor(len(storages)) as threads:
        for name in map(str, range(15)):
            study = optuna.create_study(study_name=name, storage=storages[0])
            said = {one.result() for one in [threads.submit(join, name, storage) for storage in storages]}
            told = study.user_attrs[FACTS_ATTR]
            assert said == {(told["search"], told["sampler_seed"])}


@pytest.mark.slow
def test_two_processes_on_one_sqlite_file_share_a_budget(tmp_path: Path) -> None:
    """Both fill it, both take from it; nothing is taken twice, and no lock is heard of."""
    path = str(tmp_path / "study.db")
    both = [Forked(work, path) for _ in range(2)]
    taken = [one.result() for one in both]
    assert sorted([*taken[0], *taken[1]]) == list(range(N_TRIALS))
    assert all("locked" not in one.err for one in both)


def take(path: str) -> list[int]:
    """Take what one can as soon as another is about to; the numbers of the trials."""
    study, worker = study_in(path, heartbeat_s=60, grace_s=600), workers.Worker.here()
    workers.fill(study, N_RACED)
    Path(f"{path}.{worker.name}").touch()
    while len(list(Path(path).parent.glob(f"{Path(path).name}.*"))) < 2:
        time.sleep(0.001)
    mine = []
    while waiting := workers.claimable(study):
        trial = workers.claim(study, waiting[0], worker)
        if trial is not None:
            mine.append(trial.number)
    return mine


@pytest.mark.slow
def test_nothing_is_taken_twice_however_they_race(tmp_path: Path) -> None:
    """Both always want the same one. SQLite by itself would let both read that it waits before either takes it."""
    both = [Forked(take, str(tmp_path / "study.db")) for _ in range(2)]
    taken = [number for one in both for number in one.result()]
    assert len(taken) == len(set(taken)) >= N_RACED


def test_a_budget_is_topped_up_and_numbers_have_no_gaps(study: optuna.Study) -> None:
    worker = workers.Worker.here()
    workers.fill(study, 2, [{"x": 0.25}])
    first = workers.claim(study, workers.claimable(study)[0], worker)
    assert first is not None
    assert first.suggest_float("x", 0.0, 1.0) == 0.25
    workers.hand_back(study, first)
    workers.fill(study, 3)
    workers.fill(study, 3)
    assert [attempts.number_of(trial) for trial in workers.claimable(study)] == [0, 1, 2]
    assert attempts.attempt_of(workers.claimable(study)[0]) == 2


def test_of_doubles_the_first_counts_for_everybody(study: optuna.Study) -> None:
    """Two workers have found the same trial orphaned, and queued the same command."""
    trial = study.ask()
    study.tell(trial, state=TrialState.FAIL)
    failed = study.get_trials()[0]
    second, _ = attempts.again(study, failed), attempts.again(study, failed)
    for _ in range(2):
        study.enqueue_trial({}, user_attrs={attempts.COMMAND_ATTR: "c1"})
    assert [one.number for one in attempts.counted(study.get_trials())] == [0, second.number, 3]
    assert {n: one.number for n, one in attempts.last_attempts(study).items()} == {0: 1, 3: 3}
    assert len(workers.claimable(study)) == 2


def test_the_dead_and_the_orphaned_are_found_and_those_that_have_ended_are_not(study: optuna.Study) -> None:
    worker = workers.Worker.here()
    workers.fill(study, 4)
    dead, orphan, ended, lives = [
        workers.claim(study, trial, worker) for trial in workers.claimable(study)
    ]  # fmt: skip
    assert dead and orphan and ended and lives
    gone = Forked(int)
    gone.wait()
    dead.set_user_attr(workers.WORKER_ATTR, {**worker.to_json(dead.number), "pid": gone.pid})
    study.tell(orphan, state=TrialState.FAIL)  # whoever has failed it did not come to queue it again
    ended.set_user_attr(workers.LEDGER_ATTR, {"ended": {"outcome": "failed"}})
    study.tell(ended, state=TrialState.FAIL)
    storage: Any = study._storage
    storage.record_heartbeat(lives._trial_id)
    assert sorted(workers.reap(study, ())) == [0, 1]
    assert workers.reap(study, ()) == []
    assert [(t.state.name, attempts.attempt_of(t)) for t in attempts.last_attempts(study).values()] == [
        ("WAITING", 2),
        ("WAITING", 2),
        ("FAIL", 1),
        ("RUNNING", 1),
    ]


def test_who_comes_too_late_for_a_trial_leaves_no_trace_on_it(study: optuna.Study) -> None:
    """Else it would be taken from its worker as soon as the late one has gone."""
    first, late = workers.Worker.here(), workers.Worker.here()
    workers.fill(study, 1)
    [waiting] = workers.claimable(study)
    assert workers.claim(study, waiting, first)
    assert workers.claim(study, waiting, late) is None
    assert workers.name_of(study.trials[0].user_attrs[workers.WORKER_ATTR]) == first.name


def test_a_new_attempt_is_not_taken_for_left_by_the_worker_of_the_one_before(study: optuna.Study) -> None:
    leave_one_behind(study)
    assert workers.reap(study, ()) == [0]
    [waiting] = workers.claimable(study)
    study._storage.record_heartbeat(waiting._trial_id)  # type: ignore[attr-defined]
    assert attempts.take(study, waiting), "taken, and about to say by whom"
    assert workers.reap(study, ()) == []


def test_a_trial_that_is_about_to_be_queued_again_is_waited_for(study: optuna.Study, tmp_path: Path) -> None:
    """Whoever takes trials from the dead fails them first: another worker's look may fall in between."""
    from rapidfire_automl.executor.crew import Crew

    worker = workers.Worker.here()
    workers.fill(study, 1)
    [waiting] = workers.claimable(study)
    crew = Crew(study, worker, {}, lambda number: tmp_path, lambda *args, **data: None, lambda reason: None)
    assert len(crew.claimable()) == 1
    trial = workers.claim(study, waiting, worker)
    assert trial is not None
    study.tell(trial, state=TrialState.FAIL)
    assert crew.claimable() == []
    assert (crew.others, crew.training) == (1, 1)
    assert workers.are_left(study)
    assert workers.reap(study, ()) == [0]
    assert len(crew.claimable()) == 1
    ended = workers.claim(study, workers.claimable(study)[0], worker)
    assert ended is not None
    ended.set_user_attr(workers.LEDGER_ATTR, {"ended": {"outcome": "failed"}})
    study.tell(ended, state=TrialState.FAIL)
    assert crew.claimable() == []
    assert (crew.others, crew.training) == (0, 0)
    assert not workers.are_left(study)


def test_a_trial_that_is_queued_again_between_two_looks_is_left(
    study: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trained at the first look, for what waits, and waits at the second, for what trains."""
    from rapidfire_automl.executor.crew import Crew

    leave_one_behind(study)
    look = study.get_trials

    def then_it_is_queued(*given: Any, **options: Any) -> Any:
        found = look(*given, **options)
        monkeypatch.setattr(study, "get_trials", look)
        assert workers.reap(study, ()) == [0]
        return found

    monkeypatch.setattr(study, "get_trials", then_it_is_queued)
    crew = Crew(
        study, workers.Worker.here(), {}, lambda number: tmp_path, lambda *args, **data: None, lambda reason: None
    )
    assert crew.claimable() == []
    assert (crew.left, crew.others) == (1, 0)
    assert len(crew.claimable()) == 1


def test_a_trial_that_kills_worker_after_worker_is_given_up(study: optuna.Study) -> None:
    """One that gets on in between is not, nor is one that was left to others alive; each died as often."""
    worker, gone = workers.Worker.here(), Forked(int)
    gone.wait()
    workers.fill(study, 3)
    for attempt in range(workers.MOST_DEATHS):
        assert workers.give_up(study, ()) == {}
        workers.reap(study, ())
        for waiting in workers.claimable(study):
            trial = workers.claim(study, waiting, worker)
            assert trial is not None
            number = attempts.number_of(trial)
            if number == 1 and attempt == 2:
                trial.report(0.5, step=1)
            trial.set_user_attr(workers.WORKER_ATTR, {**worker.to_json(trial.number), "pid": gone.pid})
            if number == 2 and attempt == 2:
                workers.hand_back(study, trial)
    mine = {one._trial_id for one in study.trials}
    assert workers.give_up(study, mine) == {}
    given_up = workers.give_up(study, ())
    assert list(given_up) == [0]
    assert workers.give_up(study, ()) == {}
    assert sorted(workers.reap(study, ())) == [1, 2]
    last = attempts.last_attempts(study)
    assert [last[number].state.name for number in range(3)] == ["FAIL", "WAITING", "WAITING"]
    assert last[0].user_attrs["rapidfire:error"] == given_up[0]
    assert (workers.ended(last[0]) or {})["reason"] == given_up[0]


def test_a_storage_without_a_heartbeat_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"open it with `rapidfire_automl\.open_storage"):
        workers.rhythm(study_in(str(tmp_path / "study.db"), heartbeat_s=None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hasty = optuna.storages.RDBStorage("sqlite:///:memory:", heartbeat_interval=10, grace_period=11)
    with pytest.raises(ValueError, match="at least twice"):
        workers.rhythm(optuna.create_study(storage=hasty))


def test_the_events_of_several_workers_make_one_story(tmp_path: Path) -> None:
    """A worker that was frozen says something of a trial that others have by then: it does not count."""
    told = [
        ("a", 1, "search_started", None, {"study": "s", "chunks": 2, "direction": "minimize"}),
        ("b", 2, "search_started", None, {"study": "s", "chunks": 2, "direction": "minimize"}),
        ("a", 3, "trial_started", 0, {"params": {}}),
        ("a", 4, "chunk_done", 0, {"value": 3.0}),
        ("b", 5, "trial_resumed", 0, {"params": {}, "attempt": 2}),
        ("b", 6, "chunk_done", 0, {"value": 2.0}),
        ("b", 7, "trial_ended", 0, {"state": "complete", "value": 2.0, "reason": "trained to the end"}),
        ("a", 8, "verdict", 0, {"verdict": "stop", "reason": "too late"}),
        ("a", 9, "search_ended", None, {"status": "complete"}),
        ("b", 10, "trial_started", 1, {"params": {}}),
        ("a", 11, "trial_given_up", None, {"of": 1, "reason": "given up: its workers died"}),
    ]
    for worker, at, kind, trial, data in told:
        folder = tmp_path / "workers" / worker
        folder.mkdir(parents=True, exist_ok=True)
        line = {"seq": at, "time": f"2026-01-01T00:00:{at:02}+00:00", "kind": kind, "trial": trial, "data": data}
        with (folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    assert [line.worker for line in read_events(tmp_path).lines] == [worker for worker, *_ in told]
    story = why(0, tmp_path)
    assert "is complete" in story and "attempt 2" in story
    assert why(1, tmp_path).startswith("Trial 1 failed before its first chunk was done: given up: its workers died.")


def test_the_table_shows_who_has_which_trial() -> None:
    from rich.console import Console

    from rapidfire_automl.cli.display import table

    view = SearchView(2, 2)
    view(Event("trial_started", 1.0, 0, 0, {"params": {"r": 4}, "boundaries": [1, 2]}))
    other = {"of": 1, "worker": "host-7-ab", "state": "running", "chunk": 1, "value": 2.5, "params": {"r": 8}}
    view(Event("elsewhere", 2.0, data=other))
    console = Console(width=120, record=True, file=None)
    with console.capture() as captured:
        console.print(table(view, view.rows.values()))
    first, second = captured.get().splitlines()[1:3]
    assert "this one" in first and "host-7-ab" in second and "2.5" in second
    view(Event("trial_lost", 3.0, 0, 1, {"worker": "host-7-ab"}))
    assert "taken over by host-7-ab" in view.warnings[-1]
