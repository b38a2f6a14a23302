"""Ctrl-C on the command line: the first ends things in good order, the second at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes, as a shell has them."""

GOES_ON = "The same command goes on with it."


@contextlib.contextmanager
def graceful(goes_on: Callable[[], bool]) -> Iterator[None]:
    """While open, the first Ctrl-C says what happens and raises, and the second ends the process.

    Leaving at once loses no more than SIGKILL does: what is on the disk is whole at every moment.

    Args:
        goes_on: Whether the same command would go on with what is interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            _write("\nLeft at once." + (f" {GOES_ON}" if goes_on() else ""), show_cursor=True)
            os._exit(INTERRUPTED)
        if goes_on():
            _write(
                "\nStopping: trials leave at their next step, checkpoints are written to their end. Ctrl-C once more "
                f"leaves at once. {GOES_ON}"
            )
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _write(text: str, *, show_cursor: bool = False) -> None:
    """To stderr, past all buffers and locks, which the interrupted code may hold."""
    with contextlib.suppress(OSError):
        if show_cursor and sys.stdout.isatty():
            os.write(1, b"\x1b[?25h")  # a live table has hidden it
        os.write(2, f"{text}\n".encode())
