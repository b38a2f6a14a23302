"""Checkpoints: exact trees, whole folders or none, every kind of damage told, a writer that outlives a full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import pickle
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import threading
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rapidfire_automl import failpoints
from rapidfire_automl.executor import checkpoints, writing
from rapidfire_automl.executor.checkpoints import (
    CheckpointError,
    Snapshot,
    chunk_folder,
    chunk_of,
    disk_bytes,
    newest,
    pack,
    read,
    sweep,
    thin,
    write,
)
from rapidfire_automl.executor.trees import decode, encode
from rapidfire_automl.executor.writing import Trouble, Writer, Written

pytestmark = pytest.mark.faults

FILES = ["adapter_config.json", "adapter_model.safetensors", "manifest.json", "state.json", "tensors.safetensors"]


def through(tree: Any) -> Any:
    form, tensors = encode(tree)
    return decode(json.loads(json.dumps(form, allow_nan=False)), tensors)


def check_equal(one: Any, other: Any) -> None:
    """Equal in type, dtype, layout and every bit."""
    assert type(one) is type(other), (one, other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            check_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other):
            check_equal(mine, theirs)
    elif isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert not one.numel() or one.stride() == other.stride()
        assert one.contiguous().numpy(force=True).tobytes() == other.contiguous().numpy(force=True).tobytes()
    elif isinstance(one, (np.ndarray, np.generic)):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    elif isinstance(one, float):
        assert struct.pack("d", one) == struct.pack("d", other) or (math.isnan(one) and math.isnan(other))
    elif isinstance(one, torch.Generator):
        assert torch.equal(one.get_state(), other.get_state())
    else:
        assert one == other


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 5e-324, 0.1, 1e308]),
    st.floats(),
    st.sampled_from(["", "$", "NaN", "ä\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "a/b"]),
)
KEYS = st.one_of(st.sampled_from(["$", "a", "a/b", "0"]), st.integers(-3, 3), st.none(), st.tuples(st.integers()))
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
]
TENSORS = st.builds(
    lambda dtype, shape, seed: torch.from_numpy(np.random.default_rng(seed).integers(0, 2, shape)).to(dtype),
    st.sampled_from(DTYPES),
    st.sampled_from([(), (0,), (3,), (2, 0, 3), (2, 3)]),
    st.integers(0, 9),
)
TREES = st.recursive(
    st.one_of(SCALARS, TENSORS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_trees_come_back_as_they_were(tree: Any) -> None:
    check_equal(through(tree), tree)


def test_generators_and_arrays_come_back() -> None:
    drawn = torch.Generator().manual_seed(5)
    torch.randn(3, generator=drawn)
    python = random.Random(3)
    python.gauss(0, 1)
    tree = {
        "torch": drawn,
        "numpy": np.random.RandomState(7).get_state(),
        "python": python.getstate(),
        "scalar": np.float32(0.1),
        "double": np.float64(math.nan),
        "zero-dimensional": np.array(3, dtype=np.uint16),
        "reversed": np.arange(6.0)[::-1].copy(),
        "bfloat16": torch.randn(5).to(torch.bfloat16).view(torch.int16),
    }
    back = through(tree)
    check_equal(back, tree)
    random.Random().setstate(back["python"])
    np.random.RandomState().set_state(back["numpy"])
    assert torch.equal(torch.randn(4, generator=back["torch"]), torch.randn(4, generator=drawn))


def test_bfloat16_and_nan_payloads_keep_their_bits() -> None:
    odd = torch.tensor([0x7FC1, 0xFFFF - (1 << 16), 0x0001], dtype=torch.int16).view(torch.bfloat16)
    assert torch.equal(through({"x": odd})["x"].view(torch.int16), odd.view(torch.int16))


def test_layouts_and_sharing() -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tree = {
        "transposed": whole.T,
        "column": whole[:, 1],
        "expanded": whole[:1].expand(4, 6),
        "tied": [whole, whole, torch.nn.Parameter(whole)],
        "slice": whole[1:2],
        "flipped": whole.to_sparse().to_dense().flip(0),
    }
    back = through(tree)
    check_equal(back["transposed"], whole.T)
    for name in ("column", "expanded", "slice", "flipped"):
        assert torch.equal(back[name], tree[name])
        assert back[name].is_contiguous()
    one, two, three = back["tied"]
    assert one is two is three
    assert not one.requires_grad
    assert {name: flat.numel() for name, flat in encode(tree)[1].items()} == {"float32": 4 * 24 + 4 + 6}


def test_paths_that_read_alike_stay_apart() -> None:
    tree = {"a": {"b": torch.ones(2)}, "a/b": torch.zeros(2), "c": {0: torch.ones(3), "0": torch.zeros(3)}}
    check_equal(through(tree), tree)


def test_dicts_of_other_kinds_become_dicts() -> None:
    tree = {"a": OrderedDict(x=1), "b": defaultdict(list, {0: [1.0]})}
    check_equal(through(tree), {"a": {"x": 1}, "b": {0: [1.0]}})


def test_a_copy_is_taken() -> None:
    value = torch.ones(3)
    _, tensors = encode({"x": value, "y": np.ones(2)})
    value.zero_()
    assert torch.equal(tensors["float32"], torch.ones(3))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (object(), "object"),
        (b"bytes", "bytes"),
        (1j, "complex"),
        ({1, 2}, "set"),
        (deque([1]), "deque"),
        (lambda: 0, "function"),
        (torch.float32, "dtype"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "meta"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        (np.array(["a"]), "<U1"),
        (np.array([object()]), "object"),
        ({frozenset(): 1}, "key"),
    ],
)
def test_what_has_no_form_is_named(value: Any, what: str) -> None:
    with pytest.raises(TypeError, match=rf"`optimizer/state/0/1[^`]*` can't be written: .*{what}"):
        encode({"optimizer": {"state": {0: [3, value]}}})


@pytest.mark.parametrize(
    "form", [{"$": "code"}, {"$": "tensor", "in": "absent"}, {"$": "float"}, {"$": "dict"}, {"$": 3}]
)
def test_foreign_forms_are_refused(form: Any) -> None:
    with pytest.raises(ValueError, match="form can't be read"):
        decode([form], {})


def snapshot(number: float = 1.0, size: int = 1000) -> Snapshot:
    return Snapshot(
        tree={"optimizer": {"state": {0: {"exp_avg": torch.full((size,), number)}}}, "loss": math.nan},
        adapter={"base_model.model.q_proj.lora_A.weight": torch.full((4, 8), number)},
        config={"peft_type": "LORA", "r": 4},
        meta={"chunk": number},
    )


def value_of(found: Snapshot) -> float:
    return float(found.adapter["base_model.model.q_proj.lora_A.weight"][0, 0])


def test_written_and_read(tmp_path: Path) -> None:
    folder = chunk_folder(tmp_path / "trial-1", 3)
    written = write(folder, snapshot())
    assert sorted(p.name for p in folder.iterdir()) == FILES
    assert written == disk_bytes(tmp_path) == sum(p.stat().st_size for p in folder.iterdir())
    back = read(folder)
    check_equal(back.tree, snapshot().tree)
    assert back.meta == {"chunk": 1.0} and back.config == {"peft_type": "LORA", "r": 4}
    assert value_of(back) == 1.0
    assert [p.name for p in folder.parent.iterdir()] == ["chunk-0003"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (
        manifest["format"] == checkpoints.FORMAT
        and manifest["versions"]["torch"]
        and set(manifest["files"]) == {*FILES} - {"manifest.json"}
    )


def test_written_again(tmp_path: Path) -> None:
    for number in (1.0, 2.0):
        write(tmp_path / "chunk-0001", snapshot(number))
    assert value_of(read(tmp_path / "chunk-0001")) == 2.0
    assert [p.name for p in tmp_path.iterdir()] == ["chunk-0001"]


@pytest.mark.parametrize(
    "name", ["../../x", "chunk-1", "chunk-0001.pt", "a/../chunk-0001", "chunk-000１", "", "chunk-0001 "]
)
def test_other_names_are_refused(name: str, tmp_path: Path) -> None:
    for act in (read, chunk_of, lambda folder: write(folder, snapshot())):
        with pytest.raises(CheckpointError, match="is no checkpoint's name"):
            act(tmp_path / "trial" / name)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_search_may_lie_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in ("..", "../runs/x", "../here/../runs/x"):
        folder = chunk_folder(Path(output, "trials", "0", "ended"), 1)
        write(folder, snapshot())
        assert chunk_of(folder) == 1 and newest(folder.parent).folder == folder


def test_links_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside" / "chunk-0001"
    write(outside, snapshot())
    trial = tmp_path / "trial"
    trial.mkdir()
    (trial / "chunk-0001").symlink_to(outside, target_is_directory=True)
    with pytest.raises(CheckpointError, match="not a folder"):
        read(trial / "chunk-0001")
    assert newest(trial).folder is None
    write(trial / "chunk-0001", snapshot(2.0))
    assert value_of(read(outside)) == 1.0 and value_of(read(trial / "chunk-0001")) == 2.0
    state = trial / "chunk-0001" / "state.json"
    state.unlink()
    state.symlink_to(outside / "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json is no regular file"):
        read(trial / "chunk-0001")


class Planted:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", ["optimizer.pt", "pytorch_model.bin", "adapter_model.bin", "x.pkl", "notes.txt"])
def test_a_planted_pickle_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "chunk-0001"
    write(folder, snapshot())
    (folder / name).write_bytes(pickle.dumps(Planted(tmp_path / "trace")))
    with pytest.raises(CheckpointError, match=f"{name} is no part of a checkpoint; it was not opened"):
        read(folder)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
@pytest.mark.parametrize("forged", [False, True])
def test_a_pickle_by_another_name_is_refused(name: str, forged: bool, tmp_path: Path) -> None:
    """Also where whoever planted it has written a manifest that fits."""
    folder = tmp_path / "chunk-0001"
    write(folder, snapshot())
    (folder / name).write_bytes(pickle.dumps(Planted(tmp_path / "trace")))
    if forged:
        contents = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
        files = {n: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for n, c in contents.items()}
        (folder / "manifest.json").write_bytes(checkpoints._manifest(files, {}))
    with pytest.raises(CheckpointError, match="not what this version writes" if forged else "bytes instead of"):
        read(folder)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("manifest", ["", "[]", "{}", "null", '{"sha256": 3}', "{" * 100_000])
def test_a_foreign_manifest_is_refused(manifest: str, tmp_path: Path) -> None:
    write(tmp_path / "chunk-0001", snapshot())
    (tmp_path / "chunk-0001" / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read(tmp_path / "chunk-0001")


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_noticed(name: str, tmp_path: Path) -> None:
    """Low, middle and high bits, one at a time: of each byte of the small files, of every seventh of the others."""
    folder = tmp_path / "chunk-0001"
    write(folder, Snapshot({"x": torch.ones(20)}, {"a": torch.ones(3)}, {"r": 4}))
    file, undetected = folder / name, []
    content = file.read_bytes()
    for place in range(0, len(content), 1 if len(content) < 300 else 7):
        for bit in (0, 3, 7):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                read(folder)
            except CheckpointError:
                continue
            undetected.append((place, bit))
    assert undetected == []


def damage(folder: Path, how: str) -> None:
    file = folder / "tensors.safetensors"
    content = file.read_bytes()
    match how:
        case "truncated":
            file.write_bytes(content[: len(content) // 2])
        case "empty":
            file.write_bytes(b"")
        case "flipped":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 4]))
        case "missing":
            file.unlink()
        case "no manifest":
            (folder / "manifest.json").unlink()
        case "a file":
            for each in folder.iterdir():
                each.unlink()
            folder.rmdir()
            folder.write_text("")


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("truncated", "tensors.safetensors has .* bytes instead of"),
        ("empty", "tensors.safetensors has 0 bytes instead of"),
        ("flipped", "tensors.safetensors has another SHA-256"),
        ("missing", "tensors.safetensors is missing"),
        ("no manifest", "manifest.json is missing"),
        ("a file", "it is not a folder"),
    ],
)
def test_the_one_before_is_used(how: str, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for chunk in (1, 2, 10):
        write(chunk_folder(tmp_path, chunk), snapshot(float(chunk)))
    damage(tmp_path / "chunk-0010", how)
    with caplog.at_level(logging.WARNING, "rapidfire_automl"):
        found = newest(tmp_path)
    assert found.folder == tmp_path / "chunk-0002"
    assert found.snapshot is not None and value_of(found.snapshot) == 2.0
    [(folder, reason)] = found.damaged
    assert folder == tmp_path / "chunk-0010"
    assert re.search(why, reason)
    assert reason in caplog.text


def test_none_is_left(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent") == checkpoints.Found(None, None)
    write(tmp_path / "chunk-0001", snapshot())
    damage(tmp_path / "chunk-0001", "missing")
    found = newest(tmp_path)
    assert found.folder is None and found.snapshot is None and len(found.damaged) == 1


def test_thinned(tmp_path: Path) -> None:
    for chunk in (1, 2, 9, 10, 10_000):
        write(chunk_folder(tmp_path, chunk), snapshot())
    (tmp_path / "events.jsonl").write_text("")
    assert thin(tmp_path, 2) == ["chunk-0001", "chunk-0002", "chunk-0009"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chunk-0010", "chunk-10000", "events.jsonl"]
    assert thin(tmp_path, 2) == []
    with pytest.raises(ValueError, match="`keep` must be >= 1, got 0"):
        thin(tmp_path, 0)


def in_a_process(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code that finds `folder`, `snapshot` and this module's imports."""
    start = "from pathlib import Path; from tests.executor.test_checkpoints import *; folder = Path({!r})\n"
    return subprocess.run(
        [sys.executable, "-c", start.format(str(folder)) + textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "survivor", "left"),
    [("checkpoint.writing", 1.0, 0), ("checkpoint.renaming", 1.0, 1), ("checkpoint.renamed", 2.0, 0)],
)
def test_killed_while_writing(place: str, survivor: float, left: int, tmp_path: Path) -> None:
    code = "for n in (1, 2): write(chunk_folder(folder, n), snapshot(float(n)))"
    ended = in_a_process(code, tmp_path, **{failpoints.VARIABLE: f"{place}=kill@2"})
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len([p for p in tmp_path.iterdir() if ".tmp-" in p.name]) == left
    found = newest(tmp_path)
    assert found.snapshot is not None and value_of(found.snapshot) == survivor
    assert found.damaged == ()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("tidy", [True, False])
