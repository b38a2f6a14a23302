"""A search that runs in another process: the verbs, and what it has told so far. Torch-free."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rapidfire_automl.control import Command, ControlError, Controls, Sent
from rapidfire_automl.mailboxes import FolderMailbox, StudyMailbox

if TYPE_CHECKING:
    import optuna


class Search(Controls):
    """A search that runs in another process, to be steered from here: `Search("runs/first").pause(3)`.

    Args:
        run_dir: Its run folder.
        study: Or its study: a name with `storage`, or the study itself.
        storage: URL of the study's storage.
        source: What the search's log says of where commands come from.

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
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.source = source or f"Python, process {os.getpid()} on {socket.gethostname()}"
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
        return self._mailbox.send(replace(command, source=self.source))

    def events(self, skip: int = 0) -> list[dict[str, Any]]:
        """What has happened so far, from the run folder's `events.jsonl`, without the first `skip`."""
        if self.run_dir is None:
            return []
        found = []
        with contextlib.suppress(OSError), (self.run_dir / "events.jsonl").open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if number >= skip and line.endswith("\n"):  # the last line may be half written
                    found.append(json.loads(line))
        return found


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
