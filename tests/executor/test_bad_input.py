"""Bad input gets one clear line, early, and costs nobody else anything."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from datasets import Dataset
from peft import LoftQConfig, LoraConfig, get_peft_model
from transformers import PreTrainedModel
from trl import DPOTrainer

from rapidfire_automl import RapidFireExecutor
from rapidfire_automl.executor import executor as executor_module
from rapidfire_policies import ASHA, TrialState
from tests.executor.searches import (
    HELD_OUT,
    LRS,
    TRAIN,
    Do,
    Done,
    by_lr,
    make_executor,
    search,
    sft,
    study_of,
    tiny_model,
    tokenizer,
)

Build = Callable[[RapidFireExecutor, optuna.Trial], Any]


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is an error."""

    def load(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(executor_module, "load_base", load)


# -- arguments, before any model is loaded -----------------------------------------------------------------------------


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slots": 0}, "`slots` must be an integer >= 1, got 0."),
        ({"slots": -3}, "`slots` must be an integer >= 1, got -3."),
        ({"slots": "8"}, "`slots` must be an integer >= 1, got '8'."),
        ({"slots": 2.0}, "`slots` must be an integer >= 1, got 2.0."),
        ({"slots": True}, "`slots` must be an integer >= 1, got True."),
        ({"chunks": 0}, "`chunks` must be an integer >= 1, got 0."),
        ({"chunks": None}, "`chunks` must be an integer >= 1, got None."),
        ({"eval_batch_size": 0}, "`eval_batch_size` must be an integer >= 1, got 0."),
        ({"max_paused": -1}, "`max_paused` must be an integer >= 0, got -1."),
        ({"max_paused": "all"}, "`max_paused` must be an integer >= 0, got 'all'."),
        ({"seed": -1}, "`seed` must be an integer >= 0, got -1."),
        ({"seed": "x"}, "`seed` must be an integer >= 0, got 'x'."),
        ({"metric": "accuracy"}, "`metric` must be a function or one of nll, preference_loss, .* got 'accuracy'."),
        ({"metric": 3}, "`metric` must be a function or one of .*, got 3."),
        ({"metric": ["nll", "accuracy"]}, "`metric` must be .* or a list of those, got 'accuracy'."),
        ({"metric": [None]}, "`metric` must be .* or a list of those, got None."),
        ({"metric": []}, "`metric` must be .* or a list of those, got \\[\\]."),
        ({"cost": "flops"}, "`cost` must be one of tokens, seconds, got 'flops'."),
        ({"dtype": "float99"}, "`dtype` must be 'auto', a torch.dtype or its name .* got 'float99'."),
        ({"device": "gpu?"}, "`device` must be a device such as .* got 'gpu\\?'."),
        ({"plan": 4096}, "`plan` must be a Plan, the path of a recorded one or None, got 4096."),
        ({"plan": "nowhere/plan.json"}, "`plan` must be a recorded plan"),
        ({"model": 5}, "`model` must be a hub id, a path or a transformers model, got 5."),
        ({"model": None}, "`model` must be a hub id, a path or a transformers model, got None."),
        ({"model": "/no/such/folder"}, "`model` must be .* got '/no/such/folder': no such folder."),
        ({"model": Path("nowhere")}, "`model` must be .* got 'nowhere': no such folder."),
        ({"tokenizer": "gpt2"}, "`tokenizer` must be a transformers tokenizer, got 'gpt2'."),
        ({"listeners": "print"}, "`listeners` must be functions, got 'p'."),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        RapidFireExecutor(**{"model": "some/model", **given})
    assert "\n" not in str(caught.value)


def test_a_loaded_model_needs_its_tokenizer() -> None:
    with pytest.raises(ValueError, match="`tokenizer` must be given when `model` is a loaded model"):
        RapidFireExecutor(tiny_model())


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("n_trials", [0, -1, "8", 2.5, None, True])
def test_n_trials(n_trials: Any) -> None:
    executor = make_executor()
    with pytest.raises(ValueError, match=r"`n_trials` must be an integer >= 1, got"):
        executor.optimize(optuna.create_study(), by_lr(executor), n_trials=n_trials)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("threads", [False, True])
def test_a_study_of_several_objectives_needs_as_many_metrics(threads: bool) -> None:
    executor = make_executor()
    study = optuna.create_study(directions=["minimize", "maximize"])
    run = partial(study.optimize) if threads else partial(executor.optimize, study)
    with pytest.raises(ValueError, match="`metric` must give 2 values for a study with 2 directions"):
        run(by_lr(executor), n_trials=1)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("objective", [None, "objective", 3])
def test_an_objective_that_is_no_function(objective: Any) -> None:
    executor = make_executor()
    with pytest.raises(ValueError, match="`objective` must be a function that builds a trainer, got"):
        executor.optimize(optuna.create_study(), objective, n_trials=1)


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    executor = make_executor(model=tmp_path)
    with pytest.raises(ValueError, match="`model` must be a hub id, a path or a model") as caught, executor:
        pass
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="`model` must be a hub id"):
        executor.optimize(optuna.create_study(), by_lr(executor), n_trials=1)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    executor = RapidFireExecutor(tmp_path, slots=2, chunks=2)
    with pytest.raises(ValueError, match="`tokenizer` could not be loaded from") as caught:
        _ = executor.tokenizer
    assert "\n" not in str(caught.value)


