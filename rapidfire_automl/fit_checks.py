"""What `Experiment.run_fit` checks before it loads a model: searches, and the data they train on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rapidfire_automl import rl
from rapidfire_automl.bases import CreateModel
from rapidfire_automl.configs import FieldConfig, RFModelConfig
from rapidfire_automl.groups import Search
from rapidfire_automl.metrics import METRICS, builtin_metric
from rapidfire_automl.rewards import check_columns
from rapidfire_automl.sampling import Sampling
from rapidfire_automl.space import List
from rapidfire_automl.trainers import SAMPLE_SIZE, Data, as_dataset
from rapidfire_policies.wording import counted

if TYPE_CHECKING:
    from datasets import Dataset


def check_search(search: Search, create_model_fn: CreateModel | None, eval_sampling: Sampling | None) -> None:
    """Check one search as far as that goes without data and model.

    Raises:
        ValueError: No base, a metric that its trainer doesn't have, or trials that couldn't be compared.
    """
    if create_model_fn is not None and not callable(create_model_fn):
        raise ValueError(f"`create_model_fn` must be a function, got {create_model_fn!r}.")
    if create_model_fn is None and not search.base["model_name"]:
        raise ValueError("`model_name` must be given where there is no `create_model_fn`.")
    builtin, metric = builtin_metric(search.metric)
    mine = METRICS[search.trainer_type]
    generates = search.trainer_type in rl.TRAINERS
    if isinstance(metric, str) and metric not in mine and (builtin or generates):
        raise ValueError(
            f"`metric` must be one of {', '.join(mine)}, or a function, for {search.trainer_type}, got {metric!r}."
        )
    if not builtin and any(
        config.compute_metrics is None or config.generation_config is None for config in _configs(search)
    ):
        raise ValueError(
            f"`metric` {search.metric!r} must come from `compute_metrics`, scored on generated answers. Give every "
            "RFModelConfig a `compute_metrics` and a `generation_config`, or write nll, preference_loss, ..."
        )
    if generates and not callable(metric):
        rl.check_comparable(
            [rewards for config in _configs(search) for rewards in _choices(config.reward_funcs)],
            [weights for args in _args(search) for weights in rl.members(args.reward_weights)],
            None if eval_sampling is None else eval_sampling.reward_weights,
        )


def check_data(train: Any, held_out: Any, chunks: int, searches: Sequence[Search]) -> Data:
    """The two data sets, checked against the searches that train on them.

    Raises:
        ValueError: No rows, too few, or a column that a reward function asks for is missing.
    """
    if train is None:
        raise ValueError("`train_dataset` must be given.")
    train = as_dataset("train_dataset", train)
    if len(train) < chunks:
        raise ValueError(
            f"`num_chunks` must be <= the training examples, got {counted(chunks, 'chunk')} and "
            f"{counted(len(train), 'example')}. "
            f"Write num_chunks={len(train)} or less."
        )
    data = Data(train, _stand_in(train, searches) if held_out is None else as_dataset("eval_dataset", held_out))
    for search in searches:
        if search.trainer_type in rl.TRAINERS:
            _check_prompts(search, data, chunks)
    return data


def eval_sampling_of(search: Search, given: Sampling | None) -> dict[str, Sampling]:
    """The executor's `eval_sampling`, where the search's trials generate."""
    if search.trainer_type not in rl.TRAINERS:
        return {}
    return {"eval_sampling": given or rl.default_sampling({**a.defaults(), **a.search_fields()} for a in _args(search))}


def _check_prompts(search: Search, data: Data, chunks: int) -> None:
    for config in _configs(search):
        for func in _choices(config.formatting_func):
            for name, rows in zip(("train_dataset", "eval_dataset"), data.formatted(func), strict=True):
                for rewards in _choices(config.reward_funcs):
                    check_columns(rewards, rows.column_names, name)
    for args in _args(search):
        rl.check_length(
            args.search_fields(), args.defaults(), prompts=len(data.train), chunks=chunks, chunks_name="num_chunks"
        )


def _configs(search: Search) -> Sequence[RFModelConfig]:
    value = search.space.value
    return value.values if isinstance(value, List) else (value,)


def _args(search: Search) -> list[FieldConfig]:
    return [args for config in _configs(search) for args in rl.members(config.training_args)]


def _choices(value: Any) -> Sequence[Any]:
    return value.values if isinstance(value, List) else (value,)


def _stand_in(train: Dataset, searches: Sequence[Search]) -> Dataset:
    if any(search.steers for search in searches):
        raise ValueError(
            "`eval_dataset` must be given: a policy, a pruner or a sampler decides by values on it. Only a grid or "
            "random search without a policy can do without."
        )
    warnings.warn(
        f"No `eval_dataset`: values are measured on the first {min(SAMPLE_SIZE, len(train))} training examples and say "
        "nothing about over-fitting.",
        stacklevel=4,
    )
    return train.select(range(min(SAMPLE_SIZE, len(train))))
