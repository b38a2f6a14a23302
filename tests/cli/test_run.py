"""`rapidfire-automl run`: output, exit codes, what goes to which stream."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from rapidfire_automl import program
from rapidfire_automl.cli import app
from rapidfire_automl.cli.why import newest_run
from rapidfire_automl.event_log import EventLog
from tests.fake_executor import FakeExecutor

SEARCH = """
base = "base"
[data]
train = "train.jsonl"
eval = "held.jsonl"
[args]
per_device_train_batch_size = 4
[space]
learning_rate = { low = 1e-5, high = 1e-2, log = true }
r = [4, 8]
[search]
n_trials = 12
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "search.toml").write_text(SEARCH)
    for name, rows in (("train", 64), ("held", 8)):
        lines = [json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1)}) for n in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def use(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    def build(prepared: program.Program) -> FakeExecutor:
        return FakeExecutor(prepared.settings.search.slots, prepared.settings.search.chunks, **options)

    monkeypatch.setattr(program, "build_executor", build)
    monkeypatch.setattr(program, "build_objective", lambda prepared, executor: prepared.space.suggest)


def call(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), catch_exceptions=False)


def test_run_reports_the_best_and_the_cost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    result = call("run", "search.toml")
    assert result.exit_code == 0, result.output
    summary = json.loads((folder / "runs/search/summary.json").read_text())
    lines = {line[:10].strip(): line[10:] for line in result.stdout.split("\n\n")[-1].splitlines()}
    assert lines["Best"].startswith(f"trial {summary['best_trial']} at ")
    assert "below base 2.31" in lines["Best"]
    assert f"of the {summary['chunks_if_all_ran']} it takes" in lines["Cost"]
    assert lines["Curves"] == "runs/search/curves.png"
    assert summary["settings"]["search"]["n_trials"] == 12
    assert summary["train_examples"] == 64


def test_an_error_that_the_screen_cannot_show_costs_no_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, fails={1: "caf\udce9"})
    result = call("run", "search.toml")
    assert result.exit_code == 0, result.output
    assert r"trial 1 failed: RuntimeError: caf\udce9" in result.output


def test_a_second_run_gets_a_folder_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    assert call("run", "search.toml", "-q").exit_code == 0
    assert call("run", "search.toml", "-q").exit_code == 0
    assert (folder / "runs/search-2/summary.json").exists()
    again = call("run", "search.toml", "-q", "--out", "runs/search")
    assert again.exit_code == 2
    assert "already holds a search" in again.stderr


