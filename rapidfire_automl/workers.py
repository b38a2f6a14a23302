"""Several workers on one study: who has which trial, who is gone, and what is left to do. Torch-free.

Optuna's storage is the only coordinator. A search's trials wait in it from the start, so that taking one, from WAITING
to RUNNING, is what the storage does once, whoever asks (on SQLite with the help of `exclusive.py`): no budget is
overdrawn. Who has taken a trial lets its heart beat; where that has fallen silent for the grace period, any other
worker fails the trial and puts a new attempt in its place (`attempts.py`). From then on the storage refuses whatever
the silent one still has to say about it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages._heartbeat import BaseHeartbeat, is_heartbeat_enabled
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from rapidfire_automl import attempts, failpoints

WORKER_ATTR = "rapidfire:worker"
"""The trial attribute that says who has it."""
LEDGER_ATTR = "rapidfire:ledger"
"""The trial attribute that holds what was decided of it."""
LEFT_ATTR = "rapidfire:left"
"""The trial attribute that holds Optuna's number of the attempt that its worker has left to others, alive and well."""
MOST_DEATHS = 5
"""A trial is given up when so many attempts in a row have died before they had a further chunk done."""
CANCELLED_ATTR = "rapidfire:cancelled"
"""The study attribute that says why nobody works on it any more."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A process that works on a study.

    Args:
        name: Nobody else's; fit for a folder.
        host: The machine's name.
        pid: Its number there.
        space: Tells apart machines, boots and containers in which numbers of processes mean something else.
    """

    name: str
    host: str
    pid: int
    space: str

    @classmethod
    def here(cls) -> Worker:
        """This process."""
        host = socket.gethostname()
        plain = re.sub(r"[^0-9A-Za-z]+", "-", host).strip("-")[:40] or "host"
        return cls(f"{plain}-{os.getpid()}-{secrets.token_hex(2)}", host, os.getpid(), _space())

    def to_json(self, attempt: int) -> dict[str, Any]:
        """For the study, of an attempt that it has taken, by Optuna's number."""
        return {**asdict(self), "attempt": attempt}


def name_of(told: object) -> str:
    """The name of the worker that a trial's attribute tells of; "" if of none."""
    return str(told.get("name", "")) if isinstance(told, Mapping) else ""


def is_gone(told: object) -> bool:
    """Whether a worker was a process of this very machine that is no more; others are known by their heartbeat only."""
    if not isinstance(told, Mapping) or not told.get("space") or told["space"] != _space():
        return False
    pid = told.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _space() -> str:
    """This boot of this machine and, in a container, its own numbering of processes; "" where that can't be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    except OSError:
        return ""


# -- the budget --------------------------------------------------------------------------------------------------------


def fill(study: optuna.Study, n_trials: int, points: Sequence[Mapping[str, Any]] = ()) -> None:
    """Queue trials until the search has as many as it is to have, beside those that people have added.

    Several workers may do so at the same time: a place that two have filled counts once (`attempts.counted`).

    Args:
        study: The study.
        n_trials: Trials of all workers together.
        points: Parameters of the first of them.
    """
    trials = study.get_trials(deepcopy=False)
    taken = {trial.user_attrs.get(attempts.PLACE_ATTR) for trial in trials}
    for place in range(n_trials):
        if place not in taken:
            params = dict(points[place]) if place < len(points) else {}
            study.enqueue_trial(params, user_attrs={attempts.PLACE_ATTR: place})
    for trial in attempts.counted(study.get_trials(deepcopy=False, states=(OptunaState.WAITING,))):
        attempts.label(study, trial)


def check(study: optuna.Study) -> None:
    """Raise ValueError if several workers can't share a study's storage."""
    storage = study._storage
    if not is_heartbeat_enabled(storage):
        raise ValueError(
            "`study` must be in a storage with a heartbeat for several workers: open it with "
            "`rapidfire_automl.open_storage(url, heartbeat_s=30, grace_s=120)`, in PostgreSQL, or in SQLite on one "
            "machine."
        )


def rhythm(study: optuna.Study) -> tuple[float, float]:
    """Seconds between two heartbeats, and of silence after which a worker is taken for dead.

    Raises:
        ValueError: The storage has no heartbeat, or too short a grace period.
    """
    check(study)
    storage: Any = study._storage
    heartbeat_s = float(storage.get_heartbeat_interval())
    while hasattr(storage, "inner") or hasattr(storage, "_backend"):
        storage = getattr(storage, "inner", None) or storage._backend
    grace_s = float(getattr(storage, "grace_period", None) or 2 * heartbeat_s)
    if grace_s < 2 * heartbeat_s:
        raise ValueError(f"`grace_s` must be at least twice `heartbeat_s` = {heartbeat_s:g}, got {grace_s:g}.")
    return heartbeat_s, grace_s


def are_left(study: optuna.Study) -> bool:
    """Whether any trial waits or trains, with whomever."""
    return any(not trial.state.is_finished() or is_orphan(trial) for trial in attempts.last_attempts(study).values())


def is_orphan(trial: FrozenTrial) -> bool:
    """Whether a last attempt has lost its worker and will be queued again: it was failed, but its end never decided."""
    return trial.state is OptunaState.FAIL and ended(trial) is None


# -- taking ------------------------------------------------------------------------------------------------------------


def claimable(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that wait for somebody: what others have begun first, then what people have added, then new ones."""
    trials = attempts.counted(study.get_trials(deepcopy=False))
    return sorted(
        (trial for trial in trials if trial.state is OptunaState.WAITING),
        key=lambda trial: (
            attempts.attempt_of(trial) == 1,
            attempts.COMMAND_ATTR not in trial.user_attrs,
            attempts.number_of(trial),
        ),
    )


