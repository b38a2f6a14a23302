"""A search that several workers share: its description travels in the study, so that a worker needs nothing else.

What the description names (data, base, reward functions) and the search's folder must be there for all workers; where
they are mounted elsewhere, each says where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from rapidfire_automl import workers
from rapidfire_automl.errors_of_storages import redacted
from rapidfire_automl.settings import Settings, SettingsError, parse_settings
from rapidfire_automl.storages import NoSuchStudy, StorageError, load_study, open_storage, shown

SEARCH_ATTR = "rapidfire:search"
"""The study attribute that holds the description."""
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Shared:
    """A search as its study describes it.

    Args:
        settings: What is searched, with the storage that the worker has come by.
        folder: Where the files it names are looked up first.
        run_dir: The folder that all workers see.
        facts: What is searched, to tell it from another search.
    """

    settings: Settings
    folder: Path
    run_dir: Path
    facts: Mapping[str, Any]


def find(storage: str, study: str) -> Shared:
    """What a study describes.

    Args:
        storage: URL of its storage.
        study: Its name.

    Raises:
        SettingsError: It can't be opened, or nobody has begun a search in it.
    """
    try:
        found = load_study(storage, study)
    except NoSuchStudy as error:
        raise SettingsError(
            f"`--study`: {error} Begin it with `rapidfire-automl run search.toml --storage ... --study {study}`."
        ) from None
    except StorageError as error:
        raise SettingsError(f"`--storage`: {error}") from None
    told = found.user_attrs.get(SEARCH_ATTR)
    if not isinstance(told, Mapping) or told.get("format") != _FORMAT:
        raise SettingsError(
            f"`--study`: study {study} in {shown(storage)} was not begun by `rapidfire-automl run ... --study {study}` "
            "of this version, so it does not say what is searched."
        )
    if why := found.user_attrs.get(workers.CANCELLED_ATTR):
        raise SettingsError(f"`--study`: the search of study {study} was ended: {why}.")
    lines = [f"search.storage='{storage}'", f"search.study='{study}'", "search.shared=true"]
    return Shared(
        parse_settings(told["settings"], lines), Path(told["folder"]), Path(told["run_dir"]), dict(told["facts"])
    )


def join(
    shared: Shared,
    sampler: optuna.samplers.BaseSampler,
    pruner: optuna.pruners.BasePruner,
    n_trials: int | None = None,
    points: Sequence[Mapping[str, Any]] = (),
) -> optuna.Study:
    """Open the study of a shared search; the first has it made, described and filled.

    Args:
        shared: The search.
        sampler: Proposes this worker's trials.
        pruner: Judges them.
        n_trials: Trials of all workers together, where they are to be queued.
        points: Parameters of the first of them.

    Raises:
        SettingsError: The storage can't be opened or shared, or the study holds another search.
    """
    search = shared.settings.search
    assert search.storage is not None and search.study is not None
    try:
        storage = open_storage(
            search.storage,
            patience_s=search.storage_patience_s,
            heartbeat_s=search.heartbeat_s,
            grace_s=search.grace_s,
        )
        study = optuna.create_study(
            storage=storage,
            study_name=search.study,
            direction=shared.settings.direction,
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )
        workers.rhythm(study)
    except StorageError as error:
        raise SettingsError(f"`search.storage`: {error}") from None
    except ValueError as error:
        raise SettingsError(f"`search.grace_s`: {redacted(str(error))}") from None
    filled = bool(study.get_trials(deepcopy=False))  # looked at first: whoever has filled it has described it before
    told = study.user_attrs.get(SEARCH_ATTR)
    if told is None and filled:
        raise SettingsError(f"`search.study`: study {search.study} holds something else; take another name.")
    if n_trials is not None:
        mine = {
            "format": _FORMAT,
            "settings": _portable(shared.settings),
            "folder": str(shared.folder.absolute()),
            "run_dir": str(shared.run_dir.absolute()),
            "facts": dict(shared.facts),
        }
        told = storage.settle_study_user_attr(study._study_id, SEARCH_ATTR, mine)
    if told is not None:
        _check(told["facts"], shared.facts, search.study)
    if n_trials is not None:
        if told != mine:  # the same search, with more trials or from another folder
            study.set_user_attr(SEARCH_ATTR, mine)
        workers.fill(study, n_trials, points)
    return study


def _portable(settings: Settings) -> dict[str, Any]:
    """Settings without what only this worker knows: the way to the storage, with its password."""
    tree: dict[str, Any] = settings.model_dump(mode="json", exclude_unset=True)
    for table, key in (("search", "storage"), ("search", "study"), ("search", "shared"), ("output", "dir")):
        tree.get(table, {}).pop(key, None)
    return tree


def _check(before: Mapping[str, Any], now: Mapping[str, Any], study: str) -> None:
    if differ := [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]:
        said = "; ".join(f"`{key}` was {before.get(key)!r:.80}, is {now.get(key)!r:.80}" for key in differ[:3])
        raise SettingsError(f"`search.study`: study {study} is another search: {said}. Take another name.")
