"""Checks of a policy's hyperparameters, all in one form: what is wrong, what was given, what to do."""

from __future__ import annotations


def check_int(name: str, value: object, at_least: int, fix: str = "") -> None:
    """Raise ValueError unless `value` is an integer (a bool is none) of at least `at_least`.

    >>> check_int("reduction_factor", 1, at_least=2, fix="3 keeps the best third at each rung.")
    Traceback (most recent call last):
        ...
    ValueError: `reduction_factor` must be an integer >= 2, got 1. 3 keeps the best third at each rung.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        message = f"`{name}` must be an integer >= {at_least}, got {value!r}. {fix}"
        raise ValueError(message.rstrip())


def check_level(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a number strictly between 0 and 1.

    >>> check_level("alpha", 5)
    Traceback (most recent call last):
        ...
    ValueError: `alpha` must be a number between 0 and 1, got 5. 0.05 is an error in 20 searches.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"`{name}` must be a number between 0 and 1, got {value!r}. 0.05 is an error in 20 searches.")
