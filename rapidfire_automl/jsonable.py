"""Anything a search records, as JSON that every parser reads: numbers that JSON lacks are written out as strings."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np


def jsonable(value: Any) -> Any:
    """Turn a value into plain JSON types.

    NaN and the infinities become "NaN", "Infinity" and "-Infinity": they were measured, and `None` (null) means that
    nothing was. Paths become text, tuples and sets lists, dataclasses objects; what is left becomes its `str`.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, np.generic):
        return jsonable(value.item())
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): jsonable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted((jsonable(inner) for inner in value), key=str)
    if isinstance(value, PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return str(value)


def dumps(value: Any, *, indent: int | None = None) -> str:
    """`json.dumps` of `jsonable(value)` in ASCII; never writes the NaN and Infinity tokens that JSON does not have.

    ASCII since a file name that is no UTF-8 can't be encoded otherwise.
    """
    return json.dumps(jsonable(value), indent=indent, allow_nan=False)