@pytest.mark.parametrize(
    ("place", "survivor"),
    [
        ("checkpoint.writing=kill@2", 1.0),
        ("checkpoint.renaming=kill@2", 1.0),
        ("checkpoint.replacing=kill", 1.0),
        ("checkpoint.renamed=kill@2", 2.0),
    ],
)
def test_killed_while_replacing(place: str, survivor: float, tidy: bool, tmp_path: Path) -> None:
    """One of the two is found, also by who may not tidy up; what follows is replaced as ever."""
    code = "for n in (1, 2): write(chunk_folder(folder, 1), snapshot(float(n)))"
    ended = in_a_process(code, tmp_path, **{failpoints.VARIABLE: place})
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    found = newest(tmp_path, tidy=tidy)
    assert found.snapshot is not None and value_of(found.snapshot) == survivor
    assert (found.folder, found.damaged) == (tmp_path / "chunk-0001", ())
    write(tmp_path / "chunk-0001", snapshot(3.0))
    found = newest(tmp_path)
    assert found.snapshot is not None and value_of(found.snapshot) == 3.0
    assert [p.name for p in tmp_path.iterdir()] == ["chunk-0001"]


def test_an_error_while_replacing_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "chunk-0001", snapshot())
    monkeypatch.setattr(failpoints, "_passed", {})
    monkeypatch.setenv(failpoints.VARIABLE, "checkpoint.replacing=full,checkpoint.renamed=full")
    for survivor in (1.0, 2.0):
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / "chunk-0001", snapshot(2.0))
        assert value_of(read(tmp_path / "chunk-0001")) == survivor
    write(tmp_path / "chunk-0001", snapshot(3.0))
    assert value_of(read(tmp_path / "chunk-0001")) == 3.0
    assert [p.name for p in tmp_path.iterdir()] == ["chunk-0001"]


