"""Functions run in processes of their own, forked from one that has imported everything: real processes, real signals.

Importing torch and TRL takes longer than a whole search on the tiny base.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from rapidfire_automl.failpoints import VARIABLE

PRELOAD = (
    "tests.executor.resumable",
    "rapidfire_automl.cli",
    "rapidfire_automl.program",
    "rapidfire_automl.experiment",
)


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    return context


class Forked:
    """A process that runs a function.

    Args:
        function: A module's; what it returns must have a JSON form.
        given: Its arguments.
        failpoints: See `rapidfire_automl.failpoints`.
        options: Its arguments by name.
    """

    def __init__(self, function: Callable[..., Any], *given: Any, failpoints: str = "", **options: Any) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="forked-"))
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", VARIABLE: failpoints}
        arguments = (partial(function, *given, **options), environment, str(self._folder))
        self._process = _context().Process(target=_body, args=arguments, daemon=True)
        self._process.start()
        self._begin_s = time.monotonic()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code, the negative number of the signal that has killed it, or None while it runs."""
        return self._process.exitcode

    @property
    def out(self) -> str:
        """What it has written to stdout."""
        return (self._folder / "out").read_text(encoding="utf-8") if (self._folder / "out").exists() else ""

    @property
    def err(self) -> str:
        """What it has written to stderr."""
        return (self._folder / "err").read_text(encoding="utf-8") if (self._folder / "err").exists() else ""

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 240.0) -> int:
        """Wait for its end; a process that takes longer is killed.

        Raises:
            TimeoutError: It did.
        """
        self._process.join(timeout_s)
        if self.code is None:
            self.send(signal.SIGKILL)
            self._process.join()
            raise TimeoutError(f"It still ran after {timeout_s} s.\n{self.out[-2000:]}\n{self.err[-3000:]}")
        return self.code

    def ends_within(self, seconds: float) -> bool:
        """Whether it ends so soon."""
        self._process.join(seconds)
        return self.code is not None

    def result(self) -> Any:
        """What the function has returned."""
        code = self.wait()
        assert code == 0, f"exit code {code}\n{self.out[-2000:]}\n{self.err[-5000:]}"
        return json.loads((self._folder / "result").read_text(encoding="utf-8"))

    def killed(self) -> None:
        """It has died of SIGKILL."""
        code = self.wait()
        assert code == -signal.SIGKILL, f"exit code {code}\n{self.out[-2000:]}\n{self.err[-5000:]}"

    def until(self, condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
        """Wait until something is so, or the process has ended.

        Raises:
            TimeoutError: Neither came.
        """
        deadline = time.monotonic() + timeout_s
        while not condition() and self.code is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"Nothing came in {timeout_s} s.\n{self.out[-2000:]}\n{self.err[-3000:]}")
            time.sleep(0.01)


def _body(function: Callable[[], Any], environment: Mapping[str, str], folder: str) -> None:
    """In the process."""
    gc.freeze()  # what was imported is not walked at every trainer's `gc.collect`
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    try:
        result = function()
    except KeyboardInterrupt:  # as the interpreter does it
        traceback.print_exc()
        sys.exit(128 + signal.SIGINT)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    Path(folder, "result").write_text(json.dumps(result), encoding="utf-8")
