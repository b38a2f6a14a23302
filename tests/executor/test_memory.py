"""What trials cost in memory: adapters and optimizer state, never another base."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.executor.helpers import Spec, open_executor

pytestmark = pytest.mark.slow

SPEC = Spec(lora={"r": 4}, args={"max_steps": 4})


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def test_clones_share_the_bases_tensors(base: LlamaForCausalLM, tmp_path: Path) -> None:
    """While they train and after: the same objects, new modules."""
    with open_executor(base, tmp_path, slots=3) as executor:
        assert executor._base is not None
        shared = tensors(executor._base.model)
        modules = {id(module) for module in executor._base.model.modules()}
        clones: list[LlamaForCausalLM] = []

        def objective(trial: optuna.Trial) -> Any:
            clones.append(executor.model(trial))
            assert all(x is shared[name] for name, x in tensors(clones[-1]).items())
            assert not modules & {id(module) for module in clones[-1].modules()}
            assert clones[-1].config is not executor._base.model.config
            return SPEC.build(clones[-1], executor.tokenizer, tmp_path)

        executor.optimize(optuna.create_study(), objective, n_trials=3)
        pointers = {x.data_ptr() for x in shared.values()}
        for clone in clones:
            own = {n: x for n, x in tensors(clone).items() if x.data_ptr() not in pointers}
            assert own
            assert all("lora_" in name for name in own)
        adapter = sum(p.nbytes for p in clones[0].parameters() if p.requires_grad)
        assert executor._base.bank.nbytes == 4 * adapter, "three rows and the empty one"


def test_finished_trials_are_freed(base: LlamaForCausalLM, tmp_path: Path) -> None:
    with open_executor(base, tmp_path, slots=2) as executor:
        alive: list[weakref.ref[Any]] = []

        def objective(trial: optuna.Trial) -> Any:
            trainer = SPEC.build(executor.model(trial), executor.tokenizer, tmp_path)
            alive.extend(
                [weakref.ref(trainer), weakref.ref(trainer.model), weakref.ref(trainer.model.get_base_model())]
            )
            return trainer

        executor.optimize(optuna.create_study(), objective, n_trials=4)
        gc.collect()
        assert len(alive) == 12
        assert not [ref() for ref in alive if ref() is not None]
        assert len(executor.records) == 4


def test_close_frees_everything(base: LlamaForCausalLM, tmp_path: Path) -> None:
    """With a trial that fails and one that is in the middle of its chunk when the search ends."""
    executor = open_executor(base, tmp_path, slots=2)
    with executor:
        assert executor._base is not None
        things = [
            executor._base,
            executor._base.bank,
            executor._base.multiplexer,
            executor._conductor,
            executor._base.model,
        ]
        alive: list[weakref.ref[Any]] = [weakref.ref(thing) for thing in things]
        pointer = next(executor._base.model.parameters())
        alive.append(weakref.ref(pointer))
        del pointer, things

        def objective(trial: optuna.Trial) -> Any:
            trainer = SPEC.build(executor.model(trial), executor.tokenizer, tmp_path)
            alive.append(weakref.ref(trainer))
            if trial.number == 1:
                raise ValueError("on purpose")
            return trainer

        executor.optimize(optuna.create_study(), objective, n_trials=3)
    executor._model_like = None  # what the caller passed in is the caller's
    gc.collect()
    assert len(alive) == 9
    assert not [ref() for ref in alive if ref() is not None]
    assert len(executor.records) == 3


_MEASURE = """
import json, resource, sys, tempfile
from pathlib import Path
from tests.executor.helpers import Spec, tiny_llama, train_together
import tests.executor.helpers as helpers
import copy

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

helpers.copy = type("", (), {"deepcopy": staticmethod(lambda x: x)})  # the base is the caller's, not a copy
base = tiny_llama(hidden_size=768, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=8)
spec = Spec(args={"max_steps": 3, "gradient_checkpointing": True, "per_device_train_batch_size": 1})
folder = Path(tempfile.mkdtemp())
train_together(base, [spec], folder, eval_batch_size=1)
one = peak()
results = train_together(base, [spec] * 9, folder, eval_batch_size=1)
nine = peak()
adapter = sum(p.numel() * 4 for p in results[0].trainer.model.parameters() if p.requires_grad)
print(json.dumps({"base": sum(p.nbytes for p in base.parameters()), "adapter": adapter, "one": one, "nine": nine}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no peak resident size")
def test_eight_more_trials_cost_adapters_and_optimizer_state(tmp_path: Path) -> None:
    """Peak resident size of nine trials against one, in a process of its own, on a base of 140 MB.

    What a trial's modules, data sets and thread take is the same on any base: some 5 MB each.
    """
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "policies")]),
        "MALLOC_ARENA_MAX": "1",  # else each thread keeps free memory of its own
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _MEASURE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    extra = measured["nine"] - measured["one"]
    print({name: f"{size / 2**20:.1f} MiB" for name, size in (measured | {"extra": extra}).items()})
    assert measured["base"] > 120 * 2**20
    assert extra < 8 * 4 * measured["adapter"] + 0.5 * measured["base"]
