"""How answers are sampled when trials are compared: the same for all, whatever a trial trains with; torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampling:
    """The rollouts of an evaluation.

    Args:
        num_generations: Answers to each prompt; a prompt's score is the mean of their rewards.
        temperature: Of the softmax; 0 takes the likeliest token each time.
        top_p: The smallest set of tokens with this much probability is kept.
        top_k: So many of the likeliest tokens are kept; 0 keeps all.
        max_completion_length: Most tokens of an answer.
        reward_weights: One a reward function; None for the trainer's own, which all trials then must agree on.

    Raises:
        ValueError: A number is out of range.

    >>> Sampling(num_generations=8, temperature=0.7).max_completion_length
    256
    """

    num_generations: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_completion_length: int = 256
    reward_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_generations", 1), ("top_k", 0), ("max_completion_length", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer >= {least}, got {value!r}.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"`temperature` must be >= 0, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}.")
        if self.temperature == 0 and self.num_generations > 1:
            raise ValueError(
                f"`num_generations` must be 1 at temperature 0, where all answers are the same, got "
                f"{self.num_generations}."
            )
        if self.reward_weights is not None and not all(math.isfinite(weight) for weight in self.reward_weights):
            raise ValueError(f"`reward_weights` must be finite numbers, got {self.reward_weights}.")
