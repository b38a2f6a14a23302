"""Synchronous halving: the worked tables of the papers, and who waits for whom."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from rapidfire_policies import History, Hyperband, Policy, SuccessiveHalving, TrialHistory, TrialState, Verdict
from rapidfire_policies._search import search
from rapidfire_policies.hyperband import Bracket, brackets


def whole(curves: np.ndarray, slots: int) -> History:
    """A search over `(trials, chunks)` curves."""
    trials = (TrialHistory(i, tuple(curve), TrialState.COMPLETE) for i, curve in enumerate(curves.tolist()))
    return History(tuple(trials), chunks=curves.shape[1], slots=slots)


def level(count: int, chunks: int, seed: int = 0) -> np.ndarray:
    """Curves that never cross, in a random order, `(count, chunks)`."""
    order = np.random.default_rng(seed).permutation(count).astype(float)
    return np.repeat(order[:, None], chunks, axis=1)


def trained(policy: Policy, search_space: History) -> list[int]:
    """Chunks done by each trial when the search is over."""
    *_, (history, said, _) = search(policy, search_space)
    assert all(verdict in (Verdict.STOP, Verdict.CONTINUE, Verdict.COMPLETE) for verdict in said.values())
    resources = {trial.number: trial.resource for trial in history.trials}
    going_on = [number for number, verdict in said.items() if verdict is Verdict.CONTINUE]
    return [resources[i] + (i in going_on) for i in range(len(search_space.trials))]


def reached(resources: Sequence[int], rungs: Sequence[int]) -> list[int]:
    return [sum(resource >= rung for resource in resources) for rung in rungs]


# Li et al. 2018, table 1: R = 81, eta = 3; (n_i, r_i) of the brackets s = 4, ..., 0.
TABLE = [
    [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)],
    [(34, 3), (11, 9), (3, 27), (1, 81)],
    [(15, 9), (5, 27), (1, 81)],
    [(8, 27), (2, 81)],
    [(5, 81)],
]


def test_brackets_of_the_paper() -> None:
    expected = [Bracket(rows[0][0], tuple(r for _, r in rows[:-1])) for rows in TABLE]
    assert list(brackets(1, 3, chunks=81)) == expected


def test_hyperband_runs_the_table_of_the_paper() -> None:
    """All 143 at once; who survives in each bracket are its best, whatever the other brackets hold."""
    curves = level(143, 81)
    resources = trained(Hyperband(), whole(curves, slots=143))
    start = 0
    for rows in TABLE:
        size = rows[0][0]
        cohort = resources[start : start + size]
        values = curves[start : start + size, 0]
        for count, rung in rows:
            assert sum(resource >= rung for resource in cohort) == count
            best = set(np.argsort(values)[:count].tolist())
            assert {i for i, resource in enumerate(cohort) if resource >= rung} == best
        start += size


def test_successive_halving_runs_its_table() -> None:
    resources = trained(SuccessiveHalving(), whole(level(81, 81), slots=81))
    assert reached(resources, [1, 2, 3, 4, 9, 10, 27, 28, 81]) == [81, 27, 27, 9, 9, 3, 3, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_trials_plays_no_part_in_a_cohort(seed: int) -> None:
    rng = np.random.default_rng(seed)
    curves = rng.permutation(16 * 12).reshape(16, 12) / 8.0
    shuffled = rng.permutation(16)
    one = trained(SuccessiveHalving(reduction_factor=2), whole(curves, slots=8))
    other = trained(SuccessiveHalving(reduction_factor=2), whole(curves[shuffled], slots=8))
    assert [one[i] for i in shuffled] == other
    assert reached(one, [1, 2, 3, 5, 9]) == [16, 8, 4, 2, 1]


def test_half_of_a_cohort_waits_for_the_other_half() -> None:
    """Eight slots, sixteen trials: eight train and wait, eight train and wait, then sixteen are judged."""
    asked = list(search(SuccessiveHalving(), whole(level(16, 9), slots=8)))
    states = [[trial.state for trial in history.trials] for history, _, _ in asked[:3]]
    assert states[0] == [TrialState.RUNNING] * 8
    assert states[1] == [TrialState.PAUSED] * 8 + [TrialState.RUNNING] * 8
    assert states[2] == [TrialState.PAUSED] * 16
    assert all(verdict is Verdict.PAUSE for _, said, _ in asked[:2] for verdict in said.values())
    assert sorted(asked[2][1].values()).count(Verdict.CONTINUE) == 5


def test_who_is_behind_holds_up_a_rung_and_who_is_ahead_does_not() -> None:
    waiting = [TrialHistory(i, (0.1 * i,) * 3, TrialState.PAUSED) for i in range(3)]
    ahead, behind = TrialHistory(7, (0.5,) * 4), TrialHistory(8, (0.9, 0.9))
    rule = SuccessiveHalving()
    with_ahead = rule.decide(History((*waiting, ahead), chunks=27))
    assert [str(with_ahead[i].verdict) for i in range(3)] == ["continue", "stop", "stop"]
    assert with_ahead[2].reason == "rung 3: 0.2 ranks 3 of 4, the best goes on (cut 0)"
    with_behind = rule.decide(History((*waiting, behind), chunks=27))
    assert [str(with_behind[i].verdict) for i in range(3)] == ["pause"] * 3
    assert with_behind[0].reason == "rung 3: waits for the others"


def test_later_cohorts_are_judged_against_all_values() -> None:
    stopped = [TrialHistory(i, (0.1 + 0.1 * i,), TrialState.STOPPED) for i in range(3)]
    late = [TrialHistory(3, (0.05,), TrialState.PAUSED), TrialHistory(4, (0.15,), TrialState.PAUSED)]
    late += [TrialHistory(5, (0.25,), TrialState.PAUSED)]
    decisions = SuccessiveHalving().decide(History((*stopped, *late), chunks=9))
    assert [str(decisions[i].verdict) for i in (3, 4, 5)] == ["continue", "stop", "stop"]
    assert decisions[4].reason == "rung 1: 0.15 ranks 3 of 6, the best 2 go on (cut 0.1)"


def test_a_bracket_that_fills_up_is_not_judged_before_it_is_full() -> None:
    """Nine chunks: the first bracket takes 9. Eight wait; the ninth is to come as long as somebody runs."""
    eight = tuple(TrialHistory(i, (0.1 * i,), TrialState.PAUSED) for i in range(8))
    runs = TrialHistory(8, (0.9,))
    assert brackets(1, 3, chunks=9)[0] == Bracket(9, (1, 3))
    paused = Hyperband().decide(History((*eight, runs), chunks=9))
    assert {str(decision.verdict) for decision in paused.values()} == {"pause"}
    nine = (*eight, TrialHistory(8, (0.9,), TrialState.PAUSED))
    elsewhere = TrialHistory(9, (0.5,))
    full = Hyperband().decide(History((*nine, elsewhere), chunks=9))
    assert [number for number in range(9) if full[number].verdict == "continue"] == [0, 1, 2]
    not_full = Hyperband().decide(History((*eight[:7], TrialHistory(8, (0.9, 0.9))), chunks=9))
    assert [str(not_full[number].verdict) for number in range(7)] == ["pause"] * 7
    alone = Hyperband().decide(History(eight[:7], chunks=9))
    assert [number for number in range(7) if alone[number].verdict == "continue"] == [0, 1]


def test_brackets_start_again_when_all_are_full() -> None:
    """Three chunks: brackets of 3 and 2 trials, five to a round."""
    assert brackets(1, 3, chunks=3) == (Bracket(3, (1,)), Bracket(2, ()))
    trials = tuple(TrialHistory(i, (1.0 - 0.1 * i,), TrialState.PAUSED) for i in range(10))
    decisions = Hyperband().decide(History(trials, chunks=3))
    assert [number for number in range(10) if decisions[number].verdict == "continue"] == [2, 3, 4, 7, 8, 9]


def test_brackets_where_the_chunks_are_no_power() -> None:
    assert [(b.size, b.ladder) for b in brackets(1, 3, chunks=12)] == [(9, (1, 4)), (5, (4,)), (3, ())]
    assert [(b.size, b.ladder) for b in brackets(2, 3, chunks=12)] == [(3, (4,)), (2, ())]
    assert [(b.size, b.ladder) for b in brackets(5, 2, chunks=4)] == [(1, ())]


@pytest.mark.parametrize("policy", [SuccessiveHalving(), Hyperband()], ids=repr)
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_the_diverged_stop_at_once_and_hold_up_nobody(policy: Policy, bad: float) -> None:
    curves = level(9, 9)
    curves[curves[:, 0] == 0] = bad
    resources = trained(policy, whole(curves, slots=9))
    assert reached(resources, [1, 2, 4]) == [9, 3, 1]
    assert max(resources[i] for i in range(9) if not math.isfinite(curves[i, 0])) == 1


@pytest.mark.parametrize("cls", [SuccessiveHalving, Hyperband])
def test_bad_arguments(cls: type[SuccessiveHalving] | type[Hyperband]) -> None:
    with pytest.raises(ValueError, match="`reduction_factor` must be an integer >= 2, got 1"):
        cls(reduction_factor=1)
    with pytest.raises(ValueError, match="`min_resource` must be an integer >= 1, got 0"):
        cls(min_resource=0)
