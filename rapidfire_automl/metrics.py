"""What trials are compared by: the executor's own metrics, their other names, and which way is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Metric: TypeAlias = str | Callable[..., Any]

METRICS: Mapping[str, tuple[str, ...]] = {
    "SFT": ("nll",),
    "DPO": ("preference_loss", "preference_accuracy", "reward_margin"),
    "GRPO": ("reward",),
    "RLOO": ("reward",),
}
"""Trainer type -> metrics the executor measures by itself, its own default first."""

_LOGGED_AS = {
    "eval_loss": None,
    "loss": None,
    "eval_rewards/accuracies": "preference_accuracy",
    "rewards/accuracies": "preference_accuracy",
    "eval_rewards/margins": "reward_margin",
    "rewards/margins": "reward_margin",
    "eval_reward": "reward",
}


def builtin_metric(metric: Metric | None) -> tuple[bool, Metric | None]:
    """Whether the executor (or the callable itself) measures the metric, and what to hand to it.

    `(False, key)` means a key of what `compute_metrics` returns for generated answers.
    """
    if isinstance(metric, str) and metric in _LOGGED_AS:
        return True, _LOGGED_AS[metric]
    known = {name for names in METRICS.values() for name in names}
    return metric is None or callable(metric) or metric in known, metric


def best_is(trainer_type: str, metric: Metric | None) -> str:
    """The direction where none is given: a reward is maximised, everything else minimised."""
    return "maximize" if (builtin_metric(metric)[1] or METRICS[trainer_type][0]) == "reward" else "minimize"
