"""One trial over several attempts: Optuna never hands a RUNNING trial out again, so what goes on is a new one.

A trial whose process has died is failed, and a WAITING one takes its place, with its parameters, attributes and
reported values. That is what Optuna's own `RetryHeartbeatStaleTrialCallback` does with the trials of a dead worker, in
the same system attributes, so both go on alike. A trial keeps its number in the records, the events, the folders and
for the policy: that of its first attempt, or what `label` has given it, since Optuna's own numbers have gaps then.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

NUMBER_ATTR = "rapidfire:number"
"""The trial attribute that holds its number where that is not Optuna's."""
COMMAND_ATTR = "rapidfire:command"
"""The trial attribute that holds the id of the command that has asked for it."""
PLACE_ATTR = "rapidfire:place"
"""The trial attribute that holds which of the trials a search is to have it is."""
VECTORS_ATTR = "rapidfire:vectors"
"""The trial attribute that holds its vectors, one a chunk, where there are several objectives."""
TOKEN_ATTR = "rapidfire:token"
"""The system attribute that tells a trial from another one like it."""
_HISTORY = "retry_history"
_FIRST = "failed_trial"


def number_of(trial: optuna.trial.BaseTrial | FrozenTrial) -> int:
    """A trial's number, the same in all attempts."""
    label = trial.user_attrs.get(NUMBER_ATTR)
    if label is not None:
        return int(label)
    history = history_of(trial)
    return history[0] if history else trial.number


def attempt_of(trial: optuna.trial.BaseTrial | FrozenTrial) -> int:
    """Which attempt this is, from 1."""
    return 1 + len(history_of(trial))


def history_of(trial: optuna.trial.BaseTrial | FrozenTrial) -> list[int]:
    """Optuna's numbers of the attempts before this one."""
    if isinstance(trial, optuna.Trial):
        attrs = trial.storage.get_trial_system_attrs(trial._trial_id)
    else:
        attrs = getattr(trial, "system_attrs", {})
    return list(attrs.get(_HISTORY) or [])


def label(study: optuna.Study, trial: optuna.Trial | FrozenTrial) -> int:
    """Give a new or queued trial its place among all trials, whatever number of attempts the others took.

    Returns:
        Its number; Optuna's own in a study without second attempts.
    """
    if history_of(trial):
        return number_of(trial)
    earlier = [other for other in counted(study.get_trials(deepcopy=False)) if other.number < trial.number]
    number = sum(not history_of(other) for other in earlier)
    if isinstance(trial, optuna.Trial):
        if number != trial.number:
            trial.set_user_attr(NUMBER_ATTR, number)
    elif number != trial.number:
        study._storage.set_trial_user_attr(trial._trial_id, NUMBER_ATTR, number)
    return number


def counted(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Trials in the order of Optuna's numbers, without doubles.

    Two processes may put a new attempt in a dead one's place at the same moment, do the same command, or queue what a
    search is to have, and one that lost its connection can't know whether its trial was made. Of several that follow
    the same attempt, or have the same place, command or call, the first counts; which that is every process sees alike,
    since numbers only grow.
    """
    seen: set[tuple[str, object]] = set()
    numbers: set[int] = set()
    found = []
    for trial in sorted(trials, key=lambda trial: trial.number):
        history = history_of(trial)
        keys: list[tuple[str, object]] = []
        if history:
            keys.append((_HISTORY, history[-1]))
        else:
            keys += [(name, trial.user_attrs[name]) for name in (COMMAND_ATTR, PLACE_ATTR) if name in trial.user_attrs]
        if TOKEN_ATTR in trial.system_attrs:
            keys.append((TOKEN_ATTR, trial.system_attrs[TOKEN_ATTR]))
        if seen.isdisjoint(keys) and (not history or history[-1] in numbers):
            numbers.add(trial.number)
            found.append(trial)
        seen.update(keys)
    return found


def last_attempts(study: optuna.Study) -> dict[int, FrozenTrial]:
    """The last attempt at each trial, by the trial's number."""
    last: dict[int, FrozenTrial] = {}
    for trial in counted(study.get_trials(deepcopy=False)):
        last[number_of(trial)] = trial
    return dict(sorted(last.items()))


def retry(study: optuna.Study, trial: FrozenTrial, *, inherit: bool = True) -> FrozenTrial | None:
    """Fail a trial whose process is gone and put a new attempt in its place.

    Args:
        study: Its study.
        trial: A RUNNING trial.
        inherit: See `again`.

    Returns:
        The WAITING attempt; None if somebody else was faster.
    """
    storage = study._storage
    try:
        if not storage.set_trial_state_values(trial._trial_id, state=OptunaState.FAIL):
            return None
    except optuna.exceptions.UpdateFinishedTrialError:
        return None
    return again(study, trial, inherit=inherit)


def again(study: optuna.Study, trial: FrozenTrial, *, inherit: bool = True) -> FrozenTrial:
    """A new, WAITING attempt at a trial that has failed.

    Args:
        study: Its study.
        trial: The last attempt.
        inherit: Whether it has the same parameters; else all are proposed again, as where only some had been.
    """
    attrs = copy.deepcopy(trial.system_attrs)
    attrs.setdefault(_FIRST, trial.number)
    attrs[_HISTORY] = [*(attrs.get(_HISTORY) or []), trial.number]
    attempt = optuna.create_trial(
        state=OptunaState.WAITING,
        params=dict(trial.params) if inherit else {},
        distributions=dict(trial.distributions) if inherit else {},
        user_attrs=copy.deepcopy(trial.user_attrs),
        system_attrs=attrs,
        intermediate_values=dict(trial.intermediate_values),
    )
    trial_id = study._storage.create_new_trial(study._study_id, template_trial=attempt)
    return study._storage.get_trial(trial_id)


def take(study: optuna.Study, trial: FrozenTrial) -> optuna.Trial | None:
    """Begin a WAITING trial; None if somebody else has."""
    storage = study._storage
    try:
        if not storage.set_trial_state_values(trial._trial_id, state=OptunaState.RUNNING):
            return None
    except optuna.exceptions.UpdateFinishedTrialError:
        return None
    return optuna.Trial(study, trial._trial_id)
