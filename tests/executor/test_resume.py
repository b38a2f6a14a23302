"""A search that is killed and run again is the search that was not: real processes, real signals, a small real model."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rapidfire_automl.executor.journal import FolderInUse, Journal, SearchDiffers
from rapidfire_automl.failpoints import FailpointError
from rapidfire_policies import Decision, Verdict
from tests.executor import resumable

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


ALL = bool(os.environ.get("RAPIDFIRE_FAULTS"))
"""Whether `make test-faults` asks for every fault; otherwise one of each kind is tried."""
POLICIES = ("promotion", "asha") if ALL else ("promotion",)
KILLS = ["step=kill@11", "checkpoint.renaming=kill@4", "round.reported=kill@2", "trial.ended=kill@2"]
MORE_KILLS = ["step=kill@3", "checkpoint.writing=kill@2", "checkpoint.renamed=kill@5", "round.judging=kill@3"]
MORE_KILLS += ["round.judged=kill@1", "round.judged=kill@3", "trial.ended=kill@1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Searches nobody disturbs, by policy."""
    folder = tmp_path_factory.mktemp("whole")
    processes = {policy: start(folder / policy, {"policy": policy}) for policy in POLICIES}
    return {policy: finish(process) for policy, process in processes.items()}


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("where", [*KILLS, *(MORE_KILLS if ALL else [])])
def test_killed_and_run_again(whole: dict[str, dict[str, Any]], tmp_path: Path, where: str, policy: str) -> None:
    """Bit by bit the same adapters, the same verdicts with the same reasons, and at most a chunk a trial done again."""
    killed(start(tmp_path, {"policy": policy}, failpoints=where))
    found = finish(start(tmp_path, {"policy": policy}))
    assert found["trials"] == whole[policy]["trials"]
    assert found["optuna"] == whole[policy]["optuna"]
    assert "search_resumed" in found["events"]


@pytest.mark.skipif(not ALL, reason="`make test-faults` runs it: a minute")
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_moment(whole: dict[str, dict[str, Any]], tmp_path: Path, seed: int) -> None:
    """SIGKILL at a random moment, up to three times, then to the end."""
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 3)):
        process = start(tmp_path, {"policy": "promotion"})
        try:
            process.wait(timeout=draw.uniform(3.0, 12.0))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
    found = finish(start(tmp_path, {"policy": "promotion"}))
    if found["trained"]:
        assert found["trials"] == whole["promotion"]["trials"]
    assert found["optuna"] == whole["promotion"]["optuna"]


@pytest.mark.slow
def test_sigterm_leaves_a_search_that_goes_on(whole: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    process = start(tmp_path, {"policy": "promotion", "term_at": 9})
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, err[-3000:]
    found = finish(start(tmp_path, {"policy": "promotion"}))
    assert found["trials"] == whole["promotion"]["trials"]


# -- in this process: what is on the disk, and what is refused ---------------------------------------------------------


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, failpoint: str = "round.judged=raise@3") -> None:
    """A search that an error has ended."""
    monkeypatch.setattr("rapidfire_automl.failpoints._passed", {})
    monkeypatch.setenv("RAPIDFIRE_FAILPOINTS", failpoint)
    with pytest.raises(FailpointError):
        search(folder)
    monkeypatch.delenv("RAPIDFIRE_FAILPOINTS")


def search(folder: Path, **options: Any) -> dict[str, Any]:
    return resumable.run(folder / "out", f"sqlite:///{folder / 'study.db'}", policy="promotion", **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return search(tmp_path_factory.mktemp("undisturbed"))


def test_an_error_of_the_search_loses_nothing(
    undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, monkeypatch)
    found = search(tmp_path)
    assert found["trials"] == undisturbed["trials"]
    assert found["attempts"] > len(found["optuna"])


@pytest.mark.parametrize("damage", ["truncated", "bit", "pickle", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    interrupted(tmp_path, monkeypatch)
    newest = max(tmp_path.glob("out/trials/*/checkpoints/chunk-*"), key=lambda path: path.name)
    tensors = newest / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    if damage == "truncated":
        tensors.write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        content[len(content) // 2] ^= 1
        tensors.write_bytes(content)
    elif damage == "pickle":
        (newest / "optimizer.pt").write_bytes(pickle.dumps({"state": {}}))
    else:
        tensors.unlink()
    found = search(tmp_path)
    assert "checkpoint_damaged" in found["events"]
    assert found["trials"] == undisturbed["trials"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"chunks": 2}, "`chunks` was 3, is 2"),
        ({"hidden": 48}, "`base` was"),
        ({"train_rows": 14}, "`train_dataset` was"),
        ({"lowest": 1e-3}, "the search space of `lr` was"),
    ],
)
def test_another_search_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], says: str
) -> None:
    interrupted(tmp_path, monkeypatch)
    with pytest.raises(SearchDiffers, match=re.escape(says)):
        search(tmp_path, **changed)


def test_a_folder_in_which_somebody_searches_is_refused(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    with pytest.raises(FolderInUse, match="Another process searches in"):
        Journal(tmp_path)
    first.close()
    Journal(tmp_path).close()


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("search", facts={"study": "s"}, sampler_seed=1)
    journal.write("asked", trial=0)
    journal.write("round", verdicts=[[0, 1, "continue", "why not"]])
    journal.close()
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"kind": "round", "verdicts": [[0, 2, "st')
    again = Journal(tmp_path)
    assert (again.past.judged, again.past.final(0)) == ({0: 1}, None)
    again.write("round", verdicts=[[0, 2, "stop", "enough"]])
    again.close()
    last = Journal(tmp_path)
    assert last.past.final(0) == Decision(Verdict.STOP, "enough")
    last.close()


def test_a_search_that_is_over_is_not_gone_on_with(tmp_path: Path) -> None:
    first = search(tmp_path, n_trials=2)
    second = search(tmp_path, n_trials=2)
    assert len(first["optuna"]) == 2
    assert len(second["optuna"]) == 4
    assert "search_resumed" not in second["events"]