def test_leftovers_are_swept_and_strangers_stay(tmp_path: Path) -> None:
    for name in (".chunk-0001.tmp-ab12", ".chunk-0002.old-00ff", ".git", ".chunk-0001.tmp-XY"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    for name in ("chunk-0003", ".chunk-0003.kept", ".chunk-0004.kept", ".chunk-0003.kept.old-1f"):
        (tmp_path / name).mkdir()
    assert sweep(tmp_path) == [
        ".chunk-0001.tmp-ab12",
        ".chunk-0002.old-00ff",
        ".chunk-0003.kept",
        ".chunk-0003.kept.old-1f",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".chunk-0001.tmp-XY", ".git", "chunk-0003", "chunk-0004"]


def test_an_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "chunk-0001", snapshot())
    monkeypatch.setattr(failpoints, "_passed", {})
    monkeypatch.setenv(failpoints.VARIABLE, "checkpoint.renaming=raise")
    with pytest.raises(failpoints.FailpointError):
        write(tmp_path / "chunk-0001", snapshot(2.0))
    assert [p.name for p in tmp_path.iterdir()] == ["chunk-0001"]
    assert value_of(read(tmp_path / "chunk-0001")) == 1.0


class Heard:
    """A writer's reports."""

    def __init__(self) -> None:
        self.written: list[Written] = []
        self.trouble: list[Trouble] = []

    def writer(self, **options: Any) -> Writer:
        return Writer(on_written=self.written.append, on_trouble=self.trouble.append, retry_s=0.05, **options)

    @property
    def kinds(self) -> list[str]:
        return [trouble.kind for trouble in self.trouble]


