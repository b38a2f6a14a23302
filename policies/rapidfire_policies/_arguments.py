"""Checks of a policy's hyperparameters, all in one form: what is wrong, what was given, what to do."""

from __future__ import annotations

import math

from rapidfire_policies.base import Policy


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


def check_number(
    name: str, value: object, *, at_least: float | None = None, above: float | None = None, fix: str = ""
) -> None:
    """Raise ValueError unless `value` is a finite number (a bool is none) of at least `at_least` and above `above`.

    >>> check_number("divergence", 1.0, above=1, fix="10 stops a trial at ten times its first value.")
    Traceback (most recent call last):
        ...
    ValueError: `divergence` must be a number > 1, got 1.0. 10 stops a trial at ten times its first value.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or (at_least is not None and value < at_least)
        or (above is not None and value <= above)
    ):
        bounds = [f">= {at_least}" if at_least is not None else "", f"> {above}" if above is not None else ""]
        words = " and ".join(bound for bound in bounds if bound)
        raise ValueError(f"`{name}` must be a number {words}, got {value!r}. {fix}".rstrip())


def check_inner(policy: object) -> None:
    """Raise ValueError unless a wrapper's `policy` is a policy, built.

    >>> check_inner("asha")
    Traceback (most recent call last):
        ...
    ValueError: `policy` must be a policy, got 'asha'.
    """
    if not isinstance(policy, Policy):
        fix = f" Write `{policy.__name__}()`." if isinstance(policy, type) else ""
        raise ValueError(f"`policy` must be a policy, got {policy!r}.{fix}")


def check_level(name: str, value: object, fix: str = "") -> None:
    """Raise ValueError unless `value` is a number (a bool is none) strictly between 0 and 1.

    >>> check_level("alpha", 5, fix="0.05 is an error in 20 searches.")
    Traceback (most recent call last):
        ...
    ValueError: `alpha` must be a number between 0 and 1, got 5. 0.05 is an error in 20 searches.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"`{name}` must be a number between 0 and 1, got {value!r}. {fix}".rstrip())
