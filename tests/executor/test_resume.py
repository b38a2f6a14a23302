"""A search that is killed and run again is the search that was not: real processes, real signals, a small real model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, options: Mapping[str, Any], failpoints: str = "", **more: str) -> subprocess.Popen[str]:
    """A search in `folder` in a process of its own; the same command goes on with it."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "RAPIDFIRE_FAILPOINTS": failpoints,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "policies")]),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        **more,
    }
    command = [
        sys.executable,
        "-m",
        "tests.executor.resumable",
        str(folder / "out"),
        f"sqlite:///{folder / 'study.db'}",
    ]
    return subprocess.Popen(
        [*command, json.dumps(dict(options))],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a search that ends well has come to."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def killed(process: subprocess.Popen[str]) -> None:
    """The process has died of SIGKILL."""
    _, err = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, err[-3000:]


def without_events(found: Mapping[str, Any]) -> dict[str, Any]:
    """Trials with their verdicts and adapters."""
    trials: dict[str, Any] = found["trials"]
    return trials


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Searches nobody disturbs, by policy."""
    folder = tmp_path_factory.mktemp("whole")
    processes = {policy: start(folder / policy, {"policy": policy}) for policy in ("asha", "promotion")}
    return {policy: finish(process) for policy, process in processes.items()}


KILLS = [
    "step=kill@3",
    "step=kill@11",
    "checkpoint.renaming=kill@4",
    "round.reported=kill@2",
    "round.judging=kill@3",
    "round.judged=kill@3",
    "trial.ended=kill@2",
]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["asha", "promotion"])
@pytest.mark.parametrize("where", KILLS)
def test_killed_and_run_again(whole: dict[str, dict[str, Any]], tmp_path: Path, where: str, policy: str) -> None:
    """Bit by bit the same adapters, the same verdicts with the same reasons, and at most a chunk a trial done again."""
    killed(start(tmp_path, {"policy": policy}, failpoints=where))
    found = finish(start(tmp_path, {"policy": policy}))
    assert without_events(found) == without_events(whole[policy])
    assert found["optuna"] == whole[policy]["optuna"]
    assert "search_resumed" in found["events"]


@pytest.mark.slow
def test_killed_again_and_again(whole: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    for where in ("step=kill@5", "round.judged=kill@2", "checkpoint.renaming=kill@3", "step=kill@4"):
        killed(start(tmp_path, {"policy": "promotion"}, failpoints=where))
    found = finish(start(tmp_path, {"policy": "promotion"}))
    assert without_events(found) == without_events(whole["promotion"])
