"""What the tables' trials learn: tasks whose answers can be checked, made here, and what a checked answer is worth.

A row has `prompt` and `completion` for SFT, or `prompt`, `chosen` and `rejected` for DPO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = dict[str, str]


def products(random: Random) -> Row:
    """A digit from 2 to 9 times a number below 100: "7 * 13 =", " 91"."""
    a, b = random.randint(2, 9), random.randint(0, 99)
    return {"prompt": f"{a} * {b} =", "completion": f" {a * b}"}


def subtractions(random: Random) -> Row:
    """Two numbers below 20 taken from a third: "11 - 3 - 14 =", " -6"."""
    a, b, c = (random.randint(0, 19) for _ in range(3))
    return {"prompt": f"{a} - {b} - {c} =", "completion": f" {a - b - c}"}


def backwards(random: Random) -> Row:
    """A sum of two numbers below 100, its last digit first: "58 + 67 =", " 521"."""
    a, b = random.randint(0, 99), random.randint(0, 99)
    return {"prompt": f"{a} + {b} =", "completion": f" {str(a + b)[::-1]}"}


def reversals(random: Random) -> Row:
    """Three to five digits in reverse: "reverse: 3 1 4 =", " 4 1 3"."""
    digits = [str(random.randint(0, 9)) for _ in range(random.randint(3, 5))]
    return {"prompt": f"reverse: {' '.join(digits)} =", "completion": f" {' '.join(reversed(digits))}"}


def near_misses(random: Random) -> Row:
    """A sum of two digits or three; the wrong answer is off by one."""
    row = _sum(random)
    return {**row, "rejected": f" {int(row['chosen']) + random.choice([-1, 1])}"}


def longer_answers(random: Random) -> Row:
    """A sum of two digits or three; the wrong answer has one digit more at its end."""
    row = _sum(random)
    return {**row, "rejected": f"{row['chosen']}{random.randint(0, 9)}"}


def wrong_order(random: Random) -> Row:
    """A sum from 12 to 198 whose last digit is wanted first; the wrong answer is the sum as usual."""
    while True:
        a, b = random.randint(0, 99), random.randint(0, 99)
        usual = str(a + b)
        if usual != usual[::-1]:
            return {"prompt": f"{a} + {b} =", "chosen": f" {usual[::-1]}", "rejected": f" {usual}"}


def remainders(random: Random) -> Row:
    """A number below 200 modulo one from 2 to 6: "37 % 5 =", " 2"."""
    a, b = random.randint(0, 199), random.randint(2, 6)
    return {"prompt": f"{a} % {b} =", "completion": f" {a % b}"}


def sequences(random: Random) -> Row:
    """The next of an arithmetic sequence: "next: 3 7 11 =", " 15"."""
    first, step = random.randint(0, 29), random.randint(1, 9)
    return {
        "prompt": f"next: {first} {first + step} {first + 2 * step} =",
        "completion": f" {first + 3 * step}",
    }


def sortings(random: Random) -> Row:
    """Three or four digits in ascending order: "sort: 4 1 3 =", " 1 3 4"."""
    digits = [str(random.randint(0, 9)) for _ in range(random.randint(3, 4))]
    return {"prompt": f"sort: {' '.join(digits)} =", "completion": f" {' '.join(sorted(digits))}"}


def largest(random: Random) -> Row:
    """The largest of three or four digits: "largest: 4 1 8 =", " 8"."""
    digits = [str(random.randint(0, 9)) for _ in range(random.randint(3, 4))]
    return {"prompt": f"largest: {' '.join(digits)} =", "completion": f" {max(digits)}"}


def wrong_pick(random: Random) -> Row:
    """The largest of three or four digits that are not all the same; the wrong answer is one of the others."""
    while True:
        row = largest(random)
        others = [digit for digit in row["prompt"].split()[1:-1] if f" {digit}" != row["completion"]]
        if others:
            return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f" {random.choice(others)}"}


def wrong_sign(random: Random) -> Row:
    """A number below 30 taken from another; the wrong answer has the other sign: " -6" and " 6"."""
    a, b = random.sample(range(30), 2)
    return {"prompt": f"{a} - {b} =", "chosen": f" {a - b}", "rejected": f" {b - a}"}


def swapped_digits(random: Random) -> Row:
    """A sum of two numbers below 100; in the wrong answer its last two digits have changed places."""
    while True:
        a, b = random.randint(0, 99), random.randint(0, 99)
        usual = f"{a + b:02d}"
        if usual[-1] != usual[-2] and a + b > 9:
            wrong = f"{usual[:-2]}{usual[-1]}{usual[-2]}"
            return {"prompt": f"{a} + {b} =", "chosen": f" {usual}", "rejected": f" {wrong}"}


def _sum(random: Random) -> Row:
    terms = [random.randint(0, 9) for _ in range(random.randint(2, 3))]
    return {"prompt": f"{' + '.join(map(str, terms))} =", "chosen": f" {sum(terms)}"}


_MADE: tuple[Callable[[Random], Row], ...] = (
    products, subtractions, backwards, reversals, near_misses, longer_answers, wrong_order,
    remainders, sequences, sortings, largest, wrong_pick, wrong_sign, swapped_digits,
)  # fmt: skip
MAKERS: Mapping[str, Callable[[Random], Row]] = {made.__name__: made for made in _MADE}


def rows_of(name: str, n: int, seed: int) -> list[Row]:
    """`n` rows of a task, no prompt twice; the same on every machine.

    Args:
        name: "sums" and "preferences" are those of the tests' model, the others are `MAKERS`.

    Raises:
        ValueError: There is no such task, or it has fewer prompts.
    """
    from tests.tiny import data

    if name in ("sums", "preferences"):
        return list(getattr(data, name)(n, seed))
    if name not in MAKERS:
        raise ValueError(f"`data` must be one of sums, preferences, {', '.join(MAKERS)}, got {name!r}.")
    found: dict[str, Row] = {}
    for row in _draws(name, 100 * n, seed):
        if len(found) == n:
            break
        found.setdefault(row["prompt"], row)
    if len(found) < n:
        raise ValueError(f"`rows` and `held_out` must be fewer prompts than {name} has, got {n}.")
    return list(found.values())


def _draws(name: str, most: int, seed: int) -> Iterator[Row]:
    random = Random(f"{name} {seed}")
    return (MAKERS[name](random) for _ in range(most))


def answer_errors(trainer: Any) -> NDArray[np.float64]:
    """0 for an example of an SFT trainer's `eval_dataset` that greedy decoding would answer token by token, else 1.

    Every token of the right answer, its end included, has to be the most likely one after the tokens before it.

    Returns:
        `(examples,)`.
    """
    import torch

    columns = ("input_ids", "labels", "completion_mask", "attention_mask")
    rows = [{name: row[name] for name in columns if name in row} for row in trainer.eval_dataset]
    batch = {name: x.to(trainer.args.device) for name, x in trainer.data_collator(rows).items()}
    model, was_training = trainer.model, trainer.model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    finally:
        model.train(was_training)
    wanted = batch["labels"][:, 1:]
    right = (logits[:, :-1].argmax(-1) == wanted) | (wanted == -100)
    errors: NDArray[np.float64] = (~right.all(1)).double().cpu().numpy()
    return errors


METRICS: Mapping[str, Callable[[Any], NDArray[np.float64]]] = {"answer_errors": answer_errors}