def test_a_model_outside_an_objective() -> None:
    executor = make_executor()
    trial = optuna.create_study().ask()
    with pytest.raises(RuntimeError, match=r"`executor.model\(trial\)` works inside a function decorated with"):
        executor.model(trial)
    with executor, pytest.raises(RuntimeError, match=r"`executor.model\(trial\)` works inside"):
        executor.model(trial)


def test_both_ways_to_optimize_at_once() -> None:
    executor = make_executor()
    with executor:
        optuna.create_study().optimize(by_lr(executor), n_trials=1, n_jobs=2)
        with pytest.raises(RuntimeError, match=r"already serves `study.optimize`"):
            executor.optimize(optuna.create_study(), by_lr(executor), n_trials=1)


# -- trials that can't be trained: they fail with a reason, the others go on -----------------------------------------


def beside(bad: Build, **given: Any) -> Done:
    """Two good trials, and a bad one between them."""

    def objective(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
        def build(trial: optuna.Trial) -> Any:
            lr = trial.suggest_float("lr", 1e-5, 1.0, log=True)
            return bad(executor, trial) if trial.number == 1 else sft(executor, trial, lr=lr)

        return executor.objective(build)

    return search(LRS[:3], objective=objective, **given)


@pytest.fixture(scope="module")
def untroubled() -> Done:
    return search(LRS[:3])


def lora(**given: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **given})


def other_model(executor: RapidFireExecutor, trial: optuna.Trial) -> Any:
    return sft(executor, trial, lr=1e-3, model=tiny_model())


def whole_model(executor: RapidFireExecutor, trial: optuna.Trial) -> Any:
    return sft(executor, trial, lr=1e-3, peft_config=None)


def another_trials_model(executor: RapidFireExecutor, trial: optuna.Trial) -> Any:
    return sft(executor, trial, lr=1e-3, model=executor.model(optuna.create_study().ask()))


def leaves(executor: RapidFireExecutor, trial: optuna.Trial) -> Any:
    sys.exit("enough")


class Unscored(DPOTrainer):  # type: ignore[misc]
    """Stands for a trainer without a built-in metric."""


EMPTY = Dataset.from_dict({"input_ids": []})

