"""Several objectives as one number: non-dominated fronts first, then the hypervolume only a trial covers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MARGIN = 0.1
"""How far behind the worst value the reference point lies, in units of an objective's range."""


def scalarize(vectors: ArrayLike) -> NDArray[np.float64]:
    """Rank vectors; the scalar is lower for the better one.

    A vector dominates another if it is nowhere worse and somewhere better. Front 0 are the vectors that no other
    dominates, front 1 those that only front 0 dominates, and so on. Within a front of `n`, the vector that alone covers
    the most hypervolume comes first:

        scalar = front + (vectors of the front with a larger contribution) / n

    Objectives are scaled by their range over all vectors, and the reference point lies a tenth of it behind the worst
    value of each. Equal vectors get equal scalars, and the order of the vectors plays no part.

    Args:
        vectors: One row a trial, one column an objective, lower is better, shape `(trials, objectives)`.

    Returns:
        A scalar a trial, shape `(trials,)` float64; `inf` for a vector with a NaN or an infinity in it.

    Raises:
        ValueError: `vectors` is no table.

    What breaks it: a scalar says where a vector stands among these vectors and nothing else, so those of two sets, or
    of one trial at two chunks, must not be subtracted. With more than a few objectives nearly all vectors are
    non-dominated, and the time for a contribution grows exponentially.

    Papers: Deb et al., NSGA-II, 2002 (the fronts); Beume, Naujoks and Emmerich, SMS-EMOA, 2007 (the contributions).

    >>> scalarize([[1.0, 4.0], [2.0, 2.0], [4.0, 1.0], [3.0, 3.0], [float("nan"), 0.0]]).round(2).tolist()
    [0.33, 0.0, 0.33, 1.0, inf]
    """
    table = np.asarray(vectors, dtype=np.float64)
    if table.size == 0 and table.ndim < 2:
        return np.empty(0)
    if table.ndim != 2:
        raise ValueError(f"`vectors` must have the shape (trials, objectives), got {table.shape}.")
    scalars = np.full(len(table), np.inf)
    finite = np.flatnonzero(np.isfinite(table).all(axis=1))
    points = _scaled(table[finite])
    for front, members in enumerate(_fronts(points)):
        alone = _contributions(points[members])
        # Equal up to rounding is equal: which of two mirrored vectors covers 1e-17 more depends on the order of sums.
        ahead = (alone[None, :] > alone[:, None] + 1e-12).sum(axis=1)
        scalars[finite[members]] = front + ahead / len(members)
    return scalars


def _scaled(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each objective from 0 (best) to 1 (worst), shape `(trials, objectives)`; all 0 where all are equal."""
    if not len(points):
        return points
    best = points.min(axis=0)
    # Halves first: the range of values near the largest float would overflow.
    range_ = points.max(axis=0) / 2 - best / 2
    scaled: NDArray[np.float64] = (points / 2 - best / 2) / np.where(range_ > 0, range_, 1.0)
    return scaled


def _fronts(points: NDArray[np.float64]) -> list[NDArray[np.intp]]:
    """The places of each front's vectors."""
    no_worse: NDArray[np.bool_] = np.all(points[:, None, :] <= points[None, :, :], axis=2)
    dominates = no_worse & ~no_worse.T
    left = np.ones(len(points), dtype=bool)
    fronts = []
    while left.any():
        front = np.flatnonzero(left & ~np.any(dominates[left], axis=0))
        fronts.append(front)
        left[front] = False
    return fronts


def _contributions(front: NDArray[np.float64]) -> NDArray[np.float64]:
    """The hypervolume that each vector of a front covers alone, up to `1 + _MARGIN` in each objective."""
    if front.shape[1] == 2:
        return _contributions_of_two(front)
    everybody = [tuple(point) for point in front.tolist()]
    alone = []
    for place, point in enumerate(everybody):
        others = everybody[:place] + everybody[place + 1 :]
        alone.append(_volume([point]) - _volume([_meet(point, other) for other in others]))
    return np.array(alone)


def _contributions_of_two(front: NDArray[np.float64]) -> NDArray[np.float64]:
    """With two objectives each vector's own share is a rectangle between its neighbours."""
    unique, places, counts = np.unique(front, axis=0, return_inverse=True, return_counts=True)
    reference = 1 + _MARGIN
    right = np.append(unique[1:, 0], reference)
    above = np.concatenate(([reference], unique[:-1, 1]))
    alone = (right - unique[:, 0]) * (above - unique[:, 1])
    return np.asarray(np.where(counts > 1, 0.0, alone)[places.reshape(-1)])


def _meet(one: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    """What both cover."""
    return tuple(max(a, b) for a, b in zip(one, other, strict=True))


def _volume(points: Sequence[tuple[float, ...]]) -> float:
    """The hypervolume between the points and the reference, by slices along the last objective."""
    points = sorted(set(points), key=lambda point: point[-1])
    if not points:
        return 0.0
    reference = 1 + _MARGIN
    if len(points[0]) == 1:
        return reference - points[0][0]
    total = 0.0
    for place, point in enumerate(points):
        until = points[place + 1][-1] if place + 1 < len(points) else reference
        if until > point[-1]:
            total += _volume([p[:-1] for p in points[: place + 1]]) * (until - point[-1])
    return total