def claim(study: optuna.Study, trial: FrozenTrial, worker: Worker) -> optuna.Trial | None:
    """Take a trial that waits; None if somebody else has.

    Its heart beats before it is taken: a trial without a heartbeat is never found stale, so that one whose worker dies
    in between would be lost. The worker's name comes after: who was slower must not have written its own over it.
    """
    storage = study._storage
    assert isinstance(storage, BaseHeartbeat)
    try:
        storage.record_heartbeat(trial._trial_id)
        taken = attempts.take(study, trial)
        failpoints.hit("worker.claimed")
        if taken is not None:
            taken.set_user_attr(WORKER_ATTR, worker.to_json(trial.number))
    except optuna.exceptions.UpdateFinishedTrialError:
        return None
    return taken


# -- who is gone -------------------------------------------------------------------------------------------------------


def reap(study: optuna.Study, mine: Container[int]) -> list[int]:
    """Put new attempts in the place of trials whose worker has gone.

    Args:
        study: The study.
        mine: Trial ids of this worker's own.

    Returns:
        The numbers of these trials.
    """
    before = attempts.counted(study.get_trials(deepcopy=False))
    running = {trial._trial_id for trial in before if trial.state is OptunaState.RUNNING}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    trials = attempts.counted(study.get_trials(deepcopy=False))
    followed = {history[-1] for trial in trials if (history := attempts.history_of(trial))}
    found = []
    for trial in trials:
        if trial.number in followed:
            if trial._trial_id in running:
                found.append(attempts.number_of(trial))
        elif trial.state is OptunaState.RUNNING:
            if trial._trial_id not in mine and _is_left(trial) and attempts.retry(study, trial) is not None:
                found.append(attempts.number_of(trial))
        elif trial.state is OptunaState.FAIL and not ended(trial):
            attempts.again(study, trial)  # whoever failed it has died before it could
            found.append(attempts.number_of(trial))
    return found


def give_up(study: optuna.Study, mine: Container[int]) -> dict[int, str]:
    """Fail trials that have cost worker after worker their lives: else they would do so for ever.

    Whoever trained beside such a trial has died with it, and is innocent as long as it gets on in between.

    Args:
        study: The study.
        mine: Trial ids of this worker's own.

    Returns:
        Why, by the trials' numbers.
    """
    trials = attempts.counted(study.get_trials(deepcopy=False))
    suspects = {trial.number: trial for trial in trials if len(attempts.history_of(trial)) >= MOST_DEATHS - 1}
    storage: Any = study._storage
    silent = set(storage._get_stale_trial_ids(study._study_id)) if suspects else set()
    by_number = {trial.number: trial for trial in trials}
    found = {}
    for trial in suspects.values():
        dead = trial._trial_id in silent or _is_left(trial)
        if trial.state is not OptunaState.RUNNING or trial._trial_id in mine or not dead:
            continue
        if deaths(trial, by_number) < MOST_DEATHS:
            continue
        number = attempts.number_of(trial)
        why = (
            f"given up: its workers died in {MOST_DEATHS} attempts in a row before a further chunk was done; add it "
            "again if it was not to blame"
        )
        entry = {"trial": number, "outcome": "failed", "vector": [], "reason": why, "adapter": None}
        page = {**(trial.user_attrs.get(LEDGER_ATTR) or {}), "ended": entry}
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            storage.set_trial_user_attr(trial._trial_id, "rapidfire:error", why)
            storage.set_trial_user_attr(trial._trial_id, LEDGER_ATTR, page)
            if storage.set_trial_state_values(trial._trial_id, state=OptunaState.FAIL):
                found[number] = why
    return found


def _is_left(trial: FrozenTrial) -> bool:
    """Whether whoever has taken an attempt is gone; its attributes are those of the attempt before until it says so."""
    told = trial.user_attrs.get(WORKER_ATTR)
    return isinstance(told, Mapping) and told.get("attempt") == trial.number and is_gone(told)


def deaths(trial: FrozenTrial, by_number: Mapping[int, FrozenTrial]) -> int:
    """How many attempts in a row, a dead one the last of them, have died before they had a further chunk done.

    Args:
        trial: The last attempt.
        by_number: All attempts, by Optuna's numbers.
    """
    chain = [by_number[number] for number in attempts.history_of(trial) if number in by_number] + [trial]
    count = 0
    for before, after in zip([None, *chain[:-1]], chain, strict=True):
        if after.user_attrs.get(LEFT_ATTR) == after.number:
            continue
        got_on = _chunks(after) > (0 if before is None else _chunks(before))
        count = 0 if got_on else count + 1
    return count


def _chunks(trial: FrozenTrial) -> int:
    return len(trial.user_attrs.get(attempts.VECTORS_ATTR) or trial.intermediate_values)


def ended(trial: FrozenTrial) -> dict[str, Any] | None:
    """How a trial has ended, where that was decided; one whose worker has died has no such entry."""
    told = trial.user_attrs.get(LEDGER_ATTR)
    entry = told.get("ended") if isinstance(told, Mapping) else None
    return dict(entry) if isinstance(entry, Mapping) else None


def hand_back(study: optuna.Study, trial: optuna.Trial) -> None:
    """Leave a trial to others at once."""
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
        trial.set_user_attr(LEFT_ATTR, trial.number)
        attempts.retry(study, study._storage.get_trial(trial._trial_id))
