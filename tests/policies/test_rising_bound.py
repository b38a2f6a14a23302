"""RisingBound: no false elimination where the theory promises none, a worked example, and what it is told to leave alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapidfire_automl.replay import replay
from rapidfire_policies import History, RisingBound, TrialHistory, TrialState, Verdict

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def history(*curves: tuple[float, ...], chunks: int = 10) -> History:
    return History(tuple(TrialHistory(i, curve) for i, curve in enumerate(curves)), chunks=chunks)


def verdicts(policy: RisingBound, *curves: tuple[float, ...], chunks: int = 10) -> list[Verdict]:
    decisions = policy.decide(history(*curves, chunks=chunks))
    return [decisions[number].verdict for number in range(len(curves))]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    trials=st.integers(2, 12),
    chunks=st.integers(2, 30),
    window=st.integers(1, 4),
    growth=st.sampled_from([0.0, 1 / 3, 0.7]),
    slots=st.integers(1, 12),
)
def test_convex_falling_curves_are_never_robbed_of_their_best(
    seed: int, trials: int, chunks: int, window: int, growth: float, slots: int
) -> None:
    rng = np.random.default_rng(seed)
    drops = np.sort(rng.exponential(size=(trials, chunks)) * rng.choice([0.0, 1e-3, 1.0], size=(trials, 1)), axis=1)
    curves = rng.normal(size=(trials, 1)) * rng.choice([0.0, 1.0, 10.0]) - np.cumsum(drops[:, ::-1], axis=1)
    result = replay(curves, RisingBound(window=window, growth=growth, keep=1), slots=slots)
    assert result.selected is not None
    assert curves[result.selected, -1] == pytest.approx(curves[:, -1].min(), abs=1e-9)


def test_the_property_is_the_rules_and_not_luck() -> None:
    """The same curves under a bound that trusts half the pace lose their best: the test above can fail."""
    chunks = 12
    late = 2.0 - 0.11 * np.arange(chunks)
    early = 1.0 - 0.0001 * np.arange(chunks)
    assert late[-1] < early[-1]
    half_pace = 2.0 - 0.11 * 2 - (chunks - 3) * 0.055
    assert half_pace > early[2]
    assert replay([late, early], RisingBound(keep=1), slots=2).selected == 0


def test_a_worked_example() -> None:
    # Chunk 3 of 10, window 2: trial 1 falls 0.1 a chunk and can reach 0.7 - 7 * 0.1 = 0.0; trial 2 falls 0.01: 0.83.
    lead, catches_up, too_slow = (1.0, 0.5, 0.4), (0.9, 0.8, 0.7), (0.92, 0.91, 0.90)
    decisions = RisingBound(keep=1).decide(history(lead, catches_up, too_slow))
    assert [decisions[i].verdict for i in range(3)] == [Verdict.CONTINUE, Verdict.CONTINUE, Verdict.STOP]
    assert "can reach 0.83 at its pace of 0.01" in decisions[2].reason
    assert "trial 0 has 0.5" in decisions[2].reason  # the worse of its last two


def test_nobody_is_judged_before_the_window_is_full_nor_at_the_top() -> None:
    assert set(verdicts(RisingBound(window=2, keep=1), (0.1, 0.1), (0.9, 0.9))) == {Verdict.CONTINUE}
    flat = [(level,) * 5 for level in (0.1, 0.2, 0.3, 0.4)]
    assert verdicts(RisingBound(keep=3), *flat) == [Verdict.CONTINUE] * 3 + [Verdict.STOP]


def test_the_window_grows_over_a_pause() -> None:
    pause = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.4, 0.4)
    rival = (0.35,) * 9
    assert verdicts(RisingBound(window=2, growth=0, keep=1), pause, rival, chunks=12)[0] is Verdict.STOP
    assert verdicts(RisingBound(window=2, growth=0.5, keep=1), pause, rival, chunks=12)[0] is Verdict.CONTINUE


def test_the_lead_is_of_those_that_can_still_be_handed_over() -> None:
    slow = TrialHistory(0, (0.9, 0.89, 0.88))  # can reach 0.87
    for state, verdict in [
        (TrialState.STOPPED, Verdict.CONTINUE),
        (TrialState.FAILED, Verdict.CONTINUE),
        (TrialState.COMPLETE, Verdict.STOP),
        (TrialState.PAUSED, Verdict.STOP),
    ]:
        best = TrialHistory(1, (0.91, 0.87, 0.87))  # whoever is best is never judged
        past = TrialHistory(2, (0.2, 0.1, 0.1), state)
        decisions = RisingBound(keep=1).decide(History((slow, best, past), chunks=4))
        assert decisions[0].verdict is verdict, state


def test_one_lucky_evaluation_is_no_lead() -> None:
    lucky, steady = (0.6, 0.6, 0.1), (0.5, 0.5, 0.5)
    assert verdicts(RisingBound(keep=1), lucky, steady) == [Verdict.CONTINUE, Verdict.CONTINUE]


def test_what_diverged_is_stopped_and_earlier_gaps_are_bridged() -> None:
    assert verdicts(RisingBound(), (0.5, math.nan), (0.6, 0.5)) == [Verdict.STOP, Verdict.CONTINUE]
    bridged = (math.nan, math.inf, 0.9, 0.8)
    assert verdicts(RisingBound(keep=1), bridged, (0.3, 0.2, 0.1, 0.1))[0] is Verdict.CONTINUE


@pytest.mark.parametrize(
    "arguments",
    [
        {"window": 0},
        {"keep": 0},
        {"growth": 1.0},
        {"growth": -0.1},
        {"growth": "0.3"},
        {"window": True},
        {"errors": -1.0},
    ],
)
def test_bad_arguments(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be"):
        RisingBound(**arguments)  # type: ignore[arg-type]
