"""A trainer that is captured, written, read and gone on with ends as the one that was never stopped: bit by bit."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import EarlyStoppingCallback, LlamaForCausalLM, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import DPOTrainer, RLOOTrainer

from rapidfire_automl.executor.adapters import AdapterBank
from rapidfire_automl.executor.checkpoints import Packed, Snapshot, pack, read, write
from rapidfire_automl.executor.seams import find_sites
from rapidfire_automl.executor.seams.durable import Durable, why_not_durable
from rapidfire_automl.executor.seams.weights import AdapterWeights, put_optimizer
from tests.executor.helpers import Spec, adapter_of, sft_data, tiny_llama, tiny_tokenizer
from tests.executor.rollouts import RolloutSpec, brevity, evenness, rollout_base


class Boundaries(TrainerCallback):
    """Captures after some steps, at the moment the executor does: once the step has been logged, if it is to be."""

    def __init__(self, durable: Durable, steps: tuple[int, ...], stop: bool, step_ends: bool = True) -> None:
        self._durable, self._steps, self._stop, self._step_ends = durable, steps, stop, step_ends
        self.taken: dict[int, Packed] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._step_ends and not control.should_log:
            self._take(state, control)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._take(state, control)

    def _take(self, state: Any, control: Any) -> None:
        if state.global_step in self._steps and state.global_step not in self.taken:
            self.taken[state.global_step] = pack(self._durable.capture(step=state.global_step))
            control.should_training_stop = control.should_training_stop or self._stop


@cache
def base_of(rollouts: bool) -> LlamaForCausalLM:
    return rollout_base() if rollouts else tiny_llama()


def built(spec: Spec, folder: Path) -> Trainer:
    return spec.build(copy.deepcopy(base_of(isinstance(spec, RolloutSpec))), tiny_tokenizer(), folder)


def scramble() -> None:
    """What a process that starts anew has in its generators."""
    seed = random.SystemRandom().randrange(2**31)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def comparable(log: list[dict[str, Any]]) -> list[str]:
    """A log without its clocks, to the last digit."""
    clocks = ("runtime", "time", "per_second")
    return [repr({name: value for name, value in entry.items() if not name.endswith(clocks)}) for entry in log]


def check_same(one: Trainer, other: Trainer) -> None:
    mine, theirs = adapter_of(one.model), adapter_of(other.model)
    assert comparable(one.state.log_history) == comparable(other.state.log_history)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    mine, theirs = one.state, other.state
    assert (mine.epoch, mine.global_step, mine.num_input_tokens_seen) == (
        theirs.epoch,
        theirs.global_step,
        theirs.num_input_tokens_seen,
    )
    assert mine.total_flos == theirs.total_flos
    kept = [
        [callback.state() for callback in trainer.callback_handler.callbacks if isinstance(callback, ExportableState)]
        for trainer in (one, other)
    ]
    assert kept[0] == kept[1]


def check_goes_on(spec: Spec, folder: Path, steps: tuple[int, ...]) -> None:
    """From each of `steps`, and twice from the last: a snapshot can be taken from a trainer that has gone on."""
    oracle = built(spec, folder)
    oracle.train()
    assert max(steps) < oracle.state.global_step

    def train(
        stops: tuple[int, ...], snapshot: Snapshot | None = None, stop: bool = True
    ) -> tuple[Trainer, Boundaries]:
        trainer = built(spec, folder)
        scramble_after = snapshot is not None
        durable = Durable(trainer)
        boundaries = Boundaries(durable, stops, stop)
        trainer.add_callback(boundaries)
        if scramble_after:
            scramble()
        durable.train(snapshot)
        return trainer, boundaries

    def stored(packed: Packed, chunk: int) -> Snapshot:
        path = folder / f"chunk-{chunk:04d}"
        write(path, packed)
        return read(path)

    watched, boundaries = train(steps, stop=False)
    check_same(watched, oracle)
    for step in steps:
        trainer, _ = train((), stored(boundaries.taken[step], step))
        check_same(trainer, oracle)
    _, first = train(steps[:1])
    _, second = train(steps[-1:], stored(first.taken[steps[0]], 1000))
    trainer, _ = train((), stored(second.taken[steps[-1]], 1001))
    check_same(trainer, oracle)


@dataclass
class Counting(TrainerCallback):
    """A callback without state of its own; it must stay the object it is."""

    epochs: list[float] = field(default_factory=list)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epochs.append(state.epoch)


@dataclass(frozen=True)
class Scaled(Spec):
    """With a gradient scaler, which transformers has only on GPUs; it grows within the run."""

    def build(self, model: Any, tokenizer: Any, folder: Path, *, peft: bool = True) -> Trainer:
        trainer = super().build(model, tokenizer, folder, peft=peft)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        return trainer


# 22 examples in twos: 11 batches an epoch, 6 steps of two batches, the sixth of one.
RAGGED: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 15}
SFT: Mapping[str, tuple[Spec, tuple[int, ...]]] = {
    "dropout, fused AdamW, cosine": (
        Spec(lora={"lora_dropout": 0.2}, args=RAGGED | {"lr_scheduler_type": "cosine", "warmup_steps": 4}),
        (3, 6, 8, 12),
    ),
    "packing, SGD with momentum": (
        Spec(
            args={"packing": True, "max_length": 32, "optim": "sgd", "optim_args": "momentum=0.9", "max_steps": 9},
            lora={"lora_dropout": 0.1},
        ),
        (2, 5),
    ),
    "Adafactor, grouped by length": (
        Spec(args=RAGGED | {"optim": "adafactor", "train_sampling_strategy": "group_by_length"}),
        (4, 6, 7),
    ),
    "RMSprop, constant with warm-up, losses between logs": (
        Spec(args=RAGGED | {"optim": "rmsprop", "lr_scheduler_type": "constant_with_warmup", "logging_steps": 4}),
        (3, 4, 6, 9),
    ),
    "plateau, evaluations, early stopping": (
        Spec(
            args=RAGGED
            | {
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "eval_strategy": "steps",
                "eval_steps": 2,
                "metric_for_best_model": "loss",
                "logging_steps": 3,
                "load_best_model_at_end": False,
            },
            callbacks=(lambda: EarlyStoppingCallback(early_stopping_patience=50, early_stopping_threshold=0.1),),
        ),
        (4, 6, 9),
    ),
    "evaluated and logged by epoch": (
        Spec(
            args=RAGGED
            | {"eval_strategy": "epoch", "logging_strategy": "epoch", "include_num_input_tokens_seen": "all"},
            callbacks=(Counting,),
        ),
        (5, 6, 12),
    ),
    "a sampler that draws from the global generator": (
        Spec(args=RAGGED | {"accelerator_config": {"use_seedable_sampler": False}}, lora={"lora_dropout": 0.1}),
        (2, 6, 8),
    ),
    "DoRA, a module trained beside, noisy embeddings": (
        Spec(
            args={"neftune_noise_alpha": 5.0, "max_steps": 8, "optim": "adamw_torch", "weight_decay": 0.1},
            lora={"use_dora": True, "modules_to_save": ["norm"], "use_rslora": True},
        ),
        (3, 5),
    ),
    "a gradient scaler": (Scaled(args={"max_steps": 9}), (2, 5)),
    "workers, evaluated at the start, data not skipped": (
        Spec(args=RAGGED | {"dataloader_num_workers": 1, "eval_on_start": True, "ignore_data_skip": True}),
        (4, 6),
    ),
}
OTHERS: Mapping[str, tuple[Spec, tuple[int, ...]]] = {
    "DPO": (Spec(trainer=DPOTrainer, args=RAGGED | {"max_steps": 9}, lora={"lora_dropout": 0.1}), (2, 5, 6)),
    "DPO, reference computed before": (
        Spec(trainer=DPOTrainer, args={"max_steps": 13, "precompute_ref_log_probs": True, "logging_steps": 2}),
        (5, 10),
    ),
    # 12 prompts, two generations of each: 6 batches of 4 an epoch, seen twice each: 12 batches, 6 steps.
    "GRPO, rollouts used twice": (
        RolloutSpec(
            args={"num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 10, "beta": 0.04},
            rewards=(evenness, brevity),
            lora={"lora_dropout": 0.1},
        ),
        (2, 3, 6, 8),
    ),
    "GRPO, adaptive entropy, evaluated": (
        RolloutSpec(
            args={
                "max_steps": 8,
                "use_adaptive_entropy": True,
                "entropy_target": 100.0,
                "eval_strategy": "steps",
                "eval_steps": 2,
                "per_device_eval_batch_size": 4,
                "logging_steps": 3,
            }
        ),
        (2, 3, 6),
    ),
    "RLOO": (RolloutSpec(trainer=RLOOTrainer, args={"max_steps": 9, "num_iterations": 2, "beta": 0.05}), (3, 5)),
}


RARE = (
    ()
    if os.environ.get("RAPIDFIRE_FAULTS")
    else (
        "Adafactor, grouped by length",
        "packing, SGD with momentum",
        "evaluated and logged by epoch",
        "a sampler that draws from the global generator",
        "DPO, reference computed before",
    )
)
"""Cases that only `make test-faults` tries."""


def some_slow(cases: Mapping[str, Any], *fast: str) -> list[Any]:
    fault, slow = [pytest.mark.faults], [pytest.mark.slow, pytest.mark.faults]
    return [pytest.param(name, marks=fault if name in fast else slow) for name in cases if name not in RARE]


@pytest.mark.parametrize("name", some_slow(SFT, "dropout, fused AdamW, cosine"))
def test_sft_goes_on_exactly(name: str, tmp_path: Path) -> None:
    spec, steps = SFT[name]
    check_goes_on(spec, tmp_path, steps)


@pytest.mark.parametrize("name", some_slow(OTHERS))
def test_other_trainers_go_on_exactly(name: str, tmp_path: Path) -> None:
    spec, steps = OTHERS[name]
    check_goes_on(spec, tmp_path, steps)


@pytest.mark.slow
def test_captured_after_an_epoch_s_end(tmp_path: Path) -> None:
    """In the log of the epoch, after callbacks have heard of its end: its evaluation is all that is left of it."""
    spec = SFT["evaluated and logged by epoch"][0]
    oracle = built(spec, tmp_path)
    oracle.train()
    trainer = built(spec, tmp_path)
    durable = Durable(trainer)
    boundaries = Boundaries(durable, (6, 12), stop=False, step_ends=False)
    trainer.add_callback(boundaries)
    durable.train()
    for step, ends in ((6, 2), (12, 1)):
        resumed = built(spec, tmp_path)
        Durable(resumed).train(stored(boundaries.taken[step], tmp_path))
        check_same(resumed, oracle)
        [counting] = [each for each in resumed.callback_handler.callbacks if isinstance(each, Counting)]
        assert len(counting.epochs) == ends


def captured(spec: Spec, folder: Path, step: int) -> tuple[Trainer, Packed]:
    trainer = built(spec, folder)
    durable = Durable(trainer)
    boundaries = Boundaries(durable, (step,), stop=True)
    trainer.add_callback(boundaries)
    durable.train()
    return trainer, boundaries.taken[step]


def stored(packed: Packed, folder: Path) -> Snapshot:
    write(folder / "chunk-0001", packed)
    return read(folder / "chunk-0001")


def test_nothing_is_unpickled_and_all_is_as_before_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = stored(captured(Spec(), tmp_path, 3)[1], tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    trainer = built(Spec(callbacks=(Counting,)), tmp_path)
    before, callbacks = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
    Durable(trainer).train(snapshot)
    assert trainer.state.global_step == 6
    # Trainer sets counters of its own; methods must not stay on the instance.
    assert not [name for name in vars(trainer).keys() - before.keys() if callable(vars(trainer)[name])]
    assert trainer.callback_handler.callbacks == callbacks
    assert trainer.args.eval_on_start is False and trainer.args.ignore_data_skip is False


def test_a_snapshot_serves_twice(tmp_path: Path) -> None:
    snapshot = stored(captured(Spec(), tmp_path, 3)[1], tmp_path)
    trainers = [built(Spec(), tmp_path) for _ in range(2)]
    for trainer in trainers:
        Durable(trainer).train(snapshot)
    check_same(*trainers)


def test_a_finished_trial_is_put_back_and_not_trained(tmp_path: Path) -> None:
    done, packed = captured(Spec(), tmp_path, 6)
    trainer = built(Spec(), tmp_path)
    assert Durable(trainer).train(stored(packed, tmp_path)) is None
    assert trainer.state.global_step == 6
    ours, theirs = adapter_of(trainer.model), adapter_of(done.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_adapter_on_disk_is_peft_s(tmp_path: Path) -> None:
    spec = Spec(lora={"modules_to_save": ["norm"]})
    trainer, packed = captured(spec, tmp_path, 3)
    write(tmp_path / "chunk-0001", packed)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "chunk-0001")
    ours, theirs = adapter_of(trainer.model), adapter_of(loaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.peft_config["default"].target_modules == {"q_proj", "v_proj"}


@pytest.mark.slow
def test_parameters_stay_views_into_the_bank(tmp_path: Path) -> None:
    """In the executor an adapter lies in the bank, `B` transposed, and fused optimizers want their states alike."""
    oracle = built(Spec(), tmp_path)
    oracle.train()
    snapshot = stored(captured(Spec(), tmp_path, 3)[1], tmp_path)
    trainer = built(Spec(), tmp_path)
    bank = AdapterBank(2, torch.device("cpu"))
    row = bank.add(find_sites(trainer.model)[0])
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    assert not all(p.is_contiguous() for p in parameters)
    Durable(trainer).train(snapshot)
    bank.check(row)
    assert all(now is then for now, then in zip((p for p in trainer.model.parameters() if p.requires_grad), parameters))
    for parameter in parameters:
        assert trainer.optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()
    ours, theirs = adapter_of(trainer.model), adapter_of(oracle.model)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


def test_an_optimizer_state_keeps_its_dtype() -> None:
    def half() -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))

    parameter = half()
    first = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    first.step()
    state = first.state_dict()
    state["state"][0]["exp_avg"] = torch.full((4, 3), 1.000001)
    state["state"][0]["shift"] = torch.full((2,), 1.000001, dtype=torch.float64)
    other = half()
    second = torch.optim.AdamW([other])
    put_optimizer(second, state)
    loaded = second.state[other]
    assert {name: value.dtype for name, value in loaded.items()} == {
        name: value.dtype for name, value in state["state"][0].items()
    }
    assert all(torch.equal(loaded[name], value) for name, value in state["state"][0].items())
    assert all(loaded[name] is not value for name, value in state["state"][0].items())


def test_another_precision_is_refused(tmp_path: Path) -> None:
    snapshot = stored(captured(Spec(), tmp_path, 3)[1], tmp_path)
    with pytest.raises(ValueError, match="another precision"):
        Durable(built(Scaled(), tmp_path)).train(snapshot)


def test_another_adapter_is_refused(tmp_path: Path) -> None:
    snapshot = stored(captured(Spec(), tmp_path, 3)[1], tmp_path)
    for lora in ({"r": 8}, {"target_modules": ["q_proj"]}, {"modules_to_save": ["norm"]}):
        trainer = built(Spec(lora=lora), tmp_path)
        before = adapter_of(trainer.model)
        with pytest.raises(ValueError, match="of another adapter: base_model"):
            Durable(trainer).train(snapshot)
        assert all(torch.equal(value, before[name]) for name, value in adapter_of(trainer.model).items())


def test_what_can_not_be_captured_is_said(tmp_path: Path) -> None:
    trainer = built(Spec(), tmp_path)
    with pytest.raises(RuntimeError, match="only be captured while it trains"):
        Durable(trainer).capture()
    trainer.model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    assert why_not_durable(trainer) == ""
    trainer.model = trainer.model.get_base_model()
    assert why_not_durable(trainer) == "it does not train one adapter"
    with pytest.raises(ValueError, match="can't be captured: it does not train one adapter"):
        Durable(trainer)


def test_weights_peft_makes_up_or_leaves_out() -> None:
    """Buffers go through PEFT itself; a parameter somebody unfroze beside the adapter is kept by its name."""

    def model() -> PeftModel:
        made = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
        norm = made.get_base_model().model.norm.modules_to_save["default"]
        norm.register_buffer("count", torch.tensor([1.0]))
        made.get_base_model().model.layers[0].mlp.up_proj.weight.requires_grad_(True)
        return made

    one, other = model(), model()
    with torch.no_grad():
        for parameter in one.parameters():
            if parameter.requires_grad:
                parameter.add_(1.5)
        one.get_base_model().model.norm.modules_to_save["default"].count.fill_(7)
    weights = AdapterWeights(one)
    assert [name.split(".")[-3:] for name in weights.others()] == [["mlp", "up_proj", "weight"]]
    AdapterWeights(other).put(Snapshot({"weights": weights.others()}, weights.adapter(), weights.config()))
    assert float(other.get_base_model().model.norm.modules_to_save["default"].count) == 7
    for mine, theirs in zip(one.parameters(), other.parameters()):
        assert torch.equal(mine, theirs)


def test_a_capture_does_not_walk_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[str] = []
    own: Callable[..., Any] = torch.nn.Module.state_dict

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        walks.append(type(self).__name__)
        return own(self, *args, **kwargs)

    trainer = built(Spec(data=sft_data(8)), tmp_path)
    durable = Durable(trainer)
    boundaries = Boundaries(durable, (2, 4), stop=False)
    trainer.add_callback(boundaries)
    monkeypatch.setattr(torch.nn.Module, "state_dict", counted)
    durable.train()
    assert sorted(boundaries.taken) == [2, 4]
    assert not walks
