"""The recorded curves a policy is judged on, and the draws of trials from them."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments import provenance
from rapidfire_automl.replay import hold_last

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Table:
    """Curves of a whole sweep.

    Args:
        name: Unique.
        group: What is averaged and drawn together.
        trials: Trials of a draw.
        curves: `(rows, chunks)`, lower is better.
        scores: `(rows, chunks, examples)`, or None.
        costs: `(rows, chunks)`, tokens, or None where every chunk costs the same.
        params: Hyperparameters by row.
    """

    name: str
    group: str
    trials: int
    curves: NDArray[np.float64]
    scores: NDArray[np.float64] | None = None
    costs: NDArray[np.float64] | None = None
    params: Sequence[Mapping[str, Any]] = ()

    def draw(self, seed: int) -> Table:
        """`trials` rows in random order: the same for every policy, and for any number of slots."""
        generator = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        rows = generator.choice(len(self.curves), size=min(self.trials, len(self.curves)), replace=False)
        return Table(
            self.name,
            self.group,
            self.trials,
            self.curves[rows],
            None if self.scores is None else self.scores[rows],
            None if self.costs is None else self.costs[rows],
            [self.params[row] for row in rows] if self.params else (),
        )


def load(config: Mapping[str, Any]) -> tuple[list[Table], list[dict[str, str]], dict[str, str | None]]:
    """The tables of a configuration.

    Returns:
        The tables; what was skipped, with the reason; the hash of each file that was read.
    """
    tables: list[Table] = []
    skipped: list[dict[str, str]] = []
    hashes: dict[str, str | None] = {}
    for given in config["tables"]:
        if "own" in given:
            files = [provenance.ROOT / config["own"]] if "own" in config else [HERE / "tables.npz"]
            where = files[0].name
        else:
            folders = [provenance.ROOT / folder for folder in config["curves"]]
            files = next((found for folder in folders if (found := sorted(folder.glob(given["files"])))), [])
            where = f"{given['files']} in {' or '.join(config['curves'])}"
        files = [file for file in files if file.is_file()]
        if not files:
            skipped.append({"group": given["group"], "reason": f"there is no {where}"})
        for file in files:
            hashes[file.name] = provenance.sha256(file)
            with np.load(file, allow_pickle=False) as arrays:
                tables.append(_own(given, arrays) if "own" in given else _recorded(given, arrays, file.stem))
    return tables, skipped, hashes


def _recorded(given: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], stem: str) -> Table:
    curves = arrays[given["array"]].astype(np.float64)
    curves = -curves if given.get("maximize") else curves
    params = [dict(zip(arrays["hp_names"].tolist(), row, strict=True)) for row in arrays["hp"].tolist()]
    name = stem if given["array"] == "curve" else f"{stem} {given['array']}"
    curves = (hold_last(curves) if given.get("hold_last") else curves)[:, : given.get("chunks")]
    if given.get("best_so_far"):
        # What a trial is worth whose best checkpoint is kept; a value that is not finite stays what it is.
        best = np.minimum.accumulate(np.where(np.isfinite(curves), curves, np.inf), axis=1)
        curves = np.where(np.isfinite(curves), best, curves)
    return Table(name, given["group"], given["trials"], curves, params=params)


def _own(given: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Table:
    task, name = given["own"], given["own"]
    scores = arrays[f"{task}_scores"].astype(np.float64)
    if given.get("accuracy"):
        # 1 for a wrong pair, 1/2 for a tie, 0 for a right one; NaN stays NaN.
        scores, name = 0.5 + 0.5 * np.sign(scores - math.log(2)), f"{task} accuracy"
    return Table(
        name,
        given["group"],
        given["trials"],
        scores.mean(axis=2),
        scores,
        arrays[f"{task}_tokens"].astype(np.float64),
        json.loads(str(arrays[f"{task}_params"])),
    )
