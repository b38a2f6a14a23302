"""What people have decided is on disk before it takes effect, so that a search that goes on goes on with it.

Rulings, extensions and policies stand in the search's journal, each with the command's id: whoever asked after a kill
is told that it was applied. What a warm clone begins with lies in `clones/<command's id>` until the search is over.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import optuna

from rapidfire_automl import attempts, failpoints
from rapidfire_automl.attempts import COMMAND_ATTR
from rapidfire_automl.control import Command
from rapidfire_automl.executor import checkpoints, warmstart
from rapidfire_automl.executor.durability import Durability

CLONES = "clones"


class Keeping:
    """Keeps what commands do.

    Args:
        durability: The search's folder; None where the search does not survive its process, and nothing is kept.
    """

    def __init__(self, durability: Durability | None) -> None:
        self._durability = durability

    @property
    def is_on(self) -> bool:
        """Whether anything is kept."""
        return self._durability is not None and self._durability.is_on

    def ruled(self, verdicts: Sequence[tuple[int, int, str, str]], command: Command, text: str) -> frozenset[int]:
        """A person has decided of trials: `(trial, chunk, verdict, reason)` each.

        Returns:
            Those that other workers have taken over.
        """
        return self._note("ruled", command, text, verdicts=list(verdicts))

    def extended(
        self, number: int, step: int, boundaries: Sequence[int], command: Command, text: str
    ) -> frozenset[int]:
        """A trial's chunks end at other steps, from this step on; returns as `ruled`."""
        return self._note("extended", command, text, trial=number, step=step, boundaries=list(boundaries))

    def policy(self, name: str | None, arguments: Mapping[str, Any], command: Command, text: str) -> None:
        """Another policy judges; None: nobody does."""
        self._note("policy", command, text, name=name, arguments=dict(arguments))

    def enqueued(self) -> None:
        """A trial is queued: the study has kept it, with the command's id."""
        failpoints.hit("command.enqueued")

    def inherit(self, command: str, warm: warmstart.WarmStart) -> None:
        """Keep what a clone begins with.

        Args:
            command: Id of the command that asks for the clone.
            warm: What it begins with.

        Raises:
            OSError: It could not be written.
        """
        if self.is_on:
            assert self._durability is not None
            folder = self._durability.folder / CLONES / command
            checkpoints.write(checkpoints.chunk_folder(folder, 0), warmstart.to_snapshot(warm))

    def inherited(self, command: str) -> warmstart.WarmStart | None:
        """What an earlier process has kept for a clone."""
        if self._durability is None:
            return None
        found = checkpoints.newest(self._durability.folder / CLONES / command)
        return None if found.snapshot is None or found.folder is None else warmstart.from_snapshot(found.snapshot)

    def over(self) -> None:
        """The search has come to its end."""
        if self._durability is not None:
            shutil.rmtree(self._durability.folder / CLONES, ignore_errors=True)

    def applied_before(self, study: optuna.Study) -> dict[str, str]:
        """What earlier processes have applied: command's id -> what came of it."""
        if self._durability is None:
            return {}
        queued = {
            trial.user_attrs[COMMAND_ATTR]: f"trial {attempts.number_of(trial)} is next in line for a slot"
            for trial in study.get_trials(deepcopy=False)
            if COMMAND_ATTR in trial.user_attrs
        }
        return {**queued, **self._durability.past.commands}

    def policy_before(self) -> tuple[str | None, Mapping[str, Any]] | None:
        """The policy that an earlier process was given, if it was."""
        return None if self._durability is None else self._durability.past.policy

    def _note(self, kind: str, command: Command, text: str, **data: Any) -> frozenset[int]:
        if self._durability is None:
            return frozenset()
        lost = self._durability.note(kind, command=command.id, text=text, **data)
        failpoints.hit(f"command.{kind}")
        return lost
