"""Ctrl-C, Ctrl-C again, SIGTERM: the command line leaves as it says, and the same command goes on, but not twice."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_end_to_end import base, command, folder
from tests.executor.forking import Forked

__all__ = ["base", "folder"]
pytestmark = [pytest.mark.faults, pytest.mark.slow]

SMALL = ("-q", "-s", "search.n_trials=3", "-s", "search.slots=2", "-s", "search.chunks=3", "-s", "search.policy=nop")


def _cli(words: list[str]) -> None:
    """`rapidfire-automl ...`"""
    from rapidfire_automl.cli import app

    sys.argv = ["rapidfire-automl", *words]
    app()


def run(folder: Path, out: Path) -> Forked:
    words = command(folder, "sft", *SMALL, "--out", str(out), epochs=8)
    return Forked(_cli, words[words.index("run") :])


def trained(out: Path) -> bool:
    """Whether a chunk was done and judged."""
    events = out / "events.jsonl"
    return events.exists() and '"verdict"' in events.read_text()


def values(out: Path) -> dict[str, Any]:
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "complete"
    found: dict[str, Any] = summary["values"]
    return found


def test_signals_end_a_search_that_goes_on(folder: Path) -> None:
    """One search after the other, and each is the same in the end."""
    whole = run(folder, folder / "whole")
    assert whole.wait() == 0, whole.err
    expected = values(folder / "whole")
    for name, signals, code, says in (
        ("once", [signal.SIGINT], 130, "Interrupted; finished trials are kept. The same command goes on with it."),
        ("twice", [signal.SIGINT, signal.SIGINT], 130, "Left at once. The same command goes on with it."),
        (
            "terminated",
            [signal.SIGTERM],
            143,
            "Terminated; finished trials are kept. The same command goes on with it.",
        ),
    ):
        out = folder / name
        process = run(folder, out)
        process.until(lambda out=out: trained(out))
        begin = time.monotonic()
        for number in signals:
            process.send(number)
            time.sleep(0.02)
        assert process.wait() == code, (name, process.err)
        assert says in process.err, (name, process.err)
        assert ("Ctrl-C once more leaves at once." in process.err) == (signal.SIGINT in signals)
        assert "Traceback" not in process.err
        assert time.monotonic() - begin < (5 if name == "twice" else 20), name
        assert (out / "summary.json").exists() or name == "twice"  # which may come when it is written already
        again = run(folder, out)
        assert again.wait() == 0, (name, again.err)
        assert '"search_resumed"' in (out / "events.jsonl").read_text()
        found = values(out)
        assert found.keys() == expected.keys()
        for number, curve in expected.items():
            assert found[number] == pytest.approx(curve, rel=1e-5), (name, number)


def test_the_same_command_while_it_still_runs_is_refused_and_changes_nothing(folder: Path) -> None:
    """The first is stopped meanwhile, so that it does not write itself; then it goes on to its end."""
    out = folder / "out"
    first = run(folder, out)
    first.until(lambda: trained(out))
    first.send(signal.SIGSTOP)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {"events.jsonl", "search.json", "study.db", "journal.jsonl"} <= {path.name for path in before}
    try:
        second = run(folder, out)
        assert second.wait(60.0) == 2, second.err
        [line] = second.err.strip().splitlines()
        assert line.startswith(f"error: A search is under way in {out}. Wait for it, end it with `rapidfire-automl")
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    finally:
        first.send(signal.SIGCONT)
    assert first.wait() == 0, first.err
    assert len(values(out)) == 3
    assert '"search_resumed"' not in (out / "events.jsonl").read_text()
