"""Which group size is worth its cost, on made-up trials."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rapidfire_automl.group_sizes import Stand, Worth, as_facts, bootstrap, compare, in_words
from rapidfire_automl.records import TrialRecord
from rapidfire_policies.base import TrialState

PROMPTS = 64
ORDER = np.random.default_rng(0).permutation(PROMPTS)


def trial(number: int, size: int, values: list[float], state: TrialState = TrialState.COMPLETE) -> TrialRecord:
    """A trial whose chunks of two steps take 10 tokens an answer, and whose reward is 1 on a share of the prompts."""
    made = TrialRecord(number, {"num_generations": size}, state=state, values=values)
    made.scores = [
        (round(value * PROMPTS) > ORDER).astype(float) if math.isfinite(value) else np.full(PROMPTS, np.nan)
        for value in values
    ]
    made.generated = [8 * size] * len(values)
    made.tokens = [2 * size] * len(values)
    made.boundaries = [2 * k for k in range(1, len(values) + 1)]
    return made


def records(*trials: TrialRecord) -> dict[int, TrialRecord]:
    return {one.number: one for one in trials}


def test_equal_steps_and_equal_cost() -> None:
    found = compare(
        records(
            trial(0, 4, [0.25, 0.5, 0.75, 0.75]),
            trial(1, 4, [0.25, 0.25, 0.25], TrialState.STOPPED),
            trial(2, 8, [0.5, 0.75], TrialState.STOPPED),
            trial(3, 16, [0.75], TrialState.STOPPED),
            trial(4, 16, [1.0], TrialState.FAILED),
            trial(5, 16, [math.nan], TrialState.STOPPED),
        )
    )
    # After one chunk, which the sizes' tokens pay for at 40, 80 and 160.
    assert [(s.size, s.trial, s.value, s.chunk, s.steps, s.tokens) for s in found.steps] == [
        (4, 0, 0.25, 1, 2, 40),
        (8, 2, 0.5, 1, 2, 80),
        (16, 3, 0.75, 1, 2, 160),
    ]
    assert (found.per_step, found.per_token, found.tokens) == (16, 4, 160)
    assert [(s.size, s.trial, s.value, s.chunk, s.tokens) for s in found.cost] == [
        (4, 0, 0.75, 4, 160),
        (8, 2, 0.75, 2, 160),
        (16, 3, 0.75, 1, 160),
    ]
    assert [s.behind for s in found.steps] == [0.5, 0.25, 0.0]
    assert found.steps[2].interval is None  # the best is behind nobody
    low, high = found.steps[1].interval or (0.0, 0.0)
    assert 0.1 < low < 0.25 < high < 0.4


def test_noise_is_no_difference() -> None:
    small, large = trial(0, 4, [0.5]), trial(1, 16, [0.53])
    large.scores = [np.roll(small.scores[0], 7)]
    found = compare(records(small, large))
    assert found.steps[0].behind == pytest.approx(0.03)
    assert not found.steps[0].is_worse
    assert found.per_step == 4


def test_without_scores_any_difference_counts() -> None:
    small, large = trial(0, 4, [0.5]), trial(1, 16, [0.53])
    small.scores, large.scores = [], []
    found = compare(records(small, large))
    assert found.per_step == 16
    assert "4 reaches 0.500, behind by 0.030" in in_words(found)[0]


def test_losses_are_compared_the_other_way() -> None:
    found = compare(records(trial(0, 4, [0.25]), trial(1, 16, [0.75])), maximize=False)
    assert [(s.size, s.behind) for s in found.steps] == [(4, 0.0), (16, 0.5)]


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [trial(0, 4, [0.5]), trial(1, 4, [0.6])],
        [trial(0, 4, [0.5]), trial(1, 8, [0.6], TrialState.FAILED), trial(2, 16, [])],
    ],
)
def test_one_size_compares_with_nothing(trials: list[TrialRecord]) -> None:
    with pytest.raises(ValueError, match="two or more `num_generations`"):
        compare(records(*trials))


def stand(size: int, **more: Any) -> Stand:
    return Stand(size, size, 0.5, 1, 2, 10 * size, **more)


WORSE: dict[str, Any] = {"behind": 0.1, "interval": (0.05, 0.15)}
EQUAL: dict[str, Any] = {"behind": 0.1, "interval": (-0.05, 0.25)}


@pytest.mark.parametrize(
    ("steps", "cost", "expected"),
    [
        (
            (EQUAL, {}, EQUAL),
            ({}, WORSE, WORSE),
            "num_generations = 4 is worth its cost here, at equal steps and at equal cost: 8 costs 2.0 times as much "
            "and 16 costs 4.0 times as much a step, and is no better for it.",
        ),
        (
            (WORSE, WORSE, {}),
            (WORSE, WORSE, {}),
            "num_generations = 16 is worth its cost here, at equal steps and at equal cost.",
        ),
        (
            (WORSE, {}, EQUAL),
            ({}, EQUAL, WORSE),
            "8 learns more in a step than 4, at 2.0 times the tokens, and no more for a token: worth it where steps "
            "are dear.",
        ),
        (
            (EQUAL, EQUAL, {}),
            (WORSE, {}, WORSE),
            "8 learns more for a token than 4 and no more in a step: 8 is worth its cost, 4 is not.",
        ),
    ],
)
def test_the_answer(steps: tuple[dict[str, Any], ...], cost: tuple[dict[str, Any], ...], expected: str) -> None:
    sizes = (4, 8, 16)
    worth = Worth(
        tuple(stand(size, **more) for size, more in zip(sizes, steps, strict=True)),
        tuple(stand(size, **more) for size, more in zip(sizes, cost, strict=True)),
        160,
    )
    assert in_words(worth)[-1] == expected
    assert as_facts(worth)["answer"][-1] == expected


def test_bootstrap_covers_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        low, high = bootstrap(draws.random(PROMPTS) < 0.7, resamples=500, seed=seed)
        covered += low <= 0.7 <= high
    assert 0.88 < covered / 200 < 0.99
    with pytest.raises(ValueError, match="`scores` must be finite numbers"):
        bootstrap([0.5, math.nan])
