"""Equal steps and equal cost."""

from __future__ import annotations

import math

from rapidfire_automl.rankings import costs, generates, rank
from rapidfire_automl.records import TrialRecord
from rapidfire_policies.base import TrialState

COMPLETE, STOPPED, FAILED = TrialState.COMPLETE, TrialState.STOPPED, TrialState.FAILED


def trial(number: int, values: list[float], cost: int, state: TrialState = COMPLETE) -> TrialRecord:
    return TrialRecord(
        number, state=state, values=values, tokens=[cost] * len(values), generated=[4 * cost] * len(values)
    )


def test_the_cheap_one_wins_at_equal_cost() -> None:
    records = {
        0: trial(0, [0.2, 0.5, 0.6], 10),
        1: trial(1, [0.5, 0.65, 0.7], 20),
        2: trial(2, [0.6, 0.7, 0.9], 40),
        3: trial(3, [0.1], 20, STOPPED),
        4: trial(4, [0.3], 10, FAILED),
        5: trial(5, [math.nan, math.nan, math.nan], 10),
    }
    assert generates(records)
    assert costs(records[1]) == [100, 200, 300]
    found = rank(records, maximize=True)
    assert (found.chunks, [place.trial for place in found.equal_steps]) == (3, [2, 1, 0])
    # 150 tokens pay for three chunks of trial 0, one of trial 1 and none of trial 2.
    assert found.tokens == 150
    assert [(p.trial, p.value, p.chunk, p.tokens, p.cut) for p in found.equal_cost] == [
        (0, 0.6, 3, 150, False),
        (1, 0.5, 1, 100, False),
        (3, 0.1, 1, 100, True),
    ]


def test_the_best_within_the_cost_need_not_be_the_last() -> None:
    found = rank({0: trial(0, [0.3, 0.1, 0.2], 10)}, maximize=False)
    assert [(p.value, p.chunk) for p in found.equal_cost] == [(0.1, 2)]
    assert [(p.value, p.chunk) for p in found.equal_steps] == [(0.2, 3)]


def test_nothing_to_rank() -> None:
    assert rank({}, maximize=True).tokens is None
    stopped = rank({0: trial(0, [0.3], 10, STOPPED)}, maximize=True)
    assert (stopped.tokens, stopped.equal_cost, len(stopped.equal_steps)) == (None, (), 1)
    assert not generates({0: TrialRecord(0, tokens=[3])})
