"""Chunk boundaries: exact tables, and the definition itself as a slow reference."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapidfire_automl.chunks import chunk_boundaries, examples_after, generation_boundaries


def consumed_by_each_step(examples_per_epoch: int, examples_per_step: int, max_steps: int) -> list[int]:
    """Feed the epochs step by step, as a trainer does."""
    sizes: list[int] = []
    while len(sizes) < max_steps:
        left = examples_per_epoch
        while left:
            sizes.append(min(left, examples_per_step))
            left -= sizes[-1]
    return sizes[:max_steps]


@pytest.mark.parametrize(
    ("examples", "per_step", "max_steps", "chunks", "expected"),
    [
        (100, 10, 10, 5, (2, 4, 6, 8, 10)),
        (100, 10, 10, 1, (10,)),
        (100, 10, 10, 10, tuple(range(1, 11))),
        (100, 10, 10, 4, (3, 5, 8, 10)),
        (100, 10, 30, 4, (8, 15, 23, 30)),
        # The last step of an epoch holds 2 of 10 examples: the half of 20 examples lies at step 3, not at 10 / 4 = 2.5.
        (10, 4, 6, 2, (3, 6)),
        (10, 4, 6, 4, (2, 3, 5, 6)),
        # The budget ends in the middle of an epoch: 8 + 8 of 20 examples, half of them after step 1.
        (20, 8, 2, 2, (1, 2)),
        # One step per epoch, larger than the data.
        (3, 64, 4, 4, (1, 2, 3, 4)),
        # Steps of 8, 1, 8 examples: two thirds of 17 are reached in step 3 only; chunk 2 still gets a step of its own.
        (9, 8, 3, 3, (1, 2, 3)),
        # 8, 1, 8, 1: a quarter and a half both lie within the first steps.
        (9, 8, 4, 4, (1, 2, 3, 4)),
        (5, 1, 5, 5, (1, 2, 3, 4, 5)),
    ],
)
def test_boundaries(examples: int, per_step: int, max_steps: int, chunks: int, expected: tuple[int, ...]) -> None:
    assert chunk_boundaries(examples, per_step, max_steps, chunks) == expected


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 60), st.integers(1, 12))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_against_the_definition(examples: int, per_step: int, max_steps: int, chunks: int) -> None:
    consumed = list(itertools.accumulate(consumed_by_each_step(examples, per_step, max_steps), initial=0))
    assert [examples_after(examples, per_step, step) for step in range(max_steps + 1)] == consumed
    if max_steps < chunks:
        return
    boundaries = chunk_boundaries(examples, per_step, max_steps, chunks)
    total = consumed[-1]
    wanted = [next(s for s, n in enumerate(consumed) if n * chunks >= k * total) for k in range(1, chunks + 1)]
    assert len(boundaries) == chunks
    assert boundaries[-1] == max_steps
    assert all(a < b for a, b in itertools.pairwise((0, *boundaries)))
    if all(a < b for a, b in itertools.pairwise((0, *wanted))):
        assert list(boundaries) == wanted


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 12), st.integers(1, 5))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_whole_epochs_as_chunks(examples: int, per_step: int, chunks: int, epochs: int) -> None:
    steps_per_epoch = -(-examples // per_step)
    boundaries = chunk_boundaries(examples, per_step, chunks * epochs * steps_per_epoch, chunks)
    assert boundaries == tuple(k * epochs * steps_per_epoch for k in range(1, chunks + 1))


def test_huge_counts_stay_exact() -> None:
    """Floats would lose the last examples of 10**18."""
    assert chunk_boundaries(10**18 + 1, 1, 10**18 + 1, 2) == (5 * 10**17 + 1, 10**18 + 1)


def test_fewer_steps_than_chunks() -> None:
    with pytest.raises(ValueError, match=r"^`chunks` must be <= the trial's 5 optimizer steps, got 8\. Use fewer"):
        chunk_boundaries(100, 20, 5, 8)


@pytest.mark.parametrize("name", ["examples_per_epoch", "examples_per_step", "max_steps", "chunks"])
def test_sizes_must_be_positive(name: str) -> None:
    sizes = {"examples_per_epoch": 10, "examples_per_step": 2, "max_steps": 5, "chunks": 5}
    with pytest.raises(ValueError, match=rf"^`{name}` must be >= 1, got 0\."):
        chunk_boundaries(**{**sizes, name: 0})


def test_negative_steps() -> None:
    with pytest.raises(ValueError, match="`steps` must be >= 0, got -1"):
        examples_after(10, 2, -1)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ((8, 1, 1, 8, 4), (2, 4, 6, 8)),  # a rollout a step
        ((16, 1, 4, 16, 4), (4, 8, 12, 16)),  # a rollout every four steps
        ((16, 2, 4, 8, 3), (4, 6, 8)),  # every two steps, and three chunks of four such places
        ((16, 4, 2, 4, 2), (2, 4)),  # two rollouts a step
        ((8, 1, 4, 6, 1), (6,)),  # the last step may lie between
        ((8, 1, 4, 6, 2), (4, 6)),
        ((6, 4, 2, 4, 4), (1, 2, 3, 4)),  # steps of four batches and of the two that are left of an epoch
    ],
)
def test_a_chunk_ends_where_all_rollouts_are_used_up(
    case: tuple[int, int, int, int, int], expected: tuple[int, ...]
) -> None:
    assert generation_boundaries(*case) == expected


def test_places_are_as_even_as_they_can_be() -> None:
    for per_epoch, accumulation, every, steps, chunks in itertools.product(
        (12, 24, 36), (1, 2, 3), (1, 2, 4, 6), (12, 17, 40), (1, 2, 3, 5)
    ):
        used = [examples_after(per_epoch, accumulation, step) for step in range(steps + 1)]
        places = [step for step in range(1, steps) if used[step] % every == 0] + [steps]
        if len(places) < chunks:
            with pytest.raises(ValueError, match="`chunks` must be <= the"):
                generation_boundaries(per_epoch, accumulation, every, steps, chunks)
            continue
        ends = generation_boundaries(per_epoch, accumulation, every, steps, chunks)
        assert len(ends) == chunks
        assert ends[-1] == steps
        assert all(a < b for a, b in itertools.pairwise(ends))
        assert all(end in places for end in ends)
        widest = max(b - a for a, b in itertools.pairwise([0, *places]))
        for k, end in enumerate(ends, 1):
            assert abs(used[end] - k * used[-1] / chunks) <= max(widest, steps / len(places) + 1) * accumulation * 2
