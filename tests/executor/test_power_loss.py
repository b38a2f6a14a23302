"""What a search relies on is on the disk, contents and names, before it relies on it: a power cut takes none of it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rapidfire_automl import disk
from rapidfire_automl.executor.checkpoints import chunk_folder, write
from rapidfire_automl.executor.journal import Journal
from rapidfire_automl.experiment_folders import ExperimentFolder
from tests.executor.searches import LRS, by_lr, search, study_of
from tests.executor.test_checkpoints import snapshot

DESCRIPTORS = Path("/proc/self/fd")
pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not DESCRIPTORS.is_dir(), reason="what a descriptor is of, /proc tells"),
]


class Disk:
    """What would be left of a folder after a power cut: files whose contents, and names whose folders, were synced."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._contents: set[Path] = set()
        self._names: set[Path] = {root}
        self._lock = threading.Lock()
        self.ended: list[str] = []
        self.lost: list[str] = []

    def synced(self, path: Path) -> None:
        """A file or folder was."""
        with self._lock:
            if path.is_dir():
                self._names = {name for name in self._names if name.parent != path} | {*path.iterdir()}
            else:
                self._contents.add(path)
            if path.name == "journal.jsonl":
                self._read(path)

    def renamed(self, source: Path, to: Path) -> None:
        """What is in a folder moves with it; its own name waits for its parent."""
        with self._lock:
            for known in (self._contents, self._names):
                moved = {path for path in known if path.is_relative_to(source)}
                known -= moved
                known |= {to / path.relative_to(source) for path in moved}
            self._names.discard(to)

    def missing(self, path: Path) -> list[str]:
        """What a power cut would take of a file or folder."""
        above = [folder for folder in path.parents if folder.is_relative_to(self._root)]
        below = [path, *path.rglob("*")]
        names = [entry for entry in (*above, *below) if entry not in self._names]
        contents = [entry for entry in below if entry.is_file() and entry not in self._contents]
        shown = [f"name of {entry}" for entry in names] + [f"content of {entry}" for entry in contents]
        return [line.replace(str(self._root), "") for line in shown]

    def _read(self, journal: Path) -> None:
        self.lost += self.missing(journal)
        last = json.loads(journal.read_text().splitlines()[-1])
        if last["kind"] == "ended" and last["adapter"] is not None:
            self.ended.append(last["adapter"])
            self.lost += self.missing(Path(last["adapter"]))


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """The test's folder, from before anything is written to it."""
    found = Disk(tmp_path)

    def then_say(sync: Callable[[int], None]) -> Callable[[int], None]:
        def synced(descriptor: int) -> None:
            sync(descriptor)
            found.synced((DESCRIPTORS / str(descriptor)).readlink())

        return synced

    rename = os.rename

    def renamed(source: Any, to: Any, **options: Any) -> None:
        rename(source, to, **options)
        found.renamed(Path(source), Path(to))

    monkeypatch.setattr(disk, "_sync", then_say(disk._sync))
    monkeypatch.setattr(os, "fsync", then_say(os.fsync))
    monkeypatch.setattr(os, "rename", renamed)
    return found


def test_a_checkpoint(watched: Disk, tmp_path: Path) -> None:
    """Written, replaced, and in folders that are new."""
    folder = chunk_folder(tmp_path / "trials" / "0" / "checkpoints", 1)
    for number in (1.0, 2.0):
        write(folder, snapshot(number))
        assert watched.missing(folder) == []


def test_a_journal(watched: Disk, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "runs" / "search")
    journal.write("search", facts={}, sampler_seed=1)
    journal.close()
    assert watched.missing(tmp_path / "runs" / "search" / "journal.jsonl") == watched.lost == []


def test_an_experiment_s_folder(watched: Disk, tmp_path: Path) -> None:
    path = ExperimentFolder(tmp_path / "experiments", "mine", {}).path
    assert "name of /experiments/mine" not in watched.missing(path)


def test_an_adapter_before_its_trial_s_end_is_journaled(watched: Disk, tmp_path: Path) -> None:
    """And the journal itself, at every entry; trainers write below the same folders."""
    done = search(
        LRS[:2],
        study=study_of(LRS[:2], storage=f"sqlite:///{tmp_path / 'study.db'}"),
        objective=lambda executor: by_lr(executor, save_strategy="steps", save_steps=1, output_dir="trainer_output"),
        output_dir=tmp_path / "out",
    )
    assert sorted(watched.ended) == sorted(str(record.adapter) for record in done.executor.records.values())
    assert watched.lost == []
