"""The rollouts experiment, end to end on a toy base: what it writes, and how its parts add up."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from experiments.rollouts.figure import draw, rows
from experiments.rollouts.run import PARTS, parse
from experiments.rollouts.sampling import StackSampler
from experiments.rollouts.workers import Clock, prompts
from experiments.worker import tokenizer_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "rollouts" / "run.py"
CONFIG = """
seed = 3
rounds = 4
min_rounds = 2
steps = 2
serial_factor = 2
warmup = 2
prompt_tokens = 6
new_tokens = 3
rows = 16
dtype = "float32"
gradient_checkpointing = true
profile = [3, 4]
machine_bytes = 1048576
cell_limit_s = 120.0
time_limit_s = 600.0
[lora]
r = 2
target_modules = ["q_proj", "v_proj"]
[grids.small]
trials = [1, 3]
generations = [4]
[bases.toy]
device = "cpu"
[bases.toy.llama]
vocab_size = 64
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 2
tie_word_embeddings = true
"""


def measure(folder: Path, *words: str) -> dict[str, Any]:
    (folder / "config.toml").write_text(CONFIG, encoding="utf-8")
    paths = [str(ROOT), str(ROOT / "policies"), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, str(SCRIPT), "--config", "config.toml", "--threads", "1", "--out", "results.json", *words],
        cwd=folder, check=True, timeout=500, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_the_committed_configuration_is_read() -> None:
    settings, bases, grid, _ = parse(["--grid", "8x4", "--bases", "random-35m", "--no-gradient-checkpointing"])
    assert grid == {"trials": [8], "generations": [4]}
    assert list(bases) == ["random-35m"]
    assert settings.config["gradient_checkpointing"] is False
    _, cuda, full, _ = parse(["--device", "cuda", "--grid", "full"])
    assert list(cuda) == ["random-0_5b", "random-1_5b", "random-8b"]
    assert full == {"trials": [1, 2, 4, 8, 16, 32], "generations": [4, 8, 16]}


@pytest.mark.parametrize("words", [["--grid", "8"], ["--grid", "8x1"], ["--new-tokens", "1"], ["--rounds", "0"]])
def test_bad_options_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*words, "--bases", "random-35m"])


def test_prompts_have_the_length_that_was_asked_for() -> None:
    tokenizer = tokenizer_of({}, 64)
    made = prompts(tokenizer, rows=8, tokens=6, seed=0)
    assert {len(ids) for ids in tokenizer(made)["input_ids"]} == {6}
    assert made == prompts(tokenizer, rows=8, tokens=6, seed=0) != prompts(tokenizer, rows=8, tokens=6, seed=1)
    with pytest.raises(ValueError, match="prompt_tokens"):
        prompts(tokenizer_of({}, 3), rows=8, tokens=6, seed=0)


def test_a_clock_runs_in_the_thread_that_started_it() -> None:
    clock = Clock()
    clock.start()
    stopped: list[bool] = []
    other = threading.Thread(target=lambda: stopped.append(clock.stop()))
    other.start()
    other.join()
    assert stopped == [False]
    assert clock.stop()
    assert not clock.stop()
    assert clock.seconds > 0


def test_the_sampler_tells_the_parts_from_the_rest() -> None:
    def work(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    def part() -> None:
        work(0.2)

    def host() -> None:
        work(0.1)

    idle = threading.Event()
    waiting = threading.Thread(target=idle.wait)
    waiting.start()
    before = sys.getswitchinterval()
    sampler = StackSampler({"part": (part,)})
    sampler.start()
    part()
    host()
    seen = sampler.stop()
    idle.set()
    waiting.join()
    assert sys.getswitchinterval() == before
    assert set(seen["parts_s"]) == {"part", "host"}
    assert seen["parts_s"]["part"] > 1.2 * seen["parts_s"]["host"] > 0
    assert all("work" in line for line in list(seen["lines_s"])[:1])


@pytest.mark.slow
def test_end_to_end(tmp_path: Path) -> None:
    results = measure(tmp_path)
    assert results["status"] == "complete"
    assert set(results) >= {"commit", "dirty", "versions", "hardware", "load", "bases", "data", "started", "machine"}
    toy = results["bases"]["toy"]
    assert toy["linear_parameters"] == 2 * (4 * 16 * 16 + 3 * 16 * 32) + 64 * 16  # the head is tied, and read
    machine = results["machine"]
    assert min(machine["bytes_per_s"], machine["flops_per_s"]) > 1e6
    assert [(cell["trials"], cell["generations"], cell["status"]) for cell in results["cells"]] == [
        (1, 4, "complete"), (3, 4, "complete"),
    ]  # fmt: skip
    for cell in results["cells"]:
        assert len(cell["rounds"]) == 4
        for name, key in (("step_speedup", "s"), ("decode_speedup", "token_s")):
            ratios = [one[f"serial_{key}"] / one[f"joint_{key}"] for one in cell["rounds"]]
            assert cell[name]["median"] == pytest.approx(statistics.median(ratios))
        serial, joint = cell["serial"], cell["joint"]
        assert set(joint["parts"]) == {*PARTS, "rest"}
        assert min(joint["parts"].values()) > 0
        assert joint["step_s"]["min"] / 2 < sum(joint["parts"].values()) < 2 * joint["step_s"]["max"]
        for one in cell["rounds"]:  # 4 answers of 3 tokens a trial-step, and more than decoding in it
            assert 12 * one["serial_token_s"] < one["serial_s"]
            assert 12 * one["joint_token_s"] < one["joint_s"]
        assert serial["tokens_per_s"]["median"] == pytest.approx(
            statistics.median(1 / one["serial_token_s"] for one in cell["rounds"])
        )
        assert joint["fused"] is True
        assert joint["rows_of_a_decode_step"] == 4 * cell["trials"]
        roofline = cell["roofline"]
        assert roofline["weight_bytes"] == 4 * toy["linear_parameters"]
        assert roofline["joint"]["memory_s"] == pytest.approx(roofline["weight_bytes"] / machine["bytes_per_s"])
        for way in ("serial", "joint"):
            bound_s = max(roofline[way]["memory_s"], roofline[way]["compute_s"])
            assert roofline[way]["over"] == pytest.approx(roofline[way]["token_s"] / bound_s)
    profile = results["profile"]["toy"]
    assert (profile["trials"], profile["generations"]) == (3, 4)
    assert set(profile["parts_s"]) == {"prefill", "decode and choose", "forward and head", "backward", "host"}
    assert profile["parts_s"]["host"] > 0  # the toy's kernels are shorter than the time between two looks
    assert any("GRPOTrainer" in where for where in profile["inside_s"])
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    table = rows(results, "toy")
    assert [line.split(" | ")[:2] for line in table] == [["| 1", "4"], ["| 3", "4"]]
    ratio = results["cells"][1]["step_speedup"]
    assert table[1].endswith(f"| {ratio['median']:.1f}x ({ratio['low']:.1f} to {ratio['high']:.1f}) |")


@pytest.mark.slow
def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    results = measure(tmp_path, "--time-limit", "0")
    assert results["status"] == "time limit"
    for cell in results["cells"]:
        assert cell["status"] == "missing"
        assert cell["joint"] is cell["step_speedup"] is cell["roofline"] is None
    assert rows(results, "toy") == []
    assert draw(results, tmp_path / "none.png") is None
