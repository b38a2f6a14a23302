"""What is searched, in a few numbers: the base, the data sets, the search space; another search is refused by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import optuna
import torch
from torch import nn

from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.executor.journal import differences
from rapidfire_automl.refusals import SearchDiffers


def fingerprint_of_base(model: nn.Module) -> str:
    """Of a base's shapes, and of a few numbers of each of its tensors."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        few = tensor.detach().flatten()[:16].to("cpu", torch.float32).numpy().tobytes()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + few)
    return digest.hexdigest()[:16]


def fingerprint_of_data(trainer: Any) -> dict[str, Any]:
    """Of a trainer's data sets: rows, columns, and the first, middle and last row."""
    return {name: _fingerprint(getattr(trainer, name, None)) for name in ("train_dataset", "eval_dataset")}


def _fingerprint(rows: Any) -> Any:
    if isinstance(rows, Mapping):
        return {str(name): _fingerprint(part) for name, part in rows.items()}
    if rows is None or not hasattr(rows, "__len__") or not len(rows):
        return None
    picked = [rows[i] for i in sorted({0, len(rows) // 2, len(rows) - 1})]
    text = json.dumps(picked, sort_keys=True, default=str)
    return f"{len(rows)} rows, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def check_same_trial(arm: Arm, trainer: Any, space: Mapping[str, Any]) -> None:
    """Raise SearchDiffers if a trial that goes on was begun as another one.

    Args:
        arm: With its parameters as suggested now.
        trainer: Built now.
        space: The distributions of the study's other trials, by parameter.
    """
    where = f"Trial {arm.number} can't go on"
    for name, distribution in arm.trial.distributions.items():
        if name in space and space[name] != distribution:
            raise SearchDiffers(f"{where}: the search space of `{name}` was {space[name]}, is {distribution}.")
    restored = arm.restored
    if restored is None or restored.snapshot is None:
        return
    tree = restored.snapshot.tree
    before, now = tree["record"]["params"], dict(arm.trial.params)
    if set(before) != set(now):
        names = ", ".join(f"`{name}`" for name in sorted(set(before) ^ set(now)))
        raise SearchDiffers(f"{where}: the search space has changed by {names}.")
    data = fingerprint_of_data(trainer)
    if differ := differences(tree["data"], data):
        raise SearchDiffers(f"{where}: {'; '.join(differ)}.")


def distributions(trials: Iterable[optuna.trial.FrozenTrial]) -> dict[str, Any]:
    """The first distribution of each parameter."""
    found: dict[str, Any] = {}
    for trial in trials:
        for name, distribution in trial.distributions.items():
            found.setdefault(name, distribution)
    return found
