"""`run_search`: what it returns, what it writes, and what is left when things go wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest

from rapidfire_automl.events import Event
from rapidfire_automl.jsonable import dumps, jsonable
from rapidfire_automl.refusals import FolderInUse, SearchDiffers
from rapidfire_automl.search import SearchFailed, SearchInterrupted, SearchResult, run_search
from tests.fake_executor import FakeExecutor, fake_objective

FILES = {"events.jsonl", "summary.json", "plan.json", "curves.png", "timeline.png"}


def search(run_dir: Path, executor: FakeExecutor, n_trials: int = 12, **options: Any) -> SearchResult:
    study = optuna.create_study(
        direction=options.pop("direction", "minimize"), sampler=optuna.samplers.RandomSampler(seed=0)
    )
    objective = options.pop("objective", fake_objective)
    return run_search(executor, objective, study=study, n_trials=n_trials, run_dir=run_dir, **options)


def read(run_dir: Path) -> dict[str, Any]:
    summary = json.loads((run_dir / "summary.json").read_text())
    assert isinstance(summary, dict)
    return summary


def strict_lines(path: Path) -> list[dict[str, Any]]:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_result_and_run_folder(tmp_path: Path) -> None:
    executor = FakeExecutor()
    result = search(tmp_path, executor, facts={"why": "test", "best_trial": "not ours"})
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert result.best_trial is not None
    complete = {n: v[-1] for n, v in result.values.items() if len(v) == 8}
    assert result.best_value == min(complete.values()) == complete[result.best_trial]
    assert result.best_params == executor.records[result.best_trial].params
    assert result.chunks_used == sum(map(len, result.values.values())) < result.chunks_if_all_ran == 12 * 8
    assert result.first_verdict_s is not None
    assert 0 < result.first_verdict_s < result.wall_s
    summary = read(tmp_path)
    assert summary == result.summary
    assert summary["status"] == "complete"
    assert summary["why"] == "test"
    assert summary["best_trial"] == result.best_trial
    assert summary["values"][str(result.best_trial)] == result.values[result.best_trial]
    assert len(summary["trials"]) == 12
    assert summary["trials"][0]["verdicts"][0].keys() == {"chunk", "verdict", "reason"}
    assert Path(summary["pictures"]["curves"]) == tmp_path / "curves.png"
    assert summary["plan"] == json.loads((tmp_path / "plan.json").read_text())


def test_events_are_kept_and_passed_on(tmp_path: Path) -> None:
    heard: list[Event] = []
    search(tmp_path, FakeExecutor(), listeners=[heard.append])
    search(tmp_path, FakeExecutor())
    lines = strict_lines(tmp_path / "events.jsonl")
    assert len(lines) == 2 * len(heard)
    assert [line["kind"] for line in lines[: len(heard)]] == [event.kind for event in heard]
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    assert (heard[0].kind, heard[-1].kind) == ("search_started", "search_ended")
    assert heard[0].data | {"study": ""} == {
        "study": "", "direction": "minimize", "n_trials": 12, "chunks": 8, "slots": 8,
    }  # fmt: skip
    assert heard[-1].data == {"status": "complete"}


def test_a_result_says_why(tmp_path: Path) -> None:
    values = {0: [0.5, 0.4], 1: [0.3, 0.2], 2: [0.9, 0.9], 3: [0.8, 0.8]}
    result = search(tmp_path, FakeExecutor(4, 2, values=values), n_trials=4)
    assert result.why(1) == "Trial 1 is complete after chunk 2 of 2 at 0.2, 1st of 2 complete trials."
    assert result.why(2).startswith("Trial 2 was stopped after chunk 1 of 2 at 0.9: ")
    with pytest.raises(ValueError, match=r"`trial` must be one that has started \(0 to 3\), got 4"):
        result.why(4)


def test_not_finite_is_never_the_best_and_never_breaks_json(tmp_path: Path) -> None:
    values = {0: [1.0, -math.inf], 1: [1.0, math.nan], 2: [0.9, 0.8], 3: [0.7, 0.8]}
    result = search(tmp_path, FakeExecutor(4, 2, values=values, prune=False), n_trials=4)
    assert (result.best_trial, result.best_value) == (2, 0.8)
    lines = strict_lines(tmp_path / "summary.json".replace("summary.json", "events.jsonl"))
    assert {line["data"].get("value") for line in lines if line["kind"] == "chunk_done"} >= {"NaN", "-Infinity"}
    assert read(tmp_path)["values"]["0"] == [1.0, "-Infinity"]


def test_maximize(tmp_path: Path) -> None:
    values = {0: [0.1, 0.2], 1: [0.3, 0.6], 2: [0.2, 0.4]}
    executor = FakeExecutor(4, 2, values=values, prune=False)
    assert search(tmp_path, executor, n_trials=3, direction="maximize").best_trial == 1
    assert read(tmp_path)["direction"] == "maximize"


def test_a_failed_trial_costs_what_it_trained(tmp_path: Path) -> None:
    result = search(tmp_path, FakeExecutor(4, 4, fails={1: "boom"}, prune=False), n_trials=4)
    assert result.chunks_if_all_ran == result.chunks_used == 3 * 4
    trial = read(tmp_path)["trials"][1]
    assert (trial["state"], trial["error"], trial["adapter"]) == ("failed", "RuntimeError: boom", None)


def test_all_failed(tmp_path: Path) -> None:
    fails = {n: f"boom {n % 2}" for n in range(6)}
    with pytest.raises(SearchFailed, match=r"All 6 trials failed\.\ntrials 0, 2, 4: RuntimeError: boom 0") as caught:
        search(tmp_path, FakeExecutor(fails=fails), n_trials=6)
    assert caught.value.result.best_trial is None
    summary = read(tmp_path)
    assert summary["status"] == "failed"
    assert summary["best_value"] is None
    assert summary["first_verdict_s"] is None


def test_odd_characters_in_an_error_cost_no_results(tmp_path: Path) -> None:
    odd = "caf\udce9 \u2028"
    search(tmp_path, FakeExecutor(4, 4, fails={1: odd}, prune=False), n_trials=4)
    assert read(tmp_path)["trials"][1]["error"] == f"RuntimeError: {odd}"


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    with pytest.raises(SearchInterrupted) as caught:
        search(tmp_path, FakeExecutor(4, 4, interrupt_after=18, prune=False))
    assert isinstance(caught.value, KeyboardInterrupt)
    assert caught.value.result.best_trial is not None
    assert read(tmp_path)["status"] == "interrupted"
    assert {path.name for path in tmp_path.iterdir()} == FILES


CURVES = {0: [2.0, 1.0, 0.9, 0.8], 1: [2.0, 0.5, 0.7, math.nan], 2: [1.5, 0.6, 0.6, 0.6], 3: [3.0] * 4}


@pytest.mark.parametrize(("direction", "chunks", "best"), [("minimize", 2, 1), ("minimize", 1, 2), ("maximize", 2, 3)])
def test_cancelled_it_names_the_best_so_far(tmp_path: Path, direction: str, chunks: int, best: int) -> None:
    executor = FakeExecutor(4, 4, values=CURVES, cancel_after=4 * chunks, prune=False)
    result = search(tmp_path, executor, 6, direction=direction)
    summary = read(tmp_path)
    assert (summary["status"], summary["best_trial"], result.best_trial) == ("cancelled", None, None)
    assert (result.chunks_used, result.chunks_if_all_ran) == (4 * chunks, 4 * 4), "they would have trained on"
    assert summary["best_so_far"] == {
        "trial": best,
        "value": CURVES[best][chunks - 1],
        "params": executor.records[best].params,
        "adapter": str(Path(f"trials/{best}/adapter").absolute()),
        "chunk": chunks,
        "of": 4,
    }


def test_who_has_failed_or_has_no_finite_value_is_not_the_best_so_far(tmp_path: Path) -> None:
    executor = FakeExecutor(4, 4, values=CURVES, cancel_after=8, prune=False, fails={1: "boom"})
    assert search(tmp_path, executor, 4).summary["best_so_far"]["trial"] == 2
    executor = FakeExecutor(1, 4, values={0: [math.nan] * 4}, cancel_after=1, prune=False)
    assert search(tmp_path / "none", executor, 1).summary["best_so_far"] is None
    assert "best_so_far" not in search(tmp_path / "whole", FakeExecutor(), 2).summary


def test_a_crash_is_not_hidden(tmp_path: Path) -> None:
    class Broken(FakeExecutor):
        def optimize(self, *args: Any, **kwargs: Any) -> None:
            super().optimize(*args, **kwargs)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        search(tmp_path, Broken())
    assert read(tmp_path)["status"] == "crashed"


def test_own_executor_is_entered_and_closed(tmp_path: Path) -> None:
    executor = FakeExecutor()
    search(tmp_path, executor, own=True)
    assert executor.closed


def test_earlier_trials_of_the_executor_are_left_out(tmp_path: Path) -> None:
    executor = FakeExecutor()
    search(tmp_path / "a", executor, n_trials=3)
    study = optuna.create_study()
    for _ in range(3):
        study.tell(study.ask(), 1.0)
    result = run_search(executor, fake_objective, study=study, n_trials=2, run_dir=tmp_path / "b")
    assert sorted(result.values) == [3, 4]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_search_that_is_refused_beforehand_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    class Refuses(FakeExecutor):
        def check_folder(self, study: optuna.Study) -> None:
            raise SearchDiffers("another")

        def __enter__(self) -> FakeExecutor:
            return pytest.fail("a base was about to be loaded")

    search(tmp_path, FakeExecutor(), n_trials=3)
    before = contents(tmp_path)
    with pytest.raises(SearchDiffers, match="another"):
        search(tmp_path, Refuses(), own=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("why", [SearchDiffers("another base"), FolderInUse(Path("x"))])
def test_a_search_that_is_refused_once_the_base_is_loaded_leaves_the_summary(tmp_path: Path, why: Exception) -> None:
    class Refuses(FakeExecutor):
        def optimize(self, *given: Any, **options: Any) -> None:
            raise why

    search(tmp_path, FakeExecutor(), n_trials=3)
    before = contents(tmp_path)
    with pytest.raises(type(why)):
        search(tmp_path, Refuses())
    after = contents(tmp_path)
    assert strict_lines(tmp_path / "events.jsonl")[-1]["data"] == {"status": "crashed"}
    assert {**after, "events.jsonl": b""} == {**before, "events.jsonl": b""}


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`n_trials` must be >= 1, got 0"):
        search(tmp_path, FakeExecutor(), n_trials=0)
    study = optuna.create_study(directions=["minimize", "maximize"])
    with pytest.raises(ValueError, match="one direction"):
        run_search(FakeExecutor(), fake_objective, study=study, n_trials=1, run_dir=tmp_path)


def test_missing_mlflow_names_its_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.raises(ImportError, match="pip install 'mlflow"):
        search(tmp_path, FakeExecutor(), mlflow_experiment="x")


@pytest.mark.slow
def test_mlflow_has_a_run_per_trial(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    result = search(tmp_path, FakeExecutor(fails={1: "boom"}), n_trials=4, mlflow_experiment="demo")
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("demo")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {tmp_path.name, "trial 0", "trial 2", "trial 3"}
    best = runs[f"trial {result.best_trial}"]
    history = client.get_metric_history(best.info.run_id, "value")
    assert [point.value for point in history] == result.values[result.best_trial]  # type: ignore[index]
    assert runs[tmp_path.name].data.metrics["best_value"] == result.best_value
    assert "generated" not in best.data.metrics
    (tmp_path / "rl").mkdir()
    search(tmp_path / "rl", FakeExecutor(generates=7, chunks=2), n_trials=1, mlflow_experiment="rl")
    client = MlflowClient(f"sqlite:///{tmp_path / 'rl' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("rl").experiment_id], "metrics.generated > 0")
    assert (run.data.metrics["generated"], run.data.metrics["tokens"]) == (7, 960)


def test_jsonable() -> None:
    import numpy as np

    assert jsonable({1: (math.nan, math.inf, -math.inf, None, np.float64(1.5), np.arange(2), Path("a/b"))}) == {
        "1": ["NaN", "Infinity", "-Infinity", None, 1.5, [0, 1], "a/b"]
    }
    assert dumps(Event("step", 1.0, data={"step": 3})) == (
        '{"kind": "step", "time_s": 1.0, "trial": null, "chunk": null, "data": {"step": 3}}'
    )


def sweep(trial: optuna.Trial) -> None:
    """Three group sizes in turn."""
    size = (4, 8, 16)[trial.number % 3]
    trial.suggest_int("num_generations", size, size)


def test_a_search_that_generates_is_ranked_by_steps_and_by_cost(tmp_path: Path) -> None:
    values = {0: [0.2, 0.3, 0.4, 0.5], 1: [0.3, 0.45, 0.55, 0.6], 2: [0.35, 0.5, 0.6, 0.7]}
    executor = FakeExecutor(chunks=4, values=values, prune=False, generates=1000)
    result = search(tmp_path, executor, 3, direction="maximize", objective=sweep)
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"generated.png"}
    summary = read(tmp_path)
    assert [trial["generated"] for trial in summary["trials"]] == [[n * 1000] * 4 for n in (4, 8, 16)]
    found = summary["rankings"]
    assert [(place["trial"], place["value"]) for place in found["equal_steps"]] == [(2, 0.7), (1, 0.6), (0, 0.5)]
    # 4 x 4960 tokens pay for two chunks of 8960 and for one of 16960.
    assert (found["chunks"], found["tokens"]) == (4, 19840)
    assert [(place["trial"], place["chunk"]) for place in found["equal_cost"]] == [(0, 4), (1, 2), (2, 1)]
    assert Path(result.summary["pictures"]["generated"]) == tmp_path / "generated.png"
    done = [line for line in strict_lines(tmp_path / "events.jsonl") if line["kind"] == "chunk_done"]
    assert sum(line["data"]["generated"] for line in done) == 4 * 28000


def test_a_search_that_generates_nothing_has_none_of_it(tmp_path: Path) -> None:
    summary = search(tmp_path, FakeExecutor(), 4).summary
    assert "rankings" not in summary
    assert "generated" not in summary["trials"][0]
