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
        self._follower = None if run_dir is None else Follower(run_dir)
        self._mailbox: FolderMailbox | StudyMailbox
        if run_dir is not None:
            self._mailbox = FolderMailbox(run_dir)
            if (self._mailbox.run_dir / "workers").is_dir():
                raise ControlError(f"Several workers search in {run_dir}: name their study and its storage instead.")
            if self._mailbox.listener() is None and not (self._mailbox.run_dir / "events.jsonl").exists():
                raise ControlError(f"{run_dir} is no run folder: it has no events.jsonl.")
        else:
            self._mailbox = StudyMailbox(_load_study(study, storage))

    def _send(self, command: Command) -> Sent:
        what = self.source if command.source == OWN_SOURCE else command.source
        return self._mailbox.send(replace(command, source=sender(what)))

    def events(self) -> list[Event]:
        """What has happened since the last call, or since the search began, from the run folder's `events.jsonl`."""
        return [] if self._follower is None else self._follower.read()


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

    from rapidfire_automl.errors_of_storages import redacted
    from rapidfire_automl.storages import open_storage, shown

    if isinstance(study, optuna.Study):
        return study
    if storage is None:
        raise ControlError(f"`storage` must be given beside study {study!r}, like sqlite:///study.db.")
    try:
        opened = open_storage(storage) if isinstance(storage, str) else storage
        return optuna.load_study(study_name=study, storage=opened)
    except Exception as error:  # every storage has its own kinds of errors
        where = shown(storage) if isinstance(storage, str) else type(storage).__name__
        why = redacted(str(error)) or type(error).__name__
        raise ControlError(f"Study {study!r} cannot be opened in {where}: {why}") from None