BAD: dict[str, tuple[Build, str]] = {
    "nothing returned": (
        lambda e, t: None,
        "TypeError: The objective must build and return a trainer (SFTTrainer, DPOTrainer), got nothing.",
    ),
    "a number returned": (lambda e, t: 0.5, "must build and return a trainer (SFTTrainer, DPOTrainer), got a float."),
    "the whole model": (whole_model, "full fine-tuning can't share a base. Pass `peft_config=LoraConfig(...)`"),
    "another model": (other_model, "did not come from this executor. Pass `model=executor.model(trial)`."),
    "another trial's model": (another_trials_model, "`trial` must be the one the objective was called with, 1, got 0."),
    "no eval_dataset": (
        lambda e, t: sft(e, t, lr=1e-3, eval_dataset=None),
        "`eval_dataset` must be given: trials are compared on it after every chunk. Pass it to the trainer",
    ),
    "empty eval_dataset": (
        lambda e, t: sft(e, t, lr=1e-3, eval_dataset=EMPTY),
        "`eval_dataset` must not be empty.",
    ),
    "empty train_dataset": (
        lambda e, t: sft(e, t, lr=1e-3, train_dataset=EMPTY),
        "`train_dataset` must not be empty",
    ),
    "fewer steps than chunks": (
        lambda e, t: sft(e, t, lr=1e-3, max_steps=2),
        "`chunks` must be <= the trial's 2 optimizer steps, got 3. Use fewer chunks, or give the trial more steps",
    ),
    "fewer examples than chunks": (
        lambda e, t: sft(e, t, lr=1e-3, train_dataset=TRAIN.select(range(2)), per_device_train_batch_size=1),
        "`chunks` must be <= the trial's 2 optimizer steps, got 3.",
    ),
    "learning rate as text": (
        lambda e, t: sft(e, t, lr="1e-3"),  # type: ignore[arg-type]
        "`learning_rate` must be a number, got '1e-3'. Leave out the quotes.",
    ),
    "pissa": (
        lambda e, t: sft(e, t, lr=1e-3, peft_config=lora(init_lora_weights="pissa")),
        "`init_lora_weights='pissa'` rewrites the base model's weights, which all trials share. Use True",
    ),
    "pissa, fast": (
        lambda e, t: sft(e, t, lr=1e-3, peft_config=lora(init_lora_weights="pissa_niter_4")),
        "`init_lora_weights='pissa_niter_4'` rewrites the base",
    ),
    "pissa, by hand": (
        lambda e, t: sft(
            e, t, lr=1e-3, peft_config=None, model=get_peft_model(e.model(t), lora(init_lora_weights="pissa"))
        ),
        "`init_lora_weights='pissa'` rewrites the base",
    ),
    "olora": (
        lambda e, t: sft(e, t, lr=1e-3, peft_config=lora(init_lora_weights="olora")),
        "`init_lora_weights='olora'` rewrites the base",
    ),
    "loftq": (
        lambda e, t: sft(
            e, t, lr=1e-3, peft_config=lora(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4))
        ),
        "`init_lora_weights='loftq'` rewrites the base",
    ),
    "biases": (
        lambda e, t: sft(e, t, lr=1e-3, peft_config=lora(bias="all")),
        "`bias='all'` unfreezes biases of the base, which all trials share. Use 'none'.",
    ),
    "biases of the adapter": (
        lambda e, t: sft(e, t, lr=1e-3, peft_config=lora(bias="lora_only")),
        "`bias='lora_only'`",
    ),
    "an exit": (leaves, "SystemExit: enough"),
    "a metric of another trainer": (lambda e, t: sft(e, t, lr=1e-3, cls=object), "TypeError"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.slow
def test_a_bad_trial_fails_alone(name: str, untroubled: Done) -> None:
    bad, message = BAD[name]
    model = tiny_model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    done = beside(bad, model=model)
    record = done.executor.records[1]
    assert message in (record.error or "")
    assert "\n" not in (record.error or "")
    assert done.states() == ["COMPLETE", "FAIL", "COMPLETE"]
    assert record.state is TrialState.FAILED
    assert record.adapter is None
    assert done.study.trials[1].user_attrs["rapidfire:error"] == record.error
    for number in (0, 2):
        np.testing.assert_allclose(done.losses(number), untroubled.losses(number), rtol=1e-6)
    assert_unharmed(model, before)


def assert_unharmed(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("init", ["corda", "lora_ga", "mica"])
def test_other_ways_to_rewrite_the_base_are_refused(init: str) -> None:
    """Where this version of PEFT knows them."""
    try:
        config = lora(init_lora_weights=init)
    except (ValueError, TypeError, ImportError) as error:
        pytest.skip(f"PEFT: {error}")
    done = beside(lambda e, t: sft(e, t, lr=1e-3, peft_config=config))
    assert done.states() == ["COMPLETE", "FAIL", "COMPLETE"]
    assert f"`init_lora_weights='{init}'` rewrites the base" in (done.executor.records[1].error or "")


@pytest.mark.parametrize("threads", [False, True])
def test_all_trials_failing(threads: bool) -> None:
    def objective(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
        def build(trial: optuna.Trial) -> Any:
            raise LookupError(f"no data for {trial.number}")

        return executor.objective(build)

    study = study_of(LRS[:3])
    if threads:
        search(LRS[:3], study=study, objective=objective, threads=True)
    else:
        with pytest.raises(RuntimeError, match=r"All 3 trials failed. Trial 0: LookupError: no data for 0"):
            search(LRS[:3], study=study, objective=objective)
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * 3
    assert study.trials[2].user_attrs["rapidfire:error"] == "LookupError: no data for 2"


def test_one_complete_trial_is_enough() -> None:
    done = search(LRS[:2], objective=lambda e: e.objective(lambda t: sft(e, t, lr=1e-3) if t.number else None))
    assert done.states() == ["FAIL", "COMPLETE"]


# -- trials that touch the base while they train ---------------------------------------------------------------------


def touching(touch: Callable[[Any], None], at: int = 3) -> Build:
    """A trial that does something to its model at a step in the middle of a chunk."""

    def callback(state: Any, model: Any, **_: Any) -> None:
        if state.global_step == at:
            touch(model)

    return lambda executor, trial: sft(executor, trial, lr=1e-3, callbacks=[Do(callback)])


def base_weight(model: Any) -> torch.nn.Parameter:
    weight: torch.nn.Parameter = model.get_base_model().model.layers[0].mlp.up_proj.weight
    return weight


def write(model: Any) -> None:
    with torch.no_grad():
        base_weight(model).mul_(2.0)


def replace(model: Any) -> None:
    base_weight(model).data = torch.zeros_like(base_weight(model))


HARMLESS_TO_OTHERS: dict[str, tuple[Callable[[Any], None], str]] = {
    "merge": (
        lambda model: model.merge_adapter(),
        "`merge_adapter` would write into the base, which all trials share.",
    ),
    "merge and unload": (lambda model: model.merge_and_unload(), "`merge_and_unload` would write into the base"),
    "unfreeze": (lambda model: base_weight(model).requires_grad_(True), "up_proj.weight` of the shared base was unfr"),
    "replace": (replace, "up_proj.weight` of the shared base was unfrozen, replaced or written to."),
}


@pytest.mark.parametrize("name", HARMLESS_TO_OTHERS)
@pytest.mark.slow
def test_a_trial_that_touches_the_base_fails_alone(name: str, untroubled: Done) -> None:
    touch, message = HARMLESS_TO_OTHERS[name]
    model = tiny_model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    done = beside(touching(touch), model=model)
    assert message in (done.executor.records[1].error or "")
    assert done.states() == ["COMPLETE", "FAIL", "COMPLETE"]
    for number in (0, 2):
        np.testing.assert_allclose(done.losses(number), untroubled.losses(number), rtol=1e-6)
    assert_unharmed(model, before)


@pytest.mark.slow
def test_a_base_that_was_written_to_is_loaded_again(tmp_path: Path, untroubled: Done) -> None:
    tiny_model().save_pretrained(tmp_path)
    done = beside(touching(write), model=tmp_path)
    assert "up_proj.weight` of the shared base" in (done.executor.records[1].error or "")
    assert done.states() == ["COMPLETE", "FAIL", "COMPLETE"]
    for number in (0, 2):
        np.testing.assert_allclose(done.losses(number), untroubled.losses(number), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [False, True])
def test_writing_to_a_base_that_cannot_be_loaded_again_ends_the_search_and_names_the_trial(threads: bool) -> None:
    study = study_of(LRS[:4], ASHA())
    model = tiny_model()

    def objective(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
        def build(trial: optuna.Trial) -> Any:
            lr = trial.suggest_float("lr", 1e-5, 1.0, log=True)
            bad = touching(write)
            return bad(executor, trial) if trial.number == 2 else sft(executor, trial, lr=lr)

        return executor.objective(build)

    with pytest.raises(RuntimeError, match=re.escape("ended by trial 2. BaseChanged: `model.layers.0.mlp.up_proj")):
        search(LRS[:4], study=study, objective=objective, slots=1, chunks=2, model=model, threads=threads)
    states = [trial.state.name for trial in study.trials]
    assert states[:3] == ["COMPLETE", "PRUNED", "FAIL"] or states[:3] == ["COMPLETE", "COMPLETE", "FAIL"]
    assert "BaseChanged" in study.trials[2].user_attrs["rapidfire:error"]


def test_held_out_data_of_another_trial_are_unharmed() -> None:
    """Examples are the caller's: nothing writes into them."""
    before = HELD_OUT[:]
    search(LRS[:1])
    assert HELD_OUT[:] == before
    assert tokenizer().pad_token == "<pad>"
