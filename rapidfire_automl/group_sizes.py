"""Which `num_generations` is worth its cost: a sweep's trials compared at equal steps and at equal cost, in words.

The larger a group of answers to one prompt, the less noisy the step that it yields, and the more tokens that step
takes. Which matters more depends on the task, the model and the other settings, so the best trial of each size speaks
for its size. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rapidfire_automl.rankings import costs
from rapidfire_automl.records import TrialRecord
from rapidfire_policies.base import TrialState

LEVEL = 0.95
"""Of the intervals."""


@dataclass(frozen=True, slots=True)
class Stand:
    """Where the best trial of a group size stands.

    Args:
        size: `num_generations`.
        trial: Its number.
        value: Its reward there.
        chunk: The chunk after which it stands there.
        steps: Optimizer steps until then.
        tokens: Tokens generated and trained until then.
        behind: By how much it is worse than the best of the other sizes; 0 or less for the best itself.
        interval: Of `behind`, from the held-out prompts; None where a prompt's scores are not known.
    """

    size: int
    trial: int
    value: float
    chunk: int
    steps: int
    tokens: int
    behind: float = 0.0
    interval: tuple[float, float] | None = None

    @property
    def is_worse(self) -> bool:
        """Whether it is worse than the best beyond the noise; without an interval, at all."""
        return (self.behind if self.interval is None else self.interval[0]) > 0


@dataclass(frozen=True, slots=True)
class Worth:
    """What a sweep says of its group sizes, smallest first in both.

    Args:
        steps: At equal steps: after as many as some trial of every size has done.
        cost: At equal cost: for as many tokens as some trial of every size has taken.
        tokens: That many, generated and trained.
    """

    steps: tuple[Stand, ...]
    cost: tuple[Stand, ...]
    tokens: int

    @property
    def per_step(self) -> int:
        """The smallest size that is not worse than the best at equal steps."""
        return min(stand.size for stand in self.steps if not stand.is_worse)

    @property
    def per_token(self) -> int:
        """The smallest size that is not worse than the best at equal cost."""
        return min(stand.size for stand in self.cost if not stand.is_worse)


def compare(records: Mapping[int, TrialRecord], *, maximize: bool = True, name: str = "num_generations") -> Worth:
    """Hold the best trial of each group size against the others'.

    Where a size's trials were all stopped early, it is compared as far as they went: equal steps are then fewer than
    a whole trial's, equal cost less.

    Args:
        records: The trials; failed ones and those without a finite value don't count.
        maximize: Whether higher is better.
        name: The parameter to compare by.

    Raises:
        ValueError: Fewer than two sizes have a trial with a value.
    """
    sizes: dict[int, list[TrialRecord]] = {}
    for number in sorted(records):
        record = records[number]
        if name in record.params and record.state is not TrialState.FAILED and any(map(math.isfinite, record.values)):
            sizes.setdefault(int(record.params[name]), []).append(record)
    if len(sizes) < 2:
        raise ValueError(f"`records` must have trials with a value at two or more `{name}`, got {sorted(sizes)}.")
    chunks = min(max(len(record.values) for record in group) for group in sizes.values())
    tokens = min(max(costs(record)[-1] for record in group) for group in sizes.values())
    at_steps = {size: [(record, chunks) for record in group] for size, group in sizes.items()}
    at_cost = {size: [(record, _paid(record, tokens)) for record in group] for size, group in sizes.items()}
    return Worth(_stands(at_steps, maximize), _stands(at_cost, maximize), tokens)


def in_words(worth: Worth, name: str = "num_generations") -> list[str]:
    """The two comparisons and the answer, a line each.

    >>> cheap, dear = Stand(4, 0, 0.61, 2, 4, 900, 0.19, (0.1, 0.3)), Stand(16, 1, 0.8, 2, 4, 3600)
    >>> same = (Stand(4, 0, 0.82, 8, 16, 3600), Stand(16, 1, 0.8, 2, 4, 3600, 0.02, (-0.1, 0.1)))
    >>> for line in in_words(Worth((cheap, dear), same, 3600)):
    ...     print(line)
    At equal steps (4): 16 reaches 0.800; 4 reaches 0.610, behind by 0.190 (0.100 to 0.300).
    At equal cost (3600 tokens): 4 reaches 0.820; 16 reaches 0.800, no worse beyond the noise (-0.100 to 0.100).
    16 learns more in a step than 4, at 4.0 times the tokens, and no more for a token: worth it where steps are dear.
    """
    steps, tokens = worth.steps[0].steps, worth.tokens
    return [
        f"At equal steps ({steps}): {_line(worth.steps)}.",
        f"At equal cost ({tokens} tokens): {_line(worth.cost)}.",
        _answer(worth, name),
    ]


def bootstrap(
    scores: ArrayLike, *, level: float = LEVEL, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """A percentile interval of a mean over prompts.

    Args:
        scores: `(prompts,)`.
        level: Its coverage.
        resamples: Draws of as many prompts, with replacement.
        seed: Of the draws.

    Raises:
        ValueError: No scores, or one that is not finite.

    >>> bootstrap([0.5, 0.5, 0.5])
    (0.5, 0.5)
    """
    values: NDArray[np.float64] = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"`scores` must be finite numbers, one a prompt, got {values!r:.80}.")
    drawn = np.random.default_rng(seed).integers(0, len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _paid(record: TrialRecord, tokens: int) -> int:
    """Chunks that so many tokens pay for."""
    return sum(cost <= tokens for cost in costs(record))


def _stands(at: Mapping[int, Sequence[tuple[TrialRecord, int]]], maximize: bool) -> tuple[Stand, ...]:
    """The best trial of each size, held against the best of all; sizes that stand nowhere are left out."""
    sign = 1.0 if maximize else -1.0
    best: dict[int, tuple[TrialRecord, int]] = {}
    for size, group in at.items():
        stood = [
            (record, chunk)
            for record, chunk in group
            if 0 < chunk <= len(record.values) and math.isfinite(record.values[chunk - 1])
        ]
        if stood:
            best[size] = max(stood, key=lambda found: (sign * found[0].values[found[1] - 1], -found[0].number))
    order = sorted(best, key=lambda size: (-sign * _value(best[size]), size))
    leader = best[order[0]]
    return tuple(_stand(size, best[size], leader, sign) for size in sorted(best))


def _stand(size: int, found: tuple[TrialRecord, int], leader: tuple[TrialRecord, int], sign: float) -> Stand:
    record, chunk = found
    behind, interval = 0.0, None
    if found is not leader:
        behind = sign * (_value(leader) - _value(found))
        mine, best = _scores(found), _scores(leader)
        if mine is not None and best is not None and mine.shape == best.shape:
            interval = bootstrap(sign * (best - mine))
    steps = record.boundaries[chunk - 1] if chunk <= len(record.boundaries) else chunk
    return Stand(size, record.number, _value(found), chunk, steps, costs(record)[chunk - 1], behind, interval)


def _value(found: tuple[TrialRecord, int]) -> float:
    return found[0].values[found[1] - 1]


def _scores(found: tuple[TrialRecord, int]) -> NDArray[np.float64] | None:
    record, chunk = found
    scores = record.scores[chunk - 1] if chunk <= len(record.scores) else np.empty(0)
    return scores if scores.ndim == 1 and len(scores) and np.isfinite(scores).all() else None


def _line(stands: Sequence[Stand]) -> str:
    return "; ".join(_words(stand) for stand in sorted(stands, key=lambda stand: (stand.behind, stand.size)))


def _words(stand: Stand) -> str:
    words = f"{stand.size} reaches {stand.value:.3f}"
    if stand.interval is None:
        return words if stand.behind <= 0 else f"{words}, behind by {stand.behind:.3f}"
    noise = f"({stand.interval[0]:.3f} to {stand.interval[1]:.3f})"
    if stand.is_worse:
        return f"{words}, behind by {stand.behind:.3f} {noise}"
    return f"{words}, no worse beyond the noise {noise}"


def _answer(worth: Worth, name: str) -> str:
    cheap, dear = worth.per_token, worth.per_step
    spent = {stand.size: stand.tokens for stand in worth.steps}
    if cheap == dear:
        others = [size for size in spent if size > cheap]
        more = " and ".join(f"{size} costs {spent[size] / spent[cheap]:.1f} times as much" for size in others)
        better = f": {more} a step, and is no better for it" if others else ""
        return f"{name} = {cheap} is worth its cost here, at equal steps and at equal cost{better}."
    low, high = sorted((cheap, dear))
    times = f"at {spent[high] / spent[low]:.1f} times the tokens"
    if high == dear:
        return (
            f"{high} learns more in a step than {low}, {times}, and no more for a token: worth it where steps are dear."
        )
    return f"{high} learns more for a token than {low} and no more in a step: {high} is worth its cost, {low} is not."


def as_facts(worth: Worth) -> dict[str, Any]:
    """What `summary.json` keeps of it."""
    return {"per_step": worth.per_step, "per_token": worth.per_token, "worth": worth, "answer": in_words(worth)}
