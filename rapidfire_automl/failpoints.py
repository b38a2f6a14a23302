"""Failpoints: places where a test makes the process die, stop, raise or run short, named in an environment variable.

`RAPIDFIRE_FAILPOINTS="checkpoint.renaming=kill@3,pass.forward=oom@2-5"`: SIGKILL at the third time the first is passed,
no memory for the second from the second time to the fifth. Without the variable a failpoint does nothing.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from dataclasses import dataclass

VARIABLE = "RAPIDFIRE_FAILPOINTS"
_ACTIONS = ("kill", "stop", "raise", "oom", "full")
_COUNT = r"[1-9][0-9]*"
_ENTRY = re.compile(rf"(?P<name>[^=]+)=(?P<action>{'|'.join(_ACTIONS)})(@(?P<first>{_COUNT})(-(?P<last>{_COUNT}))?)?")
_lock = threading.Lock()
_passed: dict[str, int] = {}


class FailpointError(RuntimeError):
    """What a failpoint raises."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to happen at a failpoint.

    Args:
        action: "kill" (SIGKILL to the process itself), "stop" (SIGSTOP), "raise", "oom" (out of memory) or "full"
            (no space left on the disk).
        first: At the how-manieth time.
        last: Until which.
    """

    action: str
    first: int = 1
    last: int = 1


def parse(text: str) -> dict[str, Wanted]:
    """What is to happen where.

    Raises:
        ValueError: It is not of the form `name=action@n`.

    >>> parse("checkpoint.renaming=kill@3, pass.forward=oom@2-5")["pass.forward"]
    Wanted(action='oom', first=2, last=5)
    """
    wanted = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        found = _ENTRY.fullmatch(entry)
        if found is None:
            raise ValueError(f"`{VARIABLE}` must be like 'checkpoint.renaming=kill@3' ({_ACTIONS}), got {entry!r}.")
        first = int(found["first"] or 1)
        wanted[found["name"]] = Wanted(found["action"], first, int(found["last"] or first))
    return wanted


def hit(name: str) -> None:
    """Pass a failpoint.

    Raises:
        FailpointError: The environment asks for it.
        torch.OutOfMemoryError: Likewise.
        OSError: Likewise; ENOSPC.
        ValueError: The environment variable can't be read.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return
    wanted = parse(text).get(name)
    if wanted is None:
        return
    with _lock:
        _passed[name] = passed = _passed.get(name, 0) + 1
    if not wanted.first <= passed <= wanted.last:
        return
    said = f"The failpoint {name} was passed for the {passed}. time."
    match wanted.action:
        case "raise":
            raise FailpointError(said)
        case "oom":
            import torch

            raise torch.OutOfMemoryError(said)
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        case action:
            os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
