"""ASHA's second form and PASHA against plain readings of the papers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rapidfire_policies import ASHA, PASHA, History, TrialHistory, TrialState, Verdict
from rapidfire_policies._search import search
from rapidfire_policies.survivors import is_finite
from rapidfire_policies.testing import draw_histories


def promotable(history: History, rung: int, eta: int) -> set[int]:
    """Li et al. 2020, Algorithm 2, get_job: of the top |rung| / eta those not yet promoted."""
    there = [(trial.values[rung - 1], trial) for trial in history.trials if trial.resource >= rung]
    finite = sorted((value, trial.number) for value, trial in there if math.isfinite(value))
    candidates = {number for _, number in finite[: len(there) // eta]}
    return {trial.number for _, trial in there if trial.resource == rung and trial.number in candidates}


@pytest.mark.parametrize("eta", [2, 3])
@pytest.mark.parametrize("tie_free", [True, False])
def test_promotes_whom_algorithm_2_promotes(eta: int, tie_free: bool) -> None:
    promoted = waited = 0
    for history in draw_histories(3, tie_free=tie_free):
        decisions = ASHA(reduction_factor=eta, form="promote").decide(history)
        for rung in (1, eta, eta * eta):
            if rung >= history.chunks:
                break
            expected = promotable(history, rung, eta)
            for trial in (t for t in history.live if t.resource == rung and is_finite(t)):
                decision = decisions[trial.number]
                if "no other trains" in decision.reason or "last finite" in decision.reason:
                    continue
                assert (decision.verdict is Verdict.CONTINUE) == (trial.number in expected)
                promoted += trial.number in expected
                waited += decision.verdict is Verdict.PAUSE
    assert promoted > 40
    assert waited > 50


def at_rung(values: list[float], state: TrialState = TrialState.RUNNING, chunks: int = 9, slots: int = 8) -> History:
    return History(tuple(TrialHistory(i, (value,), state) for i, value in enumerate(values)), chunks, slots)


def said(decisions: object) -> dict[int, str]:
    return {number: str(decision.verdict) for number, decision in decisions.items()}  # type: ignore[attr-defined]


def test_a_trial_is_promoted_when_enough_others_have_come() -> None:
    rule = ASHA(form="promote")
    assert said(rule.decide(at_rung([0.2, 0.1]))) == {0: "pause", 1: "pause"}
    decisions = rule.decide(at_rung([0.2, 0.1, 0.3, 0.4, 0.5]))
    assert said(decisions) == {0: "pause", 1: "continue", 2: "pause", 3: "pause", 4: "pause"}
    assert decisions[0].reason == "rung 1: ranks 2 of 5, waits to be among 1"
    waiting = TrialHistory(0, (0.2,), TrialState.PAUSED)
    others = (TrialHistory(1, (0.1, 0.1)), *(TrialHistory(i, (0.1 * i,), TrialState.PAUSED) for i in range(3, 6)))
    later = rule.decide(History((waiting, *others, TrialHistory(6, (0.9,))), chunks=9, slots=8))
    assert later[0].verdict is Verdict.CONTINUE
    assert later[0].reason == "rung 1: 0.2 ranks 2 of 6, the best 2 go on (cut 0.2)"


def test_as_many_wait_as_there_are_slots_the_most_advanced_first() -> None:
    ahead = TrialHistory(9, (0.9,) * 3, TrialState.PAUSED)
    history = at_rung([0.5, 0.1, 0.3, 0.4, 0.2], slots=3)
    decisions = ASHA(form="promote").decide(History((*history.trials, ahead), chunks=9, slots=3))
    assert said(decisions) == {0: "stop", 1: "continue", 2: "pause", 3: "pause", 4: "continue", 9: "pause"}
    assert decisions[0].reason == "rung 1: ranks 5 of 6, waits to be among 2; 3 better ones wait"


def test_when_all_wait_the_most_advanced_trains_to_its_end_and_then_all_stop() -> None:
    rule = ASHA(form="promote")
    assert said(rule.decide(at_rung([0.2, 0.1], TrialState.PAUSED))) == {0: "pause", 1: "continue"}
    ahead = TrialHistory(7, (0.5,) * 3, TrialState.PAUSED)
    history = at_rung([0.2, 0.1], TrialState.PAUSED)
    decisions = rule.decide(History((*history.trials, ahead), chunks=9, slots=8))
    assert said(decisions) == {0: "pause", 1: "continue", 7: "pause"}
    complete = TrialHistory(8, (0.5,) * 9, TrialState.COMPLETE)
    decisions = rule.decide(History((TrialHistory(0, (0.9,), TrialState.PAUSED), ahead, complete), chunks=9, slots=8))
    assert said(decisions) == {0: "stop", 7: "stop"}


def test_bad_form() -> None:
    with pytest.raises(ValueError, match='`form` must be "stop" or "promote", got \'halve\''):
        ASHA(form="halve")  # type: ignore[arg-type]


# -- PASHA ------------------------------------------------------------------------------------------------------------


def crossed_twice(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether somewhere f(c) > f(c'), later f(c) < f(c'), and at the end f(c) > f(c') again, or the reverse."""
    signs = [(a > b) - (a < b) for a, b in zip(one, other, strict=True)]
    places = range(len(signs))
    return signs[-1] != 0 and any(signs[j] == signs[-1] == -signs[k] for k in places for j in range(k))


