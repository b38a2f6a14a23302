"""The policies experiment: its metrics by hand, a small run end to end, and what is committed agrees with itself."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import provenance
from experiments.policies import measure
from experiments.policies.figure import draw
from experiments.policies.measure import Outcome, dominates, dominates_in_means, front, interval, is_best, regret
from experiments.policies.rivals import RunningMedian
from experiments.policies.run import parse, rounded, run, settings_of
from experiments.policies.section import BEGIN, END, HELD_OUT_BEGIN, README, held_out_section, section, write_section
from experiments.policies.tables import Table, load
from rapidfire_policies import History, TrialHistory, TrialState

HERE = Path(provenance.ROOT) / "experiments" / "policies"
HELD_OUT = ["heldout", "heldout2"]
NAN = math.nan
SMALL = """
seed = 1
seeds = 3
slots = [0, 2]
draws = 200
auto = "ASHA"
readable_slots = 2
tuned_on = ["sft"]
curves = ["nowhere"]
own = "OWN"
[[tables]]
group = "Elsewhere"
files = "*.npz"
array = "curve"
trials = 4
[[tables]]
group = "SFT loss"
own = "sft"
trials = 6
[[tables]]
group = "Errors"
own = "sft"
accuracy = true
trials = 6
[[policies]]
name = "Nop"
policy = "nop"
kind = "baseline"
[[policies]]
name = "ASHA"
policy = "asha"
settings = [{ reduction_factor = 2 }, { reduction_factor = 4 }]
[[policies]]
name = "Not there"
policy = "not_there"
[[policies]]
name = "Median of running"
policy = "experiments.policies.rivals:RunningMedian"
kind = "rival"
[[policies]]
name = "Optuna Patient"
pruner = "PatientPruner"
kind = "rival"
settings = [{ wrapped_pruner = { is = "MedianPruner", n_startup_trials = 1 }, patience = 1 }, { nonsense = 1 }]
"""


# -- metrics -------------------------------------------------------------------------------------------------------


def test_regret_against_a_worked_table() -> None:
    finals = [0.5, 0.9, 0.7, NAN, 1e19, 0.6]  # finite: best 0.5, median 0.7
    assert [regret(finals, i) for i in (0, 2, 1, 4)] == pytest.approx([0.0, 1.0, 1.0, 1.0])
    assert regret(finals, 5) == pytest.approx(0.5)
    assert regret(finals, 3) == regret(finals, None) == 1.0
    assert [is_best(finals, i) for i in (0, 5, 3, None)] == [True, False, False, False]


def test_regret_where_half_are_as_good_as_the_best() -> None:
    assert [regret([1.0, 1.0, 2.0], i) for i in range(3)] == [0.0, 0.0, 1.0]
    assert is_best([1.0, 1.0, 2.0], 1)


def test_interval_covers_the_mean_and_narrows_with_seeds() -> None:
    generator = np.random.default_rng(0)
    wide, narrow = (interval(generator.normal(size=n), measure.weights(n, 2000, 0)) for n in (16, 1024))
    assert wide[0] < 0 < wide[1]
    assert narrow[1] - narrow[0] == pytest.approx(4 * 0.98 / math.sqrt(1024), rel=0.1)
    assert (wide[1] - wide[0]) > 4 * (narrow[1] - narrow[0])


def outcome(regrets: list[float], speedups: list[float]) -> Outcome:
    return Outcome(np.array(regrets), np.array(speedups), np.array(speedups), np.zeros(len(regrets)))


def test_domination_needs_both_beyond_the_noise() -> None:
    resampled = measure.weights(4, 2000, 0)
    auto = outcome([0.1, 0.2, 0.3, 0.4], [4.0] * 4)

    def judged(rival: Outcome) -> tuple[bool, bool]:
        one = measure.difference(rival, auto, resampled)
        return dominates(one), dominates_in_means(one)

    # Paired: every seed a little better, far less than the seeds differ.
    assert judged(outcome([0.09, 0.19, 0.29, 0.39], [5.0] * 4)) == (True, True)
    assert judged(outcome([0.0, 0.3, 0.2, 0.39], [5.0] * 4)) == (False, True)
    assert judged(outcome([0.1, 0.2, 0.3, 0.4], [5.0] * 4)) == (False, True)
    assert judged(outcome([0.0, 0.0, 0.0, 0.0], [3.9] * 4)) == (False, False)
    assert judged(auto) == (False, False)


def test_front() -> None:
    assert front([(1.0, 0.0), (4.0, 0.2), (2.0, 0.0), (3.0, 0.3), (8.0, 0.5)]) == [2, 1, 4]
    assert front([]) == []


def test_five_digits_are_kept() -> None:
    assert rounded({"a": [1.2345678, 3], "b": (0.00012345678, None, "x", True)}) == {
        "a": [1.2346, 3],
        "b": [0.00012346, None, "x", True],
    }


def test_median_of_running() -> None:
    trials = (
        TrialHistory(0, (0.5, 0.4)),
        TrialHistory(1, (0.6,)),
        TrialHistory(2, (NAN,)),
        TrialHistory(3, (0.9, 0.45)),
        TrialHistory(4, (0.1,), TrialState.STOPPED),
    )
    # 0: 0.40 against median(0.6, 0.45). 1: 0.6 against 0.425. 3: 0.45 against 0.5. NaN is never stopped.
    said = {n: str(d.verdict) for n, d in RunningMedian().decide(History(trials, chunks=4)).items()}
    assert said == {0: "continue", 1: "stop", 2: "continue", 3: "continue"}
    assert RunningMedian(min_resource=2).decide(History(trials, chunks=4))[1].verdict == "continue"


# -- tables --------------------------------------------------------------------------------------------------------


def own_tables(path: Path, trials: int = 8, chunks: int = 5, examples: int = 6) -> None:
    """Falling curves that cross, and a trial that failed after three chunks."""
    generator = np.random.default_rng(0)
    slopes = generator.uniform(0.05, 0.3, size=(trials, 1, 1))
    starts = generator.uniform(0.5, 2.0, size=(trials, 1, 1))
    scores = starts - slopes * np.arange(chunks)[:, None] + generator.normal(0, 0.05, size=(trials, chunks, examples))
    scores[0, 3:] = NAN
    params = json.dumps([{"lr": 10.0**-i} for i in range(trials)])
    np.savez_compressed(
        path,
        sft_scores=scores.astype(np.float32),
        sft_tokens=np.full((trials, chunks), 100, dtype=np.int32) * np.arange(1, trials + 1)[:, None],
        sft_base=np.ones(examples, dtype=np.float32),
        sft_params=np.array(params),
    )


def small(folder: Path) -> dict[str, Any]:
    own_tables(folder / "own.npz")
    return tomllib.loads(SMALL.replace("OWN", str(folder / "own.npz")))


def test_draws_are_the_same_rows_everywhere(tmp_path: Path) -> None:
    tables, missing, hashes = load(small(tmp_path))
    assert [table.name for table in tables] == ["sft", "sft accuracy"]
    assert [one["group"] for one in missing] == ["Elsewhere"]
    assert len(hashes["own.npz"] or "") == 64
    drawn = tables[0].draw(5)
    assert drawn.curves.shape == (6, 5)
    rows = [int(cost[0]) // 100 - 1 for cost in drawn.costs]  # type: ignore[union-attr]
    assert len(set(rows)) == 6
    np.testing.assert_array_equal(drawn.curves, tables[0].curves[rows])
    np.testing.assert_array_equal(drawn.scores, tables[0].scores[rows])  # type: ignore[index]
    assert [one["lr"] for one in drawn.params] == [10.0**-row for row in rows]
    np.testing.assert_array_equal(tables[0].draw(5).curves, drawn.curves)
    assert not np.array_equal(tables[0].draw(6).curves, drawn.curves, equal_nan=True)


def test_a_pair_is_right_below_log_two(tmp_path: Path) -> None:
    errors = load(small(tmp_path))[0][1]
    assert set(np.unique(errors.scores[np.isfinite(errors.scores)])) == {0.0, 1.0}  # type: ignore[index]
    assert np.isnan(errors.curves[0, 3:]).all()


# -- the whole run -------------------------------------------------------------------------------------------------


def test_a_small_run(tmp_path: Path) -> None:
    results = run(small(tmp_path), tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == results
    assert [(cell["table"], cell["slots"]) for cell in results["cells"]] == [
        ("sft", 0), ("sft accuracy", 0), ("sft", 2), ("sft accuracy", 2),
    ]  # fmt: skip
    skipped = {one["setting"]: one["reason"] for one in results["missing_settings"]}
    assert set(skipped) == {"Not there", "Optuna Patient (nonsense=1)"}
    assert "not_there" in skipped["Not there"]
    by_label = {setting["label"]: setting for setting in results["settings"]}
    assert list(by_label) == [
        "Nop", "ASHA (reduction_factor=2)", "ASHA (reduction_factor=4)", "Median of running",
        "Optuna Patient (MedianPruner, patience=1)",
    ]  # fmt: skip
    assert by_label["Nop"]["regret"] == [0.0] * 4
    assert by_label["Nop"]["speedup"] == by_label["Nop"]["cost_speedup"] == [1.0] * 4
    for label in ("ASHA (reduction_factor=2)", "ASHA (reduction_factor=4)"):
        assert all(value > 1.5 for value in by_label[label]["speedup"])
        assert by_label[label]["speedup"] != by_label[label]["cost_speedup"]
    for name in ("regret", "speedup"):
        for setting in by_label.values():
            bounds = zip(setting[f"{name}_low"], setting[name], setting[f"{name}_high"])
            assert all(low <= mean <= high for low, mean, high in bounds)
    assert results["auto"]["setting"] == "ASHA (reduction_factor=2)"
    assert (results["auto"]["cells"], results["auto"]["held_out_cells"]) == (4, 2)
    assert {*results["auto"]["by_cell"][0]["rival_minus_auto"]} == {
        "Nop", "Median of running", "Optuna Patient (MedianPruner, patience=1)",
    }  # fmt: skip
    assert results["auto_among_ours"]["by_cell"][0]["rival_minus_auto"] == {}  # only other policies of ours
    assert draw(results, tmp_path / "figure.png") is not None
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_processes_change_nothing(tmp_path: Path) -> None:
    config = small(tmp_path)
    config["tables"] = config["tables"][1:2]
    config["policies"] = config["policies"][:2]
    alone, together = (run(config, tmp_path / f"{n}.json", processes=n) for n in (1, 2))
    assert alone["settings"] == together["settings"]


def test_section_is_put_in_its_place(tmp_path: Path) -> None:
    results = run(small(tmp_path), tmp_path / "results.json")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n", encoding="utf-8")
    for _ in range(2):
        write_section(readme, results)
    text = readme.read_text(encoding="utf-8")
    assert text == f"before\n\n{section(results)}\n\nafter\n"
    (group,) = [one for one in results["groups"] if (one["group"], one["slots"]) == ("SFT loss", 2)]
    means = group["settings"]["Median of running"]
    assert f"| Median of running | {means['regret']:.3f} / {means['speedup']:.1f}× |" in text
    assert "Not there" not in text
    (speedup,) = [
        one["settings"]["Optuna Patient (MedianPruner, patience=1)"]["speedup"]
        for one in results["groups"]
        if (one["group"], one["slots"]) == ("SFT loss", 0)
    ]
    assert f"a speed-up of at most {speedup:.1f}×" in text
    with pytest.raises(ValueError, match="must hold the lines"):
        write_section(tmp_path / "results.json", results)


def test_held_out_section(tmp_path: Path) -> None:
    held_out = {"frozen_at": "abc1234", "compared": ["Nop", "Median of running", "Not there"]}
    results = run({**small(tmp_path), **held_out}, tmp_path / "heldout.json")
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\nkept\n{END}\n\n{HELD_OUT_BEGIN}\nold\n{END}\n\nafter\n", encoding="utf-8")
    for _ in range(2):
        write_section(readme, results)
    text = readme.read_text(encoding="utf-8")
    assert text == f"{BEGIN}\nkept\n{END}\n\n{held_out_section(results)}\n\nafter\n"
    auto = results["settings"][1]
    assert "2 tables that nobody had seen when every policy was frozen (at abc1234)" in text
    assert f"at its worst {max(auto['regret']):.3f} (" in text
    assert f"above 0.05 on {sum(one > 0.05 for one in auto['regret'])} of 4" in text
    cell = f"{auto['regret'][2]:.3f} / {auto['speedup'][2]:.1f}× [{auto['regret_low'][2]:.3f}, "
    assert f"| SFT loss | 6 × 5 | {cell}" in text
    assert "| `ASHA (reduction_factor=2)` | `Nop` | Median of running |\n" in text
    assert "] | 0.000 / 1.0× | " in text


# -- what is committed ---------------------------------------------------------------------------------------------


def test_the_committed_configuration_is_read() -> None:
    config, given = parse(["--policies", "ASHA", "Nop", "--groups", "SFT loss", "--seeds", "2"])
    assert ([one["name"] for one in config["policies"]], config["seeds"]) == (["Nop", "ASHA"], 2)
    assert [one["group"] for one in config["tables"]] == ["SFT loss"]
    assert given.processes == 1
    settings = settings_of(parse([])[0])
    assert len({setting.label for setting in settings}) == len(settings)
    with pytest.raises(SystemExit):
        parse(["--policies", "nonsense"])


@pytest.mark.parametrize("name", ["heldout_run.toml", "heldout2_run.toml"])
def test_held_out_tables_are_judged_with_the_same_policies(name: str) -> None:
    held_out, usual = parse(["--config", str(HERE / name)])[0], parse([])[0]
    assert held_out["policies"] == usual["policies"]
    for name in ("seeds", "slots", "draws", "auto"):
        assert held_out[name] == usual[name]
    names = [one["name"] for one in usual["policies"]]
    assert set(held_out["compared"]) <= set(names)


def test_our_tables_are_what_they_are_taken_for() -> None:
    about = json.loads((HERE / "tables.json").read_text(encoding="utf-8"))
    assert about["status"] == "complete"
    assert about["tables_sha256"] == provenance.sha256(HERE / "tables.npz")
    assert (HERE / "tables.npz").stat().st_size < 3_000_000
    own = [one for one in parse([])[0]["tables"] if "own" in one]
    tables: dict[str, Table] = {table.name: table for table in load({"tables": own})[0]}
    assert len(tables["sft"].curves) >= 64
    assert len(tables["dpo"].curves) >= 32
    for table in tables.values():
        assert table.curves.shape[1] == 12
        assert table.scores is not None
        assert table.scores.shape[2] >= 32
        assert len(table.params) == len(table.curves)
        assert len({tuple(sorted(one.items())) for one in table.params}) == len(table.params)
        assert table.costs is not None
        assert (table.costs > 0).all()


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_tables_are_what_they_are_taken_for(name: str) -> None:
    about = json.loads((HERE / f"{name}_tables.json").read_text(encoding="utf-8"))
    results = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    config = parse(["--config", str(HERE / f"{name}_run.toml")])[0]
    assert (about["status"], about["dirty"]) == (results["status"], results["dirty"]) == ("complete", False)
    assert about["config"] == tomllib.loads((HERE / f"{name}.toml").read_text(encoding="utf-8"))
    assert {**results["config"], "policies": config["policies"]} == config
    assert all(one in config["policies"] for one in results["config"]["policies"])  # others may have come since
    recorded = provenance.sha256(HERE / f"{name}_tables.npz")
    assert results["data"] == {f"{name}_tables.npz": about["tables_sha256"]} == {f"{name}_tables.npz": recorded}
    assert results["missing_tables"] == []
    tables = load(config)[0]
    assert [table.name for table in tables] == list(about["tasks"])
    for table in tables:
        task = about["config"][table.name]
        assert table.scores is not None
        assert table.scores.shape == (task["trials"], task["chunks"], task["held_out"])
        assert len({tuple(sorted(one.items())) for one in table.params}) == task["trials"]


def test_readme_agrees_with_the_results() -> None:
    text = README.read_text(encoding="utf-8")
    for name, made in (("results.json", section), ("heldout2.json", held_out_section)):
        assert made(json.loads((HERE / name).read_text(encoding="utf-8"))) in text
