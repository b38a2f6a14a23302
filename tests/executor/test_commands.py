"""Commands to a search that runs, sent at known moments: by listeners, in the trials' and the conductor's threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from rapidfire_automl import RapidFireExecutor
from rapidfire_automl.control import Sent
from rapidfire_automl.events import Event
from rapidfire_policies import TrialState
from tests.executor.searches import LRS, Do, Done, Scripted, by_lr, search, sft, study_of

pytestmark = pytest.mark.slow


class At:
    """Does something once, at the first event that fits, and keeps what it sends."""

    def __init__(self, executor: RapidFireExecutor) -> None:
        self._executor = executor
        self._plans: list[tuple[Callable[[Event], bool], Callable[[RapidFireExecutor], Any]]] = []
        self.sent: list[Sent] = []
        executor.add_listener(self)

    def when(self, kind: str, trial: int | None, do: Callable[[RapidFireExecutor], Any], **data: Any) -> At:
        def fits(event: Event) -> bool:
            return (
                event.kind == kind
                and event.trial == trial
                and data.items() <= {**event.data, "chunk": event.chunk}.items()
            )

        self._plans.append((fits, do))
        return self

    def __call__(self, event: Event) -> None:
        for plan in list(self._plans):
            if plan[0](event):
                self._plans.remove(plan)
                sent = plan[1](self._executor)
                self.sent += [
                    one for one in (sent if isinstance(sent, (list, tuple)) else [sent]) if isinstance(one, Sent)
                ]


def steer(plan: Callable[[At], Any], *args: Any, **given: Any) -> tuple[Done, At]:
    made: list[At] = []

    def prepare(executor: RapidFireExecutor) -> None:
        made.append(At(executor))
        plan(made[0])

    return search(*args, prepare=prepare, **given), made[0]


def effects(at: At) -> list[tuple[str, str]]:
    return [(sent.command.verb, sent.effect.state if sent.effect else "nothing") for sent in at.sent]


def texts(at: At) -> list[str]:
    return [sent.effect.text if sent.effect else "" for sent in at.sent]


def trains(done: Done) -> list[int | None]:
    """Who made each step, in order."""
    return [event.trial for event in done.of_kind("step")]


def test_pause_in_the_middle_of_a_chunk_and_resume_in_the_same_round() -> None:
    whole = search(LRS[:3])
    done, at = steer(
        lambda at: at.when("step", 0, lambda e: e.pause(0), step=2).when("step", 1, lambda e: e.resume(0), step=3),
        LRS[:3],
        chunks=2,
    )
    assert effects(at) == [("pause", "applied"), ("resume", "applied")]
    assert texts(at)[0] == "paused, at step 2 of 6, in chunk 1 of 2"
    assert done.states() == ["COMPLETE"] * 3
    assert done.losses(0) == pytest.approx(whole.losses(0), rel=1e-6)
    assert len(done.executor.records[0].spans) == 2


def test_a_slot_given_up_in_the_middle_of_a_chunk_goes_to_a_newcomer_and_comes_back_before_the_next() -> None:
    done, at = steer(
        lambda at: at.when("step", 0, lambda e: e.pause(0), step=1).when(
            "chunk_done", 2, lambda e: e.resume(0), chunk=1
        ),
        LRS[:4],
        slots=2,
    )
    assert done.states() == ["COMPLETE"] * 4
    assert texts(at)[1] == "goes on when a slot is free, before newcomers, at step 1 of 6, in chunk 1 of 3"
    assert done.values()[0] == pytest.approx(search(LRS[:1]).values()[0], rel=1e-6)
    spans = {number: record.spans for number, record in done.executor.records.items()}
    assert len(spans[0]) == 2
    assert spans[0][0][1] <= spans[2][0][0] < spans[0][1][0] <= spans[3][0][0]


def test_a_policy_does_not_overrule_a_pause_by_hand_and_does_not_wait_for_it() -> None:
    policy = Scripted(resume={(0, chunk): "continue" for chunk in range(4)})
    done, at = steer(
        lambda at: at.when("step", 0, lambda e: e.pause(0), step=3).when("trial_ended", 1, lambda e: e.resume(0)),
        LRS[:2],
        policy,
    )
    seen = [{trial.number: trial for trial in history.trials} for history in policy.seen]
    states = [str(trials[0].state) for trials in seen if 0 in trials]
    assert states == ["running", "stopped", "running"]
    assert [trials[0].resource for trials in seen] == [1, 1, 2]
    assert done.states() == ["COMPLETE"] * 2
    assert effects(at) == [("pause", "applied"), ("resume", "applied")]


def test_a_trial_the_policy_has_paused_is_resumed_by_hand_and_not_judged_until_its_next_chunk() -> None:
    policy = Scripted({(0, 1): "pause"})
    done, at = steer(lambda at: at.when("step", 1, lambda e: e.resume(0), step=3), LRS[:2], policy)
    assert texts(at) == ["goes on, at the end of chunk 1 of 3"]
    assert done.states() == ["COMPLETE"] * 2
    assert [str(history.trials[0].state) for history in policy.seen] == ["running", "running", "running"]


def test_pause_of_a_trial_that_the_policy_has_paused_holds_it() -> None:
    policy = Scripted({(0, 1): "pause"}, resume={(0, 2): "continue"})
    done, at = steer(
        lambda at: at.when("step", 1, lambda e: e.pause(0), step=3).when("trial_ended", 1, lambda e: e.stop(0)),
        LRS[:2],
        policy,
    )
    assert effects(at) == [("pause", "applied"), ("stop", "applied")]
    assert done.states() == ["PRUNED", "COMPLETE"]
    assert done.study.trials[0].value == done.values()[0][0]


def test_a_pause_at_the_end_of_a_chunk_holds_the_trial_there() -> None:
    """Trial 1 makes the round's last step: by then trial 0 waits at its boundary."""
    done, at = steer(
        lambda at: at.when("step", 1, lambda e: e.pause(0), step=2).when("trial_ended", 1, lambda e: e.resume(0)),
        LRS[:2],
    )
    assert texts(at)[0] in ("paused, at the end of chunk 1 of 3",)
    assert done.executor.records[0].verdicts[0] == (1, "pause", "paused by Python")
    assert done.values()[0] == pytest.approx(search(LRS[:2]).values()[0], rel=1e-6)


