"""A chunk's sheet: what only files tell other workers of it, since Optuna keeps no more than its value. Torch-free.

`<trial's folder>/sheets/chunk-0003.json` holds per-example scores, costs and what the trainer has logged. It is written
once, whole, before the value is reported.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rapidfire_automl.jsonable import dumps
from rapidfire_automl.records import TrialRecord


def write(folder: Path, record: TrialRecord) -> None:
    """Write down a trial's last chunk; one that is there already stays.

    Args:
        folder: The trial's.
        record: With at least one chunk.

    Raises:
        OSError: It could not be written.
    """
    chunk = len(record.values)
    path = _path(folder, chunk)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {
        "scores": record.scores[-1],
        "seconds": record.seconds[-1],
        "tokens": record.tokens[-1],
        "generated": record.generated[-1],
        "metrics": {name: numbers[-1] for name, numbers in record.metrics.items()},
    }
    partial = path.with_name(f".{path.stem}-{secrets.token_hex(6)}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(dumps(told))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def add(record: TrialRecord, folder: Path, vector: tuple[float, ...]) -> None:
    """Add the next chunk to another worker's record, with what its sheet tells, if it has one.

    Args:
        record: Of the trial.
        folder: The trial's.
        vector: What the chunk came to, one value an objective.
    """
    told = _read(_path(folder, len(record.values) + 1))
    scores = np.asarray(_numbers(told.get("scores", [])), dtype=np.float64)
    metrics = told.get("metrics")
    record.add_chunk(
        vector,
        scores,
        {str(name): float(value) for name, value in metrics.items()} if isinstance(metrics, Mapping) else {},
        float(told.get("seconds", 0.0)),
        int(told.get("tokens", 0)),
        int(told.get("generated", 0)),
    )


def _path(folder: Path, chunk: int) -> Path:
    return folder / "sheets" / f"chunk-{chunk:04d}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _numbers(values: Any) -> Any:
    """NaN and infinities come as text."""
    if isinstance(values, list):
        return [_numbers(value) for value in values]
    return float(values)
