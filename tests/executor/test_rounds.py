"""Rounds: chunks, evaluation, one judgement over the whole history, and what becomes of its verdicts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch.nn import functional as F

from rapidfire_automl import RapidFireExecutor
from rapidfire_automl.chunks import chunk_boundaries
from rapidfire_automl.executor import rounds
from rapidfire_automl.plan import Plan
from rapidfire_automl.records import TrialRecord
from rapidfire_policies import ASHA, TrialState
from rapidfire_policies.paired import look_at
from tests.executor.searches import (
    HELD_OUT,
    LRS,
    TRAIN,
    Do,
    Scripted,
    by_lr,
    make_executor,
    search,
    sft,
    study_of,
    tiny_model,
)

pytestmark = pytest.mark.slow

ALONE = Plan(trials_per_pass=1, reason="one trial a pass")
"""With it a trial's numbers do not depend on its neighbours by a single bit."""


def nll_by_hand(model: torch.nn.Module) -> tuple[list[float], list[int]]:
    """Per held-out example: the sum of its tokens' negative log-likelihoods, and their number."""
    sums, counts = [], []
    with torch.no_grad():
        for row in HELD_OUT["input_ids"]:
            ids = torch.tensor([row])
            logits = model(input_ids=ids).logits.double()
            sums.append(float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")))
            counts.append(len(row) - 1)
    return sums, counts


def with_metric(metric: Callable[[Any], Any], lrs: tuple[float, ...] = LRS[:3], **given: Any) -> Any:
    return search(lrs, metric=metric, **given)


# -- verdicts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [False, True])
def test_stop_and_complete(threads: bool) -> None:
    policy = Scripted({(1, 1): "stop", (2, 2): "complete"})
    done = search(policy=policy, threads=threads)
    assert done.states() == ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE"]
    assert [len(values) for values in done.values().values()] == [3, 1, 2, 3]
    assert [len(done.losses(number)) for number in range(4)] == [6, 2, 4, 6]
    assert done.study.trials[1].value == done.values()[1][-1]
    assert done.study.trials[2].value == done.values()[2][-1]
    assert done.study.trials[0].intermediate_values == dict(enumerate(done.values()[0], start=1))
    assert done.verdicts()[1] == [(1, "stop")]
    assert done.verdicts()[2] == [(1, "continue"), (2, "complete")] or done.verdicts()[2] == [(2, "complete")]
    assert done.executor.records[1].verdicts[-1][2] == "scripted at (1, 1)"
    assert done.executor.records[3].verdicts[-1] == (3, "complete", "trained to the end")
    assert [record.state for record in done.executor.records.values()] == [
        TrialState.COMPLETE,
        TrialState.STOPPED,
        TrialState.COMPLETE,
        TrialState.COMPLETE,
    ]


def test_only_complete_trials_leave_an_adapter(tmp_path: Path) -> None:
    done = search(policy=Scripted({(1, 1): "stop", (2, 2): "complete"}), output_dir=tmp_path)
    found = sorted(path.parent.parent.name for path in tmp_path.glob("trials/*/adapter/adapter_config.json"))
    assert found == ["0", "2", "3"]
    assert done.executor.records[1].adapter is None
    assert done.executor.records[2].adapter == str(tmp_path / "trials" / "2" / "adapter")


def test_a_stopped_neighbour_changes_nothing() -> None:
    alone = search(LRS[:4])
    beside = search(LRS[:4], Scripted({(1, 1): "stop", (2, 2): "stop"}))
    np.testing.assert_allclose(beside.losses(0), alone.losses(0), rtol=1e-6)
    np.testing.assert_allclose(beside.values()[3], alone.values()[3], rtol=1e-6)


@pytest.mark.parametrize("threads", [False, True])
def test_pause_gives_the_slot_to_another_and_resume_goes_on_where_it_was(threads: bool) -> None:
    given: dict[str, Any] = {"slots": 2, "plan": ALONE, "threads": threads, "objective": with_dropout}
    whole = search(LRS[:3], **given)
    policy = Scripted({(0, 1): "pause"}, resume={(0, 3): "continue"})
    paused = search(LRS[:3], policy, **given)
    assert paused.states() == ["COMPLETE"] * 3
    assert [paused.losses(number) for number in range(3)] == [whole.losses(number) for number in range(3)]
    assert paused.values() == whole.values()
    assert paused.verdicts()[0] == [(1, "pause"), (1, "continue"), (3, "complete")]
    spans = {number: record.spans for number, record in paused.executor.records.items()}
    assert [len(spans[number]) for number in range(3)] == [2, 1, 1]
    if not threads:  # Optuna's threads may come in another order
        assert spans[0][0][1] <= spans[2][0][0], "the newcomer took the slot"
    first = min(spans[number][0][1] for number in (1, 2))
    assert first <= spans[0][1][0], "a slot was free before the paused one came back"
    assert any(trial.state is TrialState.PAUSED for history in policy.seen for trial in history.trials)


def with_dropout(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
    """An objective whose trials draw random numbers at every step."""
    config = LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return by_lr(executor, peft_config=config)


def test_no_more_trials_train_than_there_are_slots() -> None:
    table = {(0, 1): "pause", (1, 1): "stop", (2, 2): "pause", (4, 1): "complete"}
    done = search(LRS[:6], Scripted(table, resume={(0, 3): "continue", (2, 3): "continue"}), slots=2)
    spans = sorted(span for record in done.executor.records.values() for span in record.spans)
    for start, _ in spans:
        assert sum(begin <= start < end for begin, end in spans) <= 2
    assert sorted(done.states()) == ["COMPLETE"] * 5 + ["PRUNED"]


@pytest.mark.parametrize("threads", [False, True])
def test_if_all_are_paused_and_none_is_to_come_the_rest_ends_as_pruned(threads: bool) -> None:
    policy = Scripted({(number, 1): "pause" for number in range(3)})
    done = search(LRS[:3], policy, threads=threads)
    assert done.states() == ["PRUNED"] * 3
    assert [trial.value for trial in done.study.trials] == [values[0] for values in done.values().values()]
    assert all(record.state is TrialState.STOPPED for record in done.executor.records.values())
    assert all(record.verdicts[-1][:2] == (1, "stop") for record in done.executor.records.values())
    assert all(record.error is None for record in done.executor.records.values())


@pytest.mark.parametrize("threads", [False, True])
def test_if_all_are_paused_the_policy_may_resume_some(threads: bool) -> None:
    table = {(number, 1): "pause" for number in range(3)}
    done = search(LRS[:3], Scripted(table, resume={(1, 1): "continue"}), threads=threads)
    assert done.states() == ["PRUNED", "COMPLETE", "PRUNED"]
    assert len(done.values()[1]) == 3


def test_paused_trials_may_be_stopped_or_completed() -> None:
    table = {(0, 1): "pause", (1, 1): "pause"}
    done = search(LRS[:3], Scripted(table, resume={(0, 2): "stop", (1, 2): "complete"}))
    assert done.states() == ["PRUNED", "COMPLETE", "COMPLETE"]
    assert [len(values) for values in done.values().values()] == [1, 1, 3]


@pytest.mark.parametrize("threads", [False, True])
def test_paused_trials_do_not_pile_up(threads: bool) -> None:
    """No more trials live at a time than `n_jobs`; if all of them are paused, the policy resumes one or they end."""
    policy = Scripted({(number, 1): "pause" for number in range(5)})
    done = search(LRS[:5], policy, slots=2, max_paused=1, threads=threads)
    assert sorted(done.states()) == ["PRUNED"] * 5
    assert max(sum(t.is_live for t in history.trials) for history in policy.seen) == 3


# -- rounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [False, True])
def test_freed_slots_are_filled_in_the_next_round(threads: bool) -> None:
    policy = Scripted({(0, 1): "stop"})
    done = search(LRS[:4], policy, slots=2, threads=threads)
    assert done.states() == ["PRUNED", "COMPLETE", "COMPLETE", "COMPLETE"]
    # Which of Optuna's threads comes first is the machine's affair: in no order.
    seen = [sorted((trial.resource, str(trial.state)) for trial in history.trials) for history in policy.seen[:2]]
    assert seen[0] == [(1, "running"), (1, "running")]
    assert seen[1] == [(1, "running"), (1, "stopped"), (2, "running")]


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("cost", ["tokens", "seconds"])
def test_one_decision_a_round_over_the_whole_history(direction: str, cost: Literal["tokens", "seconds"]) -> None:
    policy = Scripted({(3, 1): "stop"})
    study = study_of(LRS[:4], policy, direction=direction)
    done = search(LRS[:4], study=study, slots=4, cost=cost)
    sign = 1 if direction == "minimize" else -1
    assert len(policy.seen) == 2, "the third round has nobody to judge: all are at their end"
    for round_, history in enumerate(policy.seen, start=1):
        assert (history.chunks, history.slots) == (3, 4)
        assert [trial.number for trial in history.trials] == [0, 1, 2, 3]
        for trial in history.trials:
            record = done.executor.records[trial.number]
            assert trial.resource == (1 if trial.number == 3 else round_)
            assert trial.values == tuple(sign * value for value in record.values[: trial.resource])
            assert all(value > 0 for value in trial.values), "a policy always minimises"
            assert trial.state is (TrialState.STOPPED if (trial.number, round_) == (3, 2) else TrialState.RUNNING)
            assert trial.params == {"lr": LRS[trial.number]}
            assert len(trial.scores) == len(trial.costs) == trial.resource
            for scores, kept in zip(trial.scores, record.scores, strict=False):
                np.testing.assert_array_equal(scores, sign * kept)
            assert trial.costs == tuple(getattr(record, cost)[: trial.resource])
            assert min(trial.costs) > 0


def test_scores_stay_with_their_chunk_where_a_metric_gives_none_at_another() -> None:
    none, some = np.empty(0), np.array([0.0, 1.0])
    kept, bare = TrialRecord(0), TrialRecord(1)
    for value, scores in ((0.9, none), (0.5, some), (0.7, none)):
        kept.add_chunk((value,), scores, {}, 1.0, 1)
        bare.add_chunk((value,), none, {}, 1.0, 1)
    trials = rounds.history([kept, bare], minimize=[False], chunks=4, slots=2).trials
    assert [scores.tolist() for scores in trials[0].scores] == [[], [0.0, -1.0], []]
    assert trials[1].scores == ()
    assert look_at(trials, 2).numbers == (0,)
    assert look_at(trials, 3).numbers == ()


def test_steps_are_paced_within_a_round() -> None:
    """A trial with four times as many steps makes four while its neighbour makes one."""

    def objective(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
        sizes = {0: 4, 1: 1}
        return executor.objective(
            lambda trial: sft(executor, trial, lr=1e-3, per_device_train_batch_size=sizes[trial.number])
        )

    done = search((0.0, 0.0), objective=objective, chunks=1)
    order = [event.trial for event in done.of_kind("step")]
    assert order.count(0) == 3
    assert order.count(1) == 12
    shares = {0: 0.0, 1: 0.0}
    for trial in order:
        shares[trial] += 1 / order.count(trial)
        assert abs(shares[0] - shares[1]) <= 1 / 3 + 1e-9


def test_chunks_are_cut_by_examples_whatever_the_batch() -> None:
    batches = [(1, 1), (2, 1), (3, 1), (2, 2)]

    def objective(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
        def build(trial: optuna.Trial) -> Any:
            size, accumulation = batches[trial.number]
            return sft(
                executor,
                trial,
                lr=1e-3,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                num_train_epochs=2,
            )

        return executor.objective(build)

    done = search((0.0,) * 4, objective=objective)
    for number, (size, accumulation) in enumerate(batches):
        steps = 2 * -(-len(TRAIN) // (size * accumulation))
        expected = list(chunk_boundaries(len(TRAIN), size * accumulation, steps, 3))
        assert done.executor.records[number].boundaries == expected
        at, ends = 0, []
        for event in done.events:
            if event.trial == number and event.kind == "step":
                at = event.data["step"]
            if event.trial == number and event.kind == "chunk_done":
                ends.append(at)
        assert ends == expected


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_scores_are_the_held_out_losses_of_the_saved_adapter() -> None:
    done = search(LRS[:3], eval_batch_size=4)
    for record in done.executor.records.values():
        assert len(record.scores) == len(record.values) == 3
        for value, scores in zip(record.values, record.scores, strict=True):
            assert scores.shape == (len(HELD_OUT),)
            assert scores.mean() == pytest.approx(value, rel=1e-12)
        assert record.adapter is not None
        sums, counts = nll_by_hand(PeftModel.from_pretrained(tiny_model(), record.adapter).eval())
        assert record.values[-1] == pytest.approx(sum(sums) / sum(counts), rel=1e-6)
        np.testing.assert_allclose(record.scores[-1], np.array(sums) * len(sums) / sum(counts), rtol=1e-5)


def test_a_stopped_trials_last_scores_are_those_of_its_chunk() -> None:
    done = search(LRS[:2], Scripted({(1, 2): "complete"}))
    record = done.executor.records[1]
    assert record.adapter is not None
    sums, counts = nll_by_hand(PeftModel.from_pretrained(tiny_model(), record.adapter).eval())
    assert record.values[-1] == pytest.approx(sum(sums) / sum(counts), rel=1e-6)


def test_evaluation_does_not_disturb_training() -> None:
    few = search(LRS[:3], chunks=2, objective=with_dropout)
    many = search(LRS[:3], chunks=6, objective=with_dropout)
    for number in range(3):
        assert few.losses(number) == many.losses(number)
        assert few.values()[number] == many.values()[number][2::3]


def test_a_metric_draws_the_same_numbers_each_time_and_disturbs_nobody() -> None:
    draws: list[tuple[float, float, float]] = []

    def metric(trainer: Any) -> float:
        draws.append((float(torch.rand(())), float(np.random.rand()), random.random()))  # noqa: NPY002
        return 1.0

    done = with_metric(metric, objective=with_dropout)
    assert len(draws) == 1 + 3 * 3
    assert len(set(draws)) == 1
    quiet = search(LRS[:3], objective=with_dropout)
    assert [done.losses(number) for number in range(3)] == [quiet.losses(number) for number in range(3)]


def test_the_base_is_measured_once() -> None:
    done = search(LRS[:2])
    sums, counts = nll_by_hand(tiny_model().eval())
    assert done.executor.base_value == pytest.approx(sum(sums) / sum(counts), rel=1e-6)
    assert done.executor.base_scores is not None
    assert done.executor.base_scores.mean() == pytest.approx(done.executor.base_value, rel=1e-12)
    (event,) = done.of_kind("base_evaluated")
    assert event.data == {"value": done.executor.base_value}
    assert event.trial is None


def test_maximize_negates_the_built_in_metric_and_nothing_else() -> None:
    down = search(LRS[:2])
    up = search(LRS[:2], study=study_of(LRS[:2], direction="maximize"))
    assert up.values() == {number: [-value for value in values] for number, values in down.values().items()}
    assert up.executor.base_value == -down.executor.base_value
    assert up.study.best_trial.number == down.study.best_trial.number
    own = with_metric(lambda trainer: 7.0, LRS[:2], study=study_of(LRS[:2], direction="maximize"))
    assert own.values()[0] == [7.0] * 3


@pytest.mark.parametrize(
    ("returned", "value", "scores"),
    [
        (3, 3.0, None),
        (2.5, 2.5, None),
        (np.float32(2.5), 2.5, None),
        (np.int64(2), 2.0, None),
        (np.array(2.5), 2.5, None),
        (torch.tensor(2.5), 2.5, None),
        ([1.0, 2.0, 6.0], 3.0, [1.0, 2.0, 6.0]),
        (np.array([1.0, 2.0], dtype=np.float32), 1.5, [1.0, 2.0]),
        (torch.tensor([1.0, 2.0]), 1.5, [1.0, 2.0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_metric_may_return_a_number_or_scores(returned: Any, value: float, scores: list[float] | None) -> None:
    done = with_metric(lambda trainer: returned, LRS[:1], chunks=1)
    assert done.states() == ["COMPLETE"]
    assert done.values()[0] == [value]
    assert done.executor.records[0].scores[0].tolist() == (scores or [])


def test_a_metric_by_name() -> None:
    assert search(LRS[:1], metric="nll").values() == search(LRS[:1]).values()


def test_a_metric_sees_the_trainer_and_may_evaluate_with_it() -> None:
    done = with_metric(lambda trainer: trainer.evaluate()["eval_loss"], LRS[:2])
    assert done.states() == ["COMPLETE"] * 2
    reference = search(LRS[:2])
    for number in range(2):
        losses = done.losses(number)
        np.testing.assert_allclose(losses, reference.losses(number), rtol=1e-6)
        np.testing.assert_allclose(done.values()[number], reference.values()[number], rtol=1e-3)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_metric_that_raises_in_one_trial_fails_that_trial_only(broken: int) -> None:
    def metric(trainer: Any) -> float:
        if trainer.args.learning_rate == LRS[broken] and trainer.state.global_step in (0, 4):
            raise ZeroDivisionError("no answers")
        return float(trainer.state.global_step)

    done = with_metric(metric)
    assert done.states() == ["FAIL" if number == broken else "COMPLETE" for number in range(3)]
    assert done.executor.records[broken].error == "ZeroDivisionError: no answers"
    assert done.study.trials[broken].user_attrs["rapidfire:error"] == "ZeroDivisionError: no answers"
    assert done.values()[2] == [2.0, 4.0, 6.0]
    assert done.executor.base_value == 0.0, "another trial measures the base if the first can't"


@pytest.mark.parametrize("returned", [None, "0.5", [], [[1.0]], {"loss": 1.0}])
def test_a_metric_that_returns_something_else_says_so(returned: Any) -> None:
    with pytest.raises(RuntimeError, match="`metric` must return a number or one score an example, got"):
        with_metric(lambda trainer: returned, LRS[:1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("threads", [False, True])
def test_a_last_value_that_is_not_finite_is_never_the_best(bad: float, threads: bool) -> None:
    def metric(trainer: Any) -> float:
        last = trainer.state.global_step == 6
        return bad if last and trainer.args.learning_rate == LRS[0] else 1.0 + trainer.args.learning_rate

    done = with_metric(metric, threads=threads)
    assert done.states() == ["FAIL", "COMPLETE", "COMPLETE"]
    assert done.study.best_trial.number == 2
    assert done.executor.records[0].error == f"ValueError: the last value is {bad}"
    assert done.executor.records[0].state is TrialState.FAILED
    assert done.executor.records[0].adapter is None


def test_a_value_that_was_not_finite_once_does_not_fail_a_trial() -> None:
    done = with_metric(lambda trainer: math.nan if trainer.state.global_step == 2 else 1.0, LRS[:2])
    assert done.states() == ["COMPLETE"] * 2
    assert math.isnan(done.values()[0][0])


def test_asha_stops_a_diverged_trial_and_its_neighbours_train_on() -> None:
    def metric(trainer: Any) -> float:
        return math.nan if trainer.args.learning_rate == LRS[1] else trainer.args.learning_rate

    done = with_metric(metric, LRS[:4], policy=ASHA(reduction_factor=2))
    assert done.states()[1] == "PRUNED"
    assert "not finite" in done.executor.records[1].verdicts[-1][2]


# -- what else may happen to a trial -----------------------------------------------------------------------------------


def test_a_trial_that_raises_frees_its_slot() -> None:
    def objective(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
        def build(trial: optuna.Trial) -> Any:
            lr = trial.suggest_float("lr", 1e-5, 1.0, log=True)
            if trial.number == 0:
                raise LookupError("no such file")
            if trial.number == 1:
                raise optuna.TrialPruned("not worth it")
            callbacks = [Do(lambda **_: 1 / 0)] if trial.number == 2 else None
            return sft(executor, trial, lr=lr, callbacks=callbacks)

        return executor.objective(build)

    done = search(LRS[:5], objective=objective, slots=2)
    assert done.states() == ["FAIL", "PRUNED", "FAIL", "COMPLETE", "COMPLETE"]
    assert done.executor.records[0].error == "LookupError: no such file"
    assert done.executor.records[2].error == "ZeroDivisionError: division by zero"
    assert done.executor.records[2].params == {"lr": LRS[2]}
    told = {event.trial: event.data.get("traceback", "") for event in done.of_kind("trial_ended")}
    assert "in build" in told[0] and "1 / 0" in told[2], "where it was raised"
    assert not told[1] and not told[3]
    reference = search(LRS[:5], slots=2)
    np.testing.assert_allclose(done.losses(3), reference.losses(3), rtol=1e-6)


def test_a_trainer_that_stops_itself_is_a_failure_with_a_reason() -> None:
    def objective(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
        def halt(state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

        def build(trial: optuna.Trial) -> Any:
            lr = trial.suggest_float("lr", 1e-5, 1.0, log=True)
            return sft(executor, trial, lr=lr, callbacks=[Do(halt)] if trial.number == 0 else None)

        return executor.objective(build)

    done = search(LRS[:2], objective=objective)
    assert done.states() == ["FAIL", "COMPLETE"]
    assert "ended itself after 1 of 3 chunks" in (done.executor.records[0].error or "")


def test_a_token_outside_the_vocabulary_fails_its_own_trial_only() -> None:
    def objective(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
        def build(trial: optuna.Trial) -> Any:
            lr = trial.suggest_float("lr", 1e-5, 1.0, log=True)
            rows = TRAIN.map(lambda row: {"input_ids": [100_000, *row["input_ids"]]}) if trial.number == 1 else TRAIN
            return sft(executor, trial, lr=lr, train_dataset=rows)

        return executor.objective(build)

    done = search(LRS[:3], objective=objective)
    assert done.states() == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "IndexError" in (done.executor.records[1].error or "")
    np.testing.assert_allclose(done.losses(0), search(LRS[:3]).losses(0), rtol=1e-6)


def test_a_listener_that_raises_does_not_end_the_search() -> None:
    def listen(event: Any) -> None:
        raise RuntimeError(event.kind)

    events: list[Any] = []
    study = study_of(LRS[:2])
    with make_executor(listeners=[listen, events.append]) as executor:
        executor.optimize(study, by_lr(executor), n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2
    assert sum(event.kind == "trial_ended" for event in events) == 2


# -- events and records ------------------------------------------------------------------------------------------------


def test_events_tell_the_whole_story() -> None:
    done = search(LRS[:3], Scripted({(1, 1): "stop"}))
    assert done.events[0].kind == "plan"
    assert done.events[0].data == {"budget_tokens": 4096, "trials_per_pass": None, "reason": "fixed for the tests"}
    kinds = [(event.kind, event.chunk) for event in done.events if event.trial == 0]
    assert kinds == [
        ("trial_started", 0),
        ("step", 0),
        ("step", 0),
        ("chunk_done", 1),
        ("step", 1),
        ("step", 1),
        ("chunk_done", 2),
        ("step", 2),
        ("step", 2),
        ("chunk_done", 3),
        ("verdict", 3),
        ("trial_ended", 3),
    ]
    stopped = [event for event in done.events if event.trial == 1]
    assert [event.kind for event in stopped[-3:]] == ["chunk_done", "verdict", "trial_ended"]
    said = {"verdict": "stop", "reason": "scripted at (1, 1)", "by": "Scripted", "numbers": {}}
    assert stopped[-2].data == said
    end = stopped[-1].data
    assert (end["state"], end["value"], end["adapter"]) == ("pruned", done.values()[1][0], None)
    start = stopped[0].data
    assert start["params"] == {"lr": LRS[1]}
    assert (start["trainer"], start["max_steps"], start["boundaries"], start["fused"]) == (
        "SFTTrainer",
        6,
        [2, 4, 6],
        True,
    )
    times = [event.time_s for event in done.events]
    assert times == sorted(times)
    steps = [event.data["step"] for event in done.events if event.trial == 2 and event.kind == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]
    chunks = [event.data for event in done.events if event.trial == 2 and event.kind == "chunk_done"]
    record = done.executor.records[2]
    assert [chunk["value"] for chunk in chunks] == record.values
    assert [chunk["seconds"] for chunk in chunks] == record.seconds
    assert [chunk["tokens"] for chunk in chunks] == record.tokens


def test_records() -> None:
    done = search(LRS[:2])
    for number, record in done.executor.records.items():
        assert record.number == number
        assert record.params == {"lr": LRS[number]}
        assert record.trainer == "SFTTrainer"
        assert (record.fused, record.why_unfused, record.error) == (True, "", None)
        assert sum(record.tokens) == sum(map(len, TRAIN["input_ids"]))
        assert len(record.seconds) == 3
        ((start, end),) = record.spans
        assert 0 <= start < end
        assert sum(record.seconds) <= 1.05 * (end - start)
    whole = max(end for record in done.executor.records.values() for _, end in record.spans)
    assert sum(sum(record.seconds) for record in done.executor.records.values()) <= 1.05 * whole
