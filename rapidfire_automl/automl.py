"""`AutoML`: one base, one space, a sampler and a policy of your choice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from rapidfire_automl.configs import TRAINING_ARGS, FieldConfig, RFLoraConfig, RFModelConfig
from rapidfire_automl.control import Command, Controls, Sent
from rapidfire_automl.events import Listener
from rapidfire_automl.experiment import DEFAULT_CHUNKS, Experiment
from rapidfire_automl.groups import ConfigGroup, RFGridSearch, RFOptuna
from rapidfire_automl.metrics import Metric
from rapidfire_automl.results import FitResult
from rapidfire_automl.strategies import check_count, unknown

if TYPE_CHECKING:
    from rapidfire_policies import Policy


class AutoML(Controls):
    """Find the best adapter for one base: the same engine, with a sampler and a policy of your choice.

    Args:
        model: Hub id, path, or a loaded model (then with `tokenizer`).
        trainer: "sft", "dpo", "grpo" or "rloo".
        space: An `RFModelConfig` (its `model_name` may be left out), or a dict of fields of TRL's config and of
            `LoraConfig` with `List` and `Range` in it: `{"learning_rate": Range(1e-5, 1e-2), "r": List([4, 8])}`.
            Keys `training_args`, `peft_config`, `reward_funcs` and other fields of `RFModelConfig` are taken as such.
        sampler: "tpe", "random", "cmaes", "gp", "qmc", "chunk", "grid", or any Optuna sampler.
        policy: "auto", another policy, an Optuna pruner, or None to train every trial to its end.
        slots: Trials that train at a time.
        chunks: Verdicts a trial.
        n_trials: Trials in all; a grid has as many as it has combinations.
        metric: As for `Experiment`.
        direction: As for `Experiment`.
        tokenizer: Of a loaded model.
        seed: Of the sampler and of the trials.
        name: Of the experiment folder.
        experiments_path: Where it lies.
        experiment_options: Further arguments of `Experiment`, like `eval_sampling`.

    Raises:
        ValueError: Anything wrong with the arguments; no model is loaded before `fit`.
    """

    def __init__(
        self,
        model: Any,
        trainer: str = "sft",
        space: RFModelConfig | Mapping[str, Any] | None = None,
        *,
        sampler: str | optuna.samplers.BaseSampler = "tpe",
        policy: str | Policy | optuna.pruners.BasePruner | None = "auto",
        slots: int = 8,
        chunks: int = DEFAULT_CHUNKS,
        n_trials: int = 32,
        metric: Metric | None = None,
        direction: str | None = None,
        tokenizer: Any = None,
        seed: int = 42,
        name: str = "automl",
        experiments_path: str | Path = "./rapidfire_experiments",
        **experiment_options: Any,
    ) -> None:
        self._loaded = None if isinstance(model, (str, Path)) else (model, tokenizer)
        if self._loaded is not None and tokenizer is None:
            raise ValueError("`tokenizer` must be given with a loaded model.")
        model_name = getattr(getattr(model, "config", None), "_name_or_path", "") if self._loaded else str(model)
        config = as_config(space if space is not None else {}, trainer).with_fields(
            {"model_name": model_name or "model"}
        )
        if self._loaded is None and tokenizer is not None:
            config = config.with_fields({"tokenizer": str(tokenizer)})
        self.chunks = check_count("chunks", chunks)
        self.seed = check_count("seed", seed, least=0)
        self.experiment = Experiment(
            name,
            experiments_path=experiments_path,
            slots=slots,
            policy=policy,
            metric=metric,
            direction=direction,
            **experiment_options,
        )
        self.group: ConfigGroup
        if sampler == "grid":
            self.group = RFGridSearch(config, trainer)
        else:
            self.group = RFOptuna(config, trainer, n_trials=n_trials, sampler=sampler, pruner=policy, seed=seed)

    def fit(self, train_dataset: Any, eval_dataset: Any = None, timeout_s: float | None = None) -> FitResult:
        """Search; see `Experiment.run_fit`."""
        loaded = self._loaded
        create = None if loaded is None else (lambda _: loaded)
        return self.experiment.run_fit(
            self.group, create, train_dataset, eval_dataset, self.chunks, self.seed, timeout_s=timeout_s
        )

    def add_listener(self, listener: Listener) -> None:
        """Have a function called with every event."""
        self.experiment.add_listener(listener)

    def _send(self, command: Command) -> Sent:
        return self.experiment._send(command)


def as_config(space: RFModelConfig | Mapping[str, Any], trainer: str) -> RFModelConfig:
    """An `RFModelConfig` from a flat or nested dict of fields.

    Raises:
        ValueError: A name that neither TRL's config nor `LoraConfig` nor `RFModelConfig` has.
    """
    if isinstance(space, RFModelConfig):
        return space
    args_class = TRAINING_ARGS.get(str(trainer).upper())
    if args_class is None:
        raise ValueError(unknown("trainer", trainer, [name.lower() for name in TRAINING_ARGS], "another case of it"))
    nested: dict[str, Any] = {}
    flat: dict[type[FieldConfig], dict[str, Any]] = {args_class: {}, RFLoraConfig: {}}
    own = RFModelConfig().search_fields().keys() | {f for f in vars(RFModelConfig()) if f != "model_name"}
    for name, value in space.items():
        if name in own:
            nested[name] = value
        else:
            home = RFLoraConfig if name in RFLoraConfig.known() else args_class
            flat[home][name] = value
    for name, config_class in (("training_args", args_class), ("peft_config", RFLoraConfig)):
        given = nested.get(name)
        if isinstance(given, Mapping) or given is None:
            nested[name] = config_class(**{**(given or {}), **flat[config_class]})
        elif flat[config_class]:
            raise ValueError(f"`{next(iter(flat[config_class]))}` must stand in `{name}`, which is given, too.")
    return RFModelConfig(**nested)
