"""Which values TRL, PEFT and torch can train with at all, whatever a search space says. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limit:
    """The numbers a field takes.

    Args:
        least: The smallest, or with `above` what all are larger than.
        most: The largest; None where there is none.
        whole: Whether fractions are out.
        above: Whether `least` itself is out.
        below: Whether `most` itself is out.
    """

    least: float
    most: float | None = None
    whole: bool = False
    above: bool = False
    below: bool = False

    def takes(self, value: float) -> bool:
        """Whether a finite number is among them."""
        if self.whole and value != int(value):
            return False
        if value < self.least or (self.above and value == self.least):
            return False
        return self.most is None or value < self.most or (value == self.most and not self.below)

    def __str__(self) -> str:
        """In words.

        >>> str(Limit(1, whole=True)), str(Limit(0, 1, below=True))
        ('a whole number >= 1', 'a number >= 0 and < 1')
        """
        kind = "a whole number" if self.whole else "a number"
        most = "" if self.most is None else f" and {'<' if self.below else '<='} {self.most:g}"
        return f"{kind} {'>' if self.above else '>='} {self.least:g}{most}"


_COUNT = Limit(1, whole=True)
_SHARE = Limit(0, 1)
_RATE = Limit(0)
LIMITS: Mapping[str, Limit] = {
    "r": _COUNT,
    "lora_r": _COUNT,
    "rank": _COUNT,
    "lora_dropout": _SHARE,
    "learning_rate": _RATE,
    "lr": _RATE,
    "weight_decay": Limit(0),
    "adam_beta1": Limit(0, 1, below=True),
    "adam_beta2": Limit(0, 1, below=True),
    "adam_epsilon": Limit(0),
    "warmup_ratio": _SHARE,
    "warmup_steps": Limit(0),
    "num_train_epochs": Limit(0, above=True),
    "per_device_train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "max_length": _COUNT,
    "max_completion_length": _COUNT,
    "num_generations": Limit(2, whole=True),
    "num_iterations": _COUNT,
    "steps_per_generation": _COUNT,
    "temperature": Limit(0, above=True),
    "top_p": Limit(0, 1, above=True),
    "beta": Limit(0),
}
"""By the field's name, or what users call it; what is not here takes any number."""


def limit_of(name: str) -> Limit | None:
    """Of a parameter, by the last part of its name: `peft_config[0].r` is an `r`."""
    return LIMITS.get(name.rpartition(".")[2])
