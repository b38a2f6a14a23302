"""What a search over recorded curves is worth, and how sure the comparison is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Weights = NDArray[np.float64]


def regret(finals: ArrayLike, selected: int | None) -> float:
    """`min(1, (final of the selected - best) / (median - best))` over finite finals.

    0 is the best trial, 1 one that is no better than the median. It is capped there: finals go up to 1e19, and one
    diverged trial would be the mean. Also 1 where nothing was handed over, where the final of what was handed over is
    not finite, and, where the median ties with the best, for whatever is no best.

    >>> regret([1.0, 2.0, 3.0, 5.0, float("nan")], 1)
    0.6666666666666666
    """
    values = np.asarray(finals, dtype=np.float64)
    finite = values[np.isfinite(values)]
    if selected is None or not math.isfinite(values[selected]):
        return 1.0
    lost, scale = values[selected] - finite.min(), np.median(finite) - finite.min()
    return 0.0 if lost == 0 else float(min(1.0, lost / scale)) if scale > 0 else 1.0


def is_best(finals: ArrayLike, selected: int | None) -> bool:
    """Whether the selected trial has the best finite final value; ties count."""
    values = np.asarray(finals, dtype=np.float64)
    return selected is not None and bool(values[selected] == values[np.isfinite(values)].min())


def weights(seeds: int, draws: int, seed: int) -> Weights:
    """Bootstrap draws of seeds as weights, `(draws, seeds)`: the same for whatever is compared, so that it is paired.

    Each row sums to 1.
    """
    picks = np.random.default_rng(seed).integers(0, seeds, size=(draws, seeds))
    counts = np.zeros((draws, seeds))
    np.add.at(counts, (np.arange(draws)[:, None], picks), 1.0)
    return counts / seeds


def interval(values: ArrayLike, resampled: Weights) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean of `values`, `(seeds,)`."""
    low, high = np.percentile(resampled @ np.asarray(values, dtype=np.float64), [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Outcome:
    """What one setting did with one cell, by seed.

    Args:
        regret: `(seeds,)`.
        speedup: `(seeds,)`, all chunks / chunks used.
        cost_speedup: `(seeds,)`, all tokens / tokens used.
        best: `(seeds,)`, 1 where it handed over the best trial.
    """

    regret: NDArray[np.float64]
    speedup: NDArray[np.float64]
    cost_speedup: NDArray[np.float64]
    best: NDArray[np.float64]


def difference(one: Outcome, other: Outcome, resampled: Weights) -> dict[str, Any]:
    """How much more regret and speed-up `one` has than `other`, with paired intervals."""
    lost, faster = one.regret - other.regret, one.speedup - other.speedup
    return {
        "regret": float(lost.mean()), "regret_interval": interval(lost, resampled),
        "speedup": float(faster.mean()), "speedup_interval": interval(faster, resampled),
    }  # fmt: skip


def dominates(difference: Mapping[str, Any]) -> bool:
    """Whether a rival is both faster and better than what it is compared with, each beyond the noise.

    Args:
        difference: The rival minus the other.
    """
    return bool(difference["speedup_interval"][0] > 0 and difference["regret_interval"][1] < 0)


def dominates_in_means(difference: Mapping[str, Any]) -> bool:
    """The harsher reading: at least as fast and as good in the means, and one of both strictly."""
    faster, lost = difference["speedup"], difference["regret"]
    return bool(faster >= 0 and lost <= 0 and (faster > 0 or lost < 0))


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points `(speedup, regret)` that no other beats in both, by speed-up.

    >>> front([(1.0, 0.0), (2.0, 0.1), (1.5, 0.2), (3.0, 0.1)])
    [0, 3]
    """
    kept: list[int] = []
    least = math.inf
    for i in sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1])):
        if points[i][1] < least:
            least = points[i][1]
            kept.append(i)
    return kept[::-1]
