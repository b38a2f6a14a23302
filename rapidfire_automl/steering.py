"""A search that runs in another process: the verbs, and what it has told so far. Torch-free."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rapidfire_automl.control import OWN_SOURCE, Command, ControlError, Controls, Sent
from rapidfire_automl.event_log import Follower
from rapidfire_automl.events import Event
from rapidfire_automl.mailboxes import FolderMailbox, StudyMailbox

if TYPE_CHECKING:
    import optuna

_CHUNKS_ATTR = "rapidfire:chunks"
"""The study attribute that says how many chunks a whole trial has."""


def sender(what: str) -> str:
    """Who sends from this process, in words: `command line, alice, process 4242 on pts/3 of host`."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user without a name, as in a container
        user = f"user {os.getuid()}" if hasattr(os, "getuid") else "unknown user"
    terminal = ""
    for stream in (0, 1, 2):
        with contextlib.suppress(OSError, AttributeError):
            terminal = f" on {os.ttyname(stream).removeprefix('/dev/')}"
            break
    return f"{what}, {user}, process {os.getpid()}{terminal} of {socket.gethostname()}"[:200]


class Search(Controls):
    """A search that runs in another process, to be steered from here: `Search("runs/first").pause(3)`.

    Args:
        run_dir: Its run folder.
        study: Or its study: a name with `storage`, or the study itself.
        storage: URL of the study's storage.
        source: What commands come from, like "Python"; the search's log says of each also which user, terminal, process
            and host.

    Raises:
        ControlError: Neither or both are given, or there is no such folder or study.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | None = None,
        *,
        study: str | optuna.Study | None = None,
        storage: str | optuna.storages.BaseStorage | None = None,
        source: str = "",
    ) -> None:
        if (run_dir is None) == (study is None):
            raise ControlError("Name the run folder of the search, or its study and storage; not both.")
        self.source = source or "Python"
        self._follower: Follower | StudyFollower
        self._mailbox: FolderMailbox | StudyMailbox
        if run_dir is not None:
            self._follower = Follower(run_dir)
            self._mailbox = FolderMailbox(run_dir)
            if (self._mailbox.run_dir / "workers").is_dir():
                raise ControlError(f"Several workers search in {run_dir}: name their study and its storage instead.")
            if self._mailbox.listener() is None and not (self._mailbox.run_dir / "events.jsonl").exists():
                raise ControlError(f"{run_dir} is no run folder: it has no events.jsonl.")
        else:
            loaded = _load_study(study, storage)
            self._follower, self._mailbox = StudyFollower(loaded), StudyMailbox(loaded)

    def _send(self, command: Command) -> Sent:
        what = self.source if command.source == OWN_SOURCE else command.source
        sent = self._mailbox.send(replace(command, source=sender(what)))
        if isinstance(self._follower, StudyFollower):
            self._follower.sent.append(sent)
        return sent

    def events(self) -> list[Event]:
        """What has happened since the last call, or since the search began.

        From the run folder's `events.jsonl`; or what the study tells of it: trials, their values and their ends, and
        what has come of commands from here.
        """
        return self._follower.read()


class StudyFollower:
    """What an Optuna study tells of a search, as events.

    Args:
        study: The study.
    """

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._told: dict[int, tuple[int, bool]] = {}
        self.sent: list[Sent] = []

    def read(self) -> list[Event]:
        """What has happened since the last call."""
        from rapidfire_automl.attempts import last_attempts

        chunks = self._study.user_attrs.get(_CHUNKS_ATTR, 1)
        events = []
        for number, trial in last_attempts(self._study).items():
            if trial.state.name == "WAITING" or not (trial.params or trial.state.is_finished()):
                continue
            if number not in self._told:
                about = {"params": trial.params, "boundaries": list(range(1, chunks + 1))}
                events.append(Event("trial_started", 0.0, number, 0, about))
            before, ended = self._told.get(number, (0, False))
            values = {step: value for step, value in sorted(trial.intermediate_values.items()) if step > before}
            events += [Event("chunk_done", 0.0, number, step, {"value": value}) for step, value in values.items()]
            if trial.state.is_finished() and not ended:
                state = {"COMPLETE": "complete", "PRUNED": "pruned"}.get(trial.state.name, "failed")
                about = {"state": state, "reason": trial.user_attrs.get("rapidfire:error", "")}
                events.append(Event("trial_ended", 0.0, number, None, about))
            self._told[number] = (max([before, *values]), trial.state.is_finished())
        return events + self._answers()

    def _answers(self) -> list[Event]:
        events = []
        for sent in list(self.sent):
            command, effect = sent.command, sent.effect
            if effect is not None:
                self.sent.remove(sent)
                about = {"id": command.id, "verb": command.verb, "of": command.trial, "source": command.source}
                told = {**about, "effect": effect.state, "text": effect.text}
                events.append(Event("command", 0.0, command.trial, None, told))
        return events


def in_background(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Run a search in a thread of its own, so that a notebook's next cells can steer it.

    Returns:
        Its `result()` waits for the search and raises what it raises.

    >>> in_background(sum, [1, 2]).result()
    3
    """
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(function(*args, **kwargs))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="search", daemon=True).start()
    return done


def _load_study(study: Any, storage: Any) -> optuna.Study:
    import optuna

    from rapidfire_automl.storages import StorageError, load_study

    if isinstance(study, optuna.Study):
        return study
    if storage is None:
        raise ControlError(f"`storage` must be given beside study {study!r}, like sqlite:///study.db.")
    try:
        return load_study(storage, study)
    except StorageError as error:
        raise ControlError(f"`storage`: {error}") from None
