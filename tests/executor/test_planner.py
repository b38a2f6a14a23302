"""The planner at work: calibration, and passes that do not fit into memory."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

from rapidfire_automl import RapidFireExecutor
from rapidfire_automl.executor.base import Base
from rapidfire_automl.executor.planner import calibrate, plan_for
from rapidfire_automl.plan import Plan
from tests.executor.searches import LRS, TRAIN, Done, by_lr, make_executor, search, sft, tiny_model
from tests.executor.test_rounds import with_dropout

pytestmark = pytest.mark.faults

Full = Callable[[Sequence[Any]], bool]


def out_of_memory_in(method: str, full: Full) -> Callable[[RapidFireExecutor], None]:
    """Have `forward` or `backward` of the multiplexer fail where `full` says so of the trials' parts."""

    def prepare(executor: RapidFireExecutor) -> None:
        assert executor._base is not None
        multiplexer = executor._base.multiplexer
        own = getattr(multiplexer, method)

        def tight(work: Any) -> Any:
            assert sys.exc_info()[0] is None, "the failed pass is still held by its error while it is tried again"
            parts = [request for _, request in work] if method == "forward" else [p for p in work.parts if p.live]
            if full(parts):
                raise torch.OutOfMemoryError("a tiny machine")
            return own(work)

        setattr(multiplexer, method, tight)

    return prepare


def more_than(trials: int, *, times: int = 10_000) -> Full:
    """Say so of passes of more than so many trials, at most so many times."""
    left = [times]

    def full(parts: Sequence[Any]) -> bool:
        left[0] -= len(parts) > trials
        return len(parts) > trials and left[0] >= 0

    return full


def assert_same(done: Done, reference: Done) -> None:
    assert done.states() == reference.states()
    for number in reference.values():
        np.testing.assert_allclose(done.losses(number), reference.losses(number), rtol=1e-6)
        np.testing.assert_allclose(done.values()[number], reference.values()[number], rtol=1e-6)


@pytest.fixture(scope="module")
def reference() -> Done:
    return search(LRS[:4], objective=with_dropout)


@pytest.mark.parametrize("method", ["forward", "backward"])
def test_after_one_out_of_memory_the_budget_is_halved_and_nothing_is_lost(method: str, reference: Done) -> None:
    prepare = out_of_memory_in(method, more_than(2, times=1))
    done = search(LRS[:4], objective=with_dropout, prepare=prepare)
    assert_same(done, reference)
    assert [event.data["budget_tokens"] for event in done.of_kind("out_of_memory")] == [2048]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forward", "backward"])
