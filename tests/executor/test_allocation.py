"""Policies that pause to say who trains next, on the real executor: searches end, repeat, and keep to their slots."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rapidfire_automl.replay import replay
from rapidfire_policies import CostAware, Policy, SequentialHalving, TopTwoThompson
from tests.executor.searches import LRS, search

pytestmark = pytest.mark.slow

POLICIES = [SequentialHalving(), TopTwoThompson(), CostAware(SequentialHalving())]


def made_up(trainer: Any) -> float:
    """Falls with the chunks; the trial with the third learning rate is best."""
    return abs(LRS.index(trainer.args.learning_rate) - 2) + 1.0 / max(1, trainer.state.global_step)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("max_paused", [2, 6])
def test_it_does_what_the_simulation_says(policy: Policy, max_paused: int) -> None:
    done = search(LRS[:6], policy, slots=2, max_paused=max_paused, chunks=6, metric=made_up)
    curves = np.array([[abs(n - 2) + 1.0 / step for step in range(1, 7)] for n in range(6)])
    costs = np.array([[record.tokens[0]] * 6 for record in done.executor.records.values()], dtype=float)
    expected = replay(curves, policy, slots=2, max_alive=2 + max_paused, costs=costs)
    if not isinstance(policy, CostAware):  # tokens of equal shares of the examples differ a little
        assert [len(values) for values in done.values().values()] == expected.resource.tolist()
    assert done.study.best_trial.params["lr"] == LRS[2]
    assert set(done.states()) == {"COMPLETE", "PRUNED"}
    assert sum(map(len, done.values().values())) < 30
    spans = [span for record in done.executor.records.values() for span in record.spans]
    for start, _ in spans:
        assert sum(begin <= start < end for begin, end in spans) <= 2


def test_draws_repeat() -> None:
    found = [search(LRS[:6], TopTwoThompson(chance=1e-6), slots=2, max_paused=4, chunks=6) for _ in range(2)]
    verdicts = [[record.verdicts for record in done.executor.records.values()] for done in found]
    assert verdicts[0] == verdicts[1]


@pytest.mark.parametrize("policy", POLICIES[:2], ids=repr)
def test_under_optunas_own_threads(policy: Policy) -> None:
    done = search(LRS[:4], policy, slots=2, threads=True, metric=made_up)
    assert done.study.best_trial.params["lr"] == LRS[2]
    assert set(done.states()) == {"COMPLETE", "PRUNED"}
