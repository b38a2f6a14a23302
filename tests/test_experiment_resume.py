"""An experiment whose process was killed goes on where its program is run again; one that is done is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rapidfire_automl import Experiment, List, RFGridSearch, RFLoraConfig, RFModelConfig, RFSFTConfig
from rapidfire_automl.experiment_folders import ExperimentFolder, facts_of
from tests.executor.forking import Forked
from tests.test_experiment_engine import QUESTIONS, base, chat

__all__ = ["base"]
pytestmark = pytest.mark.faults


def _program(base: str, folder: str, rates: tuple[float, ...] = (1e-3, 1e-2)) -> dict[str, Any]:
    """Two fits, one after the other."""

    def group(r: int) -> RFGridSearch:
        return RFGridSearch(
            RFModelConfig(
                model_name=base,
                peft_config=RFLoraConfig(r=r, target_modules=["q_proj"]),
                training_args=RFSFTConfig(
                    learning_rate=List(list(rates)),
                    per_device_train_batch_size=4,
                    max_steps=4,
                    logging_steps=1,
                    bf16=False,
                    use_cpu=True,
                ),
                formatting_func=chat,
            ),
            "SFT",
        )

    with Experiment("x", experiments_path=folder) as experiment:
        fits = [experiment.run_fit(group(r), None, QUESTIONS[:16], QUESTIONS[:8], num_chunks=2) for r in (2, 4)]
        runs = [[row["run_id"], row["learning_rate"], row["value"]] for fit in fits for row in fit.runs()]
        logged = sorted(experiment.get_results()[["run_id", "step", "loss"]].dropna().values.tolist())
    return {"folder": experiment.experiment_name, "runs": runs, "logged": logged}


@pytest.mark.slow
def test_a_killed_experiment_goes_on(base: str, tmp_path: Path) -> None:
    whole = Forked(_program, base, str(tmp_path / "whole")).result()
    assert len(whole["logged"]) == 16
    for where in ("round.judged=kill@1", "round.judged=kill@3"):  # in the first fit, then in the second
        Forked(_program, base, str(tmp_path / "cut"), failpoints=where).killed()
    found = Forked(_program, base, str(tmp_path / "cut")).result()
    assert found["folder"] == "x"
    for mine, theirs in ((found["runs"], whole["runs"]), (found["logged"], whole["logged"])):
        assert [row[:-1] for row in mine] == [row[:-1] for row in theirs]
        assert [row[-1] for row in mine] == pytest.approx([row[-1] for row in theirs], rel=1e-5)
    assert json.loads((tmp_path / "cut" / "x" / "experiment.json").read_text())["over"] == 2
    assert Forked(_program, base, str(tmp_path / "cut")).result()["folder"] == "x_2", "it was done"


def test_a_folder_is_taken_by_who_searches_the_same_and_nobody_else(tmp_path: Path) -> None:
    mine, other = (facts_of(8, seed, [{"space": object(), "trials": 4}]) for seed in (1, 2))
    first = ExperimentFolder(tmp_path, "x", mine)
    first.begin(mine)
    beside = ExperimentFolder(tmp_path, "x", mine)
    assert (beside.path.name, beside.goes_on) == ("x_2", False), "somebody is at work in x"
    beside.begin(mine)
    beside.close()
    first.close()
    assert ExperimentFolder(tmp_path, "x", other).path.name == "x_3"
    again = ExperimentFolder(tmp_path, "y", mine)
    again.begin(mine)
    again.begin(mine)
    again.close()
    cut = ExperimentFolder(tmp_path, "y", mine)
    assert (cut.path.name, cut.goes_on) == ("y", True)
    cut.begin(mine)
    cut.end()
    with pytest.raises(ValueError, match=r"`seed` of its fit 2 was another\. Set it back, or take another name"):
        cut.begin(other)
    cut.close()