def test_the_budget_is_halved_until_passes_fit(method: str, reference: Done) -> None:
    prepare = out_of_memory_in(method, more_than(1))
    done = search(LRS[:4], objective=with_dropout, prepare=prepare)
    assert_same(done, reference)
    budgets = [event.data["budget_tokens"] for event in done.of_kind("out_of_memory")]
    assert budgets == [4096 // 2**k for k in range(1, len(budgets) + 1)]
    assert budgets[-1] < 100, "at the end no two trials share a pass"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forward", "backward"])
def test_what_does_not_fit_alone_fails_alone(method: str) -> None:
    def objective(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
        def build(trial: optuna.Trial) -> Any:
            lr = trial.suggest_float("lr", 1e-5, 1.0, log=True)
            rows = TRAIN.map(lambda row: {"input_ids": row["input_ids"] * 4}) if trial.number == 1 else TRAIN
            return sft(executor, trial, lr=lr, train_dataset=rows)

        return executor.objective(build)

    def wide(parts: Sequence[Any]) -> bool:
        requests = [getattr(part, "request", part) for part in parts]
        return any(request.input_ids.shape[1] > 24 for request in requests)

    done = search(LRS[:3], objective=objective, prepare=out_of_memory_in(method, wide))
    assert done.states() == ["COMPLETE", "FAIL", "COMPLETE"]
    error = done.executor.records[1].error or ""
    assert re.match(r"OutOfMemoryError: A pass( of 2 rows of \d+ tokens)? does not fit .* \(a tiny machine\)", error)
    assert "smaller `per_device_train_batch_size`" in error
    assert [event.trial for event in done.of_kind("out_of_memory")][-1] == 1
    assert done.executor.plan.budget_tokens == done.of_kind("out_of_memory")[-1].data["budget_tokens"]
    plain = search(LRS[:3])
    np.testing.assert_allclose(done.losses(0), plain.losses(0), rtol=1e-6)
    np.testing.assert_allclose(done.losses(2), plain.losses(2), rtol=1e-6)


@pytest.mark.slow
def test_an_evaluation_that_does_not_fit_is_split_too(reference: Done) -> None:
    def full(parts: Sequence[Any]) -> bool:
        return len(parts) > 1 and not parts[0].grad

    done = search(LRS[:4], objective=with_dropout, prepare=out_of_memory_in("forward", full))
    assert_same(done, reference)


@pytest.mark.slow
def test_a_small_budget_changes_no_loss(reference: Done) -> None:
    assert_same(search(LRS[:4], objective=with_dropout, plan=Plan(budget_tokens=40)), reference)
    assert_same(search(LRS[:4], objective=with_dropout, plan=Plan(trials_per_pass=1)), reference)


@pytest.mark.slow
def test_a_plan_bounds_the_trials_of_a_pass() -> None:
    sizes: list[int] = []

    def watch(parts: Sequence[Any]) -> bool:
        sizes.append(len(parts))
        return False

    search(LRS[:4], plan=Plan(trials_per_pass=3), prepare=out_of_memory_in("forward", watch))
    assert max(sizes) == 3
    sizes.clear()
    search(LRS[:4], prepare=out_of_memory_in("forward", watch))
    assert max(sizes) == 4


def test_calibration_measures_and_leaves_no_trace() -> None:
    model = tiny_model().requires_grad_(False)
    base = Base(model, slots=4)
    before, drawn = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    plan = calibrate(base, limit_s=1.0)
    sizes = [size for size, _ in plan.tokens_per_s]
    assert sizes == [16, 64, 256, 1024][: len(sizes)]
    assert len(sizes) > 1
    assert all(rate > 0 for _, rate in plan.tokens_per_s)
    assert plan.budget_tokens in sizes
    assert plan.reason
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    base.check()
    assert not base.bank._members


def test_a_calibration_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rapidfire_automl.executor.planner.cache_folder", lambda: tmp_path)
    monkeypatch.setattr("rapidfire_automl.executor.planner._is_busy", lambda: False)
    first = plan_for(Base(tiny_model().requires_grad_(False), slots=4), slots=4)
    assert len(list(tmp_path.glob("plans/*.json"))) == 1
    assert plan_for(Base(tiny_model().requires_grad_(False), slots=4), slots=4) == first
    plan_for(Base(tiny_model(hidden=64).requires_grad_(False), slots=4), slots=4)
    assert len(list(tmp_path.glob("plans/*.json"))) == 2, "another base has a plan of its own"


def test_a_calibration_of_a_busy_machine_is_believed_until_there_is_a_better_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = "rapidfire_automl.executor.planner"
    monkeypatch.setattr(f"{planner}.cache_folder", lambda: tmp_path)
    base = Base(tiny_model().requires_grad_(False), slots=4)

    def next_process(busy: bool) -> Plan:
        monkeypatch.setattr(f"{planner}._in_this_process", {})
        monkeypatch.setattr(f"{planner}._is_busy", lambda: busy)
        return plan_for(base, slots=4)

    rough = next_process(busy=True)
    assert rough.tokens_per_s
    assert next_process(busy=True) == rough
    better = next_process(busy=False)
    assert better.tokens_per_s != rough.tokens_per_s
    assert next_process(busy=True) == better
    assert next_process(busy=False) == better


def test_one_slot_needs_no_calibration() -> None:
    assert plan_for(Base(tiny_model().requires_grad_(False), slots=1), slots=1).trials_per_pass == 1


@pytest.mark.slow
def test_a_search_calibrates_if_no_plan_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rapidfire_automl.executor.planner.cache_folder", lambda: tmp_path)
    monkeypatch.setattr("rapidfire_automl.executor.planner._is_busy", lambda: False)
    done = search(LRS[:2], plan=None)
    plan = done.events[0]
    assert plan.kind == "plan"
    assert plan.data["budget_tokens"] in (16, 64, 256, 1024)
    again = search(LRS[:2], plan=next(tmp_path.glob("plans/*.json")))
    assert again.events[0].data == plan.data, "a recorded plan is replayed"
    assert again.values() == done.values()


def test_explain_says_what_was_chosen_and_what_happened() -> None:
    executor = make_executor(
        plan=Plan(budget_tokens=64, reason="for a test", tokens_per_s=((16, 1000.0), (64, 2000.0)))
    )
    assert executor.explain().startswith("Nothing is planned yet")
    with executor:
        study = optuna.create_study()
        study.enqueue_trial({"lr": 1e-3})
        executor.optimize(study, by_lr(executor, neftune_noise_alpha=5.0), n_trials=1)
        text = executor.explain()
    assert "Plan: 64 tokens and any number of trials a pass; for a test." in text
    assert "16 tokens a pass:     1000 tokens/s" in text
    assert "Trial 0 trains unfused: `neftune_noise_alpha`." in text
    assert "\n\n" not in text


def test_explain_counts_the_joint_passes() -> None:
    executor = make_executor()
    with executor:
        study = optuna.create_study()
        for lr in LRS[:2]:
            study.enqueue_trial({"lr": lr})
        executor.optimize(study, by_lr(executor), n_trials=2)
        assert "Joint passes: " in executor.explain()
        assert " trials each" in executor.explain()
