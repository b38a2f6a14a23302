"""Checks of a policy's hyperparameters, all in one form: what is wrong, what was given, what to do."""

from __future__ import annotations

import inspect
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


def check_positive(name: str, value: object, fix: str = "") -> None:
    """Raise ValueError unless `value` is a finite number (a bool is none) above 0.

    >>> check_positive("unit", 0)
    Traceback (most recent call last):
        ...
    ValueError: `unit` must be a number > 0, got 0.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be a number > 0, got {value!r}. {fix}".rstrip())


def check_share(name: str, value: object, fix: str = "") -> None:
    """Raise ValueError unless `value` is a number (a bool is none) strictly between 0 and 1.

    >>> check_share("beta", 1.0)
    Traceback (most recent call last):
        ...
    ValueError: `beta` must be a number above 0 and below 1, got 1.0.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"`{name}` must be a number above 0 and below 1, got {value!r}. {fix}".rstrip())


def check_policy_argument(policy: object) -> None:
    """Raise ValueError unless `policy`, the argument of a wrapper, is a policy.

    >>> check_policy_argument("asha")
    Traceback (most recent call last):
        ...
    ValueError: `policy` must be a policy such as ASHA(), got 'asha'.
    """
    if not isinstance(policy, Policy):
        fix = f" Write `{policy.__name__}()`." if inspect.isclass(policy) else ""
        raise ValueError(f"`policy` must be a policy such as ASHA(), got {policy!r}.{fix}")
