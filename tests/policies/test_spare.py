"""Spare: whose STOP it waives, by a worked example and by the formula; what breaks nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest

from rapidfire_policies import Decision, History, Median, Policy, RisingBound, Spare, TrialHistory, TrialState, Verdict
from rapidfire_policies.base import numbers_of


@dataclass(frozen=True)
class StopsAll(Policy):
    """Wants every trial stopped, so that the wrapper's own rule shows."""

    def decide(self, history: History) -> Mapping[int, Decision]:
        return {t.number: Decision(Verdict.STOP, "all", numbers_of(t, threshold=0.2)) for t in history.live}


def spared(policy: Policy, *trials: TrialHistory) -> set[int]:
    decisions = policy.decide(History(trials, chunks=12))
    return {number for number, decision in decisions.items() if decision.verdict is Verdict.CONTINUE}


def test_a_worked_example() -> None:
    # Later halves: chunks 2 and 3 of 3. Averages .2, .3, .5, .9; trial 2's best is .3, its peers' median .3.
    curves = [(0.9, 0.2, 0.2), (0.9, 0.3, 0.3), (0.3, 0.5, 0.5), (0.9, 0.9, 0.9)]
    trials = [TrialHistory(n, curve) for n, curve in enumerate(curves)]
    assert spared(Spare(StopsAll(), share=0.5), *trials) == {0, 1, 2}
    assert spared(Spare(StopsAll(), share=0.49), *trials) == {0, 1}
    assert spared(Spare(StopsAll(), share=1e-9), *trials) == {0}
    stopped = Spare(StopsAll(), share=0.5).decide(History(tuple(trials), chunks=12))[3]
    assert stopped.numbers["threshold"] == pytest.approx(0.3)
    assert stopped.reason == "all"


def test_the_rule_is_the_formula() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        share = float(rng.uniform(0.01, 0.99))
        curves = [np.round(rng.uniform(0, 1, rng.integers(1, 8)), 1) for _ in range(rng.integers(1, 9))]
        trials = [TrialHistory(n, tuple(curve.tolist())) for n, curve in enumerate(curves)]
        expected = set()
        for n, curve in enumerate(curves):
            r = len(curve)
            peers = [np.mean(one[r // 2 : r]) for m, one in enumerate(curves) if m != n and len(one) >= r]
            if not peers or curve.min() <= np.quantile(peers, share) + 1e-12:
                expected.add(n)
        assert spared(Spare(StopsAll(), share=share), *trials) == expected


def test_stopped_and_finished_trials_are_peers_and_those_behind_are_none() -> None:
    judged = TrialHistory(0, (0.5, 0.5))
    for state in (TrialState.STOPPED, TrialState.COMPLETE, TrialState.PAUSED, TrialState.FAILED):
        assert spared(Spare(StopsAll()), judged, TrialHistory(1, (0.4, 0.4), state)) - {1} == set()
    assert spared(Spare(StopsAll()), judged, TrialHistory(1, (0.4,), TrialState.STOPPED)) == {0}


def test_what_diverged_is_stopped_and_no_peer() -> None:
    good, bad = TrialHistory(0, (0.5, 0.5)), TrialHistory(1, (0.1, math.nan))
    assert spared(Spare(StopsAll()), good, bad) == {0}
    early = TrialHistory(2, (math.inf, 0.6, 0.6))  # forgotten in the later half
    assert 3 in spared(Spare(StopsAll()), early, TrialHistory(3, (0.7, 0.9, 0.55)))
    assert 3 not in spared(Spare(StopsAll()), early, TrialHistory(3, (0.7, 0.9, 0.65)))


def test_other_verdicts_pass() -> None:
    trials = tuple(TrialHistory(n, (0.1 * n, 0.1 * n)) for n in range(5))
    inner = Median(average=False)
    both = [policy.decide(History(trials, chunks=9)) for policy in (inner, Spare(inner))]
    for number in range(5):
        if both[0][number].verdict is Verdict.CONTINUE:
            assert both[0][number] == both[1][number]
    assert Spare(inner).by_age is inner.by_age


def test_a_rising_bound_that_knows_errors_spares_what_may_be_noise() -> None:
    lead, slow = (1.0, 0.5, 0.4), (0.52, 0.51, 0.5)
    wave = np.cos(np.arange(100.0))
    for noise, verdict in ((0.01, Verdict.STOP), (1.0, Verdict.CONTINUE)):
        scores = {0: 0.4 + 0 * wave, 1: 0.5 + noise * wave}
        trials = tuple(TrialHistory(n, c, scores=(scores[n],) * 3) for n, c in enumerate((lead, slow)))
        history = History(trials, chunks=3 + 1)
        assert RisingBound(keep=1).decide(history)[1].verdict is Verdict.CONTINUE  # 0.49 against 0.5
        history = History(tuple(TrialHistory(t.number, (*t.values, t.values[-1]), scores=t.scores) for t in trials), 5)
        plain, careful = (RisingBound(keep=1, errors=errors).decide(history)[1] for errors in (0.0, 2.0))
        assert plain.verdict is Verdict.STOP
        assert careful.verdict is verdict
        off = 2 * np.std(scores[1] - scores[0], ddof=1) / 10
        assert careful.numbers["bound"] == pytest.approx(float(plain.numbers["bound"]) - off)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"policy": "asha"}, "`policy` must be a policy"), ({"share": 0.0}, "`share` must be"), ({"share": 1}, "`share`")],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spare(**arguments)  # type: ignore[arg-type]
