"""The joint pass's own arithmetic against the stock modules': head, norm, attention, dropout under checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from trl.trainer.utils import add_fused_lm_head

from rapidfire_automl.executor import attention, seams
from rapidfire_automl.executor.adapters import AdapterBank, LoraSite
from rapidfire_automl.executor.attention import _CausalAttention
from rapidfire_automl.executor.head import FIELDS, Head, entropy_jacobian, score
from rapidfire_automl.executor.lean import LeanMLP, LeanRMSNorm
from rapidfire_automl.executor.passes import Multiplexer
from rapidfire_automl.executor.requests import Forward, HeadSpec
from tests.executor.helpers import VOCAB, tiny_llama

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def relative(value: Tensor, expected: Tensor) -> float:
    """Difference in units of the expected norm."""
    return float((value.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def draws(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# -- head --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("temperature", "logit_scale"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.25)])
def test_head_gives_what_trls_kernel_gives(
    dtype: torch.dtype, bias: bool, temperature: float, logit_scale: float
) -> None:
    from trl.kernels import ChunkedLogProbFunction

    hidden = draws(37, 16, dtype=dtype).requires_grad_()
    weight = draws(VOCAB, 16, seed=1, dtype=dtype)
    offset = draws(VOCAB, seed=2, dtype=dtype) if bias else None
    targets = torch.randint(VOCAB, (37,), generator=torch.Generator().manual_seed(3))
    expected = dict(
        zip(
            ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
            ChunkedLogProbFunction.apply(
                hidden, weight, offset, targets, temperature, 64, None, logit_scale, FIELDS[1:]
            ),
            strict=True,
        )
    )
    up = draws(2, 37, seed=4)
    torch.autograd.backward([expected["log_probs"], expected["entropy"]], [up[0], up[1]])
    head = Head(weight, offset, logit_scale)
    inverse = torch.full((37,), 1 / temperature) if temperature != 1 else None
    result = score(
        hidden.detach(), targets, head, frozenset(FIELDS), inverse_temperature=inverse, with_gradient=True, dtype=dtype
    )
    assert result.fields.keys() == set(FIELDS)
    for name in FIELDS:
        assert relative(result.fields[name], expected[name].detach()) < TOLERANCE[dtype], name
    slope = entropy_jacobian(hidden.detach(), head, inverse_temperature=inverse, dtype=dtype)
    assert result.jacobian is not None
    assert hidden.grad is not None
    got = up[0][:, None] * result.jacobian + up[1][:, None] * slope
    assert relative(got, hidden.grad) < TOLERANCE[dtype]


def test_head_works_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = draws(29, 16), draws(VOCAB, 16, seed=1)
    targets = torch.arange(29)
    settings: dict[str, Any] = {"with_gradient": True, "dtype": torch.float32}
    inverse = torch.linspace(0.5, 2.0, 29)
    whole = score(hidden, targets, Head(weight, None), frozenset(FIELDS), inverse_temperature=inverse, **settings)
    monkeypatch.setattr("rapidfire_automl.executor.head._TILE_BYTES", 4 * VOCAB * 7)
    tiled = score(hidden, targets, Head(weight, None), frozenset(FIELDS), inverse_temperature=inverse, **settings)
    for name in FIELDS:
        torch.testing.assert_close(tiled.fields[name], whole.fields[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tiled.jacobian, whole.jacobian, rtol=1e-5, atol=1e-6)


def test_nobody_waits_for_a_head_without_positions() -> None:
    nothing = score(
        draws(0, 16), torch.zeros(0, dtype=torch.long), Head(draws(VOCAB, 16), None), frozenset(FIELDS),
        inverse_temperature=None, with_gradient=True, dtype=torch.float32,
    )  # fmt: skip
    assert all(len(x) == 0 for x in nothing.fields.values())


# -- norm --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_norm_gives_what_llamas_gives(dtype: torch.dtype) -> None:
    stock = LlamaRMSNorm(64, eps=1e-5)
    stock.weight.data = draws(64, seed=1)
    stock = stock.to(dtype).requires_grad_(False)
    up = draws(3, 5, 64, seed=2, dtype=dtype)
    grads, outs = [], []
    for norm in (stock, LeanRMSNorm(stock)):
        x = (3 * draws(3, 5, 64, dtype=dtype)).requires_grad_()
        out = norm(x)
        out.backward(up)
        assert x.grad is not None
        grads.append(x.grad)
        outs.append(out.detach())
    assert outs[0].dtype == outs[1].dtype == dtype
    assert relative(outs[1], outs[0]) < (1e-6 if dtype == torch.float32 else 1e-3)
    assert relative(grads[1], grads[0]) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_mlp_gives_what_llamas_gives(dtype: torch.dtype) -> None:
    stock = tiny_llama(dtype).requires_grad_(False).model.layers[0].mlp
    results = []
    for mlp in (stock, LeanMLP(stock)):
        x = draws(3, 5, 64, dtype=dtype).requires_grad_()
        out = mlp(x)
        out.backward(draws(3, 5, 64, seed=2, dtype=dtype))
        results.append([out.detach(), x.grad])
    for stock_result, ours in zip(*results, strict=True):
        assert relative(ours, stock_result) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_lean_parts_are_used() -> None:
    mux = Multiplexer(tiny_llama().requires_grad_(False), AdapterBank(1, torch.device("cpu")))
    kinds = [type(module) for module in mux._mux.modules()]
    assert kinds.count(LeanRMSNorm) == 5
    assert kinds.count(LeanMLP) == 2


def test_lean_norms_gradient_in_float64() -> None:
    lean = LeanRMSNorm(SimpleNamespace(weight=draws(8, seed=1, dtype=torch.float64), variance_epsilon=1e-5))  # type: ignore[arg-type]
    assert torch.autograd.gradcheck(lean, draws(2, 3, 8, dtype=torch.float64).requires_grad_())


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("tokens", [2, 9, 16])
def test_short_attention_gives_what_sdpa_gives(dtype: torch.dtype, heads: int, groups: int, tokens: int) -> None:
    up = draws(3, heads, tokens, 8, seed=9, dtype=dtype)
    results = []
    for kind in ("stock", "ours"):
        q, k, v = (
            draws(3, n, tokens, 8, seed=n + i, dtype=dtype).requires_grad_()
            for i, n in enumerate((heads, groups, groups))
        )
        if kind == "ours":
            out = _CausalAttention.apply(q, k, v, 0.3)
        else:
            wide = [x.repeat_interleave(heads // groups, 1) for x in (k, v)]
            out = nn.functional.scaled_dot_product_attention(q, *wide, is_causal=True, scale=0.3)
        out.backward(up)
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for name, stock, ours in zip(("out", "q", "k", "v"), *results, strict=True):
        assert ours.dtype == dtype
        assert relative(ours, stock) < TOLERANCE[dtype], name


def test_short_attention_is_chosen_for_short_plain_passes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: (calls.append(1), None))
    model = tiny_llama()
    attention.install(model, {"float32": 8})
    module = model.model.layers[0].self_attn

    def attend(tokens: int, mask: Tensor | None = None, **more: Any) -> bool:
        calls.clear()
        q, k = draws(1, 4, tokens, 8), draws(1, 2, tokens, 8)
        attention._attention(module, q, k, k, mask, **more)
        return not calls

    assert attend(8)
    assert not attend(9)
    assert not attend(8, torch.zeros(1, 1, 8, 8))
    assert not attend(8, dropout=0.1)
    assert not attend(8, is_causal=False)
    assert not attend(1)
    attention.install(model, {"float32": 2})
    assert not attend(8)


# -- the joint pass as a whole -----------------------------------------------------------------------------------------


class Member:
    """A trial as a pass sees it."""

    def __init__(self, model: PeftModel, seed: int) -> None:
        self.model = model
        self.sites: Mapping[str, LoraSite] = seams.find_sites(model)[0]
        self.row = -1
        self.state = torch.Generator().manual_seed(seed).get_state()

    def generator(self, device: torch.device) -> torch.Generator:
        generator = torch.Generator(device)
        generator.set_state(self.state)
        return generator

    def put_generator(self, generator: torch.Generator) -> None:
        self.state = generator.get_state()


def lora(base: LlamaForCausalLM, seed: int, **changes: Any) -> PeftModel:
    settings = {
        "r": 3,
        "target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.2,
        "init_lora_weights": False,
    } | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **settings)).train()


def alone(
    member: Member, seed: int, up: Tensor, checkpointing: bool, **inputs: Any
) -> tuple[Tensor, list[Tensor], Tensor]:
    """PEFT's own forward and backward: hidden states, gradients, and where the generator ends."""
    model = copy.deepcopy(member.model)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hidden = model.get_base_model().model(use_cache=False, **inputs).last_hidden_state
        state = torch.get_rng_state()
        hidden.backward(up)
    return hidden.detach(), [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None], state


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_joint_pass_is_every_trials_own_pass(checkpointing: bool) -> None:
    """Ragged rows and widths, other ranks and sites, left and right padding, packed rows; dropout draws included."""
    base = tiny_llama().requires_grad_(False)
    members = [
        Member(lora(base, 0), 0),
        Member(lora(base, 1, r=6, target_modules="all-linear", lora_dropout=0.4), 1),
        Member(lora(base, 2, lora_dropout=0.0, use_rslora=True), 2),
    ]
    inputs: list[dict[str, Tensor]] = []
    for seed, (rows, width) in enumerate([(2, 7), (3, 5), (1, 11)]):
        ids = torch.randint(4, VOCAB, (rows, width), generator=torch.Generator().manual_seed(seed))
        inputs.append({"input_ids": ids})
    inputs[0]["attention_mask"] = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    inputs[2]["position_ids"] = torch.tensor([[*range(4), *range(7)]])
    for left_padded in (False, True):
        if left_padded:
            inputs[1]["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1]])
        bank = AdapterBank(2, torch.device("cpu"))
        mux = Multiplexer(base, bank)
        for seed, member in enumerate(members):
            member.row = bank.add(member.sites)
            member.state = torch.Generator().manual_seed(seed).get_state()
            mux.wrap(member.sites)
        requests = [
            (member, Forward(**({"attention_mask": None, "position_ids": None} | given), grad=True, autocast=None,
                             checkpointing=checkpointing, adapter=True))
            for member, given in zip(members, inputs, strict=True)
        ]  # fmt: skip
        kinds: dict[Any, list[Any]] = {}
        for pair in requests:
            kinds.setdefault(pair[1].kind, []).append(pair)
        done = [mux.forward(together) for together in kinds.values()]
        parts = {id(part.member): (part, opened) for group, opened in done for part in group}
        ups = {}
        for seed, member in enumerate(members):
            leaf = parts[id(member)][0].leaves["hidden"]
            ups[id(member)] = up = draws(*leaf.shape, seed=seed)
            if (mask := inputs[seed].get("attention_mask")) is not None:
                up *= mask[:, :, None]
            leaf.grad = up
        for _, opened in done:
            assert opened is not None
            mux.backward(opened)
        for seed, (member, given) in enumerate(zip(members, inputs, strict=True)):
            hidden, grads, state = alone(member, seed, ups[id(member)], checkpointing, **given)
            mine = parts[id(member)][0].leaves["hidden"].detach()
            if (mask := given.get("attention_mask")) is not None:
                hidden, mine = hidden[mask.bool()], mine[mask.bool()]
            assert relative(mine, hidden) < 1e-5
            own = [p for p in member.model.parameters() if p.requires_grad]
            assert len(own) == len(grads)
            for p, expected in zip(own, grads, strict=True):
                assert p.grad is not None
                assert relative(p.grad, expected) < 1e-5
                p.grad = None
            assert torch.equal(member.state, state), "the generator stands elsewhere"
            bank.remove(member.row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_joint_pass_in_mixed_precision(dtype: torch.dtype, autocast: bool) -> None:
    """float32 adapters on either base, with and without autocast: the same draws, and numbers within bfloat16's."""
    base = tiny_llama(dtype).requires_grad_(False)
    members = [Member(lora(base, 0), 0), Member(lora(base, 1, r=6, target_modules="all-linear", lora_dropout=0.4), 1)]
    bank = AdapterBank(2, torch.device("cpu"))
    mux = Multiplexer(base, bank)
    requests = []
    kind = torch.bfloat16 if autocast else None
    for seed, member in enumerate(members):
        assert next(iter(member.sites.values())).a.dtype == torch.float32
        member.row = bank.add(member.sites)
        mux.wrap(member.sites)
        ids = torch.randint(4, VOCAB, (2 + seed, 6), generator=torch.Generator().manual_seed(seed))
        requests.append((member, Forward(ids, None, None, grad=True, autocast=kind, checkpointing=False, adapter=True)))
    parts, opened = mux.forward(requests)
    assert opened is not None
    ups = [draws(*part.leaves["hidden"].shape, seed=9, dtype=part.leaves["hidden"].dtype) for part in parts]
    for part, up in zip(parts, ups, strict=True):
        part.leaves["hidden"].grad = up
    mux.backward(opened)
    tolerance = 1e-5 if dtype == torch.float32 and not autocast else 5e-2
    for seed, (member, part) in enumerate(zip(members, parts, strict=True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden, grads, state = alone(member, seed, ups[seed], False, input_ids=requests[seed][1].input_ids)
        leaf = part.leaves["hidden"]
        assert leaf.dtype == hidden.dtype
        assert relative(leaf.detach(), hidden) < tolerance
        own = [p for p in member.model.parameters() if p.requires_grad]
        apart = [relative(p.grad, expected) for p, expected in zip(own, grads, strict=True) if p.grad is not None]
        assert len(apart) == len(own)
        print(f"{dtype} autocast={autocast}: hidden {relative(leaf.detach(), hidden):.1e} gradients {max(apart):.1e}")
        assert max(apart) < tolerance
        assert torch.equal(member.state, state), "the generator stands elsewhere"


def test_a_pass_can_be_run_again() -> None:
    """After out of memory: the same dropout, the same gradients, and nobody's generator moves."""
    base = tiny_llama().requires_grad_(False)
    member = Member(lora(base, 0), 0)
    bank = AdapterBank(1, torch.device("cpu"))
    mux = Multiplexer(base, bank)
    member.row = bank.add(member.sites)
    mux.wrap(member.sites)
    ids = torch.arange(4, 16).view(2, 6)
    request = Forward(ids, None, None, grad=True, autocast=None, checkpointing=False, adapter=True).with_head(
        HeadSpec(frozenset({"log_probs"})), ids[:, 1:], torch.ones(2, 5, dtype=torch.bool)
    )
    parts, opened = mux.forward([(member, request)])
    assert opened is not None
    after = member.state.clone()
    parts[0].leaves["log_probs"].sum().backward()
    mux.backward(opened)
    own = [p for p in member.model.parameters() if p.requires_grad]
    first = [p.grad.clone() for p in own if p.grad is not None]
    for p in own:
        p.grad = None
    mux.again(parts)
    assert torch.equal(member.state, after)
    for p, expected in zip(own, first, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, expected, rtol=1e-6, atol=1e-8)


def test_the_joint_head_is_trls_fused_head() -> None:
    """Per-token fields on a pass's own hidden states, zero where nothing is scored."""
    base = tiny_llama().requires_grad_(False)
    fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    stock = copy.deepcopy(base)
    add_fused_lm_head(stock, temperature=0.8, outputs=fields)
    spec = seams.fused_head_settings(stock.forward)
    assert spec == HeadSpec(frozenset(fields), inverse_temperature=1 / 0.8, logit_scale=1.0)
    ids = torch.arange(4, 24).view(4, 5)
    labels = ids.clone()
    labels[0, :3] = labels[2] = -100
    expected = stock(input_ids=ids, labels=labels, fused_lm_head=True)
    mux = Multiplexer(base, AdapterBank(1, torch.device("cpu")))
    member = SimpleNamespace(row=-1, sites={}, generator=torch.Generator, put_generator=lambda generator: None)
    request = Forward(ids, None, None, grad=False, autocast=None, checkpointing=False, adapter=False)
    parts, opened = mux.forward([(member, request.with_head(spec, labels[:, 1:], labels[:, 1:] != -100))])  # type: ignore[list-item]
    assert opened is None
    for name in fields:
        assert parts[0].leaves[name].dtype == expected[name].dtype, name
        torch.testing.assert_close(parts[0].leaves[name], expected[name], rtol=1e-5, atol=1e-5)
