"""Where bfloat16 is slow: measured, said, and not what the demo takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch

from rapidfire_automl import precision

cpu_only = pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU is there: the CPU's formats don't matter")


def base(dtype: torch.dtype, parameters: float = 1e8) -> Any:
    tensor = torch.empty(1, dtype=dtype)
    return SimpleNamespace(parameters=lambda: iter([tensor]), num_parameters=lambda: parameters)


def test_the_cost_is_measured_once() -> None:
    assert 0.01 < precision.bfloat16_cost() < 1000
    assert precision.bfloat16_cost() == precision.bfloat16_cost()


@cpu_only
@pytest.mark.parametrize("cost", [0.2, 40.0])
def test_what_is_said(monkeypatch: pytest.MonkeyPatch, cost: float) -> None:
    monkeypatch.setattr(precision, "bfloat16_cost", lambda: cost)
    assert precision.is_bfloat16_fast() == (cost < 1)
    mixed, plain = SimpleNamespace(bf16=True), SimpleNamespace(bf16=False)
    slow = [
        precision.why_slow(base(torch.bfloat16), plain),
        precision.why_slow(base(torch.float32), mixed),
    ]
    assert [("40 times as long" in why) for why in slow] == [cost > 1] * 2
    assert precision.why_slow(base(torch.float32), plain) == ""
    assert precision.why_slow(base(torch.bfloat16, parameters=1e6), mixed) == ""


@cpu_only
@pytest.mark.parametrize(("cost", "dtype"), [(0.2, "bfloat16"), (40.0, "float32")])
def test_the_demo_takes_what_is_fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, cost: float, dtype: str) -> None:
    from rapidfire_automl import demo
    from rapidfire_automl.cli.demo import prepare
    from rapidfire_automl.cli.terminal import Terminal

    monkeypatch.setattr(precision, "bfloat16_cost", lambda: cost)
    monkeypatch.setattr(demo, "base_path", lambda: tmp_path / "base")
    given = ["base.dtype='float16'"]
    terminal = Terminal(quiet=True)
    settings = prepare(tmp_path, terminal, [], None, None)
    assert (settings.base.dtype, settings.args.get("bf16")) == (dtype, None if cost < 1 else False)
    assert prepare(tmp_path, terminal, given, None, None).base.dtype == "float16"


@pytest.mark.slow
def test_a_search_says_once_that_it_is_slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from rapidfire_automl.executor import runner
    from tests.executor.searches import make_executor, sft

    monkeypatch.setattr(runner, "why_slow", lambda model, args: f"{args.bf16} is slow")
    said = []
    executor = make_executor(slots=2, chunks=2, output_dir=tmp_path)
    executor.add_listener(lambda event: said.append(event.data["message"]) if event.kind == "warning" else None)
    with executor:
        executor.optimize(optuna.create_study(), lambda trial: sft(executor, trial, lr=0.01), n_trials=2)
    assert said == ["False is slow"]
