"""The command line with nothing made up: a small model, real trials, the adapter loaded back by PEFT."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.executor.forking import Forked

pytestmark = pytest.mark.slow

SEARCH = """
base = "base"
trainer = "{trainer}"
[data]
train = "train.jsonl"
eval_fraction = 0.25
[args]
per_device_train_batch_size = 4
num_train_epochs = {epochs}
bf16 = false
[space]
learning_rate = {{ low = 1e-4, high = 3e-2, log = true }}
r = [2, 4]
target_modules = ["all-linear", ["q_proj", "v_proj"]]
[search]
n_trials = 6
slots = 4
chunks = 4
policy = {{ name = "asha", reduction_factor = 2 }}
"""
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that reads single characters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<pad>", "<eos>", "<unk>", *"0123456789+= abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({c: n for n, c in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = tmp_path_factory.mktemp("model") / "base"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(letters), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=1,
            )
        ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def folder(tmp_path: Path, base: Path) -> Path:
    (tmp_path / "base").symlink_to(base)
    rows = [
        {"prompt": f"{n}+1=", "completion": str(n + 1), "chosen": str(n + 1), "rejected": str(n + 3)} for n in range(64)
    ]
    for name, keys in (("sft", ("prompt", "completion")), ("dpo", ("prompt", "chosen", "rejected"))):
        (tmp_path / name).mkdir()
        lines = [json.dumps({key: row[key] for key in keys}) for row in rows]
        (tmp_path / name / "train.jsonl").write_text("\n".join(lines))
    return tmp_path


def command(folder: Path, trainer: str, *words: str, epochs: int = 2) -> list[str]:
    file = folder / trainer / "search.toml"
    file.write_text(SEARCH.format(trainer=trainer, epochs=epochs))
    return [
        sys.executable, "-m", "rapidfire_automl.cli", "run", str(file), "-s", f"base={folder / 'base'}",
        "--out", str(folder / "out"), *words,
    ]  # fmt: skip


def call(*words: str) -> None:
    """The command line, in this process."""
    from rapidfire_automl.cli import app

    app(list(words))


def forked(words: list[str], failpoints: str = "") -> Forked:
    """A command line in a process that needn't import everything first."""
    return Forked(call, *words[words.index("run") :], failpoints=failpoints)


def searched(folder: Path, trainer: str) -> tuple[list[str], dict[str, Any]]:
    """Search, and look at all that comes of it; the command, and the summary."""
    words = command(folder, trainer, "--json")
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["status"] == "complete"
    assert len(summary["trials"]) == 6
    assert summary["best_value"] < summary["base_value"]
    assert summary["chunks_used"] < summary["chunks_if_all_ran"] == 24
    results = {"events.jsonl", "summary.json", "plan.json", "curves.png", "timeline.png", "trials"}
    to_go_on = {"base", "commands", "journal.jsonl", "lock", "search.json", "study.db"}
    assert results | to_go_on == {path.name for path in (folder / "out").iterdir()}
    # Nothing but our own lines: the libraries are quiet.
    assert all(line.startswith((" ", trainer.upper())) for line in done.stderr.splitlines() if line), done.stderr

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert PeftModel.from_pretrained(model, summary["best_adapter"]).peft_config["default"].r in (2, 4)
    return words, summary


def test_a_search_of_preferences(folder: Path) -> None:
    searched(folder, "dpo")


def test_a_search_that_is_killed_in_the_middle_and_run_again_is_the_same(folder: Path) -> None:
    words, summary = searched(folder, "sft")
    elsewhere = [*words, "--out", str(folder / "again")]
    forked(elsewhere, failpoints="round.judged=kill@3").killed()
    again = forked(elsewhere)
    assert again.wait() == 0, again.err
    found = json.loads(again.out)
    assert found["values"].keys() == summary["values"].keys()
    for number, values in summary["values"].items():
        assert found["values"][number] == pytest.approx(values, rel=1e-5), number
    assert '"search_resumed"' in (folder / "again" / "events.jsonl").read_text()
    over = forked(elsewhere)
    assert over.wait() == 2
    assert "already holds a search" in over.err


def test_ctrl_c_ends_within_seconds_and_keeps_what_is_done(folder: Path) -> None:
    words = command(folder, "sft", "-s", "search.n_trials=500", epochs=8)
    process = forked(words)
    events = folder / "out" / "events.jsonl"
    process.until(lambda: events.exists() and '"state": "complete"' in events.read_text())
    begin = time.monotonic()
    process.send(signal.SIGINT)
    assert process.wait(30) == 130, process.err
    assert time.monotonic() - begin < 15
    assert "Interrupted; finished trials are kept." in process.err
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["best_trial"] is not None
    assert Path(summary["best_adapter"], "adapter_model.safetensors").exists()


def test_all_trials_failing_is_exit_code_1(folder: Path) -> None:
    words = command(folder, "sft", "-q", "-s", "space.target_modules=['nowhere']")
    done = forked(words)
    assert done.wait() == 1, done.err
    assert "All 6 trials failed." in done.err
    assert "nowhere" in done.err
    assert "Traceback" not in done.err
