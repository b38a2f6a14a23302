"""How `Auto`'s settings are chosen: speed first where it is asked for, then the worst pair, then the mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import provenance
from experiments.policies import tune
from experiments.policies.run import Job, Setting, play
from experiments.policies.tables import Table

HERE = Path(provenance.ROOT) / "experiments" / "policies"


def setting(name: str, speedup: float, *regrets: float) -> dict[str, Any]:
    pairs = [
        {"table": f"table {i}", "group": "TaskSet" if i == 0 else "other", "slots": 8, "regret": r, "speedup": speedup}
        for i, r in enumerate(regrets)
    ]
    return {"arguments": {"name": name}, "pairs": pairs}


def test_the_choice() -> None:
    slow = setting("slow", 5.0, 0.0, 0.0)
    worse = setting("worse", 9.0, 0.0, 0.2)
    tied = setting("tied", 6.5, 0.0303, 0.02)
    best = setting("best", 6.0, 0.0305, 0.01)
    assert tune.choose([slow, worse, tied, best])["arguments"] == {"name": "best"}
    assert tune.left_out([slow, worse, tied, best], "table 1") == {
        "table": "table 1", "arguments": {"name": "worse"}, "slots": [8], "regret": [0.2], "speedup": [9.0],
    }  # fmt: skip


def test_a_setting_is_measured_as_it_is_named() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=(12, 1, 1)) + 1 / np.arange(1.0, 11)[:, None] + rng.normal(0, 0.1, (12, 10, 8))
    table = Table("made up", "other", 8, scores.mean(axis=2), scores, params=[{}] * 12)
    for errors in (0.0, 2.0):
        arguments = {"window": 2, "errors": errors, "share": 0.25}
        together, few = tune.measure(table, arguments, [0, 4], range(3))
        assert (together["slots"], few["slots"]) == (0, 4)
        inner = {"is": "rising_bound", "window": 2, "keep": 1, "errors": errors}
        same = Setting("x", "ours", "policy", "spare", {"policy": inner, "share": 0.25}, True)
        outcome = play(Job(0, table, 4, same, range(3)))
        assert not isinstance(outcome, str)
        assert few["speedup"] == pytest.approx(outcome.speedup.mean())


def test_what_is_committed_is_of_this_rule_and_all_its_tables() -> None:
    results = json.loads((HERE / "tune.json").read_text(encoding="utf-8"))
    assert (results["status"], results["dirty"]) == ("complete", False)
    assert tune.choose(results["settings"])["arguments"] == results["chosen"]
    tables, hashes = [one["table"] for one in results["left_out"]], results["data"]
    assert {"sft", "dpo", "dpo accuracy", "products", "wrong_order"} < set(tables)
    assert {"tables.npz", "heldout_tables.npz"} < set(hashes)
    for one in results["settings"]:
        assert {pair["table"] for pair in one["pairs"]} == set(tables)
