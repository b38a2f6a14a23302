"""Policies inside Optuna: `PolicyPruner` for any study, and policies by name for the command line."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

import optuna

import rapidfire_policies
from rapidfire_automl.histories import history_from_study
from rapidfire_policies import Policy, Verdict


class PolicyPruner(optuna.pruners.BasePruner):
    """Prune by a policy, in any Optuna study.

    Under `RapidFireExecutor` the pruner only carries the policy: the executor asks `policy.decide` once a round, with
    per-example scores and costs in the history. In a plain Optuna loop, report after every chunk and ask
    `trial.should_prune()` each time; the policy then sees every trial of the study, running ones included
    (`rapidfire_automl.histories.history_from_study`). There only STOP prunes: a paused trial could not be resumed, so
    PAUSE trains on (a policy that works by pausing, such as `SequentialHalving`, prunes little or nothing there), and
    COMPLETE trains on too, since Optuna would file a trial that ends here under its pruned ones, where
    `study.best_trial` cannot find it. Optuna records no per-example scores and no costs: there the races and
    `NonInferior` stop nobody but trials that have diverged, and `CostAware` is its inner policy.

    Args:
        policy: The policy, e.g. `ASHA()`.
        chunks: Reports of a whole trial; policies that plan for the end need it. By default the study's attribute
            "rapidfire:chunks", else what complete trials have reported.

    Raises:
        ValueError: `policy` is no policy, `chunks` is below 1, or (when asked) the study has several objectives.

    >>> import optuna
    >>> from rapidfire_policies import ASHA
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> def objective(trial):
    ...     x = trial.suggest_float("x", -1.0, 1.0)
    ...     for chunk in range(1, 10):
    ...         trial.report(x * x + 1.0 / chunk, step=chunk)
    ...         if trial.should_prune():
    ...             raise optuna.TrialPruned
    ...     return x * x
    >>> study = optuna.create_study(
    ...     sampler=optuna.samplers.RandomSampler(seed=0), pruner=PolicyPruner(ASHA(), chunks=9)
    ... )
    >>> study.optimize(objective, n_trials=20)
    >>> sum(trial.state.name == "PRUNED" for trial in study.trials) > 10
    True
    """

    def __init__(self, policy: Policy, *, chunks: int | None = None) -> None:
        if not isinstance(policy, Policy):
            fix = f"Write `{policy.__name__}()`." if inspect.isclass(policy) else "Use policy_from_name for a name."
            raise ValueError(f"`policy` must be a rapidfire_policies.Policy, got {policy!r}. {fix}")
        if chunks is not None and (isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1):
            raise ValueError(f"`chunks` must be an integer >= 1, got {chunks!r}. It is the reports of a whole trial.")
        self.policy = policy
        self.chunks = chunks

    def __repr__(self) -> str:
        return f"PolicyPruner({self.policy!r}, chunks={self.chunks})"

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether the policy stops the trial, given all that the study's trials have reported so far."""
        decision = self.policy.decide(history_from_study(study, chunks=self.chunks)).get(trial.number)
        return decision is not None and decision.verdict is Verdict.STOP


def policy_names() -> dict[str, type[Policy]]:
    """The exported policies by the name the command line uses, e.g. "asha" for `ASHA`."""
    exported = {name: getattr(rapidfire_policies, name) for name in rapidfire_policies.__all__}
    return {
        _plain(name): value
        for name, value in exported.items()
        if inspect.isclass(value) and issubclass(value, Policy) and not inspect.isabstract(value)
    }


def policy_from_name(name: str, **arguments: object) -> Policy:
    """Build a policy from its name and hyperparameters.

    Args:
        name: An exported policy, whatever its case and underscores ("asha", "nop"), or "package.module:Class".
        arguments: The policy's hyperparameters. A wrapper's `policy` may be a policy, a name, or a mapping with a
            `name` beside that policy's own hyperparameters.

    Raises:
        ValueError: There is no such policy or hyperparameter (the message names the nearest), or the value is bad;
            `policy.policy` is the wrapped one.

    >>> policy_from_name("asha", reduction_factor=2)
    ASHA(min_resource=1, reduction_factor=2, form='stop')
    >>> policy_from_name("cost_aware", policy={"name": "asha", "reduction_factor": 2}, min_chunks=2)
    CostAware(policy=ASHA(min_resource=1, reduction_factor=2, form='stop'), unit=None, min_chunks=2)
    >>> policy_from_name("ahsa")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: `policy` must be one of asha, ... or "package.module:Class", got 'ahsa'. Did you mean `asha`?
    """
    return _from_name(name, arguments, "policy")


