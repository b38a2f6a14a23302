"""The median rule against worked tables and a slow reference."""

from __future__ import annotations

import math
from statistics import fmean, median

import pytest

from rapidfire_policies import History, Median, TrialHistory, TrialState
from rapidfire_policies.survivors import is_finite
from rapidfire_policies.testing import draw_histories

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


def test_worked_table_of_running_averages() -> None:
    # Averages after chunk 2: 0.45 (0), 0.525 (1), 0.48 (4). 0: 0.40 against 0.5025. 1: 0.45 against 0.465.
    # 3: 0.70 against median(0.5, 0.6, 0.9, 0.55) = 0.575.
    assert stopped(Median(), *TABLE) == {3}
    assert stopped(Median(grace=2), *TABLE) == set()
    # The best value, 0.47 or 0.49, against median(0.45, 0.525, 0.48) = 0.48, whatever the last one is.
    good, bad = TrialHistory(5, (0.47, 0.90)), TrialHistory(5, (0.49, 0.90))
    assert stopped(Median(grace=2), *TABLE, good) == set()
    assert stopped(Median(grace=2), *TABLE, bad) == {5}
    assert stopped(Median(grace=2, min_peers=4), *TABLE, bad) == set()


def test_worked_table_of_last_values() -> None:
    # 0: 0.40 against median(0.45, 0.41) = 0.43. 1: 0.45 against 0.405.
    # 3: 0.70 against median(0.5, 0.6, 0.9, 0.55) = 0.575.
    assert stopped(Median(average=False), *TABLE) == {1, 3}
    assert stopped(Median(grace=2, average=False), *TABLE) == {1}
    assert stopped(Median(min_peers=3, average=False), *TABLE) == {3}


@pytest.mark.parametrize("average", [True, False])
def test_ties_go_on_and_nan_is_no_peer(average: bool) -> None:
    rule = Median(average=average)
    assert stopped(rule, TrialHistory(0, (1.0,)), TrialHistory(1, (1.0,))) == set()
    assert stopped(rule, TrialHistory(0, (1.0,)), TrialHistory(1, (math.nan,))) == {1}
    assert stopped(rule, TrialHistory(0, (math.nan,)), TrialHistory(1, (math.inf,))) == {0, 1}


def test_a_value_that_was_not_finite_once() -> None:
    """It is never a trial's best; an average over it is none, a last value after it is one."""
    recovered = TrialHistory(0, (-math.inf, 0.2))
    assert stopped(Median(), recovered, TrialHistory(1, (0.9, 0.5))) == set()
    assert stopped(Median(average=False), recovered, TrialHistory(1, (0.9, 0.5))) == {1}


def slowly(trial: TrialHistory, history: History, rule: Median) -> bool:
    """The rule for a trial with a finite last value, from the docstring, in plain loops."""
    r = trial.resource
    peers = []
    for other in history.trials:
        if other.number == trial.number or other.resource < r:
            continue
        seen = other.values[:r] if rule.average else other.values[r - 1 : r]
        if all(map(math.isfinite, seen)):
            peers.append(fmean(seen))
    own = min(v for v in trial.values if math.isfinite(v)) if rule.average else trial.values[-1]
    return r >= rule.grace and len(peers) >= rule.min_peers and own > median(peers)


@pytest.mark.parametrize("rule", [Median(), Median(average=False), Median(2, 3), Median(2, 2, average=False)], ids=repr)
def test_as_the_rule_reads(rule: Median) -> None:
    stops = []
    for history in draw_histories(7):
        decisions = rule.decide(history)
        for trial in filter(is_finite, history.running):
            if "last finite" not in decisions[trial.number].reason:
                stops.append(decisions[trial.number].verdict == "stop")
                assert stops[-1] == slowly(trial, history, rule)
    assert 10 < sum(stops) < len(stops) - 10


@pytest.mark.parametrize("name", ["grace", "min_peers"])
def test_bad_arguments(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be an integer >= 1, got 0"):
        Median(**{name: 0})
