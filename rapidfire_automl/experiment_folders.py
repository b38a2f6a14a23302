"""An experiment's folder: a new one, or that of the same experiment whose process has ended before it was done.

`experiment.json` in it says what each `run_fit` searches, in order, and how many of them are over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from rapidfire_automl.disk import claim, make_folder, sync
from rapidfire_automl.jsonable import dumps

FILE, LOCK = "experiment.json", "lock"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class ExperimentFolder:
    """The folder of an experiment, locked for this process.

    The last folder of the name is taken if its first fit searches the same and one of its fits was cut short; what is
    over there is found again, what isn't goes on. Else the next free one is made: `name`, `name_2`, ...

    Args:
        parent: Where experiments lie.
        name: Of the experiment.
        facts: What its first fit searches, see `facts_of`.
    """

    def __init__(self, parent: Path, name: str, facts: Mapping[str, Any]) -> None:
        self.goes_on = False
        self._fits: list[dict[str, Any]] = []
        self._over = self._at = 0
        last = None
        number, path = 1, parent / name
        while path.exists():
            number, last = number + 1, path
            path = parent / f"{name}_{number}"
        lock = None if last is None else self._take_up(last, facts)
        while lock is None:
            try:
                make_folder(parent)
                path.mkdir()
                sync(parent)
                lock = claim(path / LOCK)
            except FileExistsError:
                number += 1
                path = parent / f"{name}_{number}"
        self.path = last if self.goes_on and last is not None else path
        self._lock = lock

    def _take_up(self, path: Path, facts: Mapping[str, Any]) -> IO[str] | None:
        """The lock of a folder to go on in, or None."""
        try:
            told = json.loads((path / FILE).read_text(encoding="utf-8"))
            fits, over = list(told["fits"]), int(told["over"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if over >= len(fits) or fits[0] != dict(facts):
            return None
        lock = claim(path / LOCK)
        self.goes_on = lock is not None
        if self.goes_on:
            self._fits, self._over = fits, over
        return lock

    def begin(self, facts: Mapping[str, Any]) -> None:
        """A fit begins.

        Raises:
            ValueError: An earlier process has searched something else at this place of the experiment.
        """
        if self._at < len(self._fits) and self._fits[self._at] != dict(facts):
            before = self._fits[self._at]
            names = ", ".join(f"`{name}`" for name in facts if before.get(name) != facts[name])
            raise ValueError(
                f"The experiment in {self.path} can't go on: {names} of its fit {self._at + 1} was another. "
                "Set it back, or take another name."
            )
        if self._at == len(self._fits):
            self._fits.append(dict(facts))
        self._at += 1
        self._write()

    def end(self) -> None:
        """A fit has come to its end."""
        self._over = max(self._over, self._at)
        self._write()

    def close(self) -> None:
        """Let other processes in."""
        self._lock.close()

    def _write(self) -> None:
        partial = self.path / f"{FILE}.partial"
        partial.write_text(dumps({"fits": self._fits, "over": self._over}, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.path / FILE)


def facts_of(chunks: int, seed: int, searches: list[Mapping[str, Any]]) -> dict[str, Any]:
    """What a fit searches, as JSON has it.

    Args:
        chunks: Of a trial.
        seed: Of the fit.
        searches: Of each search what makes it another one; objects count by their text, without addresses.
    """
    plain = [{name: _ADDRESS.sub("", str(value)) for name, value in search.items()} for search in searches]
    facts: dict[str, Any] = json.loads(dumps({"num_chunks": chunks, "seed": seed, "searches": plain}))
    return facts
