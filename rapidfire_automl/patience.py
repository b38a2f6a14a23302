"""A storage that is away for a while costs time, not the search: any Optuna storage, with patience.

What a call comes to whose connection broke while it committed, so that nobody knows whether it did:

| call | again |
|---|---|
| attributes, reported values, heartbeats | are overwritten with the same |
| an attribute that is settled once | is there already |
| a parameter | the storage keeps the first, which is the same |
| a new trial | carries a token; one that is there already is taken, and of several the first |
| the end of a trial | done if the trial has ended in just that way |
| the begin of a WAITING trial | done if nobody else takes trials (`alone`); else it is taken for somebody else's |
| a new study | exists already, which whoever creates it has to expect |

A trial that everybody takes for somebody else's has no heartbeat, and is found after the grace period.
"""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.storages._heartbeat import BaseHeartbeat, is_heartbeat_enabled
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from rapidfire_automl import errors_of_storages
from rapidfire_automl.attempts import TOKEN_ATTR
from rapidfire_automl.exclusive import Exclusively, exclusively, insert_study_user_attr

logger = logging.getLogger("rapidfire_automl")

PATIENCE_S = 600.0
"""How long a storage may be away by default."""
_SAY_AFTER_S = 2.0
"""A lock that is held for a moment is nothing to speak of."""
_NO_ANSWER_S = 5.0
"""A call that takes longer is said to get no answer."""
_FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 5.0
"""Between two tries, so that many workers don't fall upon a server that has just come back."""


class StorageAway(RuntimeError):
    """The storage could not be reached for longer than was to be waited for."""


