"""The base of a search: from the user's function, or from its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from rapidfire_automl.configs import FieldConfig
from rapidfire_automl.groups import Search
from rapidfire_automl.space import List, is_concrete

CreateModel: TypeAlias = Callable[[dict[str, Any]], Any]
"""RapidFire AI's `create_model_fn`: from a config dict to `(model, tokenizer)`."""


def make_executor(model: Any, options: Mapping[str, Any]) -> Any:
    """The executor of one search."""
    from rapidfire_automl.executor import RapidFireExecutor

    return RapidFireExecutor(model, **options)


def load_model(search: Search, create_model_fn: CreateModel | None) -> tuple[Any, Any]:
    """The base and its tokenizer; a name and None where the executor can load it by itself.

    Raises:
        ValueError: `create_model_fn` returned something else than a model and a tokenizer.
    """
    base = search.base
    if create_model_fn is not None:
        made = create_model_fn(model_config(search))
        if not isinstance(made, (tuple, list)) or len(made) != 2 or any(part is None for part in made):
            raise ValueError(f"`create_model_fn` must return (model, tokenizer), got {type(made).__name__}.")
        if hasattr(made[0], "peft_config"):
            raise ValueError("`create_model_fn` must return the base itself, got a model with an adapter.")
        return made[0], made[1]
    if not any(base[name] for name in ("model_kwargs", "tokenizer", "tokenizer_kwargs")):
        return base["model_name"], None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kwargs = dict(base["model_kwargs"] or {})
    if "torch_dtype" in kwargs:  # its name before transformers 5
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    tokenizer = AutoTokenizer.from_pretrained(
        base["tokenizer"] or base["model_name"], **(base["tokenizer_kwargs"] or {})
    )
    return AutoModelForCausalLM.from_pretrained(base["model_name"], **{"dtype": "auto", **kwargs}), tokenizer


def model_config(search: Search) -> dict[str, Any]:
    """What `create_model_fn` is called with: the base, and whatever all configurations of the search share."""
    config = search.space.value
    config = config.values[0] if isinstance(config, List) else config

    def shared(name: str) -> dict[str, Any]:
        value = getattr(config, name)
        fields = value.search_fields() if isinstance(value, FieldConfig) else {}
        return {key: field for key, field in fields.items() if is_concrete(field)}

    base = {name: search.base[name] or {} if name.endswith("kwargs") else search.base[name] for name in search.base}
    return {
        "trainer_type": search.trainer_type,
        "training_args": shared("training_args"),
        "peft_params": shared("peft_config"),
        "additional_kwargs": {},
        **{name: value for name, value in base.items() if not name.startswith("ref_")},
        "ref_model_config": {name.removeprefix("ref_"): base[name] for name in base if name.startswith("ref_")},
    }
