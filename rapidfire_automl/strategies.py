"""Samplers, policies and pruners by name, and the checks of small arguments that everything above shares."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import optuna

from rapidfire_automl.hints import nearest
from rapidfire_automl.samplers import ChunkSampler

if TYPE_CHECKING:
    from rapidfire_policies import Policy

_SAMPLERS = ("tpe", "random", "cmaes", "gp", "qmc", "chunk")


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Refuse what is no whole number of at least `least`.

    Raises:
        ValueError: It isn't one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be a whole number >= {least}, got {value!r}.")
    return value


def check_direction(direction: str) -> str:
    """Refuse what is neither direction.

    Raises:
        ValueError: It is neither.
    """
    if direction not in ("minimize", "maximize"):
        raise ValueError(f'`direction` must be "minimize" or "maximize", got {direction!r}.')
    return direction


def make_sampler(sampler: Any, seed: int) -> optuna.samplers.BaseSampler:
    """An Optuna sampler by name; one that is given as such passes through.

    Raises:
        ValueError: An unknown name.
        ImportError: The sampler needs a package that isn't installed; the message has the `pip install` line.
    """
    if isinstance(sampler, optuna.samplers.BaseSampler):
        return sampler
    if sampler == "tpe":
        # Most trials are still running when the next one is asked for; without the liar they would look alike.
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    if sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if sampler == "qmc":
        return optuna.samplers.QMCSampler(seed=seed)
    if sampler == "chunk":
        return ChunkSampler(seed=seed)
    if sampler == "cmaes":
        if importlib.util.find_spec("cmaes") is None:
            raise ImportError('`sampler="cmaes"` needs a package: pip install cmaes')
        return optuna.samplers.CmaEsSampler(seed=seed)
    raise ValueError(unknown("sampler", sampler, _SAMPLERS, "an Optuna sampler"))


def make_pruning(pruning: Any) -> Policy | optuna.pruners.BasePruner | None:
    """A policy or an Optuna pruner by name; one that is given as such passes through.

    "median" is the rule RapidFire AI has under that name, which compares last values.

    Raises:
        ValueError: An unknown name.
    """
    from rapidfire_automl.pruners import policy_from_name
    from rapidfire_policies import Median, Nop, Policy

    if isinstance(pruning, str):
        pruning = Median(average=False) if pruning.lower() == "median" else policy_from_name(pruning)
    if pruning is None or isinstance(pruning, (Nop, optuna.pruners.NopPruner)):
        return None
    if isinstance(pruning, (Policy, optuna.pruners.BasePruner)):
        return pruning
    raise ValueError(f"`policy` must be a policy, its name, or an Optuna pruner; got {pruning!r}.")


def unknown(what: str, name: Any, known: Iterable[str], otherwise: str) -> str:
    """One line that says what `what` may be, and which name was probably meant."""
    spelt = {candidate.lower(): candidate for candidate in known}
    near = spelt.get(nearest(name, spelt) or "") if isinstance(name, str) else None
    hint = f" Did you mean {near!r}?" if near else ""
    return f"`{what}` must be one of {', '.join(known)}, or {otherwise}; got {name!r}.{hint}"
