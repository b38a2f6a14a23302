"""Failpoints: places where a test makes the process die, stop or raise, named in an environment variable.

`RAPIDFIRE_FAILPOINTS="checkpoint.renaming=kill@3,round.reported=raise"`: SIGKILL at the third time the first is passed,
an exception at the first time the second is. Without the variable a failpoint does nothing.
"""

from __future__ import annotations

import os
import signal
import threading

VARIABLE = "RAPIDFIRE_FAILPOINTS"
_ACTIONS = ("kill", "stop", "raise")
_lock = threading.Lock()
_passed: dict[str, int] = {}


class FailpointError(RuntimeError):
    """What a failpoint raises."""


def parse(text: str) -> dict[str, tuple[str, int]]:
    """What to do where: action and the how-manieth time, by failpoint.

    Raises:
        ValueError: It is not of the form `name=action@n`.

    >>> parse("checkpoint.renaming=kill@3, round.reported=raise")
    {'checkpoint.renaming': ('kill', 3), 'round.reported': ('raise', 1)}
    """
    wanted = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, rest = entry.partition("=")
        action, _, count = rest.partition("@")
        count = count or "1"
        if not name or action not in _ACTIONS or not count.isdecimal() or int(count) < 1:
            raise ValueError(f"`{VARIABLE}` must be like 'checkpoint.renaming=kill@3' ({_ACTIONS}), got {entry!r}.")
        wanted[name] = (action, int(count))
    return wanted


def hit(name: str) -> None:
    """Pass a failpoint: `kill` is SIGKILL to the process itself, `stop` SIGSTOP, `raise` an exception.

    Raises:
        FailpointError: The environment asks for it.
        ValueError: The environment variable can't be read.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return
    action, count = parse(text).get(name, ("", 0))
    if not action:
        return
    with _lock:
        _passed[name] = passed = _passed.get(name, 0) + 1
    if passed != count:
        return
    if action == "raise":
        raise FailpointError(f"The failpoint {name} was passed for the {passed}. time.")
    os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
