"""A steered search that is killed and run again: each command has been applied once, and all goes on with it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from rapidfire_automl import Search
from rapidfire_automl.control import Command
from tests.executor import resumable
from tests.executor.forking import Forked

pytestmark = [pytest.mark.slow, pytest.mark.faults]
ALL = bool(os.environ.get("RAPIDFIRE_FAULTS"))
"""Whether `make test-faults` asks for every fault."""
OPTIONS = {"policy": "nop", "n_trials": 3, "steered": True}
AGAIN = " (before the search was resumed)"
MOMENTS = ["command.extended", "command.enqueued", "command.ruled", "command.policy", "command.enqueued@2"]
MOMENTS += ["command.ruled@2", "command.ruled@3", "step@9", "checkpoint.renamed@2", "round.judged@2", "trial.ended@1"]


def search(folder: Path, **options: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    return resumable.run(folder / "out", f"sqlite:///{folder / 'study.db'}", **{**OPTIONS, **options})


def killed(folder: Path, moment: str) -> bool:
    """Search in a process that dies at a moment; whether it has come to that."""
    folder.mkdir(parents=True, exist_ok=True)
    where, _, count = moment.partition("@")
    at, storage = f"{where}=kill@{count or 1}", f"sqlite:///{folder / 'study.db'}"
    process = Forked(resumable.run, folder / "out", storage, failpoints=at, **OPTIONS)
    if process.wait() == -signal.SIGKILL:
        return True
    (folder / "found.json").write_text(json.dumps(process.result()))
    return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The search that nobody kills."""
    return search(tmp_path_factory.mktemp("whole"))


def outcome(found: dict[str, Any]) -> dict[str, Any]:
    """What a trial has come to, whoever trained beside it meanwhile: a trial that waits to be asked for may be numbered
    otherwise, and knows itself by its parameters."""
    told = [
        {name: trial[name] for name in ("state", "params", "values", "adapter", "error")}
        for trial in found["trials"].values()
    ]
    return {json.dumps(trial["params"]): trial for trial in told}


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "journal.jsonl").read_text().splitlines()]


def test_what_the_script_does(whole: dict[str, Any]) -> None:
    states = {number: (trial["state"], len(trial["values"])) for number, trial in whole["trials"].items()}
    assert states == {
        "0": ("COMPLETE", 4), "1": ("COMPLETE", 3), "2": ("STOPPED", 1), "3": ("COMPLETE", 3), "4": ("COMPLETE", 3)
    }  # fmt: skip
    assert whole["judges"] == ["", "Patience(Nop)"]
    assert list(whole["commands"]) == ["extend", "clone", "pause", "policy", "add", "resume", "stop"]
    assert whole["trials"]["0"]["verdicts"][:2] == [
        [0, "pause", "paused by Python"],
        [0, "continue", "resumed by Python"],
    ]


def test_killed_and_run_again(whole: dict[str, Any], tmp_path: Path) -> None:
    """When the policy has just been swapped: a clone waits in the queue, its source is paused in the middle of a chunk,
    extended since its last checkpoint, which it has not."""
    assert killed(tmp_path, "command.policy")
    shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("clones"))
    # Another terminal has sent these to the search that was killed; the second had been applied there.
    other = Search(study="search", storage=f"sqlite:///{tmp_path / 'study.db'}")
    stale, known = other.stop(1), other._send(Command("extend", 0, {"chunks": 1}, id="extend"))
    found = search(tmp_path)
    assert outcome(found) == outcome(whole)
    assert {n: t["params"] for n, t in found["trials"].items()} == {n: t["params"] for n, t in whole["trials"].items()}
    assert stale.effect is not None and stale.effect.text.startswith("stale: it was sent to attempt 1 of this search")
    assert known.effect is not None and known.effect.applied and known.effect.text.endswith(AGAIN)
    assert found["judges"] == ["", "Patience(Nop)"]
    noted = sorted(entry["command"] for entry in entries(tmp_path) if "command" in entry)
    assert noted == ["extend", "pause", "policy", "resume", "stop"], "each once"
    # The script has sent them all again where their moments came again.
    assert {name for name, text in found["commands"].items() if text.endswith(AGAIN)} >= {"extend", "clone", "policy"}
    assert len(found["trials"]) == 5
    assert not (tmp_path / "out" / "clones").exists()
    # What the clone was to begin with is lost: it fails, and nobody else.
    found = search(tmp_path / "copy")
    assert [number for number, trial in found["trials"].items() if trial["state"] == "FAILED"] == ["2"]
    assert found["trials"]["2"]["error"].endswith("is gone with the process that kept it. Clone again.")


@pytest.mark.skipif(not ALL, reason="`make test-faults` runs it: minutes")
@pytest.mark.parametrize(
    "moments", [(moment,) for moment in MOMENTS] + list(itertools.product(MOMENTS[:4], MOMENTS[3:]))
)
def test_killed_at_every_moment(whole: dict[str, Any], tmp_path: Path, moments: tuple[str, ...]) -> None:
    done = False
    for moment in moments:
        done = done or not killed(tmp_path, moment)  # a moment that does not come again ends the search
    told = json.loads((tmp_path / "found.json").read_text()) if done else search(tmp_path)
    assert outcome(told) == outcome(whole)