@pytest.mark.parametrize("threads", [False, True])
def test_stop_ends_a_trial_within_its_chunk(threads: bool) -> None:
    done, _ = steer(lambda at: at.when("step", 1, lambda e: e.stop(1), step=3), LRS[:3], chunks=2, threads=threads)
    assert done.states() == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert len(done.losses(1)) < 6
    assert done.study.trials[1].value == (done.values()[1][-1] if done.values()[1] else None)
    assert done.executor.records[1].state is TrialState.STOPPED
    assert done.executor.records[1].verdicts[-1][1:] == ("stop", "stopped by Python")
    assert [e.data["reason"] for e in done.of_kind("trial_ended") if e.trial == 1] == ["stopped by Python"]
    assert done.values()[0] == pytest.approx(search(LRS[:1], chunks=2).values()[0], rel=1e-6)


def test_a_trial_that_is_stopped_before_its_first_report_has_no_value() -> None:
    done, at = steer(lambda at: at.when("step", 1, lambda e: e.stop(1), step=1), LRS[:2])
    assert done.states() == ["COMPLETE", "PRUNED"]
    assert done.study.trials[1].value is None
    assert len(done.losses(1)) == 1, "it does not wait for the chunk's end"
    assert "it has reported no value" in texts(at)[0]


@pytest.mark.parametrize("order", ["pause stop", "stop pause"])
def test_of_a_pause_and_a_stop_at_once_the_stop_wins(order: str) -> None:
    def both(e: RapidFireExecutor) -> list[Any]:
        return [getattr(e, verb)(0) for verb in order.split()]

    done, at = steer(lambda at: at.when("step", 0, both, step=1), LRS[:2])
    assert sorted(effects(at)) == [("pause", "refused"), ("stop", "applied")]
    assert done.states() == ["PRUNED", "COMPLETE"]


def test_doubled_commands_are_applied_once() -> None:
    def twice(e: RapidFireExecutor) -> list[Any]:
        first = e.pause(0)
        return [first, e._send(first.command), e.pause(0), e.stop(1), e.stop(1)]

    done, at = steer(
        lambda at: at.when("step", 0, twice, step=1).when("trial_ended", 1, lambda e: e.resume(0)), LRS[:2]
    )
    assert [state for _, state in effects(at)] == ["applied", "applied", "refused", "applied", "refused", "applied"]
    assert texts(at)[2] == "trial 0 is paused by hand already"
    assert texts(at)[4] == "trial 1 is being stopped"
    assert len(done.of_kind("command")) == 5
    assert done.states() == ["COMPLETE", "PRUNED"]


