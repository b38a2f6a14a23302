"""What the names in a search file stand for: classes, storages, folders, bases."""

from __future__ import annotations

import importlib
import json
import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rapidfire_automl.disk import is_locked
from rapidfire_automl.event_log import FILE
from rapidfire_automl.names import LONGEST
from rapidfire_automl.refusals import FolderInUse
from rapidfire_automl.settings import SettingsError

_log = logging.getLogger("rapidfire_automl")

FACTS = "search.json"
"""What is searched in a run folder: the settings by key, without how many trials, slots and seconds it may take."""


def load(name: str, key: str) -> Any:
    """The object that "package.module:Name" means."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(f"`{key}`: {name} cannot be imported: {first_line(error)}") from None


def no_such(key: str, name: str, known: Sequence[str]) -> str:
    """One line that says what `key` may be."""
    return f'`{key}` must be one of {", ".join(known)} or "package.module:Name", got "{name}".'


def new_run_dir(given: str | None, name: str) -> Path:
    """The run folder of a search that does not go on: the one given, or the next free one; not made yet."""
    return run_dir_of(given, name, {})


def run_dir_of(given: str | None, name: str, facts: Mapping[str, Any]) -> Path:
    """The run folder that `output.dir` means, or the next free one; not made yet.

    A folder with a search that has not come to its end is taken if that search is this one, to go on with it: without
    `output.dir` the newest such, unless the search is under way. A newer one that is passed over is told in the log.

    Args:
        given: `output.dir`.
        name: Of the search, where that is None: `runs/<name>`, `runs/<name>-2`, ...
        facts: What is searched.

    Raises:
        SettingsError: `output.dir` holds a search that is over, or another one.
        FolderInUse: A search is under way in `output.dir`.
    """
    if given is not None:
        folder = Path(given)
        if is_locked(folder / FILE):
            raise FolderInUse(folder)
        before = _unfinished(folder)
        if before is None:
            if (folder / "summary.json").exists():
                raise SettingsError(f"`output.dir`: {given} already holds a search; name another folder.")
        elif said := _differences(before, facts):
            raise SettingsError(f"`output.dir`: the search in {given} can't go on: {said}. Name another folder.")
        return folder
    if not name.strip(". ") or not name.isprintable() or len(name) > LONGEST:
        raise SettingsError(
            f"The search file's name, {name[:20]!r}, can't be its run folder's. "
            "Rename it, or give `output.dir` (`--out`)."
        )
    number, folder = 1, Path("runs") / name
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    if not facts:
        return folder
    passed, does = None, f"takes {folder}"
    for run in _newest_first(name):
        before = _unfinished(run)
        if before is None or is_locked(run / FILE):
            continue
        if before == dict(facts):
            folder, does = run, f"goes on in {run}"
            break
        passed = passed or (run, _differences(before, facts))
    if passed is not None:
        _log.warning(
            "The search in %s has not come to its end and is another one (%s), so this one %s. To go on with it set "
            "that back and name it: `-o %s`.",
            passed[0],
            passed[1],
            does,
            shlex.quote(str(passed[0])),
        )
    return folder


def _newest_first(name: str) -> list[Path]:
    """`runs/<name>`, `runs/<name>-2`, ..., as far as there are such, the highest number first."""
    numbered = re.compile(rf"{re.escape(name)}(?:-([2-9]|[1-9]\d+))?")
    folders = Path("runs").iterdir() if Path("runs").is_dir() else ()
    found = {folder: match for folder in folders if (match := numbered.fullmatch(folder.name))}
    return sorted(found, key=lambda folder: int(found[folder][1] or 1), reverse=True)


def _differences(before: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """What was and is searched, where that differs; the first three of these."""
    differ = [key for key in sorted({*before, *facts}) if before.get(key) != facts.get(key)]
    return "; ".join(f"`{key}` was {before.get(key)!r:.80}, is {facts.get(key)!r:.80}" for key in differ[:3])


def _unfinished(folder: Path) -> dict[str, Any] | None:
    """What is searched in a folder, if that was begun and has not come to its end.

    One that was interrupted, killed or broken goes on; `cancel` has ended it for good.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    try:
        status = json.loads((folder / "summary.json").read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError, AttributeError):
        status = None
    return facts if isinstance(facts, dict) and status not in ("complete", "failed", "cancelled") else None


def find_base(model: str, folder: Path) -> str:
    """The folder or hub id that `base.model` means."""
    for path in (folder / model, Path(model).expanduser()):
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise SettingsError(f"`base.model`: {path} holds no model, it has no config.json.")
            return str(path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise SettingsError(f"`base.model`: there is no folder {model}, and it is no hub id either.")
    return model


def check_base(model: str) -> None:
    """Read the base's configuration, a few hundred bytes, so that a misspelt name is found now."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model)
    except Exception as error:  # the hub, the network and the parser have their own kinds of errors
        raise SettingsError(f"`base.model`: {model} cannot be loaded: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
