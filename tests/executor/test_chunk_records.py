"""What a chunk leaves in a record beside its value: logged metrics and costs, and that policies see both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from peft import LoraConfig

from rapidfire_automl import RapidFireExecutor
from rapidfire_automl.records import TrialRecord
from rapidfire_policies import ASHA, CostAware
from tests.executor.searches import LRS, TRAIN, Do, Scripted, by_lr, search, sft

pytestmark = pytest.mark.slow


def logging_every(steps: int, **given: Any) -> Callable[[RapidFireExecutor], Any]:
    return lambda executor: by_lr(executor, logging_steps=steps, **given)


@pytest.mark.parametrize("threads", [False, True])
def test_metrics_are_the_means_of_what_was_logged_in_the_chunk(threads: bool) -> None:
    policy = Scripted({(1, 2): "stop"})
    done = search(LRS[:2], policy, threads=threads)
    for number, chunks in ((0, 3), (1, 2)):
        record = done.executor.records[number]
        losses = done.losses(number)
        assert len(losses) == 2 * chunks
        expected = [sum(losses[2 * k : 2 * k + 2]) / 2 for k in range(chunks)]
        assert record.metrics["loss"] == expected
        assert {"grad_norm", "learning_rate", "mean_token_accuracy"} <= set(record.metrics)
        assert {len(numbers) for numbers in record.metrics.values()} == {chunks}
        assert not {"epoch", "step", "train_runtime"} & set(record.metrics)
    shown = policy.seen[-1].trials[0]
    assert shown.metrics["loss"] == tuple(done.executor.records[0].metrics["loss"][: shown.resource])


def test_a_chunk_without_a_log_has_nan() -> None:
    done = search(LRS[:1], objective=logging_every(4))
    loss = done.executor.records[0].metrics["loss"]
    assert [math.isnan(value) for value in loss] == [True, False, True]
    assert loss[1] == done.losses(0)[0]


def test_without_any_log_there_are_no_metrics() -> None:
    done = search(LRS[:1], objective=logging_every(1, logging_strategy="no"))
    assert done.executor.records[0].metrics == {}
    assert len(done.values()[0]) == 3


def test_what_a_metric_logs_by_evaluating_is_not_counted() -> None:
    done = search(LRS[:1], metric=lambda trainer: trainer.evaluate()["eval_loss"])
    assert not any(name.startswith("eval") for name in done.executor.records[0].metrics)
    assert done.executor.records[0].metrics["loss"] == search(LRS[:1]).executor.records[0].metrics["loss"]


def test_a_callback_that_suppresses_logging_loses_no_chunk() -> None:
    """The boundary waits for a log that never comes, and is closed before the next step."""

    def objective(executor: RapidFireExecutor) -> Any:
        def build(trial: optuna.Trial) -> Any:
            lr = trial.suggest_float("lr", 1e-5, 1.0, log=True)
            trainer = sft(executor, trial, lr=lr)
            train = trainer.train

            def train_quietly() -> Any:  # a callback behind the executor's own
                trainer.add_callback(Do(lambda control, **_: setattr(control, "should_log", False)))
                return train()

            trainer.train = train_quietly
            return trainer

        return executor.objective(build)

    done = search(LRS[:1], objective=objective)
    assert done.losses(0) == []
    np.testing.assert_allclose(done.values()[0], search(LRS[:1]).values()[0], rtol=1e-6)


def test_a_record_takes_metrics_that_come_late_or_stay_away() -> None:
    record = TrialRecord(0)
    for metrics in ({"loss": 1.0}, {"kl": 2.0}, {"loss": 3.0, "kl": 4.0}):
        record.add_chunk((0.5,), np.empty(0), metrics, seconds=1.0, tokens=10)
    np.testing.assert_equal(record.metrics, {"loss": [1.0, math.nan, 3.0], "kl": [math.nan, 2.0, 4.0]})
    assert (record.values, record.vectors, record.tokens) == ([0.5] * 3, [], [10] * 3)
    assert record.last_vector == (0.5,)
    assert TrialRecord(1).last_vector == ()


def test_tokens_of_an_unfused_trial_are_counted_too() -> None:
    config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    done = search(LRS[:2], objective=lambda executor: by_lr(executor, peft_config=config))
    plain = search(LRS[:2])
    for number, record in done.executor.records.items():
        assert not record.fused
        assert record.tokens == plain.executor.records[number].tokens
        assert sum(record.tokens) == sum(map(len, TRAIN["input_ids"]))


def test_cost_aware_verdicts_repeat() -> None:
    """Tokens, unlike seconds, are the same each time; a trial of two epochs pays twice as much a chunk."""

    def objective(executor: RapidFireExecutor) -> Any:
        def build(trial: optuna.Trial) -> Any:
            lr = trial.suggest_float("lr", 1e-5, 1.0, log=True)
            return sft(executor, trial, lr=lr, num_train_epochs=1 + trial.number % 2)

        return executor.objective(build)

    found = [search(LRS[:6], CostAware(ASHA(reduction_factor=2)), objective=objective, slots=3) for _ in range(2)]
    reasons = [[record.verdicts for record in done.executor.records.values()] for done in found]
    assert reasons[0] == reasons[1]
    assert {"stop"} <= {verdict for verdicts in reasons[0] for _, verdict, _ in verdicts}
    records = found[0].executor.records
    assert sum(records[1].tokens) > 0
    chunks = [record.tokens[0] for record in records.values()]
    assert chunks[1] > 1.5 * chunks[0]