def test_a_writer_writes_in_order_and_thins(tmp_path: Path) -> None:
    heard = Heard()
    writer = heard.writer(keep=2)
    for chunk in (1, 2, 3):
        for trial in "ab":
            writer.submit(chunk_folder(tmp_path / trial, chunk), snapshot(float(chunk)))
        assert writer.flush(30)
    assert writer.close(30)
    assert [(w.folder.parent.name, w.folder.name) for w in heard.written] == [
        (trial, f"chunk-000{chunk}") for chunk in (1, 2, 3) for trial in "ab"
    ]
    assert heard.written[-1].removed == ("chunk-0001",) and heard.written[0].removed == ()
    assert heard.written[0].bytes == disk_bytes(tmp_path / "a" / "chunk-0002") and heard.written[0].seconds > 0
    assert heard.trouble == []
    with pytest.raises(RuntimeError, match="closed"):
        writer.submit(tmp_path / "chunk-0001", snapshot())


def test_a_snapshot_is_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step's weights don't get into it; and while one is written, a trial's newer takes its older's place."""
    go, begun, own = threading.Event(), threading.Event(), writing.write

    def slow(*args: Any) -> int:
        begun.set()
        assert go.wait(30)
        return own(*args)

    monkeypatch.setattr(writing, "write", slow)
    heard = Heard()
    writer = heard.writer(keep=5)
    taken = snapshot(1.0)
    writer.submit(tmp_path / "a" / "chunk-0001", taken)
    assert begun.wait(30)
    for x in taken.adapter.values():
        x.fill_(9.0)
    for chunk in (2, 3):
        writer.submit(chunk_folder(tmp_path / "a", chunk), snapshot(float(chunk)))
    writer.submit(tmp_path / "b" / "chunk-0001", snapshot())
    assert writer.pending_bytes == 2 * pack(snapshot()).nbytes
    assert not writer.flush(0.01)
    caught_up = threading.Thread(target=writer.catch_up, args=(tmp_path / "a",))
    caught_up.start()
    caught_up.join(0.1)
    assert caught_up.is_alive(), "who has a checkpoint that waits, waits for it"
    writer.catch_up(tmp_path / "c")
    go.set()
    caught_up.join(30)
    assert not caught_up.is_alive()
    assert writer.flush(30) and writer.close(30)
    assert [f"{w.folder.parent.name}{chunk_of(w.folder)}" for w in heard.written] == ["a1", "a3", "b1"]
    assert value_of(read(tmp_path / "a" / "chunk-0001")) == 1.0


def test_what_can_not_be_written_is_said_at_once(tmp_path: Path) -> None:
    writer = Heard().writer()
    with pytest.raises(TypeError, match="`loss` can't be written"):
        writer.submit(tmp_path / "chunk-0001", Snapshot({"loss": object()}, {}, {}))
    with pytest.raises(TypeError, match="`meta` can't be written"):
        writer.submit(tmp_path / "chunk-0001", Snapshot({}, {}, {}, {"loss": math.nan}))
    with pytest.raises(CheckpointError):
        writer.submit(tmp_path / "chunk-1", snapshot())
    assert writer.close(1)


def test_an_error_gives_up_one_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").write_text("a file where a trial's folder is to be")
    heard = Heard()
    caplog.set_level(logging.WARNING, "rapidfire_automl")
    writer = Writer(on_written=heard.written.append, on_trouble=lambda trouble: heard.trouble.append(trouble) or 1 / 0)
    writer.submit(tmp_path / "a" / "chunk-0001", snapshot())
    writer.submit(tmp_path / "b" / "chunk-0001", snapshot())
    assert writer.flush(30) and writer.close(30)
    assert [w.folder.parent.name for w in heard.written] == ["b"]
    assert heard.kinds == ["failed"] and "FileExistsError" in heard.trouble[0].reason
    assert "writing" in caplog.text and "A listener" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_FSIZE)[1] != resource.RLIM_INFINITY,
    reason="a limit on files can't be lifted again",
)
def test_a_full_disk_pauses_writing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: in a process of its own, which lifts it later."""
    code = """
        heard = Heard()
        writer = heard.writer(keep=5)
        writer.submit(folder / "a" / "chunk-0001", snapshot(1.0))
        assert writer.flush(30)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        for chunk in (2, 3, 4):
            for trial in "ab":
                writer.submit(chunk_folder(folder / trial, chunk), snapshot(float(chunk)))
        assert not writer.flush(0.5)
        assert writer.paused and heard.kinds == ["paused"], heard.kinds
        assert writer.pending_bytes <= 2 * pack(snapshot()).nbytes
        assert value_of(read(folder / "a" / "chunk-0001")) == 1.0
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert writer.flush(30)
        assert heard.kinds == ["paused", "resumed"] and not writer.paused
        assert {value_of(newest(folder / trial).snapshot) for trial in "ab"} == {4.0}
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        writer.submit(folder / "a" / "chunk-0005", snapshot(5.0))
        writer.submit(folder / "b" / "chunk-0005", snapshot(5.0))
        assert writer.close(30)
        assert heard.kinds == ["paused", "resumed", "paused", "lost", "lost"], heard.kinds
        assert "disk is full" in heard.trouble[0].reason
        assert not [p for p in folder.rglob("*") if ".tmp-" in p.name]
    """
    ended = in_a_process(code, tmp_path)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_other_kinds_of_full(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, left, both = os.fsync, [3], threading.Event()

    def fsync(descriptor: int) -> None:
        assert both.wait(30)
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        own(descriptor)

    monkeypatch.setattr(checkpoints.os, "fsync", fsync)
    heard = Heard()
    writer = heard.writer()
    for trial in "ab":
        writer.submit(tmp_path / trial / "chunk-0001", snapshot())
    both.set()
    assert writer.flush(30) and writer.close(30)
    assert heard.kinds == ["paused", "resumed"]
    assert sorted(w.folder.parent.name for w in heard.written) == ["a", "b"]
    assert sorted(p.name for p in tmp_path.rglob("*chunk*")) == ["chunk-0001", "chunk-0001"]
