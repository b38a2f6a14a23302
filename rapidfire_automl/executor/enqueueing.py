"""Configurations somebody asks for while a search runs: checked, and queued in the study."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from rapidfire_automl import attempts
from rapidfire_automl.attempts import COMMAND_ATTR
from rapidfire_automl.control import ControlError
from rapidfire_automl.hints import nearest
from rapidfire_automl.limits import Limit, limit_of
from rapidfire_automl.tables import looks_numeric

CLONE_ATTR = "rapidfire:clone_of"
WARM_ATTR, ADD_ATTR = "rapidfire:warm_start", "rapidfire:added"
_SHAPES = (
    "r",
    "rank",
    "lora_r",
    "target_modules",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "model",
    "model_name",
)
"""Parameters, by the last part of their name, that a warm start can't bear a change of."""


def fit(
    changes: Mapping[str, Any],
    known: Mapping[str, BaseDistribution],
    who: str,
    *,
    strict: bool,
    source: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Values as the study's parameters have them.

    Args:
        changes: Name -> value; of a name the last part is enough where no other parameter ends so.
        known: The parameters.
        who: Has these parameters, for errors.
        strict: Whether other names are errors.
        source: Parameters that a value like "/2" or "*1.5" changes by that factor.

    Returns:
        The values, and notes on those outside the search space.

    Raises:
        ControlError: A name or value that can't be.
    """
    fitted: dict[str, Any] = {}
    notes = []
    for given, value in changes.items():
        ends = [name for name in known if name.rpartition(".")[2] == given]
        name = given if given in known or len(ends) != 1 else ends[0]
        if name not in known:
            if strict:
                near = nearest(given, known)
                hint = f" Did you mean `{near}`?" if near else ""
                raise ControlError(f"`{given}` is no parameter of {who}; it has {', '.join(known)}.{hint}")
            _check_possible(name, value, limit_of(name))
            fitted[name] = value
            continue
        if name in fitted:
            raise ControlError(f"`{name}` is given twice, as {fitted[name]} and as {value}. Leave one out.")
        before = None if source is None else source.get(name)
        if isinstance(value, str) and _is_number(before):
            value = before * factor if (factor := _factor(value)) else value
        fitted[name] = _value(name, value, known[name])
        if not _is_within(known[name], fitted[name]):
            low, high = getattr(known[name], "low", None), getattr(known[name], "high", None)
            notes.append(f"`{name}` = {fitted[name]} is outside the search space ({low} to {high})")
    return fitted, notes


def _value(name: str, value: Any, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        spelt = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        for choice in distribution.choices:
            if (choice == value and type(choice) is type(value)) or str(choice) == spelt:
                return choice
        raise ControlError(f"`{name}` must be one of {', '.join(map(str, distribution.choices))}, got {value!r}.")
    limit, whole = limit_of(name), isinstance(distribution, IntDistribution)
    if getattr(distribution, "log", False) and (limit is None or limit.least <= 0):  # Optuna itself can't take another
        limit = Limit(0, None if limit is None else limit.most, whole=whole, above=True)
    space = f" (the search space: {getattr(distribution, 'low', None)} to {getattr(distribution, 'high', None)})"
    if not _is_number(value) or not math.isfinite(value) or (whole and value != int(value)):
        wanted = str(limit or ("a whole number" if whole else "a number"))
        quotes = " Write it without quotes." if isinstance(value, str) and looks_numeric(value) else ""
        raise ControlError(f"`{name}` must be {wanted}{space}, got {value!r}.{quotes}")
    if not _is_within(distribution, value):
        _check_possible(name, value, limit, space)
    return int(value) if whole else float(value)


def _check_possible(name: str, value: Any, limit: Limit | None, space: str = "") -> None:
    """Refuse a number with which no trial can be trained."""
    if limit is not None and _is_number(value) and not limit.takes(value):
        raise ControlError(f"`{name}` must be {limit}{space}, got {value!r}.")


def _is_within(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except ValueError:  # not positive, where its logarithm is drawn
        return False


def _factor(text: str) -> float | None:
    """What "/2" or "*1.5" multiplies by; None of anything else."""
    sign, number = text.strip()[:1], text.strip()[1:]
    try:
        factor = float(number) if sign == "*" else 1.0 / float(number) if sign == "/" else 0.0
    except (ValueError, ZeroDivisionError):
        return None
    return factor if math.isfinite(factor) and factor > 0 else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_warm(source: int, params: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Refuse at once what the clone's trainer would refuse.

    Raises:
        ControlError: A change that a warm start can't bear.
    """
    for name, value in changes.items():
        if name.rpartition(".")[2] in _SHAPES and params.get(name) != value:
            raise ControlError(
                f"`{name}` of trial {source} is {params.get(name)}: an adapter can't be carried over to {value}. "
                "Clone it without warm start, or without this change."
            )


def enqueue(
    study: optuna.Study, params: Mapping[str, Any], attributes: Mapping[str, Any], command: str
) -> tuple[FrozenTrial, int]:
    """Queue a configuration, once, whichever workers do the command; its trial, and that trial's number."""
    trial = _of_command(study, command)
    if trial is None:
        study.enqueue_trial(dict(params), user_attrs={**attributes, COMMAND_ATTR: command})
        trial = _of_command(study, command)
        assert trial is not None
    if trial.state is OptunaState.WAITING:
        return trial, attempts.label(study, trial)
    return trial, attempts.number_of(trial)  # another process was quicker than we


def _of_command(study: optuna.Study, command: str) -> FrozenTrial | None:
    trials = attempts.counted(study.get_trials(deepcopy=False))
    return next((trial for trial in trials if trial.user_attrs.get(COMMAND_ATTR) == command), None)


def left_over(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that people have added and an earlier process has not begun."""
    waiting = study.get_trials(deepcopy=False, states=(OptunaState.WAITING,))
    return [trial for trial in waiting if COMMAND_ATTR in trial.user_attrs]


def numbers_of_people(study: optuna.Study) -> set[int]:
    """The numbers of the trials that people have added."""
    trials = study.get_trials(deepcopy=False)
    return {attempts.number_of(trial) for trial in trials if COMMAND_ATTR in trial.user_attrs}


def origin(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Where a trial that a person has added comes from, by its attributes, as events tell it; nothing of others."""
    if CLONE_ATTR in attributes:
        return {"clone_of": attributes[CLONE_ATTR], "warm_start": bool(attributes.get(WARM_ATTR))}
    return {"added": True} if ADD_ATTR in attributes else {}


def claim(study: optuna.Study, trial: FrozenTrial) -> optuna.Trial | None:
    """Ask for one particular queued trial, as `study.ask` asks for the first; None if somebody else has it.

    Without this a trial that a person has added would wait behind a queued grid.
    """
    try:
        study._thread_local.cached_all_trials = None
        if study._storage.set_trial_state_values(trial._trial_id, state=OptunaState.RUNNING):
            return optuna.Trial(study, trial._trial_id)
    except (AttributeError, RuntimeError, KeyError):  # another Optuna, or it was taken
        pass
    return None