def slow_cap(history: History, eta: int, percentile: float) -> int:
    """Bohdal et al. 2023, in plain loops over groups of similar trials, from the lowest pair of rungs up."""
    ladder = [eta**k for k in range(10) if eta**k < history.chunks]
    for below, top in itertools.pairwise(ladder):
        distances = []
        for a, b in itertools.combinations(history.trials, 2):
            last = min(a.resource, b.resource, top)
            values = (*a.values[:top], *b.values[:top])
            if last > below and all(map(math.isfinite, values)) and crossed_twice(a.values[:last], b.values[:last]):
                distances.append(abs(a.values[last - 1] - b.values[last - 1]))
        epsilon = float(np.percentile(distances, percentile)) if distances else 0.0
        there = [
            t
            for t in history.trials
            if t.resource >= top and math.isfinite(t.values[top - 1]) and math.isfinite(t.values[below - 1])
        ]
        lower = sorted(there, key=lambda t: (t.values[below - 1], t.number))
        upper = sorted(there, key=lambda t: (t.values[top - 1], t.number))
        groups = [
            {t.number for t in lower if abs(t.values[below - 1] - at_rank.values[below - 1]) <= epsilon}
            for at_rank in lower
        ]
        if all(trial.number in group for trial, group in zip(upper, groups, strict=True)):
            return top
    return history.chunks


@pytest.mark.parametrize("percentile", [90.0, 50.0, 0.0])
def test_the_cap_is_that_of_a_slow_reading(percentile: float) -> None:
    rng = np.random.default_rng(0)
    caps = []
    for _ in range(150):
        count, noise = int(rng.integers(1, 12)), rng.choice((0.0, 0.5, 2.0))
        curves = rng.permutation(count)[:, None] + rng.choice((0.0, 0.0, noise, -noise, 2 * noise), size=(count, 27))
        if rng.random() < 0.3:
            curves[0, rng.integers(27)] = rng.choice((math.nan, -math.inf))
        resources = rng.choice((1, 3, 4, 9, 9, 11, 27, 27, 27, 27, 27, 27), size=count)
        trials = tuple(
            TrialHistory(i, tuple(curve[:r])) for i, (curve, r) in enumerate(zip(curves.tolist(), resources))
        )
        history = History(trials, chunks=28)
        caps.append(PASHA(percentile=percentile).cap(history))
        assert caps[-1] == slow_cap(history, 3, percentile)
    assert all(caps.count(cap) > 5 for cap in (3, 9, 27)), {cap: caps.count(cap) for cap in caps}


