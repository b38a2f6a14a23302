"""The rungs and the cut, on exact tables."""

from __future__ import annotations

import math

import pytest

from rapidfire_policies import Decision, History, TrialHistory, TrialState, Verdict
from rapidfire_policies.rungs import rungs, top_fraction, values_at
from rapidfire_policies.survivors import keep_one


@pytest.mark.parametrize(
    ("min_resource", "reduction_factor", "chunks", "expected"),
    [
        (1, 3, 1, ()),
        (1, 3, 2, (1,)),
        (1, 3, 9, (1, 3)),
        (1, 3, 10, (1, 3, 9)),
        (1, 2, 8, (1, 2, 4)),
        (2, 4, 33, (2, 8, 32)),
        (5, 2, 5, ()),
        (1, 4, 256, (1, 4, 16, 64)),
    ],
)
def test_rungs(min_resource: int, reduction_factor: int, chunks: int, expected: tuple[int, ...]) -> None:
    assert rungs(min_resource, reduction_factor, chunks) == expected


@pytest.mark.parametrize(("count", "keep"), [(1, 1), (2, 1), (3, 1), (5, 1), (6, 2), (8, 2), (9, 3), (16, 5)])
def test_one_in_three_goes_on_and_never_nobody(count: int, keep: int) -> None:
    cut = top_fraction({number: float(count - number) for number in range(count)}, 3)
    assert cut.keep == keep
    assert {number for number in range(count) if cut.keeps(number)} == set(range(count - keep, count))
    assert cut.value == keep


def test_ties_rank_by_number_whatever_the_order_of_the_mapping() -> None:
    values = {7: 0.5, 2: 0.5, 9: 0.1, 4: 0.5}
    backwards = dict(reversed(values.items()))
    assert top_fraction(values, 2).ranks == top_fraction(backwards, 2).ranks == {9: 1, 2: 2, 4: 3, 7: 4}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_ranks_last_and_counts(bad: float) -> None:
    cut = top_fraction({0: bad, 1: 1e300, 2: bad, 3: -1e300}, 2)
    assert cut.ranks == {3: 1, 1: 2, 0: 3, 2: 4}
    assert cut.keep == 2


def test_a_cut_needs_values() -> None:
    with pytest.raises(ValueError, match="`values` must hold at least one value"):
        top_fraction({}, 2)


def test_values_at_counts_every_state_that_got_there() -> None:
    trials = tuple(TrialHistory(i, (0.1 * i,) * (i + 1), state) for i, state in enumerate(TrialState))
    assert values_at(History(trials, chunks=9), 3) == {2: 0.2, 3: 3 * 0.1, 4: 0.4}


def stop(*numbers: int) -> dict[int, Decision]:
    return {number: Decision(Verdict.STOP, "worse") for number in numbers}


def test_keep_one_prefers_the_most_advanced_then_the_best_then_the_oldest() -> None:
    trials = [TrialHistory(3, (0.1,)), TrialHistory(2, (0.9, 0.5)), TrialHistory(1, (0.9, 0.5))]
    history = History(tuple(trials), chunks=4)
    kept = keep_one(history, stop(1, 2, 3))
    assert [n for n, decision in kept.items() if decision.verdict is Verdict.CONTINUE] == [1]
    assert kept[1].reason == "worse; kept as the last finite trial"


@pytest.mark.parametrize(
    "other",
    [
        TrialHistory(1, (0.9,), TrialState.COMPLETE),
        TrialHistory(1, (0.9,), TrialState.RUNNING),
        TrialHistory(1, (0.9,), TrialState.PAUSED),
    ],
)
def test_keep_one_leaves_decisions_alone_where_another_finite_trial_survives(other: TrialHistory) -> None:
    history = History((TrialHistory(0, (0.1,)), other), chunks=4)
    assert keep_one(history, stop(0)) == stop(0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_keep_one_keeps_no_diverged_trial(value: float) -> None:
    complete = TrialHistory(1, (0.5, value), TrialState.COMPLETE)
    history = History((TrialHistory(0, (value,)), complete), chunks=4)
    assert keep_one(history, stop(0)) == stop(0)
