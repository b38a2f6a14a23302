"""`rapidfire-automl run --storage ... --study ...` and `worker`: real processes, a real database, a small real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import postgres
from tests.executor.forking import Forked

pytestmark = [pytest.mark.slow, pytest.mark.faults]

TINY = Path(__file__).resolve().parents[1] / "tiny"
SEARCH = """
base = "base"
[data]
train = "train.jsonl"
eval_fraction = 0.25
[args]
per_device_train_batch_size = 4
num_train_epochs = 2
max_length = 32
bf16 = false
[space]
learning_rate = { low = 1e-4, high = 3e-2, log = true }
r = [2, 4]
[search]
n_trials = 3
slots = 2
chunks = 2
policy = "nop"
heartbeat_s = 1
grace_s = 3
"""


def call(*words: str) -> None:
    """The command line, in this process."""
    from rapidfire_automl.cli import app

    app(list(words))


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[str]:
    with ExitStack() as stack:
        if postgres.binaries() is None:
            yield f"sqlite:///{tmp_path / 'study.db'}"
        else:
            yield stack.enter_context(postgres.server()).url()


def test_a_worker_needs_only_the_study_and_the_folder(tmp_path: Path, storage: str) -> None:
    """It is begun in one process, which dies, and ends in another that knows nothing but where the study is."""
    (tmp_path / "base").symlink_to(TINY / "model")
    rows = [json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1)}) for n in range(24)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    file, folder = tmp_path / "search.toml", tmp_path / "out"
    file.write_text(SEARCH)
    where = ("--storage", storage, "--study", "first")
    Forked(call, "run", str(file), *where, "-o", str(folder), failpoints="round.judged=kill@1").killed()

    joins = Forked(call, "worker", *where, "--slots", "1", "--json")
    assert joins.wait() == 0, joins.err
    summary = json.loads(joins.out)
    assert (summary["status"], len(summary["trials"])) == ("complete", 3)
    assert [trial["state"] for trial in summary["trials"]] == ["complete"] * 3
    assert Path(summary["best_adapter"], "adapter_model.safetensors").exists()
    assert "is left behind by" in joins.err

    why = Forked(call, "why", "0", "--run", str(folder))
    assert why.wait() == 0, why.err
    assert "is complete" in why.out and "attempt 2" in why.out

    changed = Forked(call, "run", str(file), *where, "-o", str(folder), "--chunks", "3")
    assert changed.wait() == 2
    assert "`search.chunks` was 2, is 3" in changed.err
    unknown = Forked(call, "worker", "--storage", storage, "--study", "other")
    assert unknown.wait() == 2
    assert "has no study other" in unknown.err

    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    said = [text.encode() for one in (joins, why, changed, unknown) for text in (one.out, one.err)]
    assert not any(b"a-secret" in text for text in [*written, *said])
    assert (folder / "workers").is_dir()