def test_epsilon_forgives_trials_that_cross_and_cross_again() -> None:
    def two(one: list[float], other: list[float]) -> History:
        return History((TrialHistory(0, tuple(one)), TrialHistory(1, tuple(other))), chunks=27)

    swapped = two([0.50, 0.50, 0.50], [0.52, 0.49, 0.48])
    assert PASHA().cap(swapped) == 9
    noisy = two([0.50, 0.50, 0.50], [0.49, 0.52, 0.48])
    assert PASHA().cap(noisy) == 3
    # Rung 1 ranks 0 first, rung 3 ranks 1 first; they differ by less at rung 1 than a third pair that crossed twice.
    third = (TrialHistory(2, (0.90, 0.90, 0.90)), TrialHistory(3, (0.95, 0.85, 0.95)))
    forgiving = History((*swapped.trials, *third), chunks=27)
    assert PASHA().cap(forgiving) == 3


def test_only_the_best_64_of_a_rung_are_compared() -> None:
    def swapped(place: int) -> History:
        top = list(range(70))
        top[place], top[place + 1] = top[place + 1], top[place]
        return History(tuple(TrialHistory(i, (float(i), 0.0, float(top[i]))) for i in range(70)), chunks=27)

    assert PASHA().cap(swapped(62)) == 9
    assert PASHA().cap(swapped(64)) == 3


def test_nobody_is_promoted_at_the_cap_until_it_rises() -> None:
    stable = [TrialHistory(i, (0.1 * i,) * 3) for i in range(6)]
    decisions = PASHA().decide(History(tuple(stable), chunks=27, slots=6))
    assert {decision.verdict for decision in decisions.values()} == {Verdict.PAUSE}
    assert decisions[0].reason == "rung 3: waits, the cap is 3"
    waiting = [TrialHistory(t.number, t.values, TrialState.PAUSED) for t in stable]
    turns = TrialHistory(6, (0.9, 0.9, 0.0))
    decisions = PASHA().decide(History((*waiting, turns), chunks=27, slots=6))
    assert [n for n, decision in decisions.items() if decision.verdict is Verdict.CONTINUE] == [0, 6]


def test_where_rankings_agree_only_the_winner_is_trained_beyond_the_cap() -> None:
    trials = (TrialHistory(i, (1.0 + i,) * 27, TrialState.COMPLETE) for i in (5, 3, 8, 1, 0, 7, 2, 6, 4))
    whole = History(tuple(trials), chunks=27, slots=9)

    def chunks(policy: PASHA | ASHA) -> dict[int, int]:
        *_, (history, verdicts, _) = search(policy, whole)
        done = {trial.number: trial.resource for trial in history.trials}
        return {number: resource + (verdicts.get(number) is Verdict.CONTINUE) for number, resource in done.items()}

    assert chunks(PASHA()) == {0: 27, 1: 3, 2: 3} | dict.fromkeys(range(3, 9), 1)
    assert sum(chunks(PASHA()).values()) <= sum(chunks(ASHA()).values())


def test_where_every_rung_turns_the_ranking_round_there_is_no_cap() -> None:
    """Values `i` at rungs 1 and 9, `-i` at 3 and 27 and in between: nobody crosses twice within two rungs of another."""
    turned = [[float(-i)] * 27 for i in range(5)]
    for i, values in enumerate(turned):
        values[0] = values[8] = float(i)
    history = History(tuple(TrialHistory(i, tuple(values)) for i, values in enumerate(turned)), chunks=81)
    assert PASHA(percentile=0).cap(history) == 81


@pytest.mark.parametrize("percentile", [-1, 101, math.nan, "90"])
def test_bad_percentile(percentile: float) -> None:
    with pytest.raises(ValueError, match=r"`percentile` must be a number [<>]= "):
        PASHA(percentile=percentile)
