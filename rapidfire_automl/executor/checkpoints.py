"""Checkpoints on disk: one folder each, written whole or not at all, read only if every byte is as it was written.

A trial's folder holds `chunk-0001`, `chunk-0002`, ...; in each lie

- `adapter_model.safetensors` and `adapter_config.json`: the adapter in PEFT's layout, for anybody to load;
- `tensors.safetensors` and `state.json`: everything else (see `trees`);
- `manifest.json`: SHA-256 and size of the others and, last, of itself; the format, versions of libraries, and `meta`.

Nothing is ever unpickled. The hashes tell damage, not forgery: who can write into the folder can write a manifest, but
what they can plant is data, never code.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from rapidfire_automl.disk import is_full, make_folder, sync
from rapidfire_automl.executor.trees import decode, encode, fresh_copy
from rapidfire_automl.failpoints import hit

logger = logging.getLogger("rapidfire_automl")

FORMAT = 2
TENSORS, STATE = "tensors.safetensors", "state.json"
ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MANIFEST = "manifest.json"
_FILES = frozenset({TENSORS, STATE, ADAPTER, CONFIG})
_NAME = re.compile(r"chunk-([0-9]{4,})")
_KEPT = re.compile(r"\.(?P<name>chunk-[0-9]{4,})\.kept")
_LEFTOVER = re.compile(r"\.chunk-[0-9]{4,}(\.kept)?\.(tmp|old)-[0-9a-f]+")
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "numpy", "safetensors", "rapidfire_automl")


class CheckpointError(ValueError):
    """A checkpoint is damaged, or is none; nothing of it was used."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a checkpoint holds.

    Args:
        tree: Training state, as `trees.encode` takes it.
        adapter: The adapter's tensors by PEFT's names.
        config: PEFT's config of the adapter, in plain JSON types.
        meta: What the owner wants to know without reading tensors, in plain JSON types.
    """

    tree: Mapping[str, Any]
    adapter: Mapping[str, Tensor]
    config: Mapping[str, Any]
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Packed:
    """A snapshot that no later training step changes: all tensors are copies on the CPU."""

    form: Any
    tensors: Mapping[str, Tensor]
    adapter: Mapping[str, Tensor]
    config: Mapping[str, Any]
    meta: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(x.numel() * x.element_size() for part in (self.tensors, self.adapter) for x in part.values())


@dataclass(frozen=True, slots=True)
class Found:
    """What `newest` found.

    Args:
        folder: The newest valid checkpoint, or None.
        snapshot: What it holds.
        damaged: Newer ones that can't be used, and why.
    """

    folder: Path | None
    snapshot: Snapshot | None
    damaged: tuple[tuple[Path, str], ...] = ()


def pack(snapshot: Snapshot) -> Packed:
    """Copy a snapshot to the CPU.

    Raises:
        TypeError: Something in it has neither a safetensors nor a JSON form; its path is named.
    """
    collects = gc.isenabled()
    gc.disable()  # thousands of small objects that stay would set it off, and it would look at all there are
    try:
        form, tensors = encode(dict(snapshot.tree))
        adapter = {name: fresh_copy(x) for name, x in snapshot.adapter.items()}
    finally:
        if collects:
            gc.enable()
    for name, plain in (("config", snapshot.config), ("meta", snapshot.meta)):
        try:
            json.dumps(plain, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"`{name}` can't be written: {error}.") from None
    return Packed(form, tensors, adapter, dict(snapshot.config), dict(snapshot.meta))


def chunk_folder(parent: Path, chunk: int) -> Path:
    """Where the checkpoint after a chunk goes.

    >>> chunk_folder(Path("trial-7"), 3).as_posix()
    'trial-7/chunk-0003'
    """
    return parent / f"chunk-{chunk:04d}"


def chunk_of(folder: Path) -> int:
    """The chunk after which a checkpoint was taken.

    Raises:
        CheckpointError: It is not named like a checkpoint, or its parent climbs out of the search's folder.
    """
    matched = _NAME.fullmatch(folder.name)
    if matched is None or folder.parent.name == "..":
        raise CheckpointError(f"`{folder}` is no checkpoint's name. Checkpoints are called like chunk-0003.")
    return int(matched[1])


def write(folder: Path, snapshot: Snapshot | Packed) -> int:
    """Write a checkpoint: temporary folder, fsync, rename, fsync. One that is there already is replaced.

    Args:
        folder: Where to; its name is like `chunk-0003`.
        snapshot: What to write.

    Returns:
        Bytes written.

    Raises:
        CheckpointError: The folder is not named like a checkpoint.
        OSError: It could not be written; nothing of it is left.
        TypeError: Something can't be written without pickle.
    """
    chunk_of(folder)
    packed = snapshot if isinstance(snapshot, Packed) else pack(snapshot)
    hit("checkpoint.writing")
    state = json.dumps(packed.form, allow_nan=False).encode()
    return _put(folder, {**_adapter_files(packed), TENSORS: packed.tensors, STATE: state}, packed.meta)


def write_adapter(folder: Path, packed: Packed) -> int:
    """Write an adapter alone, in PEFT's layout, whole or not at all.

    Args:
        folder: Where to; replaced if it is there.
        packed: Its tensors and config.

    Returns:
        Bytes written.

    Raises:
        OSError: It could not be written; nothing of it is left.
    """
    return _put(folder, _adapter_files(packed))


def _adapter_files(packed: Packed) -> dict[str, Mapping[str, Tensor] | bytes]:
    config = json.dumps(packed.config, allow_nan=False, indent=2, sort_keys=True).encode()
    return {ADAPTER: packed.adapter, CONFIG: config}


def _put(
    folder: Path, contents: Mapping[str, Mapping[str, Tensor] | bytes], meta: Mapping[str, Any] | None = None
) -> int:
    """Files into a folder that appears with all of them, and with a manifest if there is something to say in it.

    What it replaces is there, under another name, until it has appeared.

    Returns:
        Bytes written.
    """
    parent = folder.parent
    make_folder(parent)
    temporary = parent / f".{folder.name}.tmp-{secrets.token_hex(6)}"
    kept = parent / f".{folder.name}.kept"
    try:
        temporary.mkdir()
        files = {name: _write(temporary / name, content) for name, content in contents.items()}
        if meta is not None:
            files[MANIFEST] = _write(temporary / MANIFEST, _manifest(files, meta))
        sync(temporary)
        hit("checkpoint.renaming")
        if _is_there(folder):
            _take_away(kept)
            folder.rename(kept)
            hit("checkpoint.replacing")
        temporary.rename(folder)
        sync(parent)
        hit("checkpoint.renamed")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _put_back(kept, folder)
        raise
    _take_away(kept)
    return sum(int(file["bytes"]) for file in files.values())


def _write(path: Path, content: Mapping[str, Tensor] | bytes) -> dict[str, Any]:
    """A new file, on the disk when this returns; its hash, of what can be read again, and its size."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        try:
            save_file(dict(content), path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(errno.ENOSPC if is_full(error) else errno.EIO, str(error)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def read(folder: Path) -> Snapshot:
    """Read a checkpoint, after its files, their sizes and their hashes have been found right.

    Raises:
        CheckpointError: It is damaged, holds something that is no part of a checkpoint, or is none.
    """
    chunk_of(folder)
    try:
        return _read(folder)
    except CheckpointError as error:
        raise CheckpointError(f"`{folder.name}` can't be used: {error}") from error
    except OSError as error:
        raise CheckpointError(f"`{folder.name}` can't be used: {error.strerror or error}.") from error


def newest(parent: Path, *, tidy: bool = True) -> Found:
    """The newest checkpoint that can be used; one that a killed writer was about to replace gets its name again.

    Args:
        parent: A trial's.
        tidy: Whether to remove what killed writers have left; not where somebody may still be writing.
    """
    _restore(parent)
    if tidy:
        sweep(parent)
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(_checkpoints(parent)):
        try:
            return Found(folder, read(folder), tuple(damaged))
        except CheckpointError as error:
            damaged.append((folder, str(error)))
            logger.warning("A checkpoint of %s: %s", parent.name, error)
    return Found(None, None, tuple(damaged))


def sweep(parent: Path) -> list[str]:
    """Remove what killed writers have left half done, or have replaced; returns its names."""
    _restore(parent)
    gone = [
        entry
        for entry in _entries(parent)
        if (_LEFTOVER.fullmatch(entry.name) or _KEPT.fullmatch(entry.name)) and not entry.is_symlink()
    ]
    for entry in gone:
        shutil.rmtree(entry, ignore_errors=True)
    return [entry.name for entry in gone]


def thin(parent: Path, keep: int) -> list[str]:
    """Remove all checkpoints but the newest `keep` (>= 1); returns their names."""
    if keep < 1:
        raise ValueError(f"`keep` must be >= 1, got {keep}.")
    gone = _checkpoints(parent)[:-keep]
    for folder in gone:
        _take_away(folder)
    return [folder.name for folder in gone]


def disk_bytes(parent: Path) -> int:
    """Bytes that all files below a folder take."""
    total = 0
    for folder, _, names in os.walk(parent):
        for name in names:
            try:
                total += (Path(folder) / name).lstat().st_size
            except FileNotFoundError:  # a writer has just renamed or removed it
                continue
    return total


def _read(folder: Path) -> Snapshot:
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError("it is not a folder.")
    names = {entry.name for entry in folder.iterdir()}
    if unknown := names - _FILES - {MANIFEST}:
        raise CheckpointError(f"{min(unknown)} is no part of a checkpoint; it was not opened.")
    if missing := (_FILES | {MANIFEST}) - names:
        raise CheckpointError(f"{min(missing)} is missing.")
    for name in sorted(names):
        if not stat.S_ISREG((folder / name).lstat().st_mode):
            raise CheckpointError(f"{name} is no regular file.")
    manifest = _checked_manifest((folder / MANIFEST).read_bytes())
    contents = {name: _checked(folder / name, manifest["files"][name]) for name in sorted(_FILES)}
    try:
        tensors, adapter = load(contents[TENSORS]), load(contents[ADAPTER])
        tree = decode(json.loads(contents[STATE]), tensors)
        config = json.loads(contents[CONFIG])
    except (SafetensorError, ValueError, LookupError, RecursionError) as error:
        raise CheckpointError(f"its hashes are right, but it is not what this version writes: {error}") from error
    return Snapshot(tree, adapter, config, manifest["meta"])


def _checked(path: Path, wanted: Mapping[str, Any]) -> bytes:
    content = path.read_bytes()
    if len(content) != wanted["bytes"]:
        raise CheckpointError(f"{path.name} has {len(content)} bytes instead of {wanted['bytes']}.")
    if hashlib.sha256(content).hexdigest() != wanted["sha256"]:
        raise CheckpointError(f"{path.name} has another SHA-256 than when it was written.")
    return content


def _manifest(files: Mapping[str, Mapping[str, Any]], meta: Mapping[str, Any]) -> bytes:
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "files": {name: dict(found) for name, found in files.items()},
        "versions": {"python": platform.python_version()} | _versions(),
        "meta": dict(meta),
    }
    manifest["sha256"] = _own_hash(manifest)
    return json.dumps(manifest, allow_nan=False, indent=2).encode()


def _checked_manifest(content: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(content)
        own = manifest.pop("sha256")
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
        raise CheckpointError(f"{MANIFEST} can't be read.") from None
    if own != _own_hash(manifest):
        raise CheckpointError(f"{MANIFEST} has another SHA-256 than when it was written.")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"it has format {manifest.get('format')}, and this version reads {FORMAT}.")
    files = manifest["files"]
    if set(files) != _FILES or not all(set(entry) == {"bytes", "sha256"} for entry in files.values()):
        raise CheckpointError(f"{MANIFEST} names other files.")
    return dict(manifest)


def _own_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, allow_nan=False, sort_keys=True).encode()).hexdigest()


@cache
def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _entries(parent: Path) -> list[Path]:
    return sorted(parent.iterdir()) if parent.is_dir() else []


def _checkpoints(parent: Path) -> list[Path]:
    return sorted((entry for entry in _entries(parent) if _NAME.fullmatch(entry.name)), key=chunk_of)


def _is_there(entry: Path) -> bool:
    return entry.is_symlink() or entry.exists()


def _restore(parent: Path) -> None:
    for entry in _entries(parent):
        if kept := _KEPT.fullmatch(entry.name):
            _put_back(entry, parent / kept["name"])


def _put_back(kept: Path, folder: Path) -> None:
    """Give what was to be replaced its name again, unless what replaces it is there."""
    if not _is_there(folder):
        with suppress(OSError):  # nothing was kept, or another process is faster
            kept.rename(folder)


def _take_away(folder: Path) -> None:
    """Remove a checkpoint, if it is there: out of sight at once, so that a crash on the way leaves no half of it."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink(missing_ok=True)
        return
    aside = folder.parent / f".{folder.name.removeprefix('.')}.old-{secrets.token_hex(6)}"
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
