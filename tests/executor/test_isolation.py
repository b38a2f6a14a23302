"""A trial does not change when its neighbours are stopped, paused, added, permuted or poisoned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, TrainerCallback
from trl import DPOTrainer

from rapidfire_automl.plan import Plan
from rapidfire_automl.pruners import PolicyPruner
from rapidfire_policies.base import Decision, History, Policy, TrialState, Verdict
from tests.executor.helpers import ALONE, JOINT, VOCAB, Result, Spec, differences, train_together, weight_difference

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@dataclass(frozen=True)
class Scripted(Policy):
    """Does as it is told.

    Args:
        stop: Chunk after which a trial is stopped, by number.
        pause: Chunk after which a trial is paused, by number; it resumes two chunks of its neighbours later.
    """

    stop: Mapping[int, int] = field(default_factory=dict)
    pause: Mapping[int, int] = field(default_factory=dict)

    def decide(self, history: History) -> Mapping[int, Decision]:
        told = {}
        for trial in history.trials:
            others = [t.resource for t in history.trials if t.number != trial.number]
            if trial.state is TrialState.PAUSED:
                late = max(others) >= trial.resource + 2
                told[trial.number] = Decision(Verdict.CONTINUE if late else Verdict.PAUSE)
            elif trial.state is TrialState.RUNNING:
                told[trial.number] = Decision(Verdict.CONTINUE)
                if trial.resource == self.stop.get(trial.number):
                    told[trial.number] = Decision(Verdict.STOP)
                if trial.resource == self.pause.get(trial.number):
                    told[trial.number] = Decision(Verdict.PAUSE)
        return told


class Poison(TrainerCallback):
    """Makes a trial's adapter NaN after its second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.fill_(float("nan"))


COMMON = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 4}
VICTIM = Spec(lora={"r": 4, "lora_dropout": 0.1}, args={**COMMON, "gradient_accumulation_steps": 2, "seed": 1})
OTHER = Spec(lora={"r": 4, "lora_alpha": 16}, args={**COMMON, "per_device_train_batch_size": 3})
LARGER = Spec(lora={"r": 11, "lora_dropout": 0.2, "target_modules": "all-linear"}, args={**COMMON, "seed": 2})
PAIRS = Spec(trainer=DPOTrainer, lora={"r": 2}, args=COMMON)
WILD = replace(OTHER, args={**OTHER.args, "learning_rate": 1e38, "optim": "sgd", "max_grad_norm": 0.0})
POISONED = replace(OTHER, callbacks=[Poison])

UNKNOWN = replace(OTHER, data=Dataset.from_list([{"input_ids": [5, 6, 7, VOCAB + row]} for row in range(9)]))

# Name: trials, where the victim stands among them, slots, policy.
DISTURBED: dict[str, tuple[Sequence[Spec], int, int, Policy]] = {
    "a neighbour is stopped": ([OTHER, VICTIM, LARGER], 1, 3, Scripted(stop={0: 1})),
    "all neighbours are stopped": ([OTHER, VICTIM, LARGER], 1, 3, Scripted(stop={0: 2, 2: 1})),
    "a neighbour is paused and resumed": ([OTHER, VICTIM, LARGER], 1, 3, Scripted(pause={2: 1})),
    "it is paused and resumed itself": ([OTHER, VICTIM, LARGER], 1, 3, Scripted(pause={1: 2})),
    "both are paused, slots change hands": ([OTHER, VICTIM, LARGER], 1, 2, Scripted(pause={0: 2, 1: 1})),
    "neighbours are added": ([OTHER, VICTIM, LARGER, PAIRS, OTHER], 1, 5, Scripted()),
    "a neighbour comes later": ([OTHER, VICTIM, LARGER, PAIRS], 1, 3, Scripted(stop={0: 1})),
    "neighbours are permuted": ([LARGER, OTHER, VICTIM], 2, 3, Scripted()),
    "neighbours are missing": ([VICTIM], 0, 1, Scripted()),
    "a neighbour's learning rate is 1e38": ([WILD, VICTIM, LARGER], 1, 3, Scripted()),
    "a neighbour's tokens are not in the vocabulary": ([UNKNOWN, VICTIM, LARGER], 1, 3, Scripted()),
    "a neighbour's weights are NaN": ([LARGER, VICTIM, POISONED], 1, 3, Scripted()),
}


def victims(base: LlamaForCausalLM, folder: Path, plan: Plan, name: str) -> Result:
    """The victim's share of a search."""
    specs, place, slots, policy = DISTURBED.get(name, ([OTHER, VICTIM, LARGER], 1, 3, Scripted()))
    results = train_together(
        base, specs, folder, plan=plan, chunks=4, slots=slots, pruner=PolicyPruner(policy), allow_failures=True
    )
    record = results[place].record
    assert record is not None
    assert record.fused
    assert record.state is TrialState.COMPLETE
    assert len(record.values) == 4
    return results[place]


@pytest.fixture(scope="module", params=[ALONE, JOINT], ids=["alone", "joint"])
def undisturbed(
    base: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Plan, Result]:
    return request.param, victims(base, tmp_path_factory.mktemp("undisturbed"), request.param, "")


@pytest.mark.parametrize("name", DISTURBED)
def test_a_trial_does_not_see_its_neighbours(
    base: LlamaForCausalLM, tmp_path: Path, undisturbed: tuple[Plan, Result], name: str
) -> None:
    """Bit for bit with one trial per pass; to 1e-6 in joint passes."""
    plan, expected = undisturbed
    disturbed = victims(base, tmp_path, plan, name)
    logged = differences(disturbed.log, expected.log)
    assert disturbed.record is not None
    assert expected.record is not None
    values = np.array([disturbed.record.values, expected.record.values])
    scores = np.array([disturbed.record.scores, expected.record.scores])
    print(name, f"{max(logged.values()):.1e}, adapter {weight_difference(disturbed, expected):.1e}")
    if plan is ALONE:
        assert disturbed.trials_per_pass == 1
        assert max(logged.values()) == 0.0, logged
        assert all(torch.equal(disturbed.weights[n], expected.weights[n]) for n in expected.weights)
        assert (values[0] == values[1]).all()
        assert (scores[0] == scores[1]).all()
    else:
        assert expected.trials_per_pass > 1.5
        assert max(logged.values()) < 1e-6, logged
        # Adam divides by the gradients' size, so where they are small their last digit shows.
        assert weight_difference(disturbed, expected) < 1e-5
        np.testing.assert_allclose(values[0], values[1], rtol=1e-6)
        np.testing.assert_allclose(scores[0], scores[1], rtol=1e-6)


@pytest.mark.parametrize("spec", [WILD, POISONED, UNKNOWN], ids=["learning rate", "weights", "tokens"])
def test_the_poison_works(base: LlamaForCausalLM, tmp_path: Path, spec: Spec) -> None:
    """Otherwise the tests above prove nothing; the poisoned trial fails and nobody else does."""
    poisoned, healthy = train_together(base, [spec, VICTIM], tmp_path, allow_failures=True)
    assert spec is UNKNOWN or not np.isfinite(poisoned.losses[-1])
    assert poisoned.record is not None
    assert poisoned.record.state is TrialState.FAILED
    assert healthy.record is not None
    assert healthy.record.state is TrialState.COMPLETE