def test_a_resume_takes_back_a_pause_that_has_not_taken_effect() -> None:
    done, at = steer(lambda at: at.when("step", 0, lambda e: [e.pause(0), e.resume(0)], step=1), LRS[:2])
    assert effects(at) == [("pause", "applied"), ("resume", "applied")]
    assert len(done.executor.records[0].spans) == 1
    assert done.states() == ["COMPLETE"] * 2


def test_a_pause_takes_back_a_resume_that_has_no_slot_yet() -> None:
    done, at = steer(
        lambda at: (
            at.when("step", 0, lambda e: e.pause(0), step=1)
            .when("step", 2, lambda e: [e.resume(0), e.pause(0)], step=1)
            .when("trial_ended", 2, lambda e: e.resume(0))
        ),
        LRS[:3],
        slots=2,
        max_paused=2,
    )
    assert [state for _, state in effects(at)] == ["applied"] * 4
    assert done.states() == ["COMPLETE"] * 3


def test_what_is_refused_says_why() -> None:
    def all_of(e: RapidFireExecutor) -> list[Any]:
        verbs = [e.resume, e.pause, e.stop, lambda trial: e.extend(trial, 1)]
        return [*(verb(0) for verb in verbs), e.resume(1), e.stop(7), e.clone(7), e.clone(1, warm_start=True)]

    done, at = steer(
        lambda at: at.when("step", 0, lambda e: e.stop(0), step=1).when("step", 1, all_of, step=3),
        LRS[:2],
    )
    assert effects(at)[0] == ("stop", "applied")
    assert texts(at)[1:5] == ["trial 0 was stopped"] * 4
    assert texts(at)[5] == "trial 1 is training"
    assert texts(at)[6:8] == ["trial 7 is unknown: there are 0 to 1"] * 2
    assert {state for _, state in effects(at)[1:8]} == {"refused"}
    refused = [event.data["text"] for event in done.of_kind("command") if event.data["effect"] == "refused"]
    assert refused == texts(at)[1:8], "refusals are logged, too"


def test_a_finished_trial_says_so() -> None:
    done, at = steer(lambda at: at.when("trial_ended", 0, lambda e: [e.stop(0), e.pause(0)]), LRS[:3], slots=1)
    assert texts(at) == ["trial 0 is complete"] * 2
    assert done.states() == ["COMPLETE"] * 3


def test_commands_after_the_end_are_refused() -> None:
    done, at = steer(lambda at: at.when("verdict", 0, lambda e: e.resume(0), chunk=3), LRS[:1])
    assert effects(at) == [("resume", "refused")]
    with pytest.raises(ValueError, match="`pause` steers a search that runs: the search has ended"):
        done.executor.pause(0)


def test_cancel_keeps_what_has_finished_and_the_adapters_of_the_rest(tmp_path: Path) -> None:
    steps = Steps()
    done, at = steer(
        lambda at: at.when("step", 1, lambda e: e.pause(1), step=1).when("step", 2, lambda e: e.cancel(), step=3),
        LRS[:4],
        slots=1,
        objective=steps.objective(),
        output_dir=tmp_path,
    )
    assert effects(at) == [("pause", "applied"), ("cancel", "applied")]
    assert done.states() == ["COMPLETE", "FAIL", "FAIL", "WAITING"], "no further trial is asked for"
    assert done.executor.cancelled
    for number, step in ((1, 1), (2, 3)):  # paused, and in the middle of a chunk
        folder = done.executor.records[number].adapter
        assert folder == done.study.trials[number].user_attrs["rapidfire:adapter"]
        saved = load_file(Path(str(folder)) / "adapter_model.safetensors")
        assert sorted(x.sum().item() for x in saved.values()) == pytest.approx(steps.sums(number, step), abs=1e-6)


