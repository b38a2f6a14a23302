"""The adapter bank, and adapters on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from trl import DPOTrainer

from rapidfire_automl.executor import seams
from rapidfire_automl.executor.adapters import AdapterBank, LoraSite
from tests.executor.helpers import Spec, open_executor, train_alone, train_together

CPU = torch.device("cpu")


def sites(
    rank: int, seed: int = 0, keys: tuple[str, ...] = ("q", "v"), dtype: torch.dtype = torch.float32
) -> dict[str, LoraSite]:
    """Random adapters on Linears of 6 to 10 features."""
    draw = torch.Generator().manual_seed(seed)
    return {
        key: LoraSite(
            a=nn.Parameter(torch.randn(rank, 6, generator=draw, dtype=dtype)),
            b=nn.Parameter(torch.randn(10, rank, generator=draw, dtype=dtype)),
            scaling=1.0,
            dropout=0.0,
            dropout_module=nn.Identity(),
        )
        for key in keys
    }


def values(adapter: dict[str, LoraSite]) -> list[Tensor]:
    return [x.detach().clone() for site in adapter.values() for x in (site.a, site.b)]


def parameters(adapter: dict[str, LoraSite]) -> list[nn.Parameter]:
    return [x for site in adapter.values() for x in (site.a, site.b)]


# -- the bank ----------------------------------------------------------------------------------------------------------


def test_parameters_become_views_and_keep_their_values() -> None:
    bank = AdapterBank(2, CPU)
    small, large = sites(2), sites(5, seed=1, keys=("v", "o"))
    before = values(small), values(large)
    objects = parameters(small)
    rows = [bank.add(small), bank.add(large)]
    assert parameters(small) == objects or all(a is b for a, b in zip(parameters(small), objects, strict=True))
    for adapter, expected in zip((small, large), before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(values(adapter), expected, strict=True))
    stacked = bank.select(rows)
    a, b = stacked["v"]
    assert a.shape == (2, 5, 6)
    assert b.shape == (2, 5, 10)
    assert torch.equal(a[0, :2], small["v"].a)
    assert torch.equal(b[0, :2], small["v"].b.T)
    assert not a[0, 2:].any()
    assert not b[0, 2:].any()
    assert not stacked["o"][0][0].any(), "a trial without an adapter at a site reads zeros"
    assert bank.sites(rows) == {"q", "v", "o"}
    assert bank.sites(rows[:1]) == {"q", "v"}
    with torch.no_grad():
        small["v"].a.add_(1)
        large["v"].b.mul_(2)
    a, b = bank.select(rows)["v"]
    assert torch.equal(a[0, :2], small["v"].a), "a pass reads what the optimizer wrote"
    assert torch.equal(b[1], large["v"].b.T)


def test_any_rows_in_any_order() -> None:
    bank = AdapterBank(3, CPU)
    adapters = [sites(2, seed=i) for i in range(3)]
    rows = [bank.add(adapter) for adapter in adapters]
    for chosen in ([rows[2], rows[0]], [bank.zero_row, rows[1]], [rows[0], rows[1]], [bank.zero_row]):
        a, b = bank.select(chosen)["q"]
        for i, row in enumerate(chosen):
            if row == bank.zero_row:
                assert not a[i].any()
                assert not b[i].any()
            else:
                assert torch.equal(a[i], adapters[row]["q"].a)
                assert torch.equal(b[i], adapters[row]["q"].b.T)
    assert bank.select(rows, torch.bfloat16)["q"][0].dtype == torch.bfloat16


def test_a_pass_is_as_wide_as_its_own_ranks() -> None:
    """So that a trial alone computes the same whoever is in the bank."""
    bank = AdapterBank(2, CPU)
    rows = [bank.add(sites(2)), bank.add(sites(7, seed=1))]
    assert bank.rank == 7
    assert bank.select(rows[:1])["q"][0].shape == (1, 2, 6)
    assert bank.select(rows[::-1])["q"][0].shape == (2, 7, 6)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_optimizers_survive_growth_and_removal(kind: Any) -> None:
    """Same steps as on parameters that were never moved, with state from before each move."""
    bank = AdapterBank(1, CPU)
    mine, reference = sites(3), sites(3)
    settings: dict[str, Any] = {"lr": 0.1} | ({"momentum": 0.9} if kind is not torch.optim.AdamW else {})
    optimizers = [kind(parameters(adapter), **settings) for adapter in (mine, reference)]

    def step(seed: int) -> None:
        for adapter, optimizer in zip((mine, reference), optimizers, strict=True):
            draw = torch.Generator().manual_seed(seed)
            for p in parameters(adapter):
                p.grad = torch.randn(p.shape, generator=draw)
            optimizer.step()
            optimizer.zero_grad()
        for x, y in zip(values(mine), values(reference), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)

    step(0)
    row = bank.add(mine)
    step(1)
    version = bank.version
    other = bank.add(sites(6, seed=1, keys=("q", "o")))
    assert bank.version > version, "more rows, a higher rank and a new site"
    bank.check(row)
    assert torch.equal(bank.select([row])["v"][1][0], mine["v"].b.T)
    step(2)
    bank.remove(other)
    step(3)
    bank.remove(row)
    assert not bank.select([0, 1])["q"][0].any()
    step(4)
    assert all(p.is_contiguous() or p.T.is_contiguous() for p in parameters(mine))


def test_a_freed_row_is_clean_and_used_again() -> None:
    bank = AdapterBank(2, CPU)
    bank.add(sites(2))
    sick = sites(4, seed=1)
    row = bank.add(sick)
    with torch.no_grad():
        sick["q"].a.fill_(float("nan"))
    bank.remove(row)
    fresh = sites(1, seed=2, keys=("v",))
    assert bank.add(fresh) == row
    assert all(torch.isfinite(x).all() for pair in bank.select([row]).values() for x in pair)
    assert sick["q"].a.isnan().all(), "whoever leaves takes its values along"


def test_a_parameter_that_was_replaced_is_noticed() -> None:
    bank = AdapterBank(1, CPU)
    adapter = sites(2)
    row = bank.add(adapter)
    bank.check(row)
    adapter["v"].b.data = adapter["v"].b.data.clone()
    with pytest.raises(RuntimeError, match="replaced"):
        bank.check(row)


def test_one_dtype_at_a_time() -> None:
    bank = AdapterBank(2, CPU)
    row = bank.add(sites(2))
    with pytest.raises(ValueError, match="bfloat16"):
        bank.add(sites(2, dtype=torch.bfloat16))
    bank.remove(row)
    bank.reset()
    half = sites(2, dtype=torch.bfloat16)
    before = values(half)
    bank.add(half)
    assert bank.dtype == torch.bfloat16
    assert all(torch.equal(x, y) for x, y in zip(values(half), before, strict=True))


# -- which adapters can join -------------------------------------------------------------------------------------------

UNFUSABLE: dict[str, dict[str, Any]] = {
    "DoraLinearVariant": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["norm"]},
    "trainable_token_indices": {"trainable_token_indices": [4]},
    "lora_bias": {"lora_bias": True},
    "LoRA on Embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "outside the backbone": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("why", UNFUSABLE)
def test_adapters_that_cannot_join_say_why(why: str, base: LlamaForCausalLM) -> None:
    config = LoraConfig(**({"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | UNFUSABLE[why]))
    found, reason = seams.find_sites(get_peft_model(copy.deepcopy(base), config))
    assert not found
    assert why in reason


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"init_lora_weights": "pissa"}, marks=pytest.mark.slow),
        pytest.param({"init_lora_weights": "pissa_niter_4"}, marks=pytest.mark.slow),
        pytest.param({"init_lora_weights": "olora"}, marks=pytest.mark.slow),
        pytest.param({"bias": "all"}, marks=pytest.mark.slow),
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_adapters_that_rewrite_the_base_are_refused_and_harm_nobody(
    base: LlamaForCausalLM, tmp_path: Path, settings: dict[str, Any]
) -> None:
    before = {name: p.clone() for name, p in base.named_parameters()}
    good, bad = Spec(), Spec(lora=settings)
    expected = train_alone(base, good, tmp_path / "alone")
    with open_executor(base, tmp_path, slots=2) as executor:
        assert executor._base is not None
        shared = executor._base.model

        def objective(trial: optuna.Trial) -> Any:
            return (bad, good)[trial.number].build(executor.model(trial), executor.tokenizer, tmp_path)

        executor.optimize(optuna.create_study(), objective, n_trials=2)
        assert next(iter(settings)) in str(executor.records[0].error)
        assert executor.records[1].log_history[-1]["train_loss"] == pytest.approx(
            expected.log[-1]["train_loss"], rel=1e-6
        )
        for name, p in shared.named_parameters():
            assert torch.equal(p, before[name])
            assert not p.requires_grad


# -- on disk -----------------------------------------------------------------------------------------------------------

SAVED = {
    "LoRA": Spec(lora={"lora_dropout": 0.1}),
    "rsLoRA, patterns": Spec(
        lora={"r": 6, "use_rslora": True, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}},
        args={"gradient_checkpointing": True},
    ),
    "DPO": Spec(trainer=DPOTrainer, lora={"r": 2}),
    "DoRA": Spec(lora={"use_dora": True}),
    "modules_to_save": Spec(lora={"modules_to_save": ["norm"]}),
}


@pytest.mark.slow
def test_saved_adapters_load_with_plain_peft(base: LlamaForCausalLM, tmp_path: Path) -> None:
    """And give the logits of the trainer's own model, and of the oracle's."""
    ids = torch.arange(4, 28).view(2, 12)

    def logits_of(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    together = train_together(base, list(SAVED.values()), tmp_path)
    untrained = logits_of(copy.deepcopy(base))
    for (name, spec), result in zip(SAVED.items(), together, strict=True):
        assert result.record is not None
        folder = result.record.adapter
        assert folder == str(tmp_path / "out" / "trials" / str(result.record.number) / "adapter")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        logits = logits_of(loaded)
        assert torch.equal(logits, logits_of(result.trainer.model)), name
        moved = (logits - untrained).norm()
        assert moved > 0
        alone = logits_of(train_alone(base, spec, tmp_path / "alone").trainer.model)
        assert (logits - alone).norm() < 1e-4 * moved, name
        torch.testing.assert_close(logits_of(loaded.merge_and_unload()), logits, rtol=1e-4, atol=1e-4)
