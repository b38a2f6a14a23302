"""Which known name a misspelt one was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_NICKNAMES = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "grad_accum": "gradient_accumulation_steps",
    "scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "max_seq_length": "max_length",
    "warmup_ratio": "warmup_steps",
    "alpha": "lora_alpha",
    "rank": "r",
    "lora_r": "r",
    "dropout": "lora_dropout",
    "modules": "target_modules",
    "group_size": "num_generations",
    "max_new_tokens": "max_completion_length",
    "dora": "use_dora",
    "rslora": "use_rslora",
    "trials": "n_trials",
    "num_trials": "n_trials",
    "num_chunks": "chunks",
    "shards": "chunks",
    "num_shards": "chunks",
    "pruner": "policy",
    "timeout": "timeout_s",
    "study_name": "study",
    "test": "eval",
    "validation": "eval",
    "eval_dataset": "eval",
    "train_dataset": "train",
    "model_name": "model",
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was most likely meant to be, or None when nothing is near."""
    names = sorted(known)
    nickname = _NICKNAMES.get(name.lower())
    if nickname in names:
        return nickname
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    return close[0] if close else None


def unknown(name: str, known: Iterable[str], where: str = "") -> str:
    """One line that says `name` is no known key and names the nearest one, or else all of them when they are few."""
    names = sorted(known)
    near = nearest(name, names)
    prefix = f"{where}." if where else ""
    if near is not None:
        return f"`{prefix}{name}` is no known key; did you mean `{prefix}{near}`?"
    if len(names) <= 12:
        return f"`{prefix}{name}` is no known key; known are {', '.join(names)}."
    return f"`{prefix}{name}` is no known key."
