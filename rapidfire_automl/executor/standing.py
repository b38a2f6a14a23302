"""Where a trial stands, to whoever wants something of it: live or ended, with a slot or without, at which step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import optuna
from optuna.trial import TrialState as OptunaState

from rapidfire_automl import attempts, workers
from rapidfire_automl.control import Command
from rapidfire_automl.executor import ledger
from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.executor.requests import Boundary
from rapidfire_automl.executor.sources import Arrivals, Asking, Claims
from rapidfire_automl.records import TrialRecord
from rapidfire_policies.base import TrialState, Verdict

if TYPE_CHECKING:
    from rapidfire_automl.executor.conductor import Conductor

ENDED = {
    TrialState.COMPLETE: "is complete",
    TrialState.STOPPED: "was stopped",
    TrialState.FAILED: "has failed",
    OptunaState.COMPLETE: "is complete",
    OptunaState.PRUNED: "was stopped",
    OptunaState.FAIL: "has failed",
    OptunaState.WAITING: "has not begun",
}


class Refused(Exception):
    """A command that cannot be; the message says why."""


class Elsewhere(Exception):
    """A command for a trial of another process, or of whichever will take it over."""


class NotYet(Exception):
    """A command that waits until this process has loaded its trial."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A pause or a stop that waits for its trial's next safe point."""

    verdict: Verdict
    command: Command


class Standing:
    """What is known of the search's trials.

    Args:
        records: Of all trials, by number.
    """

    def __init__(self, records: Mapping[int, TrialRecord]) -> None:
        self._records = records
        self.wishes: dict[int, Wish] = {}
        self.study: optuna.Study | None = None
        self.conductor: Conductor | None = None
        self.source: Asking | Arrivals | Claims | None = None
        self._seen: Mapping[int, optuna.trial.FrozenTrial] = {}

    @property
    def arms(self) -> Sequence[Arm]:
        """Live arms, and those that are about to leave."""
        return () if self.conductor is None else self.conductor.arms

    def live(self, number: int) -> Arm | None:
        """A trial's arm while it lives."""
        return next((arm for arm in self.arms if arm.number == number and not arm.done), None)

    def arm(self, command: Command) -> Arm:
        """The live arm a command is about.

        Raises:
            Refused: There is none, or it is about to end.
            Elsewhere: It lives in another process, or waits for one to take it over.
        """
        assert command.trial is not None
        arm = self.live(command.trial)
        if arm is not None and arm.lost:
            raise Elsewhere
        if arm is None:
            raise Refused(f"trial {command.trial} {self.why_not_live(command.trial)}")
        wish = self.wishes.get(arm.number)
        stopping = wish is not None and wish.verdict is Verdict.STOP
        final = [
            d for d in (arm.ruling, arm.decision) if d is not None and d.verdict in (Verdict.STOP, Verdict.COMPLETE)
        ]
        if stopping or final:
            raise Refused(f"trial {arm.number} is being stopped")
        if at_its_end(arm):
            raise Refused(f"trial {arm.number} has trained to its end")
        return arm

    def why_not_live(self, number: int) -> str:
        """Why a trial has no arm here.

        Raises:
            Elsewhere: It lives in another process, or waits for one to take it over.
        """
        shared = isinstance(self.source, Claims)  # then a record tells of another's trial, or of one that was lost
        record = None if shared else self._records.get(number)
        if record is not None:
            return ENDED.get(record.state, "has not begun")
        trial = self._last(number)
        if trial is None:
            known = f"there are 0 to {max(self._seen)}" if self._seen else "there is none yet"
            return f"is unknown: {known}"
        if trial.state is OptunaState.RUNNING or (shared and _waits_for_another(trial)):
            raise Elsewhere
        return ENDED[trial.state]

    def applied_elsewhere(self, command: Command) -> str | None:
        """What a command to a trial has come to, if another worker has applied it."""
        if command.trial is None or not isinstance(self.source, Claims):
            return None
        trial = self._last(command.trial)
        return None if trial is None else ledger.commands_of(trial).get(command.id)

    def look_again(self) -> None:
        """The study is asked anew at the next question, once for all commands that come together."""
        self._seen = {}

    def _last(self, number: int) -> optuna.trial.FrozenTrial | None:
        if number not in self._seen:
            self._seen = self.trials()
        return self._seen.get(number)

    def trials(self) -> dict[int, optuna.trial.FrozenTrial]:
        """The last attempts at all trials of the study, by number."""
        assert self.study is not None
        return attempts.last_attempts(self.study)


def _waits_for_another(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether its worker has gone, and the next is yet to come."""
    begun = trial.state is OptunaState.WAITING and attempts.attempt_of(trial) > 1
    return begun or workers.is_orphan(trial)


def at_its_end(arm: Arm) -> bool:
    """Whether it waits at the end of its last chunk."""
    return isinstance(arm.request, Boundary) and arm.request.chunk >= len(arm.record.boundaries)


def where(arm: Arm) -> str:
    """Where it stands, in words."""
    ends, done = arm.record.boundaries, len(arm.record.values)
    if isinstance(arm.request, Boundary):
        return f"at the end of chunk {arm.request.chunk} of {len(ends)}"
    return f"at step {arm.step} of {ends[-1]}, in chunk {done + 1} of {len(ends)}" if ends else "before its first step"
