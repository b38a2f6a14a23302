"""The journal: what is written is read back, whatever characters a trial's error has."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rapidfire_automl.executor.journal import NAME, Journal, read

REASONS = {
    "a line separator": "ValueError: bad\u2028row",
    "a next line": "ValueError: bad\x85row",
    "a form feed and a carriage return": "ValueError: bad\x0c\rrow",
    "a file name that is no UTF-8": "FileNotFoundError: " + os.fsdecode(b"caf\xe9.jsonl"),
    "a letter": "ValueError: café",
}


@pytest.mark.parametrize("reason", REASONS.values(), ids=REASONS.keys())
def test_what_a_trial_has_ended_with_is_read_back(tmp_path: Path, reason: str) -> None:
    journal = Journal(tmp_path)
    journal.write("ended", trial=0, reason=reason)
    journal.close()
    assert read(tmp_path / NAME).ended == {0: {"kind": "ended", "trial": 0, "reason": reason}}


def test_a_journal_that_has_such_characters_as_they_are_is_read(tmp_path: Path) -> None:
    entries = [{"kind": "ended", "trial": trial, "reason": f"bad{odd}row"} for trial, odd in enumerate("\u2028\x85é")]
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    (tmp_path / NAME).write_text(lines, encoding="utf-8")
    assert list(read(tmp_path / NAME).ended) == [0, 1, 2]


def test_the_last_search_counts_and_is_not_over_because_one_before_it_is(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("search", facts={"study": "first"}, sampler_seed=1, anew=True)
    journal.write("asked", trial=7)
    journal.write("over")
    journal.write("search", facts={"study": "second"}, sampler_seed=2, anew=True)
    journal.write("asked", trial=0)
    journal.close()
    past = read(tmp_path / NAME)
    assert (past.facts, past.asked, past.over) == ({"study": "second"}, [0], False)
    lines = (tmp_path / NAME).read_bytes().split(b"\n")
    (tmp_path / NAME).write_bytes(b"\n".join([*lines[:3], b"\0\0", *lines[4:]]))
    past = read(tmp_path / NAME)
    assert (past.over, past.damaged) == (False, [4])
