"""How commands reach a search: through memory, the run folder, or the Optuna study. Torch-free.

A mailbox has two ends. Whoever steers calls `send`; the search calls `open`, then `take` between its turns, `answer`,
and `close`. What was answered stays answered: a command is applied once, also over restarts.

Who may steer is who may write: into the run folder's `commands`, which is made for its owner alone, or into the study's
storage, which whoever has its URL can change anyway. What they write is data, checked like any input, and can't name
code to import (`policy_from_outside`).
"""

from __future__ import annotations

from typing import Protocol

from rapidfire_automl.control import Command, Effect
from rapidfire_automl.mailboxes.folder import FolderMailbox
from rapidfire_automl.mailboxes.memory import MemoryMailbox
from rapidfire_automl.mailboxes.study import StudyMailbox


class Mailbox(Protocol):
    """What a search needs of a source of commands."""

    @property
    def foreign(self) -> bool:
        """Whether others than this process can send."""

    @property
    def attempt(self) -> int:
        """Which attempt of the search listens, from 1; 0 where none outlives the process."""

    def open(self) -> None:
        """Begin an attempt."""

    def take(self) -> list[Command]:
        """Commands that have come since and have no answer, in the order they were made; cheap.

        Those to earlier attempts are among them: only the search knows whether they took effect.
        """

    def answer(self, command: Command, effect: Effect) -> None:
        """Say what came of one."""

    def close(self, reason: str) -> None:
        """No command will be taken any more."""


__all__ = ["FolderMailbox", "Mailbox", "MemoryMailbox", "StudyMailbox"]
