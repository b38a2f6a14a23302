"""A trial that goes on in another attempt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from rapidfire_automl import attempts


def storage(kind: str, folder: Path) -> Any:
    if kind == "journal":
        return optuna.storages.JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    return None if kind == "memory" else f"sqlite:///{folder / 'study.db'}"


@pytest.fixture(params=["memory", "sqlite", "journal"])
def study(request: pytest.FixtureRequest, tmp_path: Path) -> optuna.Study:
    return optuna.create_study(storage=storage(request.param, tmp_path), study_name="s")


def begin(study: optuna.Study) -> optuna.Trial:
    trial = study.ask()
    trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
    trial.suggest_categorical("r", [4, 8])
    trial.report(3.0, step=1)
    trial.set_user_attr("kept", 7)
    return trial


def frozen(study: optuna.Study, number: int) -> Any:
    return study.get_trials()[number]


def test_a_new_attempt_has_all_of_the_old_one(study: optuna.Study) -> None:
    first = begin(study)
    begin(study)
    waiting = attempts.retry(study, frozen(study, 0))
    assert waiting is not None
    second = attempts.take(study, waiting)
    assert second is not None
    assert (second.number, attempts.number_of(second), attempts.attempt_of(second)) == (2, 0, 2)
    assert second.params == first.params
    assert second.suggest_float("learning_rate", 1e-5, 1e-2, log=True) == first.params["learning_rate"]
    assert second.user_attrs["kept"] == 7
    second.report(2.0, step=2)
    assert frozen(study, 2).intermediate_values == {1: 3.0, 2: 2.0}
    study.tell(second, 2.0)
    last = attempts.last_attempts(study)
    assert {number: trial.number for number, trial in last.items()} == {0: 2, 1: 1}
    assert frozen(study, 0).state is TrialState.FAIL
    assert [attempts.number_of(trial) for trial in attempts.finished(study)] == [0]


def test_a_third_attempt_is_still_the_first_trial(study: optuna.Study) -> None:
    begin(study)
    for expected in (2, 3):
        waiting = attempts.retry(study, attempts.last_attempts(study)[0])
        assert waiting is not None
        again = attempts.take(study, waiting)
        assert again is not None
        assert (attempts.number_of(again), attempts.attempt_of(again)) == (0, expected)


def test_only_one_is_faster(study: optuna.Study) -> None:
    begin(study)
    stale = frozen(study, 0)
    waiting = attempts.retry(study, stale)
    assert attempts.retry(study, stale) is None
    assert waiting is not None
    assert attempts.take(study, waiting) is not None
    assert attempts.take(study, waiting) is None
    assert len(study.trials) == 2


def test_the_storages_own_retry_is_an_attempt_too(study: optuna.Study) -> None:
    begin(study)
    study.tell(0, state=TrialState.FAIL)
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        callback = RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)
    callback(study, frozen(study, 0))
    second = study.ask()
    assert (second.number, attempts.number_of(second), attempts.attempt_of(second)) == (1, 0, 2)
    waiting = attempts.retry(study, frozen(study, 1))
    assert waiting is not None
    assert (attempts.number_of(waiting), attempts.attempt_of(waiting)) == (0, 3)
