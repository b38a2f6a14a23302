"""One worker among several: it takes trials, says that it lives, notices who doesn't, and knows how others fare."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from rapidfire_automl import attempts, failpoints, sheets, workers
from rapidfire_automl.attempts import VECTORS_ATTR
from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.executor.ledger import past_of, waits
from rapidfire_automl.patience import LONGEST_WAIT_S, StorageAway
from rapidfire_automl.records import TrialRecord
from rapidfire_automl.workers import Worker
from rapidfire_policies.base import TrialState

logger = logging.getLogger("rapidfire_automl")

_TICK_S = 5.0
"""Between two looks at whether the search goes on and this worker's trials are still its own."""
_STATES = {
    OptunaState.RUNNING: TrialState.RUNNING,
    OptunaState.COMPLETE: TrialState.COMPLETE,
    OptunaState.PRUNED: TrialState.STOPPED,
    OptunaState.FAIL: TrialState.FAILED,
}


class Crew:
    """This worker's part in a search with others.

    Args:
        study: Shared, in a storage with a heartbeat.
        worker: This process.
        records: Of all trials, by number; those of other workers' are kept up to date here.
        folder: Where a trial's files go, by number; every worker sees it.
        tell: Emits an event (kind, arm or None, data).
        cancelled: Called when somebody has ended the search, with the reason.
    """

    def __init__(
        self,
        study: optuna.Study,
        worker: Worker,
        records: MutableMapping[int, TrialRecord],
        folder: Callable[[int], Path],
        tell: Callable[..., None],
        cancelled: Callable[[str], None],
    ) -> None:
        storage = study._storage
        assert isinstance(storage, BaseHeartbeat)
        self._study, self._storage, self.worker = study, storage, worker
        self._records, self._folder = records, folder
        self._tell, self._cancelled = tell, cancelled
        self._heartbeat_s, self._grace_s = workers.rhythm(study)
        self._arms: dict[int, Arm] = {}
        self._ended: set[int] = set()
        self._holding = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._pulse, name="heartbeat", daemon=True)
        self._seen: dict[int, tuple[Any, ...]] = {}
        self._news = False
        self.left = self.others = self.training = 1  # until the first look

    def start(self) -> None:
        """Begin to say that this worker lives."""
        self._thread.start()

    def stop(self) -> None:
        """Fall silent."""
        self._stop.set()
        self._thread.join(timeout=5.0)

    # -- the conductor's thread ----------------------------------------------------------------------------------------

    def claimable(self) -> list[FrozenTrial]:
        """Trials that wait for somebody; counts what others do, too."""
        found = workers.claimable(self._study)  # before the look at others: whoever takes one of these is seen there
        self.refresh()
        return found

    def claim(self, trial: FrozenTrial) -> optuna.Trial | None:
        """Take a trial; None if somebody else has."""
        return workers.claim(self._study, trial, self.worker)

    def hold(self, arm: Arm) -> None:
        """The trial is this worker's from now on."""
        with self._holding:
            self._arms[arm.number] = arm

    def release(self, arm: Arm) -> None:
        """The trial is through, or others have it."""
        with self._holding:
            self._arms.pop(arm.number, None)
        self._seen.pop(arm.number, None)
        if not arm.lost:
            self._ended.add(arm.trial.number)
        else:
            self._tell("trial_lost", arm, worker=self._who_has(arm.number))

    def end_for_all(self) -> None:
        """Let other workers end, too."""
        if not self._study.user_attrs.get(workers.CANCELLED_ATTR):
            self._study.set_user_attr(workers.CANCELLED_ATTR, f"cancelled through worker {self.worker.name}")

    def share(self, record: TrialRecord) -> None:
        """Let other workers see what a chunk has come to beside its value; called in the trial's thread."""
        try:
            sheets.write(self._folder(record.number), record)
        except OSError as error:
            logger.warning("Other workers won't see trial %d's scores: %s", record.number, error)

    @property
    def news(self) -> bool:
        """Whether other workers' trials have come further since this was asked last."""
        news, self._news = self._news, False
        return news

    @property
    def numbers(self) -> set[int]:
        """Of this worker's trials."""
        with self._holding:
            return set(self._arms)

    def refresh(self) -> None:
        """Look how other workers' trials fare, and how many wait."""
        self.left = self.others = self.training = 0
        mine = self.numbers
        for number, trial in attempts.last_attempts(self._study).items():
            self.left += trial.state is OptunaState.WAITING
            if number in mine or trial.number in self._ended:
                continue
            page = trial.user_attrs.get(workers.LEDGER_ATTR) or {}
            past = past_of(number, page)
            if trial.state is OptunaState.RUNNING or workers.is_orphan(trial):
                self.others += 1
                self.training += not waits(past, number)
            reported = len(trial.user_attrs.get(VECTORS_ATTR) or trial.intermediate_values)
            verdicts = past.verdicts.get(number, [])
            who = workers.name_of(trial.user_attrs.get(workers.WORKER_ATTR))
            seen = (trial.number, trial.state, reported, len(verdicts), len(trial.params), who)
            if trial.state is OptunaState.WAITING or self._seen.get(number) == seen:
                continue
            self._seen[number] = seen
            self._news = True
            record = self._records[number] = self._record(number, trial, verdicts)
            if waits(past, number) and record.state is TrialState.RUNNING:
                record.state = TrialState.PAUSED
            self._tell(
                "elsewhere",
                None,
                of=number,
                worker=who,
                state=record.state.value,
                chunk=len(record.values),
                value=record.values[-1] if record.values else None,
                params=dict(record.params),
            )

    def _record(self, number: int, trial: FrozenTrial, verdicts: list[tuple[int, str, str]]) -> TrialRecord:
        """Another worker's record, from what the study and the shared folder tell."""
        record = TrialRecord(number, params=dict(trial.params), state=_STATES[trial.state])
        before = self._records.get(number)
        vectors = [tuple(vector) for vector in trial.user_attrs.get(VECTORS_ATTR, ())]
        vectors = vectors or [(trial.intermediate_values[step],) for step in sorted(trial.intermediate_values)]
        if before is not None and before.values == [vector[0] for vector in vectors]:
            for name in ("values", "vectors", "scores", "metrics", "seconds", "tokens", "generated"):
                setattr(record, name, getattr(before, name))
        else:
            for vector in vectors:
                sheets.add(record, self._folder(number), vector)
        record.verdicts = verdicts
        record.adapter = trial.user_attrs.get("rapidfire:adapter")
        record.error = trial.user_attrs.get("rapidfire:error")
        return record

    # -- the pulse -----------------------------------------------------------------------------------------------------

    def _pulse(self) -> None:
        others_need_s = self._grace_s + LONGEST_WAIT_S
        beaten_s = in_touch_since_s = time.monotonic() - others_need_s
        last_s = time.monotonic()
        while True:
            try:
                if time.monotonic() - beaten_s >= self._heartbeat_s:
                    beaten_s = time.monotonic()
                    self._beat()
                goes_on = self._look()
                now = time.monotonic()
                if now - last_s > 0.75 * self._grace_s:
                    in_touch_since_s = now  # it was frozen, or nobody could be heard: the others, too, may live
                last_s = now
                if goes_on and now - in_touch_since_s >= others_need_s:
                    self._take_from_the_dead()
            except StorageAway:
                return
            except Exception:
                logger.exception("The heartbeat failed; it goes on.")
            if self._stop.wait(min(_TICK_S, self._heartbeat_s)):
                return

    def _beat(self) -> None:
        failpoints.hit("worker.beat")
        for arm in self._held():
            self._storage.record_heartbeat(arm.trial._trial_id)

    def _look(self) -> bool:
        """Whose trials are still this worker's; returns whether the search goes on."""
        states = {trial._trial_id: trial.state for trial in self._study.get_trials(deepcopy=False)}
        for arm in self._held():
            if not arm.done and states.get(arm.trial._trial_id) is OptunaState.FAIL:
                arm.lost = True
        why = self._study.user_attrs.get(workers.CANCELLED_ATTR)
        if why:
            self._cancelled(str(why))
        return not why

    def _take_from_the_dead(self) -> None:
        mine = {arm.trial._trial_id for arm in self._held()}
        for number, why in workers.give_up(self._study, mine).items():
            self._tell("trial_given_up", None, of=number, reason=why)
        for number in workers.reap(self._study, mine):
            if number not in self.numbers:
                self._tell("trial_orphaned", None, of=number, worker=self._who_has(number))

    def _held(self) -> list[Arm]:
        with self._holding:
            return list(self._arms.values())

    def _who_has(self, number: int) -> str:
        trial = attempts.last_attempts(self._study).get(number)
        return "" if trial is None else workers.name_of(trial.user_attrs.get(workers.WORKER_ATTR))