def test_a_search_that_was_cancelled_is_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, cancel_after=3)
    assert call("run", "search.toml", "-q", "-o", "out").exit_code == 0
    assert json.loads((folder / "out/summary.json").read_text())["status"] == "cancelled"
    monkeypatch.setattr(program, "build_executor", lambda prepared: pytest.fail("a model was about to be loaded"))
    again = call("run", "search.toml", "-q", "-o", "out")
    assert (again.exit_code, again.stderr) == (
        2, "error: `output.dir`: out already holds a search; name another folder.\n"
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("known", [True, False])
def test_a_folder_in_which_a_search_is_under_way_is_refused_before_anything_there_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """`known`: whether a search file is behind it, not Python."""
    use(monkeypatch, interrupt_after=3)
    assert call("run", "search.toml", "-q", "-o", "out").exit_code == 130
    if not known:
        for name in ("search.json", "summary.json", "study.db"):
            (folder / "out" / name).unlink()
    monkeypatch.setattr(program, "build_executor", lambda prepared: pytest.fail("a model was about to be loaded"))
    with EventLog(folder / "out" / "events.jsonl"):
        before = contents(folder / "out")
        result = call("run", "search.toml", "-q", "-o", "out")
        assert contents(folder / "out") == before
    assert result.exit_code == 2
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: A search is under way in out. Wait for it, end it with `rapidfire-automl cancel ")
    assert "(`-o` on the command line)" in line
    assert "--debug" not in line


def test_a_search_that_begins_between_the_check_and_the_start_is_not_written_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch)
    prepare = program.prepare
    taken: list[EventLog] = []

    def late(*given: Any) -> program.Program:
        prepared = prepare(*given)
        prepared.run_dir.mkdir(parents=True)
        taken.append(EventLog(prepared.run_dir / "events.jsonl"))
        return prepared

    monkeypatch.setattr(program, "prepare", late)
    result = call("run", "search.toml", "-q")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: A search is under way in runs/search.")
    assert contents(folder / "runs") == {"search/events.jsonl": b""}
    taken[0].__exit__(None, None, None)


def test_a_lost_study_is_refused_before_the_base_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rapidfire_automl.executor.journal import Journal

    use(monkeypatch, interrupt_after=3)
    assert call("run", "search.toml", "-q", "-o", "out").exit_code == 130
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    journal = Journal(folder / "out")
    journal.write("search", facts={"study": "search"}, sampler_seed=0, anew=True)
    journal.write("asked", trial=0)
    journal.close()
    (folder / "out" / "study.db").unlink()
    before = contents(folder / "out")
    result = call("run", "search.toml", "-q", "-o", "out")
    assert result.exit_code == 2
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: The search in out has not come to its end, and this can't go on with it: study ")
    assert "lacks trials that were begun there (0). Open its study in the storage where it was" in line
    assert "--debug" not in line
    assert {**contents(folder / "out"), "study.db": b""} == {**before, "study.db": b""}


def test_a_study_that_cannot_be_opened_leaves_no_folder_that_looks_like_a_search(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch)
    assert call("run", "search.toml", "-q").exit_code == 0
    assert call("run", "search.toml", "-q", "-s", "search.storage='sqlite:////nowhere/s.db'").exit_code == 2
    assert newest_run(folder) == folder / "runs/search"


def test_json_is_all_there_is_on_stdout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    monkeypatch.setattr(program, "build_objective", lambda p, executor: lambda t: print("noise") or p.space.suggest(t))
    result = call("run", "search.toml", "--json", "--n-trials", "3", "--slots", "2", "--chunks", "4", "--seed", "5")
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert (summary["slots"], summary["chunks"], len(summary["trials"])) == (2, 4, 3)
    assert summary["settings"]["search"]["seed"] == 5
    assert "noise" in result.stderr
    assert "trial 0 starts" in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-s", "search.slotz=3"], "did you mean `search.slots`?"),
        (["--slots", "0"], "`search.slots` must be >= 1, got 0."),
        (["-s", "args.learning_rat=1e-4"], "did you mean `args.learning_rate`?"),
        (["-s", "args.warmup_steps='many'"], "`args.warmup_steps` must be a number"),
        (["-s", "space.r=[0, 4]"], "`space.r` must be a whole number >= 1, got 0."),
        (["-s", "space.learning_rate={low=-1.0, high=1.0}"], "`space.learning_rate` must be a number >= 0, got -1.0."),
        (["-s", "args.weight_decay=-0.1"], "`args.weight_decay` must be a number >= 0, got -0.1."),
        (["-s", "lora.lora_dropout=2"], "`lora.lora_dropout` must be a number >= 0 and <= 1, got 2."),
        (["-s", "data.train=none.jsonl"], "there is no file none.jsonl"),
        (["-s", "data.train=empty.jsonl"], "`data.train` is empty"),
        (["-s", "search.chunks=65"], "has 64 examples, fewer than `search.chunks` = 65"),
        (["-s", "search.chunks=50"], "as short as 48 optimizer steps"),
        (["-s", "search.sampler=grid"], "`space.learning_rate` is a range, and a grid needs lists"),
        (["-s", "search.sampler=tpee"], "`search.sampler` must be one of tpe"),
        (["-s", "search.policy=asa"], "Did you mean `asha`?"),
        (["-s", "search.policy.budge=3"], "`budget`"),
        (["-s", "search.metric=none"], "`search.metric` must be one of nll"),
        (["-s", "base=./nowhere"], "`base.model`: there is no folder ./nowhere"),
        (["-s", "lora.bias=all"], "unfreezes biases of the base"),
        (["-s", "lora.init_lora_weights=pissa"], "rewrites the base"),
        (["-s", "trainer=dpo"], 'trainer dpo needs "chosen" + "rejected"'),
        (["-s", "args.output_dir=x"], "set `output.dir` instead"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str
) -> None:
    monkeypatch.setattr(program, "build_executor", lambda prepared: pytest.fail("a model was about to be loaded"))
    (folder / "empty.jsonl").write_text("")
    result = call("run", "search.toml", *words)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-o", "search.toml"], "`output.dir`: search.toml cannot be made: File exists."),
        (["-o", "search.toml/out"], "`output.dir`: search.toml/out cannot be made: Not a directory."),
        (["-s", "base=hollow"], "`model` must be a hub id, a path or a model; 'hollow': Error no file named"),
        (["-s", "base.device=nowhere", "-s", "args.bf16=false"], "`device` must be a device such as 'cpu'"),
        (["-s", "base.device=cuda:77", "-s", "args.bf16=false"], "`device` must be one that is here, got 'cuda:77': "),
    ],
)
def test_a_mistake_that_is_found_late_is_plain_too(folder: Path, words: list[str], expected: str) -> None:
    (folder / "hollow").mkdir()
    (folder / "hollow" / "config.json").write_text('{"model_type": "llama"}')
    result = call("run", "search.toml", "-q", *words)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {expected}")
    assert "--debug" not in line


def test_what_is_no_mistake_of_the_user_says_where_to_look(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*_: Any, **__: Any) -> None:
        raise ValueError("math domain error")

    use(monkeypatch)
    monkeypatch.setattr(FakeExecutor, "__enter__", leave)
    result = call("run", "search.toml", "-q")
    assert result.exit_code == 1
    assert result.stderr == "error: ValueError: math domain error (--debug shows where)\n"


def test_check_stops_before_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "build_executor", lambda prepared: pytest.fail("a model was about to be loaded"))
    result = call("run", "search.toml", "--check")
    assert result.exit_code == 0
    assert "The search can be run." in result.stdout
    assert not (folder / "runs").exists()


def test_all_failed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, fails=dict.fromkeys(range(12), "boom"))
    result = call("run", "search.toml", "-q")
    assert result.exit_code == 1
    assert "All 12 trials failed." in result.stderr
    assert "RuntimeError: boom" in result.stderr
    assert "Traceback" not in result.output
    assert "Traceback" in call("run", "search.toml", "-q", "--debug").stderr


def best_of(output: str) -> list[str]:
    """The lines about the best trial."""
    lines = output.split("\n\n")[-1].splitlines()
    return lines[: next(place for place, line in enumerate(lines) if line.startswith("Cost"))]


@pytest.mark.parametrize("chunks", [2, 7, 8])
def test_cancelled_it_shows_the_best_so_far(folder: Path, monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    """Two slots: after seven chunks nobody is complete, after eight both are, and two more have begun after that."""
    curves = {0: [2.0] * 8, 1: [1.5] * 8, 2: [0.5] * 8, 3: [0.7] * 8}
    use(monkeypatch, values=curves, cancel_after=2 * chunks if chunks < 8 else 18, prune=False)
    result = call("run", "search.toml", "--slots", "2")
    assert result.exit_code == 0, result.output
    lines = best_of(result.stdout)
    if chunks < 8:
        assert lines[0] == f"Best      trial 1 at 1.5 so far, after chunk {chunks} of 8, 35% below base 2.31"
        assert lines[1].strip().startswith("learning_rate=") and "r=" in lines[1]
        assert lines[2] == "Adapter   trials/1/adapter"
    else:
        assert lines[0].startswith("Best      trial 1 at 1.5, 35% below")
        assert lines[3] == "So far    trial 2 at 0.5, after chunk 1 of 8, 78% below base 2.31"
        assert lines[4].strip().startswith("learning_rate=")
        assert lines[5] == "Adapter   trials/2/adapter"


def test_a_study_without_a_name_has_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    where = ("--storage", "sqlite:///study.db", "--n-trials", "2", "-q")
    assert call("run", "search.toml", *where).exit_code == 0
    again = call("run", "search.toml", *where)
    assert again.exit_code == 2
    assert again.stderr == (
        "error: `search.study`: sqlite:///study.db already has a study search; take another name, like `--study NAME`.\n"
    )


def test_ctrl_c(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, interrupt_after=20)
    result = call("run", "search.toml", "-q")
    assert result.exit_code == 130
    assert "Interrupted; finished trials are kept." in result.stderr
    assert json.loads((folder / "runs/search/summary.json").read_text())["status"] == "interrupted"


def test_grid_runs_each_combination_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, prune=False)
    result = call(
        "run", "search.toml", "--json", "-s", "search.sampler=grid", "-s", "space.learning_rate=[1e-4, 1e-3]",
        "-s", "space.target_modules=['all-linear', ['q_proj', 'v_proj']]", "--chunks", "2",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    trials = [tuple(map(str, trial["params"].values())) for trial in json.loads(result.stdout)["trials"]]
    assert len(trials) == len(set(trials)) == 8


def test_importing_the_command_line_is_fast() -> None:
    heavy = "{'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate', 'mlflow', 'matplotlib'}"
    code = f"import sys, rapidfire_automl.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_sweep_of_group_sizes_is_reported_at_equal_steps_and_equal_cost(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.dumps({"prompt": f"{n}+1=", "answer": str(n + 1)}) for n in range(64)]
    for name in ("train", "held"):
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    (folder / "grpo.toml").write_text(
        SEARCH.replace("[data]", 'trainer = "grpo"\nreward = "exact_match"\n[data]')
        .replace("per_device_train_batch_size = 4", "per_device_train_batch_size = 16")
        .replace("r = [4, 8]", "num_generations = [4, 16]")
    )
    use(monkeypatch, generates=1000, prune=False)
    result = call("run", "grpo.toml", "--n-trials", "6")
    assert result.exit_code == 0, result.output
    assert "GRPO on base" in result.stdout
    summary = json.loads((folder / "runs/grpo/summary.json").read_text())
    assert summary["direction"] == "maximize"
    report = result.stdout[result.stdout.index("Best ") :]
    # 8 chunks of 4 x 1000 generated tokens and 960 trained
    assert "after 8 chunks each, and by the best value within 39.7k generated and trained tokens" in report
    (header,) = [line for line in report.splitlines() if line.lstrip().startswith("trial ")]
    assert header.split()[-7:] == ["equal", "steps", "equal", "cost", "generated", "trained", "seconds"]
    places = [line.split() for line in report.splitlines() if line.strip().startswith("#")]
    assert [line[0] for line in places] == [f"#{place['trial']}" for place in summary["rankings"]["equal_steps"]]
    assert {"32k", "128k"} == {line[-3] for line in places}
    assert "Generated runs/grpo/generated.png" in report
