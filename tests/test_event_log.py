"""`events.jsonl`: what is written, what a kill leaves of it, and how it is read back."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from rapidfire_automl import disk
from rapidfire_automl import event_log as module
from rapidfire_automl.event_log import FILE, EventLog, read_events
from rapidfire_automl.events import Event
from rapidfire_automl.refusals import FolderInUse


def step(number: int) -> Event:
    return Event("step", 1.5, 3, 1, {"step": number})


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_has_its_number_the_wall_clock_and_the_event(tmp_path: Path) -> None:
    with EventLog(tmp_path / FILE) as log:
        log(Event("chunk_done", 2.0, 3, 1, {"value": math.nan, "name": "zero\n\udc80", "best": -math.inf}))
        log(step(7))
    first, second = entries(tmp_path / FILE)
    moment = datetime.fromisoformat(first.pop("time"))
    assert moment.utcoffset() == timedelta(0)
    assert abs(moment.timestamp() - datetime.now().timestamp()) < 60
    assert first == {
        "seq": 1, "kind": "chunk_done", "time_s": 2.0, "trial": 3, "chunk": 1,
        "data": {"value": "NaN", "name": "zero\n\udc80", "best": "-Infinity"},
    }  # fmt: skip
    assert (second["seq"], second["data"]) == (2, {"step": 7})


def test_a_line_is_in_the_file_when_the_listeners_hear_of_it(tmp_path: Path) -> None:
    seen: list[int] = []
    with EventLog(tmp_path / FILE, [lambda event: seen.append(len(entries(tmp_path / FILE)))]) as log:
        log(step(1))
        log(step(2))
    log(step(3))  # after the end
    assert seen == [1, 2]
    assert len(entries(tmp_path / FILE)) == 2


def test_a_listener_that_raises_costs_nobody_else_anything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def raises(event: Event) -> None:
        raise RuntimeError("no")

    heard: list[Event] = []
    with EventLog(tmp_path / FILE, [raises, heard.append]) as log:
        log(step(1))
    assert heard == [step(1)]
    assert "A listener failed on step" in caplog.text


@pytest.mark.parametrize("tail", [b"", b'{"seq": 9, "ki', b'{"seq": 9, "kind": "step", "data": "\xc3'])
def test_what_goes_on_appends_and_counts_on(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / FILE
    with EventLog(path) as log:
        for number in range(3):
            log(step(number))
    with path.open("ab") as file:
        file.write(tail)
    log = read_events(tmp_path)
    assert (len(log.lines), log.torn, log.damaged) == (3, bool(tail), ())
    with EventLog(path) as log:
        log(step(3))
    assert [entry["seq"] for entry in entries(path)] == [1, 2, 3, 4]
    assert not read_events(tmp_path).torn


def test_a_second_log_is_refused_before_it_changes_anything(tmp_path: Path) -> None:
    path = tmp_path / FILE
    with EventLog(path) as log:
        log(step(0))
        with path.open("ab") as file:
            file.write(b'{"seq": 2, "ki')  # as if the first were just writing it
        before = path.read_bytes()
        with pytest.raises(FolderInUse, match=r"A search is under way in .*`rapidfire-automl cancel --run "):
            EventLog(path)
        assert path.read_bytes() == before
    with EventLog(path) as log:
        log(step(1))
    assert [entry["seq"] for entry in entries(path)] == [1, 2]


def test_where_there_are_no_locks_nobody_is_kept_out_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(disk.fcntl, "flock", flock)
    caplog.set_level(logging.WARNING, "rapidfire_automl")
    with EventLog(tmp_path / FILE) as log:
        log(step(0))
    assert len(entries(tmp_path / FILE)) == 1
    assert "can't be locked (No locks available)" in caplog.text
    assert disk.claim(tmp_path / "lock") is not None
    assert not disk.is_locked(tmp_path / FILE)


def test_a_process_that_was_forked_meanwhile_does_not_keep_it_locked(tmp_path: Path) -> None:
    """As a data loader's workers are: they have the same open files."""
    with EventLog(tmp_path / FILE) as log:
        log(step(0))
        forked = os.dup(log._lines.file.fileno())
    assert not disk.is_locked(tmp_path / FILE)
    os.close(forked)


