"""Failpoints do nothing unless the environment asks, and then exactly once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from rapidfire_automl import failpoints
from rapidfire_automl.disk import is_full
from rapidfire_automl.failpoints import VARIABLE, FailpointError, hit


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoints, "_passed", {})


def test_nothing_happens_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    hit("a.b")
    monkeypatch.setenv(VARIABLE, "c.d=raise")
    hit("a.b")


def test_it_raises_the_nth_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "a.b=raise@2,c.d=raise")
    hit("a.b")
    with pytest.raises(FailpointError, match=r"a\.b was passed for the 2\. time"):
        hit("a.b")
    hit("a.b")
    with pytest.raises(FailpointError, match=r"c\.d"):
        hit("c.d")


@pytest.mark.parametrize("text", ["a", "a=b", "a=kill@0", "a=kill@x", "=kill", "a=kill@-1", "a=oom@2-"])
def test_bad_ones_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError, match="must be like"):
        hit("a")


def test_memory_and_the_disk_run_short_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "a=oom@2-3,b=full")
    hit("a")
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="passed for the"):
            hit("a")
    hit("a")
    with pytest.raises(OSError, match="No space left") as caught:
        hit("b")
    assert is_full(caught.value)


def passing(action: str) -> subprocess.Popen[str]:
    code = "from rapidfire_automl.failpoints import hit; hit('x'); print('once', flush=True); hit('x'); print('twice')"
    environment = os.environ | {VARIABLE: f"x={action}@2", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def test_kill() -> None:
    process = passing("kill")
    assert process.communicate(timeout=60)[0] == "once\n"
    assert process.returncode == -signal.SIGKILL


def test_stop() -> None:
    process = passing("stop")
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGSTOP
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=60)[0] == "once\ntwice\n"
    finally:
        process.kill()
