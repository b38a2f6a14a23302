"""Commands for trials that this worker does not have: left to whoever has them, or takes them over. No training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from rapidfire_automl import attempts
from rapidfire_automl.control import Command, Effect
from rapidfire_automl.executor.commands import Commands
from rapidfire_automl.executor.keeping import Keeping
from rapidfire_automl.executor.sources import Arrivals, Claims
from rapidfire_automl.mailboxes import StudyMailbox
from rapidfire_automl.records import TrialRecord
from rapidfire_automl.workers import LEDGER_ATTR
from rapidfire_policies import TrialState as State

NEW, TRAINS, WAITS, ORPHAN, DONE, FAILED, STOPPED = range(7)


def open_study(folder: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(study_name="s", storage=f"sqlite:///{folder / 'study.db'}", load_if_exists=True)


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    """Trials of all kinds; their numbers are the names above."""
    study = open_study(tmp_path)
    ended = {"ended": {"outcome": "failed"}}
    for state, attrs in (
        (TrialState.WAITING, {}),
        (TrialState.RUNNING, {}),
        (TrialState.RUNNING, {}),
        (TrialState.FAIL, {}),
        (TrialState.COMPLETE, {}),
        (TrialState.FAIL, {LEDGER_ATTR: ended}),
        (TrialState.PRUNED, {LEDGER_ATTR: {"commands": {"known": "stopped, at step 3"}}}),
    ):
        value = 1.0 if state is TrialState.COMPLETE else None
        study.add_trial(optuna.create_trial(state=state, value=value, user_attrs=attrs))
    attempts.retry(study, study.trials[WAITS])
    return study


class Worker:
    """One worker's commands, and what it has looked up in the study."""

    def __init__(self, study: optuna.Study) -> None:
        crew: Any = None
        # What this worker last knew of trials that it has lost, or that were failed with their workers.
        records = {number: TrialRecord(number, state=State.FAILED) for number in (TRAINS, WAITS, ORPHAN)}
        self.told: list[dict[str, Any]] = []
        self.commands = Commands(records, 3, lambda kind, arm, **data: self.told.append(data), lambda: None)
        self.commands.begin(study, Claims(crew, lambda trial: None, None), Keeping(None))
        self.box = self.commands._boxes[-1]
        assert isinstance(self.box, StudyMailbox)
        self.box._every_s = 0.0

    def look(self) -> None:
        self.commands.turn([])


@pytest.fixture
def worker(study: optuna.Study) -> Worker:
    return Worker(study)


@pytest.fixture
def other(study: optuna.Study, tmp_path: Path) -> StudyMailbox:
    """Where another worker takes and answers commands."""
    box = StudyMailbox(open_study(tmp_path), every_s=0.0, shared=True)
    box.open()
    return box


def from_outside(worker: Worker, folder: Path) -> Callable[[Command], Any]:
    return StudyMailbox(open_study(folder)).send


def from_this_process(worker: Worker, folder: Path) -> Callable[[Command], Any]:
    return worker.commands.send


@pytest.fixture(params=[from_outside, from_this_process])
def send(request: pytest.FixtureRequest, worker: Worker, tmp_path: Path) -> Any:
    send: Any = request.param(worker, tmp_path)
    return send


@pytest.mark.parametrize("trial", [TRAINS, WAITS, ORPHAN])
@pytest.mark.parametrize("verb", ["pause", "resume", "stop"])
def test_a_command_is_left_to_whoever_has_its_trial_or_takes_it_over(
    worker: Worker, other: StudyMailbox, send: Any, trial: int, verb: str
) -> None:
    sent = send(Command(verb, trial))
    for _ in range(3):
        worker.look()
    assert sent.effect is None and not worker.told
    (command,) = other.take()
    assert (command.id, command.verb, command.trial) == (sent.command.id, verb, trial)
    other.answer(command, Effect("applied", "done"))
    worker.look()
    effect = sent.effect
    assert (effect.state, effect.text) == ("applied", "done")
    assert not worker.told, "who has done it logs it"


@pytest.mark.parametrize(
    ("trial", "why"),
    [(NEW, "has not begun"), (DONE, "is complete"), (FAILED, "has failed"), (77, "is unknown: there are 0 to 6")],
)
def test_what_nobody_takes_over_is_refused(worker: Worker, send: Any, trial: int, why: str) -> None:
    sent = send(Command("pause", trial))
    worker.look()
    assert sent.effect.text == f"trial {trial} {why}"


def test_what_a_worker_has_done_and_not_answered_is_not_done_again(worker: Worker, send: Any) -> None:
    """It has died in between; another has taken its trial over."""
    sent = send(Command("stop", STOPPED, id="known"))
    worker.look()
    assert (sent.effect.state, sent.effect.text) == ("applied", "stopped, at step 3 (by another worker)")


def test_a_command_that_comes_by_two_ways_is_answered_by_both(
    worker: Worker, other: StudyMailbox, tmp_path: Path
) -> None:
    command = Command("pause", WAITS)
    both = [from_this_process(worker, tmp_path)(command)]
    worker.look()
    both.append(from_outside(worker, tmp_path)(command))
    worker.look()
    assert len(other.take()) == 1
    other.answer(command, Effect("applied", "done"))
    worker.look()
    assert [sent.effect and sent.effect.text for sent in both] == ["done"] * 2


def test_the_trials_are_read_once_at_a_look(
    worker: Worker, study: optuna.Study, send: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trial in (TRAINS, WAITS, ORPHAN) * 3:
        send(Command("pause", trial))
    worker.look()
    reads = []
    own = attempts.last_attempts
    monkeypatch.setattr(attempts, "last_attempts", lambda study: reads.append(1) or own(study))
    worker.look()
    assert len(reads) == 1
    assert isinstance(worker.box, StudyMailbox)
    worker.box._every_s = 60.0
    for _ in range(100):
        worker.look()
    assert len(reads) == 1, "between two looks at the study nothing is read"


def test_a_worker_that_leaves_answers_nothing_that_others_may_do(
    worker: Worker, other: StudyMailbox, send: Any
) -> None:
    sent = send(Command("pause", WAITS))
    worker.look()
    worker.commands.end("the search has ended")
    assert sent.effect is None
    assert [command.id for command in other.take()] == [sent.command.id]


def test_a_search_that_is_not_shared_says_where_the_trial_is(study: optuna.Study) -> None:
    """Its own process's commands, that is: another's are left alone."""
    commands = Commands({}, 3, lambda *_, **data: None, lambda: None)
    commands.begin(study, Arrivals(0.0, lambda: False), Keeping(None))
    mine, others = commands.send(Command("pause", TRAINS)), StudyMailbox(study).send(Command("pause", TRAINS))
    commands.turn([])
    assert mine.effect is not None and others.effect is None
    text = "trial 1 trains in another process: Search(study='s', storage=...) reaches it"
    assert (mine.effect.state, mine.effect.text) == ("refused", text)
