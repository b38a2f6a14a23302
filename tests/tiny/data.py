"""Small data sets for the tests: sums of one-digit numbers, made here, the same on every machine."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

MODEL = Path(__file__).parent / "model"
"""The folder of the tests' language model."""


def sums(n: int, seed: int = 0) -> Dataset:
    """`n` sums with columns `prompt` ("3 + 4 - 2 =") and `completion` (" 5"); no prompt twice while any is left."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": prompt, "completion": f" {answer}"} for prompt, answer in _draw(n, seed)])


def preferences(n: int, seed: int = 0) -> Dataset:
    """`n` sums with columns `prompt`, `chosen` (the right answer) and `rejected` (one that is off by 1 to 5)."""
    from datasets import Dataset

    random = Random(f"wrong {seed}")
    rows = []
    for prompt, answer in _draw(n, seed):
        wrong = answer + random.choice([-1, 1]) * random.randint(1, 5)
        rows.append({"prompt": prompt, "chosen": f" {answer}", "rejected": f" {wrong}"})
    return Dataset.from_list(rows)


def additions() -> list[dict[str, str]]:
    """All hundred additions of two digits: what the tiny model is rated by."""
    return [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(10) for b in range(10)]


def _draw(n: int, seed: int) -> list[tuple[str, int]]:
    """`n` sums of two or three digits and their values."""
    random = Random(seed)
    rows: list[tuple[str, int]] = []
    seen: set[str] = set()
    for _ in range(100 * n):
        if len(rows) == n:
            break
        text = str(value := random.randint(0, 9))
        for _ in range(random.randint(1, 2)):
            digit, sign = random.randint(0, 9), random.choice([-1, 1])
            text, value = f"{text} {'+' if sign > 0 else '-'} {digit}", value + sign * digit
        if text not in seen or len(seen) >= 4000:  # of 4,200 there are; the last few are long to wait for
            seen.add(text)
            rows.append((f"{text} =", value))
    return rows
