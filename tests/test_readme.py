"""The READMEs' code runs, on the tests' tiny model instead of SmolLM2 and with fewer trials."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rapidfire_automl.program import prepare
from rapidfire_automl.settings import load_settings
from tests.tiny.data import sums

ROOT = Path(__file__).parent.parent
SMALLER = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": str(ROOT / "tests" / "tiny" / "model"),
    "n_trials=32": "n_trials=5",
    "slots=8": "slots=4",
    "num_runs=8": "num_runs=3",
    "n_trials=12": "n_trials=2",
    '"chain_sum", 256, 32': '"chain_sum", 16, 4',
    '"max_completion_length": 32': '"max_completion_length": 4',
}


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    sums(48, seed=0).to_json("train.jsonl")
    sums(16, seed=1).to_json("eval.jsonl")
    code = blocks(ROOT / "README.md", "python")
    assert len(code) == 3
    names: dict[str, object] = {"__name__": "__main__"}
    for block in code:
        for old, new in SMALLER.items():
            block = block.replace(old, new)
        exec(compile(block, "README.md", "exec"), names)
    study = names["study"]
    assert len(study.trials) == 5  # type: ignore[attr-defined]
    adapter = Path(study.best_trial.user_attrs["rapidfire:adapter"])  # type: ignore[attr-defined]
    assert (adapter / "adapter_model.safetensors").is_file()
    assert capsys.readouterr().out
    rankings = names["fit"].best.summary["rankings"]  # type: ignore[attr-defined]
    assert {place["trial"] for place in rankings["equal_steps"]} <= {0, 1}


def test_the_readmes_search_file_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (text,) = blocks(ROOT / "README.md", "toml")
    (tmp_path / "search.toml").write_text(text)
    prepared = prepare(load_settings("search.toml", [f"base.model='{ROOT / 'tests' / 'tiny' / 'model'}'"]), tmp_path)
    assert prepared.n_trials == 16


def test_every_file_the_readme_names_exists() -> None:
    plain = (ROOT / "README.md").read_text(encoding="utf-8").split("```")[1::2]
    (tree,) = [block for block in plain if "seams/" in block]
    folders = [ROOT, ROOT / "rapidfire_automl", ROOT / "rapidfire_automl" / "executor"]
    for name in re.findall(r"[\w/]+(?:\.py|/)(?=\s)", tree):
        assert any((folder / name).exists() for folder in folders), name


def test_the_numbers_of_speed_are_those_that_were_measured() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "experiments" / "throughput" / "results.json").read_text(encoding="utf-8"))
    rows = []
    for cell in sorted(results["cells"], key=lambda cell: (cell["trials"], cell["tokens"])):
        if cell["base"] == "smollm2-135m":
            ms = [f"{cell[way]['step_s']['median'] * 1e3:.0f}" for way in ("serial", "joint")]
            speedup = cell["speedup"]
            ratio = f"{speedup['median']:.1f}x | {speedup['low']:.1f} to {speedup['high']:.1f}"
            rows.append(f"| {cell['trials']} | {cell['tokens']} | {' | '.join(ms)} | {ratio} |")
    assert len(rows) == 16
    assert "\n".join(rows) in text
    compared = json.loads((ROOT / "experiments" / "demo_compare" / "results.json").read_text(encoding="utf-8"))
    wall_s = [f"{compared[side]['wall_s']:.0f} s" for side in ("ours", "serial")]
    assert f"took {wall_s[0]}, plain TRL {wall_s[1]}" in " ".join(text.split())
