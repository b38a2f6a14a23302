"""The data sets a search file names: found, loaded, and checked before any model is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rapidfire_automl.reasoning import Task, reasoning_rows
from rapidfire_automl.settings import Settings, SettingsError
from rapidfire_automl.tables import Data, ReasoningGym
from rapidfire_policies.wording import counted

if TYPE_CHECKING:
    from datasets import Dataset

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

_COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": (("messages",), ("prompt", "completion"), ("input_ids",)),
    "dpo": (("chosen", "rejected"),),
    "grpo": (("prompt",),),
    "rloo": (("prompt",),),
}
"""Per trainer kind, the sets of columns of which one must be there; SFT also takes its `dataset_text_field`."""


def load_data(settings: Settings, folder: Path) -> tuple[Dataset, Dataset]:
    """Load, or make, the training and the held-out examples.

    Args:
        settings: The search file.
        folder: Its folder, where files it names are looked up first; then the current one.

    Raises:
        SettingsError: A file is missing, cannot be read or is empty, columns are missing, or there are fewer
            training examples than chunks.
    """
    data = settings.data
    if data.reasoning_gym is not None:
        return _make(data.reasoning_gym, settings)
    train = _limit(_load(data.train, data.split, "data.train", data, folder), data.max_train, settings.search.seed)
    if data.eval_fraction is not None:
        if len(train) < 2:
            raise SettingsError("`data.train` has one example, too few to hold some out; name `data.eval`.")
        parts = train.train_test_split(test_size=data.eval_fraction, seed=settings.search.seed)
        train, held_out = parts["train"], parts["test"]
    else:
        held_out = _load(data.eval or data.train, data.eval_split or "train", "data.eval", data, folder)
    held_out = _limit(held_out, data.max_eval, settings.search.seed)
    for name, rows in (("data.train", train), ("data.eval", held_out)):
        _check_columns(name, rows, settings)
    _check_count(train, settings)
    return train, held_out


def _make(gym: ReasoningGym, settings: Settings) -> tuple[Dataset, Dataset]:
    """The rows of `[data.reasoning_gym]`; for SFT the task's own answer completes them."""
    from datasets import Dataset

    if settings.trainer == "dpo":
        raise SettingsError("`data.reasoning_gym` makes prompts with answers, and trainer dpo needs pairs of answers.")
    given = gym.model_dump(exclude={"tasks"})
    try:
        sets = reasoning_rows([Task(task.task, task.options) for task in gym.tasks], **given)
    except ValueError as error:
        raise SettingsError(f"`data.reasoning_gym`: {error}") from error
    if settings.trainer == "sft":
        for rows in sets:
            for row in rows:
                said = row["answer"]
                row["completion"] = [{"role": "assistant", "content": said}] if gym.chat else f" {said}"
    train, held_out = (Dataset.from_list(rows) for rows in sets)
    _check_count(train, settings)
    return train, held_out


def _check_count(train: Dataset, settings: Settings) -> None:
    chunks = settings.search.chunks
    if len(train) < chunks:
        raise SettingsError(
            f"`data.train` has {counted(len(train), 'example')}, fewer than `search.chunks` = {chunks}. "
            f"Set `search.chunks` to {len(train)} or less, or give more examples."
        )


def check_files(settings: Settings, folder: Path) -> None:
    """Check that the files `[data]` names exist, without importing or reading anything.

    Raises:
        SettingsError: One is missing or empty, or of a kind that cannot be read.
    """
    for key, source in (("data.train", settings.data.train), ("data.eval", settings.data.eval)):
        if source:
            _find(source, key, folder)


def _find(source: str, key: str, folder: Path) -> Path | None:
    """The file that `source` means, or None for a data set of the hub."""
    for path in (folder / source, Path(source)):
        if path.is_file():
            if path.suffix not in _LOADERS:
                raise SettingsError(f"`{key}` must be one of {', '.join(_LOADERS)} or a hub id, got {source}.")
            if path.stat().st_size == 0:
                raise SettingsError(f"`{key}` is empty: {path} has no examples.")
            return path
        if path.is_dir():
            raise SettingsError(f"`{key}` must be a file or a hub id, and {path} is a folder.")
    if Path(source).suffix in _LOADERS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise SettingsError(f"`{key}`: there is no file {source}, neither in {folder} nor in the current folder.")
    return None


def _load(source: str, split: str, key: str, data: Data, folder: Path) -> Dataset:
    from datasets import load_dataset

    path = _find(source, key, folder)
    try:
        if path is not None:
            rows = load_dataset(_LOADERS[path.suffix], data_files=str(path), split="train")
        else:
            rows = load_dataset(source, data.subset, split=split)
    except Exception as error:  # every reader has its own kinds of errors
        raise SettingsError(f"`{key}`: {source} cannot be loaded: {_first_line(error)}") from error
    if len(rows) == 0:
        raise SettingsError(f"`{key}` is empty: {source} has no examples.")
    return rows


def _first_line(error: BaseException) -> str:
    """The innermost cause's first line: readers wrap theirs in "An error occurred while generating the dataset"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0] or type(error).__name__


def _limit(rows: Dataset, most: int | None, seed: int) -> Dataset:
    if most is None or len(rows) <= most:
        return rows
    return rows.shuffle(seed=seed).select(range(most))


def _check_columns(key: str, rows: Any, settings: Settings) -> None:
    wanted = _COLUMNS[settings.trainer]
    if settings.trainer == "sft":
        wanted = ((str(settings.args.get("dataset_text_field", "text")),), *wanted)
    have = set(rows.column_names)
    if not any(have.issuperset(columns) for columns in wanted):
        ways = " or ".join(" + ".join(f'"{name}"' for name in columns) for columns in wanted)
        raise SettingsError(
            f"`{key}` lacks columns: trainer {settings.trainer} needs {ways}, got {', '.join(sorted(have))}."
        )
