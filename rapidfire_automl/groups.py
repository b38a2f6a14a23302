"""Config groups: which configurations are tried, and how they fall into searches of one base each."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import optuna

from rapidfire_automl import rl
from rapidfire_automl.configs import TRAINING_ARGS, RFLoraConfig, RFModelConfig
from rapidfire_automl.metrics import Metric, best_is
from rapidfire_automl.rewards import as_rewards
from rapidfire_automl.space import Choice, List, Space
from rapidfire_automl.strategies import check_count, check_direction, make_pruning, make_sampler, unknown

if TYPE_CHECKING:
    from rapidfire_policies import Policy

Pruning: TypeAlias = "str | Policy | optuna.pruners.BasePruner | None"

BASE_FIELDS = (
    "model_name",
    "tokenizer",
    "tokenizer_kwargs",
    "model_type",
    "model_kwargs",
    "ref_model_name",
    "ref_model_type",
    "ref_model_kwargs",
)
"""Fields that make a base; trials that differ in one of them can't share a model."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """One search on one base.

    Args:
        trainer_type: "SFT", "DPO", "GRPO" or "RLOO".
        space: What the trials differ in; its values are `RFModelConfig`s, or a `List` of them.
        base: The base's fields, nothing left to choose.
        n_trials: Trials to run.
        queue: The parameters of each trial where they are known before; empty where the sampler finds them.
        sampler: Optuna's.
        pruning: Policy, Optuna pruner, or None for none.
        direction: "minimize" or "maximize".
        metric: For the executor; None is the trainer's own. A name the executor doesn't know is a key of what
            `compute_metrics` returns.
        slots: Trials at a time; None for the experiment's.
    """

    trainer_type: str
    space: Space
    base: Mapping[str, Any]
    n_trials: int
    queue: tuple[Mapping[str, Choice], ...] = ()
    sampler: optuna.samplers.BaseSampler | None = None
    pruning: Policy | optuna.pruners.BasePruner | None = None
    direction: str = "minimize"
    metric: Metric | None = None
    slots: int | None = None

    @property
    def steers(self) -> bool:
        """Whether the values decide what is trained."""
        return self.pruning is not None or not self.queue


class ConfigGroup(ABC):
    """Configurations with a trainer; the subclasses say which of them are tried.

    Args:
        configs: An `RFModelConfig`, or a list or `List` of them.
        trainer_type: "SFT", "DPO", "GRPO" or "RLOO"; by default what `training_args` are for.

    Raises:
        ValueError: No configuration, one of another class, an unknown trainer type, or `training_args` of another one.
    """

    def __init__(self, configs: Any = None, trainer_type: str | None = None) -> None:
        members = configs.values if isinstance(configs, List) else configs
        members = list(members) if isinstance(members, (list, tuple)) else [members]
        for config in members:
            if not isinstance(config, RFModelConfig):
                raise ValueError(f"`configs` must be an RFModelConfig or a list of them, got {config!r}.")
        if not members:
            raise ValueError("`configs` must hold at least one RFModelConfig, got none.")
        self.trainer_type = _trainer_type(trainer_type, members)
        self.configs = [_normalised(config, self.trainer_type) for config in members]

    @abstractmethod
    def searches(self, pruning: Any = None, metric: Metric | None = None, direction: str | None = None) -> list[Search]:
        """The searches to run, one a base.

        Args:
            pruning: Policy or pruner for a group that has none of its own.
            metric: Likewise.
            direction: Likewise; None for the metric's own.
        """

    def _fixed(self, points: Iterable[tuple[Mapping[str, Choice], Any]], space: Space, **common: Any) -> list[Search]:
        """One search a base from configurations that are known before."""
        bases: dict[str, tuple[Mapping[str, Any], list[Mapping[str, Choice]]]] = {}
        for params, config in points:
            base = base_fields(config)
            bases.setdefault(_key(base), (base, []))[1].append(params)
        return [
            Search(
                trainer_type=self.trainer_type,
                space=space,
                base=base,
                n_trials=len(queue),
                queue=tuple(queue),
                **common,
            )
            for base, queue in bases.values()
        ]

    def _judged(self, metric: Metric | None, direction: str | None) -> dict[str, Any]:
        """What trials are compared by, and which way."""
        return {"metric": metric, "direction": check_direction(direction or best_is(self.trainer_type, metric))}

    def _space(self) -> Space:
        return Space(self.configs[0] if len(self.configs) == 1 else List(self.configs))


class RFGridSearch(ConfigGroup):
    """Every combination of the `List`s is trained; no `Range` allowed. Nothing stops early unless a policy is given.

    >>> from rapidfire_automl.configs import RFLoraConfig, RFModelConfig
    >>> config = RFModelConfig("base", peft_config=RFLoraConfig(r=List([4, 8])))
    >>> [search.n_trials for search in RFGridSearch(config, trainer_type="SFT").searches()]
    [2]
    """

    def searches(self, pruning: Any = None, metric: Metric | None = None, direction: str | None = None) -> list[Search]:
        """All combinations, grouped by base in the order of their first one."""
        space = self._space()
        points = ((p.params, p.value) for p in space.grid("RFGridSearch"))
        return self._fixed(points, space, pruning=make_pruning(pruning), **self._judged(metric, direction))


class RFRandomSearch(ConfigGroup):
    """`num_runs` different configurations, drawn at random from `List`s and `Range`s before the first one trains.

    Args:
        configs: As for every group.
        trainer_type: As for every group.
        num_runs: How many.
        seed: Of the draws.

    Raises:
        ValueError: `num_runs` < 1, or more than the space has.
    """

    def __init__(self, configs: Any = None, trainer_type: str | None = None, num_runs: int = 1, seed: int = 42) -> None:
        super().__init__(configs, trainer_type)
        self.num_runs = check_count("num_runs", num_runs)
        self.seed = check_count("seed", seed, least=0)

    def searches(self, pruning: Any = None, metric: Metric | None = None, direction: str | None = None) -> list[Search]:
        """The drawn configurations, grouped by base."""
        space = self._space()
        draws = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=self.seed))
        found: dict[str, tuple[Mapping[str, Choice], Any]] = {}
        for _ in range(50 * self.num_runs):
            trial = draws.ask()
            value = space.suggest(trial)
            found.setdefault(repr(sorted(trial.params.items())), (trial.params, value))
            if len(found) == self.num_runs:
                break
        else:
            raise ValueError(
                f"`num_runs` must not exceed the different configurations there are: {self.num_runs} asked for, "
                f"{len(found)} found. Use RFGridSearch to train all of them."
            )
        return self._fixed(found.values(), space, pruning=make_pruning(pruning), **self._judged(metric, direction))


class RFOptuna(ConfigGroup):
    """An Optuna sampler finds the configurations while they train, and a policy or pruner stops the bad ones.

    Several bases get a study each, and an equal share of the trials.

    Args:
        configs: As for every group; values are `List`s and `Range`s.
        trainer_type: As for every group.
        n_initial: Trials at a time, as RapidFire AI names it; by default the experiment's `slots`.
        budget: Trials in all. Every trial that ends, pruned or not, makes room for the next.
        objective: "minimize:eval_loss", "maximize:rougeL", ...: direction and metric in one, as RapidFire AI writes it.
        sampler: "tpe", "random", "cmaes", "gp", "qmc", "chunk", or any Optuna sampler.
        pruner: "asha", "median", None, a policy, or any Optuna pruner.
        seed: Of the sampler.
        granularity: Accepted for RapidFire AI's sake; verdicts fall after every chunk.
        n_trials: Same as `budget`.
        num_runs: Same as `budget`.
        direction: "minimize" or "maximize", where `objective` isn't given.
        metric: A name or a callable, where `objective` isn't given.

    After the search `study` is the Optuna study, and `studies` are all of them where there were several bases.

    Raises:
        ValueError: A number of trials < 1, an unknown sampler, pruner or direction, several objectives.
    """

    def __init__(
        self,
        configs: Any = None,
        trainer_type: str | None = None,
        n_initial: int | None = None,
        budget: int = 40,
        objective: str | None = None,
        sampler: str | optuna.samplers.BaseSampler = "tpe",
        pruner: Pruning = "median",
        seed: int = 42,
        granularity: str = "chunk",
        *,
        n_trials: int | None = None,
        num_runs: int | None = None,
        direction: str | None = None,
        metric: Metric | None = None,
    ) -> None:
        super().__init__(configs, trainer_type)
        self.n_initial = None if n_initial is None else check_count("n_initial", n_initial)
        name, asked = ("n_trials", n_trials) if n_trials is not None else ("num_runs", num_runs)
        trials = check_count("budget", budget) if asked is None else check_count(name, asked)
        self.n_trials = max(trials, self.n_initial or 1)
        self.seed = check_count("seed", seed, least=0)
        self.sampler = make_sampler(sampler, self.seed)
        self.pruning = make_pruning(pruner)
        if objective is not None and (direction is not None or metric is not None):
            raise ValueError("`objective` and `direction` or `metric` exclude each other. Drop `objective`.")
        self.direction, self.metric = (direction, metric) if objective is None else _objective(objective)
        if granularity not in ("chunk", "shard"):
            warnings.warn(f"`granularity={granularity!r}` is ignored: verdicts fall after every chunk.", stacklevel=2)
        self.studies: list[optuna.Study] = []

    @property
    def study(self) -> optuna.Study | None:
        """The Optuna study, once the search has begun; the last one where there were several bases."""
        return self.studies[-1] if self.studies else None

    @property
    def _study(self) -> optuna.Study | None:
        # RapidFire AI's tutorial reads it by this name.
        return self.study

    def searches(self, pruning: Any = None, metric: Metric | None = None, direction: str | None = None) -> list[Search]:
        """One search a base; what the group was given itself comes first."""
        bases: dict[str, tuple[Mapping[str, Any], list[RFModelConfig]]] = {}
        for config in self.configs:
            base_part = {name: getattr(config, name) for name in BASE_FIELDS}
            for point in Space(base_part).grid("a choice of bases"):
                bases.setdefault(_key(point.value), (point.value, []))[1].append(config.with_fields(point.value))
        shares = [self.n_trials // len(bases) + (i < self.n_trials % len(bases)) for i in range(len(bases))]
        return [
            Search(
                trainer_type=self.trainer_type,
                space=Space(configs[0] if len(configs) == 1 else List(configs)),
                base=base,
                n_trials=share,
                sampler=self.sampler,
                pruning=self.pruning,
                **self._judged(metric if self.metric is None else self.metric, self.direction or direction),
                slots=self.n_initial,
            )
            for (base, configs), share in zip(bases.values(), shares, strict=True)
            if share
        ]


def as_groups(config_group: Any) -> list[ConfigGroup]:
    """What `run_fit` takes for its first argument, as groups; a bare config is a grid.

    Raises:
        ValueError: Neither a group nor a config, nor a list of such.
    """
    if isinstance(config_group, ConfigGroup):
        return [config_group]
    if isinstance(config_group, RFModelConfig):
        return [RFGridSearch(config_group)]
    members: Sequence[Any] = config_group.values if isinstance(config_group, List) else config_group
    if isinstance(members, (list, tuple)) and members:
        return [group for member in members for group in as_groups(member)]
    raise ValueError(f"`config_group` must be an RFGridSearch, RFRandomSearch or RFOptuna, got {config_group!r}.")


def base_fields(config: RFModelConfig) -> dict[str, Any]:
    """The fields that make the base."""
    return {name: getattr(config, name) for name in BASE_FIELDS}


def _objective(objective: str) -> tuple[str, Metric]:
    if "," in objective:
        raise ValueError(f"`objective` must name one metric, got {objective!r}. Several can't be searched for at once.")
    direction, colon, metric = objective.partition(":")
    if not colon or not metric:
        raise ValueError(f'`objective` must read "minimize:eval_loss" or "maximize:<metric>", got {objective!r}.')
    return check_direction(direction.strip()), metric.strip()


def _trainer_type(given: str | None, configs: Sequence[RFModelConfig]) -> str:
    if given is None:
        for name, config_class in TRAINING_ARGS.items():
            args = configs[0].training_args
            args = args.values[0] if isinstance(args, List) else args
            if config_class.real_name in (type(args).__name__, getattr(args, "real_name", None)):
                return name
        raise ValueError(f"`trainer_type` must be given: one of {', '.join(TRAINING_ARGS)}.")
    name = str(given).upper()
    if name in TRAINING_ARGS:
        return name
    raise ValueError(unknown("trainer_type", given, list(TRAINING_ARGS), "left out"))


def _normalised(config: RFModelConfig, trainer_type: str) -> RFModelConfig:
    """The config with TRL's and PEFT's own objects turned into fields.

    Raises:
        ValueError: No adapter, `training_args` of another trainer, a reference model other than the base, or what GRPO
            and RLOO can't do with.
    """
    args_class = TRAINING_ARGS[trainer_type]
    if config.ref_model_name not in (None, config.model_name):
        raise ValueError(
            f"`ref_model_name` must be the base itself, got {config.ref_model_name!r}: the reference is the shared "
            "base with the adapter switched off. Leave it out."
        )

    def args(value: Any) -> Any:
        if value is None or isinstance(value, args_class):
            return args_class() if value is None else value
        if type(value).__name__ == args_class.real_name:
            return args_class.of(value)
        raise ValueError(
            f'`training_args` must be {args_class.__name__} for trainer_type="{trainer_type}", got '
            f"{type(value).__name__}."
        )

    def adapter(value: Any) -> Any:
        if value is None:
            raise ValueError(
                "`peft_config` must be given: trials are adapters on one frozen base, which full fine-tuning would "
                "change. Write peft_config=RFLoraConfig(r=16)."
            )
        return RFLoraConfig.of(value) if type(value).__name__ == "LoraConfig" else value

    normalised = config.with_fields(
        {"training_args": _each(config.training_args, args), "peft_config": _each(config.peft_config, adapter)}
    )
    if trainer_type not in rl.TRAINERS:
        if config.reward_funcs is not None:
            raise ValueError(
                f'`reward_funcs` are for GRPO and RLOO, got trainer_type="{trainer_type}". Leave them out.'
            )
        return normalised
    return _with_rewards(normalised)


def _with_rewards(config: RFModelConfig) -> RFModelConfig:
    """The config with functions for reward names, and with every combination of its training arguments checked."""
    if config.compute_metrics is not None:
        raise ValueError("`compute_metrics` is not for GRPO and RLOO: their trials are compared by `reward_funcs`.")
    sets = config.reward_funcs.values if isinstance(config.reward_funcs, List) else [config.reward_funcs]
    rewards = [as_rewards(given) for given in sets]
    for args in rl.members(config.training_args):
        rl.check_arguments(args.search_fields(), args.defaults())
        for weights in rl.members(args.reward_weights):
            rl.check_weights(weights, rewards)
    return config.with_fields({"reward_funcs": List(rewards) if isinstance(config.reward_funcs, List) else rewards[0]})


def _each(value: Any, convert: Callable[[Any], Any]) -> Any:
    return List([_each(member, convert) for member in value.values]) if isinstance(value, List) else convert(value)


def _key(base: Mapping[str, Any]) -> str:
    return repr([(name, repr(value)) for name, value in base.items()])
