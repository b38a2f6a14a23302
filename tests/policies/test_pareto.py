"""Several objectives as one number: by hand, by definition, and whatever the order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rapidfire_policies.pareto import scalarize


def fronts_by_definition(vectors: np.ndarray) -> list[int]:
    """Peel off what no other dominates."""
    left, front, found = set(range(len(vectors))), 0, [0] * len(vectors)
    while left:
        best = {
            i
            for i in left
            if not any((vectors[j] <= vectors[i]).all() and (vectors[j] < vectors[i]).any() for j in left)
        }
        for i in best:
            found[i] = front
        left, front = left - best, front + 1
    return found


def volume_on_a_grid(points: np.ndarray, reference: float) -> float:
    """Count the cells that a point covers; exact where the points lie on the grid."""
    axes = [np.unique(np.append(column, reference)) for column in points.T]
    total = 0.0
    for corner in itertools.product(*(range(len(axis) - 1) for axis in axes)):
        low = np.array([axis[i] for axis, i in zip(axes, corner, strict=True)])
        high = np.array([axis[i + 1] for axis, i in zip(axes, corner, strict=True)])
        if (points <= low).all(axis=1).any():
            total += float(np.prod(high - low))
    return total


def test_a_worked_table() -> None:
    vectors = [[1, 5], [2, 3], [4, 2], [5, 1], [3, 4], [5, 5], [6, 6]]
    # Front 0: four; scaled by 5 with the reference at 1.1: alone .2 * .3 = .06, .4 * .4 = .16, .2 * .2 = .04, .3 * .2 = .06.
    # (3, 4) is behind (2, 3) only, (5, 5) behind it, (6, 6) behind all.
    assert scalarize(vectors).tolist() == [0.25, 0.0, 0.75, 0.25, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_fronts_and_contributions_by_definition(objectives: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).choice([0.0, 0.25, 0.5, 1.0, 2.0], size=(9, objectives))
    scalars = scalarize(vectors)
    fronts = fronts_by_definition(vectors)
    assert np.floor(scalars).astype(int).tolist() == fronts
    ranges = np.ptp(vectors, axis=0)
    points = (vectors - vectors.min(axis=0)) / np.where(ranges > 0, ranges, 1.0)
    for front in set(fronts):
        members = [i for i, f in enumerate(fronts) if f == front]
        whole = volume_on_a_grid(points[members], 1.1)
        alone = {i: whole - volume_on_a_grid(points[[j for j in members if j != i]], 1.1) for i in members}
        for i, j in itertools.combinations(members, 2):
            if abs(alone[i] - alone[j]) > 1e-9:
                assert (scalars[i] < scalars[j]) == (alone[i] > alone[j])
            else:
                assert scalars[i] == scalars[j]


@pytest.mark.parametrize("objectives", [2, 3])
def test_the_order_plays_no_part(objectives: int) -> None:
    values = [0.0, 0.25, 0.5, 0.5, 1.0, 3.0, math.nan, math.inf, -math.inf]
    for seed in range(100):
        random = np.random.default_rng(seed)
        vectors = random.choice(values, size=(int(random.integers(1, 12)), objectives))
        order = random.permutation(len(vectors))
        np.testing.assert_array_equal(scalarize(vectors)[order], scalarize(vectors[order]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_comes_last_and_changes_nobody(bad: float) -> None:
    sound = [[0.0, 1.0], [1.0, 0.0], [0.4, 0.4]]
    assert scalarize([*sound, [bad, 0.0], [0.0, bad]]).tolist() == [*scalarize(sound).tolist(), math.inf, math.inf]


def test_units_do_not_matter() -> None:
    vectors = np.random.default_rng(0).normal(size=(20, 2))
    np.testing.assert_array_equal(scalarize(vectors), scalarize(vectors * [1e6, 1e-3] + [5.0, -2.0]))
    largest = np.finfo(float).max
    assert scalarize([[largest, 0.0], [-largest, 1.0], [0.0, 0.2]]).tolist() == [2 / 3, 1 / 3, 0.0]


def test_equal_vectors_are_equal_and_a_lone_one_is_best() -> None:
    assert scalarize([[1.0, 2.0]] * 3).tolist() == [0.0] * 3
    assert scalarize([[1.0, 2.0]]).tolist() == [0.0]
    assert scalarize([]).tolist() == []
    assert scalarize(np.empty((0, 2))).tolist() == []


def test_what_is_no_table() -> None:
    with pytest.raises(ValueError, match=r"`vectors` must have the shape \(trials, objectives\), got \(2,\)"):
        scalarize([1.0, 2.0])
