"""One of each kind of trouble in a whole search on a small real model: it ends right, and says what it has met."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rapidfire_automl.event_log import read_events
from rapidfire_automl.executor.checkpoints import disk_bytes
from rapidfire_automl.executor.journal import Journal, read
from tests.executor import resumable
from tests.executor.forking import Forked
from tests.executor.test_resume import ALL, assert_same

pytestmark = [pytest.mark.faults, pytest.mark.slow]

OPTIONS: dict[str, Any] = {"policy": "nop", "n_trials": 3}
WIDE: dict[str, Any] = {"policy": "nop", "n_trials": 3, "wide": True}
"""Adapters of 260 kB, checkpoints of 800 kB."""


def start(folder: Path, failpoints: str = "", **options: Any) -> Forked:
    """A search in a process of its own, its study beside its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return Forked(resumable.run, folder / "out", f"sqlite:///{folder / 'study.db'}", failpoints=failpoints, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    runs = {"joint": {**OPTIONS, "alone": False}, "alone": OPTIONS, "wide": WIDE}
    return {name: start(folder / name, **options).result() for name, options in runs.items()}


def kinds(folder: Path) -> list[str]:
    return [line.event.kind for line in read_events(folder / "out").lines]


# -- memory ------------------------------------------------------------------------------------------------------------


def test_out_of_memory_in_joint_passes_costs_nobody_anything(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """What does not fit is done again: two trials one by one, one by itself a second time."""
    failpoints = "pass.forward=oom@3,pass.backward=oom@4"
    found = start(tmp_path, failpoints, **OPTIONS, alone=False).result()
    assert_same(found, undisturbed["joint"], alone=False)
    told = [line.event for line in read_events(tmp_path / "out").lines if line.event.kind == "out_of_memory"]
    assert told
    assert [(event.trial, event.data["budget_tokens"]) for event in told] == [(None, 2048), (None, 1024)][: len(told)]


def test_who_does_not_fit_alone_fails_alone(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """The first pass of all is the check at start: it is done again, too, and the others' bits are the same."""
    found = start(tmp_path, "pass.forward=oom@1,pass.backward=oom@4-5", **OPTIONS).result()
    failed = [number for number, trial in found["trials"].items() if trial["state"] == "FAILED"]
    assert len(failed) == 1
    assert (
        "does not fit into memory, even with no other trial in it. Take smaller" in found["trials"][failed[0]]["error"]
    )
    for number in {"0", "1"} - {*failed}:  # what comes later is proposed by other values
        assert found["trials"][number] == undisturbed["alone"]["trials"][number]
    [ended] = [line.event for line in read_events(tmp_path / "out").lines if line.event.data.get("state") == "failed"]
    assert "Traceback" in ended.data["traceback"]


# -- disk --------------------------------------------------------------------------------------------------------------


def test_a_limit_on_files_pauses_checkpoints_until_it_is_lifted(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Checkpoints are larger than files may be; nothing else is. Training goes on, and what waits is written later."""
    found = start(tmp_path, **WIDE, file_limit_bytes=400_000, lifted_at=25).result()
    assert_same(found, undisturbed["wide"])
    told = [kind for kind in kinds(tmp_path) if kind.startswith("writing")]
    assert told == ["writing_paused", "writing_resumed"]
    assert "checkpoint" in kinds(tmp_path)[kinds(tmp_path).index("writing_paused") :]


def test_an_adapter_waits_for_room(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    found = start(tmp_path, "adapter.saving=full@1", **OPTIONS).result()
    assert_same(found, undisturbed["alone"])
    for number, folder in found["adapters"].items():
        assert (Path(folder) / "adapter_config.json").exists(), number


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB, mounted for the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "rapidfire-test", str(folder)]
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a disk of 1 MB takes root and `mount`")
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a disk of 1 MB can't be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_of_one_megabyte(undisturbed: dict[str, Any], small_disk: Path) -> None:
    """Study, journal, events and adapters are on it, too: they have room, checkpoints don't."""
    found = start(small_disk, **WIDE).result()
    assert_same(found, undisturbed["wide"])
    told = kinds(small_disk)
    assert told.count("writing_paused") == 1
    assert "writing_failed" not in told
    assert all(
        Path(folder, "adapter_model.safetensors").stat().st_size > 200_000 for folder in found["adapters"].values()
    )
    assert disk_bytes(small_disk) < 1 << 20
    assert not list(small_disk.rglob("*.tmp-*")) + list(small_disk.rglob("*.partial"))


@pytest.mark.skipif(not ALL, reason="`make test-faults` runs it")
def test_a_disk_that_is_full_and_gets_room(undisturbed: dict[str, Any], small_disk: Path) -> None:
    """Filled to the last byte in the middle of the search, and emptied: nothing is lost, checkpoints are written again.

    The study lies on it, too: Optuna's commits are tried until there is room.
    """
    study = f"sqlite:///{small_disk / 'study.db'}"
    process = Forked(resumable.run, small_disk / "out", study, **{**WIDE, "chunks": 6, "train_rows": 120})
    process.until(
        lambda: (
            (small_disk / "out" / "events.jsonl").exists()
            and "chunk_done" in (small_disk / "out" / "events.jsonl").read_text()
        )
    )
    ballast = small_disk / "ballast"
    end = time.monotonic() + 5.0
    with ballast.open("wb", buffering=0) as file:
        while time.monotonic() < end:  # whatever becomes free is taken at once
            with contextlib.suppress(OSError):
                while file.write(b"x" * 512):
                    pass
            time.sleep(0.01)
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    ballast.unlink()
    found = process.result()
    assert {trial["state"] for trial in found["trials"].values()} == {"COMPLETE"}
    resumed = len(found["events"]) - 1 - found["events"][::-1].index("writing_resumed")
    assert "checkpoint" in found["events"][resumed:]
    assert found["events"].index("storage_away") < found["events"].index("storage_back")
    log = read_events(small_disk / "out")
    assert [line.event.kind for line in log.lines].count("chunk_done") == found["trained"]
    assert not log.damaged
    assert read(small_disk / "out" / "journal.jsonl").over


def _journal_on_a_full_disk(folder: str) -> list[str]:
    """Entries that can't be written wait, in order, cut ones included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = Journal(Path(folder))
    resource.setrlimit(resource.RLIMIT_FSIZE, (110, hard))
    said = [journal.write("asked", trial=number).waits for number in range(6)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said.append(journal.write("over").waits)
    journal.close()
    return said


def test_the_journal_waits_for_room(tmp_path: Path) -> None:
    said = Forked(_journal_on_a_full_disk, str(tmp_path)).result()
    assert [bool(reason) for reason in said] == [False] * 3 + [True] * 3 + [False]
    past = read(tmp_path / "journal.jsonl")
    assert (past.asked, past.over) == (list(range(6)), True)