def test_a_search_whose_last_trial_is_paused_by_hand_waits_for_it() -> None:
    """The warning is the only event while all waits, and it is what the resume answers to."""
    done, _ = steer(
        lambda at: at.when("step", 0, lambda e: e.pause(0), step=3).when("warning", None, lambda e: e.resume(0)),
        LRS[:1],
    )
    assert "resume, stop or cancel" in done.of_kind("warning")[0].data["message"]
    assert done.states() == ["COMPLETE"]
    assert done.values()[0] == search(LRS[:1]).values()[0]


# -- policies ----------------------------------------------------------------------------------------------------------


def test_a_policy_is_switched_off_and_another_on() -> None:
    policy = Scripted({(1, 2): "stop", (2, 2): "stop"})
    done, at = steer(lambda at: at.when("step", 0, lambda e: e.set_policy(), step=3), LRS[:3], policy)
    assert done.states() == ["COMPLETE"] * 3
    assert "NopPruner judges instead of Scripted" in texts(at)[0]
    done, at = steer(lambda at: at.when("step", 0, lambda e: e.set_policy("asha", reduction_factor=3), step=1), LRS[:3])
    assert done.states().count("PRUNED") >= 1
    assert "from the next round on ASHA(min_resource=1, reduction_factor=3" in texts(at)[0]


def test_a_policy_that_is_none_is_refused() -> None:
    _, at = steer(lambda at: at.when("step", 0, lambda e: e.set_policy("ahsa"), step=1), LRS[:1])
    assert effects(at) == [("set-policy", "refused")]
    assert "Did you mean `asha`?" in texts(at)[0]


# -- longer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "constant", "cosine"])
def test_an_extended_trial_trains_on_by_the_schedule_of_its_new_length(schedule: str) -> None:
    policy = Scripted({(0, 4): "stop"})
    done, at = steer(
        lambda at: at.when("step", 0, lambda e: e.extend(0, 2), step=2),
        LRS[:2],
        policy,
        objective=partial(by_lr, lr_scheduler_type=schedule),
    )
    assert effects(at) == [("extend", "applied")]
    assert done.states() == ["COMPLETE"] * 2, "the policy has no say in the chunks beyond the others'"
    assert [len(values) for values in done.values().values()] == [5, 3]
    assert done.executor.records[0].boundaries == [2, 4, 6, 8, 10]
    assert max(trial.resource for history in policy.seen for trial in history.trials) <= 3
    longer = search(LRS[:1], chunks=5, objective=partial(by_lr, lr_scheduler_type=schedule, max_steps=10))
    rates = [
        [entry["learning_rate"] for entry in d.executor.records[0].log_history if "loss" in entry]
        for d in (done, longer)
    ]
    assert rates[0][2:] == pytest.approx(rates[1][2:])
    if schedule == "constant":
        assert done.losses(0) == pytest.approx(longer.losses(0), rel=1e-6)
        assert done.values()[0] == pytest.approx(longer.values()[0], rel=1e-6)


def test_what_can_not_be_extended() -> None:
    kind = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}}
    _, at = steer(
        lambda at: at.when("step", 0, lambda e: e.extend(0, 2), step=1).when(
            "chunk_done", 0, lambda e: e.extend(0, 2), chunk=3
        ),
        LRS[:1],
        objective=partial(by_lr, **kind),
    )
    assert texts(at) == [
        "trial 0 can't train longer: its schedule (warmup_stable_decay) has parts of a fixed length",
        "trial 0 has trained to its end",
    ]


# -- new trials --------------------------------------------------------------------------------------------------------


def test_an_added_configuration_is_one_trial_more_and_goes_before_the_queue() -> None:
    done, at = steer(lambda at: at.when("step", 0, lambda e: e.add({"lr": 5e-3}), step=3), LRS[:3], slots=1)
    assert done.states() == ["COMPLETE"] * 4
    assert [trial.params["lr"] for trial in done.study.trials] == [*LRS[:3], 5e-3]
    started = [event.trial for event in done.of_kind("trial_started")]
    assert started == [0, 3, 1, 2]
    assert texts(at) == ["trial 3 is next in line for a slot"]


