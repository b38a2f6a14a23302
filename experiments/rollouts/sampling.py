"""A profiler that looks at the stacks of all threads every so often: cheap, and the same for every version of Python.

cProfile sees one thread, and slows Python code down more than it slows kernels.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

_PATIENCE_S = 1e-4
"""A thread gives way to the sampler within this time; with Python's 5 ms, kernels, which give way at once, would be
seen more often than they run."""


class StackSampler:
    """Where the one thread that is not waiting spends its time.

    Args:
        parts: Functions by the name of what they are part of; time inside is told apart from the rest.
        interval_s: Between two looks.
    """

    def __init__(self, parts: Mapping[str, Sequence[Callable[..., Any]]], interval_s: float = 0.002) -> None:
        self._parts = {function.__code__: name for name, functions in parts.items() for function in functions}
        self._interval_s = interval_s
        self._seconds: Counter[str] = Counter(dict.fromkeys((*parts, "host"), 0.0))
        self._inside: Counter[str] = Counter()
        self._lines: Counter[str] = Counter()
        self._looks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(_PATIENCE_S)
        self._thread.start()

    def stop(self, most: int = 40) -> dict[str, Any]:
        """Stop.

        Returns:
            `parts_s`: seconds by part (0 where no look fell), the rest as "host". `inside_s`: of the host's, by
            function, with what it calls. `lines_s`: of the host's, by the line that is at work, kernels it calls
            included. Both without what nearly all of the host's time passes through.
        """
        self._stop.set()
        self._thread.join()
        sys.setswitchinterval(self._switch_s)
        host_s = self._seconds["host"]
        inside = {name: seconds for name, seconds in self._inside.items() if seconds < 0.9 * host_s}
        return {
            "looks": self._looks,
            "parts_s": dict(self._seconds.most_common()),
            "inside_s": dict(Counter(inside).most_common(most)),
            "lines_s": dict(self._lines.most_common(most)),
        }

    def _run(self) -> None:
        mine = threading.get_ident()
        before = time.perf_counter()
        while not self._stop.wait(self._interval_s):
            working = [
                frame for thread, frame in sys._current_frames().items() if thread != mine and not _waits(frame.f_code)
            ]
            now = time.perf_counter()
            if working:  # where two are at work, one has the baton and the other is about to wait
                self._note(max(working, key=_depth), now - before)
            before = now

    def _note(self, frame: FrameType, seconds: float) -> None:
        self._looks += 1
        stack = list(_stack(frame))
        part = next((self._parts[each.f_code] for each in stack if each.f_code in self._parts), "host")
        self._seconds[part] += seconds
        if part == "host":
            self._lines[f"{_name(frame.f_code)}:{frame.f_lineno}"] += seconds
            for name in {_name(each.f_code) for each in stack}:
                self._inside[name] += seconds


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _depth(frame: FrameType) -> int:
    return sum(1 for _ in _stack(frame))


def _waits(code: CodeType) -> bool:
    return Path(code.co_filename).name in ("threading.py", "selectors.py", "connection.py")


def _name(code: CodeType) -> str:
    """`package/module.py:function`, the same on every machine."""
    path = Path(code.co_filename).as_posix()
    for root in ("/site-packages/", f"/python{sys.version_info[0]}.{sys.version_info[1]}/"):
        path = path.rpartition(root)[2]
    parts = path.split("/")
    for package in ("rapidfire_automl", "experiments"):
        if package in parts:
            path = "/".join(parts[len(parts) - 1 - parts[::-1].index(package) :])
    return f"{path}:{code.co_qualname}"