def _delegate(name: str) -> Callable[..., Any]:
    reads = name.removeprefix("_").startswith("get_")

    def call(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if reads else self._exclusively():
            return self._patiently(lambda tries: getattr(self.inner, name)(*args, **kwargs))

    call.__name__ = name
    return call


class PatientStorage(BaseStorage, BaseHeartbeat):
    """Does what a storage does, again and again where that can't be reached.

    Args:
        inner: The storage.
        patience_s: How long a call is tried; after that it raises, and so does every other call until `renew`.
        alone: Whether no other process begins trials of the study.
        say_after_s: For how long nothing is said.
        hang_up: Breaks the connections of calls that get no answer, from another thread; without it they can only be
            waited for.
        exclusively: What calls that write are in (`exclusive.py`).

    Raises:
        StorageAway: From any call, when the time is over; the last error is its cause.
    """

    def __init__(
        self,
        inner: BaseStorage,
        *,
        patience_s: float = PATIENCE_S,
        alone: bool = True,
        say_after_s: float = _SAY_AFTER_S,
        hang_up: Callable[[], None] | None = None,
        exclusively: Exclusively = nullcontext,
    ) -> None:
        self.inner = inner
        self.patience_s = patience_s
        self.alone = alone
        self._say_after_s = say_after_s
        self._listeners: list[Callable[[str, float, str], None]] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._away_since: float | None = None
        self._said = False
        self._reason = ""
        self._jitter = random.Random(secrets.randbits(32))
        self._hang_up = hang_up
        self._exclusively = exclusively
        self._calls: dict[int, float] = {}
        self._watcher: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": self.inner, "patience_s": self.patience_s, "alone": self.alone, "say": self._say_after_s}

    def __setstate__(self, state: dict[str, Any]) -> None:
        say = state.pop("say")
        self.__init__(state.pop("inner"), **state, say_after_s=say)  # type: ignore[misc]

    # -- who waits -----------------------------------------------------------------------------------------------------

    def listen(self, listener: Callable[[str, float, str], None]) -> None:
        """Have a function called with "away" or "back", for how many seconds it has been away, and why."""
        if listener not in self._listeners:
            self._listeners.append(listener)
        if self._watcher is None:
            watching = (weakref.ref(self),)
            self._watcher = threading.Thread(target=_watch, args=watching, name="storage-watcher", daemon=True)
            self._watcher.start()

    def give_up(self) -> None:
        """Let every call that waits raise now, and every call to come that can't get through at once."""
        self._over.set()

    def renew(self) -> None:
        """Be patient again."""
        self._over.clear()
        self._away_since, self._said = None, False

    @property
    def away_s(self) -> float:
        """For how long it has been away; 0 if it isn't."""
        since = self._away_since
        return 0.0 if since is None else time.monotonic() - since

    def failed(self, error: BaseException) -> None:
        """Something below has met an error, and may try again by itself."""
        if errors_of_storages.is_away(error):
            self._has_gone(errors_of_storages.reason_of(error))

    def _patiently(self, call: Callable[[int], Any]) -> Any:
        """Call with how often it has been tried, until it returns."""
        begin, wait_s, tries = time.monotonic(), _FIRST_WAIT_S, 0
        while True:
            if self._over.is_set() and self._away_since is not None:  # whoever leaves does not ask a dead server again
                raise self._too_long()
            try:
                self._calls[threading.get_ident()] = time.monotonic()
                try:
                    result = call(tries)
                finally:
                    self._calls.pop(threading.get_ident(), None)
            except Exception as error:
                if not errors_of_storages.is_away(error):
                    raise
                reason = errors_of_storages.reason_of(error)
                waited_s = time.monotonic() - begin
                self._has_gone(reason)
                if self._over.is_set() or waited_s >= self.patience_s:
                    self._over.set()
                    raise self._too_long() from error
                tries += 1
                left_s = begin + self.patience_s - time.monotonic()
                self._over.wait(min(wait_s * self._jitter.uniform(0.5, 1.0), max(left_s, 0.01)))
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            else:
                if self._away_since is not None:
                    self._is_back()
                return result

    def _too_long(self) -> StorageAway:
        return StorageAway(
            f"The study's storage could not be reached for {self.away_s:.0f} s: {self._reason}. Every trial is kept as "
            "of its last chunk; run the same command again when the storage is back."
        )

    def _look(self) -> None:
        """A server that is frozen refuses nothing: say that it does not answer, and hang up when the time is over."""
        begun = min(list(self._calls.values()), default=None)
        waited_s = 0.0 if begun is None else time.monotonic() - begun
        if waited_s > _NO_ANSWER_S:
            self._has_gone(f"no answer for {waited_s:.0f} s", waited_s)
        if waited_s > self.patience_s + _NO_ANSWER_S or (waited_s > _NO_ANSWER_S and self._over.is_set()):
            self._over.set()
            if self._hang_up is not None:
                self._hang_up()

    def _has_gone(self, reason: str, waited_s: float = 0.0) -> None:
        with self._lock:
            now = time.monotonic()
            self._away_since = self._away_since or now - waited_s
            self._reason = reason
            say = not self._said and now - self._away_since >= self._say_after_s
            self._said = self._said or say
            away_s = now - self._away_since
        if say:
            logger.warning("The study's storage is away (%s); it is tried for %.0f s.", reason, self.patience_s)
            self._tell("away", away_s, reason)

    def _is_back(self) -> None:
        with self._lock:
            since, self._away_since = self._away_since, None
            said, self._said = self._said, False
        if said and since is not None:
            away_s = time.monotonic() - since
            logger.warning("The study's storage is back after %.0f s.", away_s)
            self._tell("back", away_s, "")

    def _tell(self, what: str, away_s: float, reason: str) -> None:
        for listener in self._listeners:
            try:
                listener(what, away_s, reason)
            except Exception:
                logger.exception("A listener of the storage failed.")

    # -- what can't simply be done twice -------------------------------------------------------------------------------

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """A new trial, once; see `BaseStorage`."""
        token = secrets.token_hex(8)
        if template_trial is None:
            template = optuna.trial.create_trial(state=OptunaState.RUNNING, system_attrs={TOKEN_ATTR: token})
        else:
            template = template_trial
            template.system_attrs = {**template.system_attrs, TOKEN_ATTR: token}
        failures = errors_of_storages.failures()

        def create(tries: int) -> int:
            made = self._made(study_id, token) if tries else []
            trial_id: int = made[0] if made else self.inner.create_new_trial(study_id, template)
            if errors_of_storages.failures() != failures:  # Optuna has tried again by itself
                for double in self._made(study_id, token)[1:]:
                    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                        self.inner.set_trial_state_values(double, state=OptunaState.FAIL)
                trial_id = self._made(study_id, token)[0]
            return trial_id

        with self._exclusively():
            created: int = self._patiently(create)
        return created

    def _made(self, study_id: int, token: str) -> list[int]:
        trials = self.inner.get_all_trials(study_id, deepcopy=False)
        return [trial._trial_id for trial in trials if trial.system_attrs.get(TOKEN_ATTR) == token]

    def set_trial_state_values(self, trial_id: int, state: OptunaState, values: Sequence[float] | None = None) -> bool:
        """Begin or end a trial; see `BaseStorage`."""

        def set_it(tries: int) -> bool:
            try:
                done = bool(self.inner.set_trial_state_values(trial_id, state, values))
            except optuna.exceptions.UpdateFinishedTrialError:
                found = self.inner.get_trial(trial_id) if tries else None
                if found is None or found.state != state or (values is not None and list(values) != found.values):
                    raise
                return True
            return done or (tries > 0 and self.alone and state == OptunaState.RUNNING)

        with self._exclusively():
            return bool(self._patiently(set_it))

    def settle_study_user_attr(self, study_id: int, key: str, value: Any) -> Any:
        """Give a study an attribute, unless it has it; workers that do so at once all find the same one.

        Returns:
            What it has.
        """
        engine = _engine(self.inner)

        def settle(tries: int) -> Any:
            if engine is not None:
                insert_study_user_attr(engine, study_id, key, value)
            elif key not in self.inner.get_study_user_attrs(study_id):
                self.inner.set_study_user_attr(study_id, key, value)
            return self.inner.get_study_user_attrs(study_id)[key]

        with self._exclusively():
            return self._patiently(settle)

    # -- what can ------------------------------------------------------------------------------------------------------

    create_new_study = _delegate("create_new_study")
    delete_study = _delegate("delete_study")
    set_study_user_attr = _delegate("set_study_user_attr")
    set_study_system_attr = _delegate("set_study_system_attr")
    get_study_id_from_name = _delegate("get_study_id_from_name")
    get_study_name_from_id = _delegate("get_study_name_from_id")
    get_study_directions = _delegate("get_study_directions")
    get_study_user_attrs = _delegate("get_study_user_attrs")
    get_study_system_attrs = _delegate("get_study_system_attrs")
    get_all_studies = _delegate("get_all_studies")
    set_trial_param = _delegate("set_trial_param")
    get_trial_id_from_study_id_trial_number = _delegate("get_trial_id_from_study_id_trial_number")
    get_trial_number_from_id = _delegate("get_trial_number_from_id")
    get_trial_param = _delegate("get_trial_param")
    set_trial_intermediate_value = _delegate("set_trial_intermediate_value")
    set_trial_user_attr = _delegate("set_trial_user_attr")
    set_trial_system_attr = _delegate("set_trial_system_attr")
    get_trial = _delegate("get_trial")
    get_all_trials = _delegate("get_all_trials")
    get_n_trials = _delegate("get_n_trials")
    get_best_trial = _delegate("get_best_trial")
    get_trial_params = _delegate("get_trial_params")
    get_trial_user_attrs = _delegate("get_trial_user_attrs")
    get_trial_system_attrs = _delegate("get_trial_system_attrs")
    record_heartbeat = _delegate("record_heartbeat")
    _get_stale_trial_ids = _delegate("_get_stale_trial_ids")

    def remove_session(self) -> None:
        """See `BaseStorage`."""
        self.inner.remove_session()

    def get_heartbeat_interval(self) -> int | None:
        """Seconds, or None where the storage has no heartbeat."""
        return self.inner.get_heartbeat_interval() if isinstance(self.inner, BaseHeartbeat) else None

    def get_heartbeat_stale_trial_callback(self) -> Callable[[optuna.Study, FrozenTrial], None] | None:
        """What becomes of a trial whose process is gone."""
        return self.inner.get_heartbeat_stale_trial_callback() if isinstance(self.inner, BaseHeartbeat) else None


def _watch(watched: weakref.ref[PatientStorage]) -> None:
    """Look after a storage as long as anybody uses it."""
    while (storage := watched()) is not None:
        storage._look()
        del storage
        time.sleep(1.0)


def _engine(storage: BaseStorage) -> Any:
    """SQLAlchemy's, of a storage in a database; else None."""
    return getattr(getattr(storage, "_backend", storage), "engine", None)


def patient(study: optuna.Study, *, patience_s: float) -> PatientStorage | None:
    """Have a study's storage be patient from now on; None where it is in this process's memory."""
    inner = study._storage
    if isinstance(inner, InMemoryStorage):
        return None
    if not isinstance(inner, PatientStorage):
        engine = _engine(inner)
        alone = not is_heartbeat_enabled(inner)
        inner = study._storage = PatientStorage(inner, alone=alone, exclusively=exclusively(engine))
        if engine is not None:
            errors_of_storages.watch(engine, inner.failed)
    inner.patience_s = patience_s
    inner.renew()
    return inner
