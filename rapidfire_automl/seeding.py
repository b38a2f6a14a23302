"""A sampler whose proposal for a trial depends on a seed and the trial's number, not on what it has drawn before.

Optuna's samplers draw from one stream, which a process that was killed takes with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import optuna


def seed_of(sampler: optuna.samplers.BaseSampler) -> int:
    """A seed that follows from the sampler's own, if it has one."""
    for generator in _generators(sampler):
        return int(generator.rng.randint(2**31))
    return int(np.random.default_rng().integers(2**31))


def reseed(sampler: optuna.samplers.BaseSampler, seed: int, *key: int) -> None:
    """Have a sampler's next draws be those for one trial.

    Args:
        sampler: Its generators, and those of the samplers it holds, are seeded; what has none is left alone.
        seed: Of the search.
        key: The trial's number, and what else tells these draws from others.
    """
    for place, generator in enumerate(_generators(sampler)):
        state = np.random.SeedSequence([seed, *key, place]).generate_state(4)
        generator.rng.seed(state)


def _generators(sampler: Any, depth: int = 3) -> Iterator[Any]:
    """The sampler's lazy random states, in a fixed order."""
    for _, value in sorted(getattr(sampler, "__dict__", {}).items()):
        if type(value).__name__ == "LazyRandomState":
            yield value
        elif isinstance(value, optuna.samplers.BaseSampler) and depth:
            yield from _generators(value, depth - 1)