def test_names_and_values_are_checked() -> None:
    def all_of(e: RapidFireExecutor) -> list[Any]:
        return [
            e.add({"lrr": 1e-3}), e.add({"lr": "1e-3"}), e.add({"lr": True}), e.clone(0, set={"rank": 4}), e.add({"lr": 5.0})
        ]  # fmt: skip

    done, at = steer(lambda at: at.when("step", 0, all_of, step=1), LRS[:1])
    assert [state for _, state in effects(at)] == ["refused"] * 4 + ["applied"]
    assert texts(at)[0] == "`lrr` is no parameter of the search; it has lr. Did you mean `lr`?"
    assert texts(at)[1] == "`lr` must be a number, got '1e-3'. Write it without quotes."
    assert texts(at)[3] == "`rank` is no parameter of trial 0; it has lr."
    assert "`lr` = 5.0 is outside the search space (1e-05 to 1.0)" in texts(at)[4]
    assert done.study.trials[1].params == {"lr": 5.0}


def test_a_clone_in_a_study_that_optuna_drives() -> None:
    done, at = steer(
        lambda at: at.when("step", 0, lambda e: e.clone(0, set={"lr": 1e-4}), step=1),
        LRS[:2],
        n_trials=3,
        slots=1,
        threads=True,
    )
    assert [trial.params["lr"] for trial in done.study.trials] == [*LRS[:2], 1e-4]
    assert "it is one of `n_trials`" in texts(at)[0]


# -- warm starts -------------------------------------------------------------------------------------------------------


class Steps:
    """What each trial's adapter was after each step."""

    def __init__(self) -> None:
        self.weights: dict[int, list[torch.Tensor]] = {}
        self.shapes: list[int] = []

    def sums(self, trial: int, step: int) -> list[float]:
        """The sum of each of its tensors after a step, in order of size."""
        return sorted(part.sum().item() for part in self.weights[trial][step].split(self.shapes))

    def objective(self, **more: Any) -> Callable[[RapidFireExecutor], Callable[[optuna.Trial], float]]:
        def make(executor: RapidFireExecutor) -> Callable[[optuna.Trial], float]:
            @executor.objective
            def objective(trial: optuna.Trial) -> Any:
                kept = self.weights.setdefault(trial.number, [])

                def keep(model: Any, **_: Any) -> None:
                    self.shapes = [p.numel() for p in model.parameters() if p.requires_grad]
                    kept.append(
                        torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])
                    )

                settings = {name: pick(trial) for name, pick in more.items()}
                return sft(
                    executor,
                    trial,
                    lr=trial.suggest_float("lr", 1e-5, 1.0, log=True),
                    lr_scheduler_type="constant",
                    max_grad_norm=0.0,
                    callbacks=[Do(keep, "on_train_begin"), Do(keep)],
                    **settings,
                )

            return objective

        return make


def test_a_warm_clone_goes_on_from_its_source_and_its_own_learning_rate_is_in_force_at_its_first_step() -> None:
    steps = Steps()
    clones = [{"lr": 1e-2}, {"lr": 5e-3}, {}]

    def ask(e: RapidFireExecutor) -> list[Any]:
        return [e.pause(0), *(e.clone(0, set=changes, warm_start=True) for changes in clones)]

    done, at = steer(
        lambda at: at.when("step", 0, ask, step=4).when("trial_ended", 2, lambda e: e.resume(0)),
        LRS[:1],
        objective=steps.objective(),
        chunks=2,
        slots=3,
    )
    assert effects(at) == [("pause", "applied")] + [("clone", "applied")] * 3 + [("resume", "applied")]
    assert done.states() == ["COMPLETE"] * 4
    source = steps.weights[0]
    for clone in (1, 2, 3):
        assert torch.equal(steps.weights[clone][0], source[4]), "the adapter as it was after step 4"
    full, half, same = (steps.weights[clone][1] - steps.weights[clone][0] for clone in (1, 2, 3))
    torch.testing.assert_close(full, same, rtol=0, atol=0)
    # Adam's first warm step: the learning rate times a direction that the source's moments decide.
    torch.testing.assert_close(half, full / 2, rtol=1e-4, atol=1e-8)
    cold = steps.weights[0][1] - steps.weights[0][0]
    assert cold.abs().max() == pytest.approx(1e-2, rel=1e-3), "without moments each number moves by the learning rate"
    assert full.abs().mean() < 0.8e-2
    rates = [done.executor.records[clone].log_history[0]["learning_rate"] for clone in (1, 2, 3)]
    assert rates == [1e-2, 5e-3, 1e-2]
    losses = done.losses(0)
    for clone in (1, 2, 3):
        assert done.losses(clone)[0] < losses[0], "it knows what its source has learnt of the same examples"
    assert done.losses(1)[0] == done.losses(2)[0]


