"""Memory that is free goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def give_back(generation: int = 2) -> None:
    """Collect garbage, and return what the C library holds for later; does only the first where it is not glibc.

    To be called after a phase that needed much more than the next: otherwise its peak stays part of the process's size.

    Args:
        generation: Of the garbage collection, as for `gc.collect`.
    """
    gc.collect(generation)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
