"""SequentialHalving against the paper's worked rounds, and against its algorithm written down once more."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rapidfire_automl.replay import replay
from rapidfire_policies import History, SequentialHalving, TrialHistory, TrialState


def by_the_book(curves: np.ndarray, budget: int) -> list[int]:
    """Karnin et al. 2013, Algorithm 3, on curves that go on: the chunks each of `(trials, chunks)` gets."""
    trials, chunks = curves.shape
    rounds = math.ceil(math.log2(trials))
    left, done = list(range(trials)), [0] * trials
    for _ in range(rounds):
        each = max(1, budget // (len(left) * rounds))
        for trial in left:
            done[trial] = min(chunks, done[trial] + each)
        if done[left[0]] == chunks:
            return done
        left = sorted(left, key=lambda trial: (curves[trial, done[trial] - 1], trial))[: math.ceil(len(left) / 2)]
    done[left[0]] = chunks
    return done


@pytest.mark.parametrize(
    ("trials", "budget", "expected"),
    [
        # 8 trials: 3 rounds of 8 chunks are 1 for each of 8, 2 for each of 4, 4 for each of 2.
        (8, 24, (1, 3, 7)),
        (16, 128, (2, 6, 14, 30)),
        # 5 trials, halved upwards: 5, 3, 2; a third of 30 is 2, 3 and 5 each.
        (5, 30, (2, 5, 10)),
        (8, 1, (1, 2, 3)),
        (2, 10, (5,)),
        (1, 10, ()),
    ],
)
def test_rounds(trials: int, budget: int, expected: tuple[int, ...]) -> None:
    assert SequentialHalving(budget=budget).resources(trials, chunks=64) == expected


def test_by_default_the_last_round_ends_whole_trials() -> None:
    # A round is 7 chunks / (1/8 + 1/4 + 1/2) = 8 chunks: the two last ones end theirs as complete.
    assert SequentialHalving().resources(8, chunks=7) == (1, 3)
    curves = np.arange(8.0)[:, None] + np.zeros((8, 7))
    assert replay(curves, SequentialHalving(), slots=8, max_alive=16).resource.tolist() == [7, 7, 3, 3, 1, 1, 1, 1]


@pytest.mark.parametrize("slots", [1, 3, 8, 16])
@pytest.mark.parametrize("trials", [2, 5, 8, 16])
@pytest.mark.parametrize("budget", [1, 24, 64])
def test_it_is_the_papers_algorithm_whatever_the_slots(trials: int, slots: int, budget: int) -> None:
    curves = np.random.default_rng(trials).permutation(trials * 12).reshape(trials, 12).astype(float)
    found = replay(curves, SequentialHalving(budget=budget), slots=slots, max_alive=max(slots, trials))
    assert found.resource.tolist() == by_the_book(curves, budget)
    assert found.slot_rounds.max() == min(slots, trials)
    rounds = len(SequentialHalving(budget=budget).resources(trials, 12))
    assert found.chunks <= max(budget, 2 * trials + rounds) + 12


def test_more_trials_than_can_live_come_in_waves_and_end() -> None:
    random = np.random.default_rng(0)
    curves = random.permutation(40)[:, None] + random.normal(size=(40, 9)) / 4
    found = replay(curves, SequentialHalving(), slots=4, max_alive=8)
    assert all(found.resource)
    assert int(curves[:, -1].argmin()) in found.complete
    assert len(found.stopped | found.complete) == len(found.resource)
    assert found.chunks < 40 * 9 / 2


def test_a_round_waits_for_whoever_runs_and_for_whoever_is_behind() -> None:
    policy = SequentialHalving(budget=8)  # 4 trials: rounds end at 1 and 3 chunks
    paused = [TrialHistory(i, (0.1 * i,), TrialState.PAUSED) for i in range(3)]
    running = TrialHistory(3, (0.05,))
    waits = policy.decide(History((*paused, running), chunks=9))
    assert {str(decision.verdict) for decision in waits.values()} == {"pause"}
    done = policy.decide(History((*paused, TrialHistory(3, (0.05,), TrialState.PAUSED)), chunks=9))
    assert [str(done[n].verdict) for n in range(4)] == ["continue", "stop", "stop", "continue"]
    behind = [TrialHistory(0, (0.0, 0.0, 0.0), TrialState.PAUSED), TrialHistory(3, (0.05,), TrialState.PAUSED)]
    gone = [TrialHistory(n, (0.2,), TrialState.STOPPED) for n in (1, 2)]
    next_up = policy.decide(History((*behind, *gone), chunks=9))
    assert {n: str(decision.verdict) for n, decision in next_up.items()} == {0: "pause", 3: "continue"}


@pytest.mark.parametrize("budget", [0, -1, 2.0, True, "8"])
def test_bad_budget(budget: object) -> None:
    with pytest.raises(ValueError, match="`budget` must be an integer >= 1, got "):
        SequentialHalving(budget=budget)  # type: ignore[arg-type]