def test_a_clone_of_an_ended_trial_begins_with_its_saved_adapter(tmp_path: Any) -> None:
    steps = Steps()
    done, at = steer(
        lambda at: at.when("step", 1, lambda e: e.clone(0, warm_start=True), step=3),
        LRS[:2],
        slots=1,
        objective=steps.objective(),
        output_dir=tmp_path,
    )
    assert texts(at) == [
        "trial 2 is next in line for a slot; trial 0 has no optimizer state any more, the clone's begins empty"
    ]
    assert torch.equal(steps.weights[2][0], steps.weights[0][-1])
    assert done.states() == ["COMPLETE"] * 3


def test_a_stopped_trial_leaves_nothing_to_a_warm_clone() -> None:
    done, at = steer(
        lambda at: at.when("step", 0, lambda e: e.stop(0), step=1).when(
            "step", 1, lambda e: [e.clone(0, warm_start=True), e.clone(0)], step=3
        ),
        LRS[:2],
    )
    assert texts(at)[1] == "trial 0 was stopped and its adapter was not saved. Clone it without warm start."
    assert effects(at)[2] == ("clone", "applied")
    assert done.states() == ["PRUNED", "COMPLETE", "COMPLETE"]


@pytest.mark.parametrize(
    ("name", "choices", "message"),
    [
        ("lora", [4, 2], "`r` of trial 0 is 4, here it is 2"),
        (
            "lora",
            [("q_proj",), ("q_proj", "v_proj")],
            "`target_modules` (or what else is trained) of trial 0 are others",
        ),
        ("optim", ["adamw_torch", "sgd"], "`optim` of trial 0 is AdamW, here it is SGD"),
        ("lora", [{"alpha": 8}, {"alpha": 16}], "`lora_alpha` of trial 0 is 8, here it is 16"),
    ],
)
def test_what_does_not_fit_a_warm_start_is_an_error_that_names_the_fix(
    name: str, choices: list[Any], message: str
) -> None:
    def pick(trial: optuna.Trial) -> Any:
        choice = choices[trial.suggest_categorical("which", [0, 1])]
        if name == "optim":
            return choice
        r = choice if isinstance(choice, int) else 4
        targets = list(choice) if isinstance(choice, tuple) else ["q_proj"]
        alpha = choice["alpha"] if isinstance(choice, dict) else 8
        return LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")

    study = study_of()
    study.enqueue_trial({"lr": 1e-2, "which": 0})
    done, at = steer(
        lambda at: at.when("step", 0, lambda e: e.clone(0, set={"which": 1}, warm_start=True), step=2),
        LRS[:1],
        study=study,
        objective=Steps().objective(**{"peft_config" if name == "lora" else name: pick}),
    )
    assert effects(at) == [("clone", "applied")]
    assert done.states() == ["COMPLETE", "FAIL"]
    error = done.executor.records[1].error
    assert error is not None
    assert message in error
    assert error.endswith("Clone it without warm start, or without this change.")


def test_a_changed_rank_is_refused_at_once_where_its_name_is_known() -> None:
    study = study_of()
    study.enqueue_trial({"lr": 1e-2, "r": 4})
    done, at = steer(
        lambda at: at.when("step", 0, lambda e: e.clone(0, set={"r": 2}, warm_start=True), step=2),
        LRS[:1],
        study=study,
        objective=Steps().objective(r=lambda trial: trial.suggest_categorical("r", [2, 4])),
    )
    assert texts(at) == [
        "`r` of trial 0 is 4: an adapter can't be carried over to 2. Clone it without warm start, or without this change."
    ]
    assert done.states() == ["COMPLETE"]


def test_a_trial_that_runs_unfused_is_steered_alike() -> None:
    config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    done, at = steer(
        lambda at: at.when("step", 0, lambda e: [e.pause(0), e.stop(1)], step=1).when(
            "trial_ended", 1, lambda e: [e.clone(0, warm_start=True), e.resume(0)]
        ),
        LRS[:2],
        objective=partial(by_lr, peft_config=config),
    )
    assert [state for _, state in effects(at)] == ["applied"] * 4
    assert not done.executor.records[0].fused
    assert done.states() == ["COMPLETE", "PRUNED", "COMPLETE"]
