"""CostAware: the inner policy where costs are equal, worked tables where they are not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from rapidfire_automl.replay import replay
from rapidfire_policies import (
    ASHA,
    CostAware,
    Decision,
    History,
    Median,
    Nop,
    Policy,
    SequentialHalving,
    TopTwoThompson,
    TrialHistory,
    TrialState,
    Verdict,
    testing,
)

INNER = [ASHA(), ASHA(reduction_factor=2), Median(), Nop(), SequentialHalving(), TopTwoThompson()]


@pytest.mark.parametrize("inner", INNER, ids=repr)
@pytest.mark.parametrize("cost", [None, 1.0, 0.1, 12345.0])
def test_at_equal_costs_it_is_the_inner_policy(inner: Policy, cost: float | None) -> None:
    for drawn in testing.draw_histories(0):
        # A trial that completed early has ended where a later budget is not open to it; nobody else is that short.
        trials = tuple(
            replace(t, costs=() if cost is None else (cost,) * t.resource)
            for t in drawn.trials
            if t.state is not TrialState.FAILED
        )
        history = replace(drawn, trials=trials)
        assert dict(CostAware(inner).decide(history)) == dict(inner.decide(history))


@dataclass(frozen=True)
class Watches(Policy):
    """Says the same of all it is asked about, and keeps what it saw."""

    verdicts: Mapping[int, str] = field(default_factory=dict)
    seen: list[History] = field(default_factory=list, compare=False)

    def decide(self, history: History) -> Mapping[int, Decision]:
        self.seen.append(history)
        return {
            t.number: Decision(Verdict(self.verdicts[t.resource]), f"at {t.resource}")
            for t in history.trials
            if t.resource in self.verdicts
        }


def test_what_the_inner_policy_sees() -> None:
    inner = Watches()
    trial = TrialHistory(
        0,
        (0.9, 0.8, 0.7, 0.6),
        scores=tuple(np.array([v, v]) for v in (0.9, 0.8, 0.7, 0.6)),
        costs=(1.5, 1.0, 0.25, 1.5),  # spent: 1.5, 2.5, 2.75, 4.25
        metrics={"kl": (1.0, 2.0, 3.0, 4.0)},
    )
    CostAware(inner, unit=1.0).decide(History((trial,), chunks=8, slots=3))
    crossed_two = [history.trials[0] for history in inner.seen]
    # Within 1 unit there is no chunk, so the first one stands for it; within 2 the first, within 3 the third.
    assert [shown.values for shown in crossed_two] == [(0.9, 0.9, 0.7), (0.9, 0.9, 0.7, 0.7)]
    assert [s.tolist() for s in crossed_two[0].scores] == [[0.9, 0.9], [0.9, 0.9], [0.7, 0.7]]
    assert crossed_two[1].metrics == {"kl": (1.0, 1.0, 3.0, 3.0)}
    assert crossed_two[1].costs == (1.0,) * 4
    assert {(history.chunks, history.slots) for history in inner.seen} == {(8, 3)}, "8 chunks of 1.06 are 8 whole units"


def test_the_unit_is_the_median_chunk() -> None:
    cheap = TrialHistory(0, (0.5,) * 3, costs=(2.0,) * 3)
    dear = TrialHistory(1, (0.4,), costs=(8.0,))
    inner = Watches()
    CostAware(inner).decide(History((cheap, dear), chunks=4))
    assert [t.resource for t in inner.seen[-1].trials] == [3, 4]
    assert inner.seen[-1].chunks == 16, "the dear one spends four units a chunk"


def test_a_whole_trial_keeps_its_value_at_every_later_budget() -> None:
    whole = TrialHistory(0, (0.5, 0.4), TrialState.COMPLETE, costs=(1.0, 1.0))
    ended_early = TrialHistory(1, (0.3,), TrialState.COMPLETE, costs=(1.0,))
    dear = TrialHistory(2, (0.6,), costs=(4.0,))
    inner = Watches()
    CostAware(inner, unit=1.0).decide(History((whole, ended_early, dear), chunks=2))
    assert inner.seen[-1].trials[0].values == (0.5, *[0.4] * 7)
    assert inner.seen[-1].trials[1].values == (0.3,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_trial_is_shown_with_its_last_value(bad: float) -> None:
    inner = Watches()
    CostAware(inner, unit=1.0).decide(History((TrialHistory(0, (0.5, bad), costs=(1.0, 0.5)),), chunks=4))
    assert repr(inner.seen[-1].trials[0].values) == repr((bad,))


def test_a_big_chunk_jumps_over_no_rung() -> None:
    # Rungs at 1, 2, 4 units; the dear trial's first chunk ends at 3.
    cheap = [TrialHistory(i, (v, v, v), TrialState.COMPLETE, costs=(1.0,) * 3) for i, v in enumerate([0.1, 0.2])]
    dear = TrialHistory(9, (0.3,), costs=(3.0,))
    history = History((*cheap, dear), chunks=9)
    assert CostAware(ASHA(reduction_factor=2), unit=1.0).decide(history)[9].verdict is Verdict.STOP
    assert (
        ASHA(reduction_factor=2, min_resource=3).decide(history).get(9, Decision(Verdict.CONTINUE)).verdict
        == "continue"
    )


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ({}, None),
        ({3: "continue"}, "continue"),
        ({1: "stop", 3: "continue"}, "stop"),
        ({1: "pause", 2: "complete", 3: "continue"}, "pause"),
        ({1: "pause", 2: "stop"}, "stop"),
        ({1: "complete"}, "complete"),
        ({4: "stop"}, None),
    ],
)
def test_the_hardest_of_several_boundaries_answers_counts(said: dict[int, str], verdict: str | None) -> None:
    trial = TrialHistory(0, (0.5,), costs=(3.0,))
    other = TrialHistory(1, (0.5,) * 9, TrialState.COMPLETE, costs=(1.0,) * 9)
    decisions = CostAware(Watches(said), unit=1.0).decide(History((trial, other), chunks=9))
    assert (str(decisions[0].verdict) if 0 in decisions else None) == verdict


def test_between_boundaries_nobody_is_judged_but_the_diverged() -> None:
    policy = CostAware(Watches({1: "stop"}), unit=1.0)
    complete = TrialHistory(9, (0.1,) * 4, TrialState.COMPLETE, costs=(1.0,) * 4)
    crossed_before = TrialHistory(0, (0.5, 0.4), costs=(1.2, 0.5))
    not_yet = TrialHistory(1, (0.5,), costs=(0.5,))
    diverged = TrialHistory(2, (math.nan,), costs=(0.5,))
    decisions = policy.decide(History((crossed_before, not_yet, diverged, complete), chunks=4))
    assert {n: str(d.verdict) for n, d in decisions.items() if n != 9} == {2: "stop"}


def test_the_floor_on_chunks_keeps_a_dear_trial_from_starving() -> None:
    complete = TrialHistory(9, (0.1,) * 8, TrialState.COMPLETE, costs=(1.0,) * 8)
    rule = dict.fromkeys(range(1, 30), "stop")
    dear = TrialHistory(0, (0.5, 0.4), costs=(4.0, 4.0))
    judged = CostAware(Watches(rule), unit=1.0).decide(History((dear, complete), chunks=8))
    spared = CostAware(Watches(rule), unit=1.0, min_chunks=3).decide(History((dear, complete), chunks=8))
    assert judged[0].verdict is Verdict.STOP
    assert 0 not in spared
    inner = Watches()
    third = TrialHistory(0, (0.5, 0.4, 0.3), costs=(4.0, 4.0, 4.0))
    CostAware(inner, unit=1.0, min_chunks=3).decide(History((third, complete), chunks=8))
    assert inner.seen[-1].trials[0].values == (0.3,) * 12, "never represented by fewer chunks than the floor"


def test_a_paused_trial_resumes_when_every_boundary_it_crossed_lets_it_go() -> None:
    trial = TrialHistory(0, (0.5,), TrialState.PAUSED, costs=(2.0,))
    other = TrialHistory(1, (0.5,) * 9, TrialState.COMPLETE, costs=(1.0,) * 9)
    history = History((trial, other), chunks=9)
    for said, verdict in [({1: "continue"}, None), ({1: "continue", 2: "continue"}, "continue")]:
        decisions = CostAware(Watches(said), unit=1.0).decide(history)
        assert (str(decisions[0].verdict) if 0 in decisions else None) == verdict


@pytest.mark.parametrize("inner", [SequentialHalving(), TopTwoThompson(), ASHA()], ids=repr)
def test_searches_end_with_the_best_trial_and_dear_bad_ones_cost_less(inner: Policy) -> None:
    t = np.arange(1, 13) ** -0.5
    curves = np.arange(16.0)[:, None] / 16 + t
    costs = np.where(np.arange(16)[:, None] % 4 == 3, 8.0, 1.0) + np.zeros((16, 12))
    aware = replay(curves, CostAware(inner), slots=4, costs=costs, max_alive=8)
    plain = replay(curves, inner, slots=4, costs=costs, max_alive=8)
    assert 0 in aware.complete
    assert len(aware.stopped | aware.complete) == len(aware.resource)
    dear = range(3, 16, 4)
    assert sum(aware.resource[n] for n in dear) <= sum(plain.resource[n] for n in dear)


def test_a_tiny_unit_counts_as_a_64th_of_a_chunk() -> None:
    inner = Watches()
    CostAware(inner, unit=1e-9).decide(History((TrialHistory(0, (0.5,), costs=(1.0,)),), chunks=2))
    assert inner.seen[-1].trials[0].resource == 64
    assert inner.seen[-1].chunks == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": ASHA}, r"`policy` must be a policy, got .* Write `ASHA\(\)`\."),
        ({"policy": "asha"}, r"`policy` must be a policy, got 'asha'\."),
        ({"unit": 0.0}, "`unit` must be a number > 0, got 0.0"),
        ({"unit": math.inf}, "`unit` must be a number > 0, got inf"),
        ({"unit": True}, "`unit` must be a number > 0, got True"),
        ({"min_chunks": 0}, "`min_chunks` must be an integer >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CostAware(**arguments)  # type: ignore[arg-type]
