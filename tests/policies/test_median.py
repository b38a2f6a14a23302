"""The median rule against a worked table."""

from __future__ import annotations

import math

import pytest

from rapidfire_policies import History, Median, TrialHistory, TrialState

# After chunk 1: 5 trials. After chunk 2: 0 and 1 stand there, 2 was stopped before it, 4 is paused after it.
TABLE = (
    TrialHistory(0, (0.50, 0.40)),
    TrialHistory(1, (0.60, 0.45)),
    TrialHistory(2, (0.90,), TrialState.STOPPED),
    TrialHistory(3, (0.70,)),
    TrialHistory(4, (0.55, 0.41, 0.30), TrialState.PAUSED),
)


def stopped(policy: Median, *trials: TrialHistory) -> set[int]:
    return {n for n, d in policy.decide(History(trials, chunks=6)).items() if d.verdict == "stop"}


def test_worked_table() -> None:
    # 0: 0.40 against median(0.45, 0.41) = 0.43. 1: 0.45 against 0.405.
    # 3: 0.70 against median(0.5, 0.6, 0.9, 0.55) = 0.575.
    assert stopped(Median(), *TABLE) == {1, 3}
    assert stopped(Median(min_resource=2), *TABLE) == {1}
    assert stopped(Median(min_peers=3), *TABLE) == {3}


def test_ties_go_on_and_nan_is_no_peer() -> None:
    assert stopped(Median(), TrialHistory(0, (1.0,)), TrialHistory(1, (1.0,))) == set()
    assert stopped(Median(), TrialHistory(0, (1.0,)), TrialHistory(1, (math.nan,))) == {1}
    assert stopped(Median(), TrialHistory(0, (math.nan,)), TrialHistory(1, (math.inf,))) == {0, 1}


@pytest.mark.parametrize("name", ["min_resource", "min_peers"])
def test_bad_arguments(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be >= 1, got 0"):
        Median(**{name: 0})