def test_a_look_says_who_is_locked_and_makes_nothing(tmp_path: Path) -> None:
    path = tmp_path / FILE
    assert not disk.is_locked(path)
    assert not path.exists()
    with EventLog(path):
        assert disk.is_locked(path)
    assert not disk.is_locked(path)


def test_a_torn_line_longer_than_a_block_and_logs_without_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 8)
    path = tmp_path / FILE
    path.write_bytes(b'{"kind": "step"}\n{"kind": "step", "seq": 41}\n{"kind": "step"}\n' + b"x" * 5000)
    with EventLog(path) as log:
        log(step(0))
    assert [entry.get("seq") for entry in entries(path)] == [None, 41, None, 42]
    path.write_bytes(b"x" * 500)
    with EventLog(path) as log:
        log(step(0))
    assert [entry["seq"] for entry in entries(path)] == [1]


def test_verdicts_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(disk, "_sync", lambda file: synced.append(os.fstat(file).st_size))
    with EventLog(tmp_path / FILE) as log:
        log(step(1))
        assert synced == []
        log(Event("verdict", 1.0, 3, 1, {"verdict": "stop"}))
        assert synced == [(tmp_path / FILE).stat().st_size]


def test_a_verdict_told_again_is_written_once(tmp_path: Path) -> None:
    """A search that goes on tells its last verdicts again; those that the kill has cut off are written then."""
    heard: list[Event] = []
    first, second = (Event("verdict", 1.0, n, 1, {"verdict": "stop", "reason": "behind"}) for n in (3, 4))
    with EventLog(tmp_path / FILE) as log:
        log(first)
    with EventLog(tmp_path / FILE, [heard.append]) as log:
        for event in (first, second):
            log(replace(event, data={**event.data, "again": True}))
    assert [(entry["trial"], entry["seq"]) for entry in entries(tmp_path / FILE)] == [(3, 1), (4, 2)]
    assert [event.trial for event in heard] == [4]


def test_lines_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    """A real limit on the file's size, in a process of its own: a line is cut in the middle, and made whole later."""
    script = textwrap.dedent(
        """
        import logging, resource, signal, sys
        from pathlib import Path
        from rapidfire_automl.events import Event
        from rapidfire_automl.event_log import EventLog
        logging.basicConfig()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with EventLog(Path(sys.argv[1])) as log:
            log(Event("step", 0.0, 0, 0, {"step": 0}))
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
            for number in range(1, 5):
                log(Event("step", 0.0, 0, 0, {"step": number}))
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            log(Event("step", 0.0, 0, 0, {"step": 5}))
        """
    )
    words = [sys.executable, "-c", script, str(tmp_path / FILE)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(module.__file__).parents[1])
    assert [entry["data"]["step"] for entry in entries(tmp_path / FILE)] == list(range(6))
    assert done.stderr.count("its lines are kept for later") == 1
    assert os.strerror(errno.EFBIG) in done.stderr


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    endless = b'{"kind": "step", "time_s": 1' + b"0" * 400 + b"}"
    rows = [b'{"kind": "step", "trial": 1}', b"\x00\xff", b"[1, 2]", b"", b'{"kind": 3}', b"[" * 100_000, endless]
    odd = b'{"kind": "step", "trial": "1", "chunk": true, "data": [], "time_s": null, "seq": "x", "time": 5}'
    (tmp_path / FILE).write_bytes(b"\n".join([*rows, odd]) + b"\n")
    log = read_events(tmp_path)
    assert [line.event.trial for line in log.lines] == [1, None]
    assert (log.lines[1].event.chunk, log.lines[1].event.data, log.lines[1].seq) == (None, {}, 0)
    assert log.damaged == (2, 3, 5, 6, 7)
    assert not log.torn


def test_what_is_no_run_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        read_events(tmp_path / "none")
    with pytest.raises(ValueError, match=r"`run_dir` must hold events\.jsonl"):
        read_events(tmp_path)
