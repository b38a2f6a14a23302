"""TopTwoThompson: what it believes, whom it lets train, and that a search with it ends."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from rapidfire_automl.replay import replay
from rapidfire_policies import History, TopTwoThompson, TrialHistory, TrialState


def falling(ends: list[float], chunks: int = 16, noise: float = 0.0) -> np.ndarray:
    """Curves `(trials, chunks)` that fall as `t^-1/2` to these ends."""
    t = np.arange(1, chunks + 1) ** -0.5 - chunks**-0.5
    errors = np.random.default_rng(0).normal(size=(len(ends), chunks))
    return np.array(ends)[:, None] + t + noise * errors


def paused(curves: np.ndarray, done: int) -> tuple[TrialHistory, ...]:
    return tuple(TrialHistory(i, tuple(row[:done]), TrialState.PAUSED) for i, row in enumerate(curves.tolist()))


def verdicts(policy: TopTwoThompson, history: History) -> dict[int, str]:
    return {number: str(decision.verdict) for number, decision in sorted(policy.decide(history).items())}


def test_the_chance_against_a_hand_calculation() -> None:
    """Two trials after one of four chunks: no curve to fit, so means are last values."""
    history = History(paused(np.array([[1.0], [2.0]]), 1), chunks=4)
    # reach = 1.5 * (median 1.5 - best 1) = 0.75; deviation = 0.75 * (1 - 1/2); z = -1 / (0.375 * sqrt(2)) = -1.886
    chance = 0.5 * math.erfc(1 / (0.375 * math.sqrt(2)) / math.sqrt(2))
    assert 0.029 < chance < 0.030
    assert verdicts(TopTwoThompson(chance=0.029), history)[1] == "pause"
    assert verdicts(TopTwoThompson(chance=0.030), history) == {0: "continue", 1: "stop"}
    reason = TopTwoThompson(chance=0.030).decide(history)[1].reason
    assert reason == "ends at 2 ± 0.38; a chance of 0.03 to beat trial 0"


def test_a_curve_is_continued_to_its_end() -> None:
    """The trial that is behind but falls faster is believed to end lower, and leads."""
    t = np.arange(1, 17) ** -0.5
    curves = np.array([1.0 + 0.2 * t, 0.5 + 1.5 * t])
    assert curves[0, 5] < curves[1, 5]
    history = History(paused(curves, 6), chunks=16, slots=1)
    decisions = TopTwoThompson().decide(history)
    assert decisions[0].reason.endswith("to beat trial 1") or str(decisions[1].verdict) == "continue"
    assert f"ends at {curves[1, -1]:.4g} ±" in decisions[1].reason


def test_while_somebody_runs_the_others_wait_and_then_the_slots_are_filled() -> None:
    curves = falling([0.5, 0.51, 0.52, 0.53])
    all_paused = paused(curves, 2)
    one_runs = (replace(all_paused[0], state=TrialState.RUNNING), *all_paused[1:])
    assert set(verdicts(TopTwoThompson(), History(one_runs, chunks=16, slots=2)).values()) == {"pause"}
    for slots in (1, 2, 3, 4, 8):
        answer = verdicts(TopTwoThompson(), History(all_paused, chunks=16, slots=slots))
        assert list(answer.values()).count("continue") == min(slots, 4)
        assert answer[0] == "continue", "the leader always trains"


def test_the_leader_trains_whatever_is_drawn() -> None:
    history = History(paused(falling([0.5, 0.501, 0.502, 0.503], noise=1e-3), 2), chunks=16, slots=1)
    leaders = {tuple(verdicts(TopTwoThompson(seed=seed, beta=0.01), history).values()) for seed in range(50)}
    assert len(leaders) == 1


def test_beta_says_whether_the_best_or_the_second_best_of_a_draw_trains() -> None:
    history = History(paused(falling([0.5 + 0.01 * i for i in range(8)], noise=1e-3), 2), chunks=16, slots=3)
    answers = [
        [verdicts(TopTwoThompson(seed=seed, beta=beta), history) for seed in range(20)] for beta in (0.001, 0.999)
    ]
    assert answers[0] != answers[1]


def test_beta_divides_the_chunks_between_the_best_and_its_rivals() -> None:
    """With two slots the second one is drawn: mostly the runner-up, in some rounds somebody else."""
    curves = falling([0.5, 0.5001, 0.52, 0.53], noise=1e-3)
    picked = []
    for seed in range(200):
        answer = verdicts(TopTwoThompson(seed=seed), History(paused(curves, 3), chunks=16, slots=2))
        picked += [number for number, verdict in answer.items() if verdict == "continue" and number > 0]
    assert picked.count(1) > picked.count(2) > 0


def test_draws_repeat_with_the_seed_and_change_with_the_chunks_done() -> None:
    curves = falling([0.5 + 0.001 * i for i in range(12)])
    history = History(paused(curves, 2), chunks=16, slots=4)
    assert verdicts(TopTwoThompson(seed=1), history) == verdicts(TopTwoThompson(seed=1), history)
    answers = {tuple(verdicts(TopTwoThompson(seed=seed), history).values()) for seed in range(8)}
    assert len(answers) > 1
    more = History((*history.trials, TrialHistory(99, (9.0,), TrialState.STOPPED)), chunks=16, slots=4)
    later = [
        verdicts(TopTwoThompson(seed=seed), more) != verdicts(TopTwoThompson(seed=seed), history) for seed in range(8)
    ]
    assert any(later)


@pytest.mark.parametrize("slots", [1, 4, 16])
@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("trials", [1, 2, 16, 40])
def test_a_search_ends_with_the_best_trial_within_its_budget(trials: int, noise: float, slots: int) -> None:
    ends = [0.1 + 0.05 * i for i in range(trials)]
    found = replay(falling(ends, noise=noise), TopTwoThompson(), slots=slots, max_alive=2 * slots)
    assert 0 in found.complete
    assert len(found.stopped | found.complete) == len(found.resource)
    assert all(found.resource)
    if trials > max(2, slots):
        assert found.chunks < 0.5 * trials * 16


@pytest.mark.parametrize("budget", [1, 20, 60])
def test_equal_trials_are_ended_by_the_budget(budget: int) -> None:
    found = replay(falling([0.5] * 8), TopTwoThompson(budget=budget), slots=4, max_alive=8)
    assert len(found.complete) >= 1
    assert found.chunks <= budget + 4 + 16 + 8


def test_nothing_is_stopped_that_is_as_good_as_the_leader() -> None:
    history = History(tuple(TrialHistory(i, (0.5,) * 4, TrialState.PAUSED) for i in range(4)), chunks=8, slots=2)
    assert "stop" not in verdicts(TopTwoThompson(budget=100), history).values()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, "`beta` must be a number between 0 and 1, got 0.0"),
        ({"beta": 1}, "`beta` must be a number between 0 and 1, got 1"),
        ({"chance": math.nan}, "`chance` must be a number between 0 and 1, got nan"),
        ({"doubt": 0}, "`doubt` must be a number > 0, got 0"),
        ({"seed": -1}, "`seed` must be an integer >= 0, got -1"),
        ({"budget": 0}, "`budget` must be an integer >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopTwoThompson(**arguments)  # type: ignore[arg-type]