def name_of_policy(policy: Policy) -> tuple[str, dict[str, object]]:
    """The name and hyperparameters from which `policy_from_name` builds a policy.

    Raises:
        ValueError: It, or one that it wraps, is none of rapidfire_policies.

    >>> name_of_policy(policy_from_name("cost_aware", policy="asha"))[0]
    'costaware'
    """
    names = [name for name, cls in policy_names().items() if cls is type(policy)]
    if not names or not dataclasses.is_dataclass(policy):
        raise ValueError(f"{type(policy).__name__} is no policy of rapidfire_policies.")
    arguments: dict[str, object] = {}
    for field in dataclasses.fields(policy):
        value = getattr(policy, field.name)
        if isinstance(value, Policy):
            name, inner = name_of_policy(value)
            value = {"name": name, **inner}
        arguments[field.name] = value
    return names[0], arguments


def policy_from_outside(name: str, known: Iterable[type], arguments: Mapping[str, object]) -> Policy:
    """`policy_from_name` for words that come from another process: nothing is imported for them.

    Args:
        name: As there; "package.module:Class" only for a class in `known`.
        known: Classes this process has been told to use.
        arguments: As there, a wrapped policy's likewise.

    Raises:
        ValueError: As there, or such a name of another class.
    """
    words, inner = [name], arguments.get("policy")
    while inner is not None:
        word = inner.get("name") if isinstance(inner, Mapping) else inner
        words += [word] if isinstance(word, str) else []
        inner = inner.get("policy") if isinstance(inner, Mapping) else None
    for word in words:
        module, colon, attribute = word.partition(":")
        if colon and vars(sys.modules.get(module, None) or object).get(attribute) not in tuple(known):
            raise ValueError(
                f"`policy` {word!r} would import code that the search has not been started with. Name a policy of "
                f"rapidfire_policies ({', '.join(policy_names())}), or set it from the search's own process."
            )
    return policy_from_name(name, **arguments)


def _from_name(name: object, arguments: Mapping[str, object], key: str) -> Policy:
    """`policy_from_name`, with the key that errors are about."""
    if not isinstance(name, str):
        raise ValueError(f"`{key}` must be named by a string, got {name!r}.")
    cls = _load(name, key) if ":" in name else policy_names().get(_plain(name))
    if cls is None:
        names = list(policy_names())
        raise ValueError(
            f'`{key}` must be one of {", ".join(names)} or "package.module:Class", got {name!r}.'
            + _did_you_mean(name, names)
        )
    accepted = inspect.signature(cls).parameters
    for argument in arguments:
        if argument not in accepted:
            raise ValueError(
                f"`{argument}` is no argument of {cls.__name__}.{_did_you_mean(argument, list(accepted))} "
                f"It takes: {', '.join(accepted) or 'none'}."
            )
    built = {
        argument: _inner(value, f"{key}.policy") if argument == "policy" else value
        for argument, value in arguments.items()
    }
    try:
        return cls(**built)
    except TypeError as error:
        raise ValueError(f"{cls.__name__} cannot be built from {dict(arguments)}: {error}.") from error
    except ValueError as error:  # a wrapper speaks of its own argument
        raise ValueError(str(error).replace("`policy`", f"`{key}.policy`", 1)) from None


def _inner(value: object, key: str) -> object:
    """The policy that a wrapper's `policy` means; what is neither a name nor a mapping is left to the wrapper."""
    if isinstance(value, str):
        return _from_name(value, {}, key)
    if isinstance(value, Mapping):
        if "name" not in value:
            raise ValueError(f'`{key}` needs a `name`, like {{name = "asha"}}, got {dict(value)}.')
        return _from_name(value["name"], {str(k): v for k, v in value.items() if k != "name"}, key)
    return value


def _load(name: str, key: str) -> type[Policy]:
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise ValueError(f"`{key}` {name!r} cannot be imported: {error}.") from error
    cls = getattr(module, class_name, None)
    if cls is None:
        policies = [one for one, value in vars(module).items() if inspect.isclass(value) and issubclass(value, Policy)]
        nearest = _did_you_mean(class_name, policies)
        raise ValueError(f"`{key}` {name!r} is unknown: {module_name} has no {class_name!r}.{nearest}")
    if not inspect.isclass(cls) or not issubclass(cls, Policy) or inspect.isabstract(cls):
        raise ValueError(
            f"`{key}` {name!r} is no policy. It must be a subclass of rapidfire_policies.Policy with a `decide`."
        )
    return cls


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _did_you_mean(word: str, words: list[str]) -> str:
    plain = {_plain(candidate): candidate for candidate in words}
    nearest = get_close_matches(_plain(word), plain, n=1, cutoff=0.5)
    return f" Did you mean `{plain[nearest[0]]}`?" if nearest else ""
