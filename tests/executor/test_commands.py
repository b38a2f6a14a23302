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


@pytest.fixture(scope="module")
def whole() -> Done:
    """The same trials, all together, and nobody steps in."""
    return search(LRS)


# -- what happens when, in one search: each trial has its own troubles, and trial 0 none ------------------------------


class Races:
    """Commands sent by name, at the events of one search over eight trials."""

    def __init__(self) -> None:
        self.sent: dict[str, Sent] = {}
        self.done = search(LRS, slots=8, prepare=lambda executor: executor.add_listener(partial(self, executor)))

    def __call__(self, executor: RapidFireExecutor, event: Event) -> None:
        moment = (event.kind, event.trial, event.data.get("step", event.chunk))
        # An event is told while its trial has the baton: a pause of it takes effect at its next step.
        if moment == ("step", 1, 1):
            self.send(executor, "1: pause, then stop", executor.pause(1))
            self.send(executor, "1: stop", executor.stop(1))
        if moment == ("step", 2, 1):
            self.send(executor, "2: stop", executor.stop(2))
            self.send(executor, "2: stop, then pause", executor.pause(2))
        if moment == ("step", 3, 1):
            first = self.send(executor, "3: pause", executor.pause(3))
            self.send(executor, "3: the same once more", executor._send(first.command))
            self.send(executor, "3: another pause", executor.pause(3))
        if moment == ("step", 4, 1):
            self.send(executor, "4: pause", executor.pause(4))
            self.send(executor, "4: resume before that", executor.resume(4))
            self.send(executor, "4: extend", executor.extend(4, 1))
        if moment == ("step", 5, 3):
            self.send(executor, "5: stop", executor.stop(5))
            self.send(executor, "5: another stop", executor.stop(5))
        if moment == ("step", 6, 3):
            self.send(executor, "6: pause", executor.pause(6))
        if moment == ("step", 7, 2):  # the round's last step: by now trial 0 and trial 6 wait at their boundaries
            self.send(executor, "7: pause at a boundary", executor.pause(7))
        if moment == ("step", 0, 5):
            for trial in (3, 6, 7):
                self.send(executor, f"{trial}: resume", executor.resume(trial))
            for verb in ("resume", "pause", "stop"):
                self.send(executor, f"5 has ended: {verb}", getattr(executor, verb)(5))
            self.send(executor, "5 has ended: extend", executor.extend(5, 1))
            self.send(executor, "5 has ended: warm clone", executor.clone(5, warm_start=True))
            self.send(executor, "0 trains: resume", executor.resume(0))
            self.send(executor, "nobody: stop", executor.stop(77))
            self.send(executor, "nobody: clone", executor.clone(77))
        if event.kind == "trial_ended" and event.trial == 0:
            self.send(executor, "0 is complete: stop", executor.stop(0))

    def send(self, executor: RapidFireExecutor, name: str, sent: Sent) -> Sent:
        self.sent[name] = sent
        return sent

    def effect(self, name: str) -> tuple[str, str]:
        effect = self.sent[name].effect
        assert effect is not None, name
        return effect.state, effect.text


@pytest.fixture(scope="module")
def races() -> Races:
    return Races()


def test_whoever_was_not_stopped_has_trained_as_if_nobody_had_stepped_in(races: Races, whole: Done) -> None:
    states = [str(record.state) for record in races.done.executor.records.values()]
    assert states == ["complete", "stopped", "stopped", "complete", "complete", "stopped", "complete", "complete"]
    for trial in (0, 3, 6, 7):
        assert races.done.losses(trial) == pytest.approx(whole.losses(trial), rel=1e-6)
        assert races.done.values()[trial] == pytest.approx(whole.values()[trial], rel=1e-6)


def test_of_a_pause_and_a_stop_at_once_the_stop_wins(races: Races) -> None:
    assert races.effect("1: pause, then stop") == ("refused", "a stop came before it took effect")
    assert races.effect("2: stop, then pause") == ("refused", "trial 2 is being stopped")
    for trial in (1, 2):
        assert races.effect(f"{trial}: stop") == (
            "applied",
            "stopped, at step 1 of 6, in chunk 1 of 3; it has reported no value",
        )
        assert len(races.done.losses(trial)) == 1, "it does not wait for the chunk's end"
        assert races.done.study.trials[trial].value is None


def test_a_stop_in_the_middle_of_a_chunk_leaves_what_was_reported(races: Races) -> None:
    assert races.effect("5: stop")[1].startswith("stopped, at step 3 of 6, in chunk 2 of 3; its value is")
    assert races.effect("5: another stop") == ("refused", "trial 5 is being stopped")
    record, trial = races.done.executor.records[5], races.done.study.trials[5]
    assert (len(races.done.losses(5)), len(record.values)) == (3, 1)
    assert (trial.state.name, trial.value) == ("PRUNED", record.values[0])
    assert record.state is TrialState.STOPPED
    assert record.verdicts[-1] == (1, "stop", "stopped by Python")
    assert [e.data["reason"] for e in races.done.of_kind("trial_ended") if e.trial == 5] == ["stopped by Python"]


def test_doubled_commands_are_applied_once(races: Races) -> None:
    assert (
        races.effect("3: pause")
        == races.effect("3: the same once more")
        == ("applied", "paused, at step 1 of 6, in chunk 1 of 3")
    )
    assert races.effect("3: another pause") == ("refused", "trial 3 is paused by hand already")
    told = [event.data["id"] for event in races.done.of_kind("command")]
    assert len(told) == len(set(told)) == len({sent.command.id for sent in races.sent.values()}), (
        "refusals are logged, too"
    )


def test_a_resume_takes_back_a_pause_that_has_not_taken_effect(races: Races) -> None:
    assert races.effect("4: pause") == ("applied", "withdrawn by a resume before it took effect")
    assert races.effect("4: resume before that")[1].startswith("trains on, at step 1 of")
    assert len(races.done.executor.records[4].spans) == 1


def test_a_paused_trial_goes_on_where_it_was(races: Races) -> None:
    assert races.effect("6: pause") == ("applied", "paused, at step 3 of 6, in chunk 2 of 3")
    assert races.effect("6: resume") == ("applied", "goes on, at step 3 of 6, in chunk 2 of 3")
    assert races.effect("7: pause at a boundary") == ("applied", "paused, at the end of chunk 1 of 3")
    assert races.done.executor.records[7].verdicts[0] == (1, "pause", "paused by Python")
    assert [len(races.done.executor.records[trial].spans) for trial in (3, 6, 7)] == [2, 2, 2]


def test_what_is_refused_says_why(races: Races) -> None:
    for verb in ("resume", "pause", "stop", "extend"):
        assert races.effect(f"5 has ended: {verb}") == ("refused", "trial 5 was stopped")
    no_adapter = "trial 5 was stopped and its adapter was not saved. Clone it without warm start."
    assert races.effect("5 has ended: warm clone") == ("refused", no_adapter)
    assert races.effect("0 trains: resume") == ("refused", "trial 0 is training")
    for verb in ("stop", "clone"):
        assert races.effect(f"nobody: {verb}") == ("refused", "trial 77 is unknown: there are 0 to 7")
    assert races.effect("0 is complete: stop") == ("refused", "trial 0 is complete")


# -- slots and policies ------------------------------------------------------------------------------------------------


def test_a_slot_given_up_in_the_middle_of_a_chunk_goes_to_a_newcomer_and_comes_back_before_the_next(
    whole: Done,
) -> None:
    done, at = steer(
        lambda at: (
            at.when("step", 0, lambda e: e.pause(0), step=1)
            .when("step", 2, lambda e: [e.resume(0), e.pause(0)], step=1)
            .when("chunk_done", 2, lambda e: e.resume(0), chunk=1)
        ),
        LRS[:4],
        slots=2,
    )
    assert done.states() == ["COMPLETE"] * 4
    when = "goes on when a slot is free, before newcomers, at step 1 of 6, in chunk 1 of 3"
    held = "it has no slot, at step 1 of 6, in chunk 1 of 3; only resume brings it back now"
    assert texts(at)[1:] == [when, held, when], "a pause takes back a resume that has no slot yet"
    assert done.values()[0] == pytest.approx(whole.values()[0], rel=1e-6)
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


def test_a_policy_is_switched_off_and_another_on() -> None:
    policy = Scripted({(1, 1): "stop", (2, 1): "stop"})
    done, at = steer(
        lambda at: at.when("step", 0, lambda e: [e.set_policy("ahsa"), e.set_policy()], step=1).when(
            "step", 0, lambda e: e.set_policy("asha", reduction_factor=3, min_resource=2), step=3
        ),
        LRS[:3],
        policy,
    )
    assert effects(at) == [("set-policy", "refused"), ("set-policy", "applied"), ("set-policy", "applied")]
    assert "Did you mean `asha`?" in texts(at)[0]
    assert "NopPruner judges instead of Scripted" in texts(at)[1]
    assert "from the next round on ASHA(min_resource=2, reduction_factor=3" in texts(at)[2]
    assert [len(values) >= 2 for values in done.values().values()] == [True] * 3, "nobody was stopped after chunk 1"
    assert done.states().count("PRUNED") == 2


# -- the end -----------------------------------------------------------------------------------------------------------


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


def test_a_search_whose_last_trial_is_paused_by_hand_waits_for_it(whole: Done) -> None:
    """The warning is the only event while all waits, and it is what the resume answers to."""
    done, _ = steer(
        lambda at: at.when("step", 0, lambda e: e.pause(0), step=3).when("warning", None, lambda e: e.resume(0)),
        LRS[:1],
    )
    assert "resume, stop or cancel" in done.of_kind("warning")[0].data["message"]
    assert done.states() == ["COMPLETE"]
    assert done.values()[0] == pytest.approx(whole.values()[0], rel=1e-6)


# -- longer ------------------------------------------------------------------------------------------------------------


SCHEDULES = ("linear", "constant", "cosine")


def scheduled(executor: RapidFireExecutor, **given: Any) -> Callable[[optuna.Trial], float]:
    """Trial i follows schedule i."""

    @executor.objective
    def objective(trial: optuna.Trial) -> Any:
        lr = trial.suggest_float("lr", 1e-5, 1.0, log=True)
        return sft(executor, trial, lr=lr, lr_scheduler_type=SCHEDULES[trial.number % 3], **given)

    return objective


def test_an_extended_trial_trains_on_by_the_schedule_of_its_new_length() -> None:
    policy = Scripted({(0, 4): "stop"})
    done, at = steer(
        lambda at: [at.when("step", i, lambda e, i=i: e.extend(i, 2), step=2) for i in range(3)],
        [LRS[0], LRS[0], LRS[0], LRS[1]],
        policy,
        objective=scheduled,
    )
    assert effects(at) == [("extend", "applied")] * 3
    assert done.states() == ["COMPLETE"] * 4, "the policy has no say in the chunks beyond the others'"
    assert [len(values) for values in done.values().values()] == [5, 5, 5, 3]
    assert done.executor.records[0].boundaries == [2, 4, 6, 8, 10]
    assert max(trial.resource for history in policy.seen for trial in history.trials) <= 3
    longer = search([LRS[0]] * 3, chunks=5, objective=partial(scheduled, max_steps=10))
    for i in range(3):
        rates = [
            [entry["learning_rate"] for entry in d.executor.records[i].log_history if "loss" in entry]
            for d in (done, longer)
        ]
        assert rates[0][2:] == pytest.approx(rates[1][2:])
    assert done.losses(1) == pytest.approx(longer.losses(1), rel=1e-6), "with a constant rate nothing else differs"
    assert done.values()[1] == pytest.approx(longer.values()[1], rel=1e-6)


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


def test_an_added_configuration_is_checked_is_one_trial_more_and_goes_before_the_queue() -> None:
    def all_of(e: RapidFireExecutor) -> list[Any]:
        return [
            e.add({"lrr": 1e-3}), e.add({"lr": "1e-3"}), e.add({"lr": True}), e.clone(0, set={"rank": 4}),
            e.clone(0, set={"lr": "/0"}), e.add({"lr": 5.0}), e.clone(0, set={"lr": "/2"}),
        ]  # fmt: skip

    done, at = steer(lambda at: at.when("step", 0, all_of, step=3), LRS[:2], slots=1)
    assert [state for _, state in effects(at)] == ["refused"] * 5 + ["applied"] * 2
    assert texts(at)[0] == "`lrr` is no parameter of the search; it has lr. Did you mean `lr`?"
    wanted = "`lr` must be a number > 0 (the search space: 1e-05 to 1.0)"
    assert texts(at)[1] == f"{wanted}, got '1e-3'. Write it without quotes."
    assert texts(at)[3] == "`rank` is no parameter of trial 0; it has lr."
    assert texts(at)[4] == f"{wanted}, got '/0'."
    assert "trial 2 is next in line for a slot; `lr` = 5.0 is outside the search space (1e-05 to 1.0)" in texts(at)[5]
    assert [trial.params["lr"] for trial in done.study.trials] == [*LRS[:2], 5.0, LRS[0] / 2]
    assert [event.trial for event in done.of_kind("trial_started")] == [0, 2, 3, 1]


def test_a_search_that_optuna_drives_is_steered_alike() -> None:
    done, at = steer(
        lambda at: at.when("step", 0, lambda e: [e.clone(0, set={"lr": 1e-4}), e.stop(0)], step=1),
        LRS[:2],
        n_trials=5,
        slots=1,
        threads=True,
    )
    # Optuna's threads may have asked for others before the clone was queued.
    assert done.states() == ["PRUNED", *["COMPLETE"] * 4]
    assert [trial.params["lr"] for trial in done.study.trials].count(1e-4) == 1
    assert "it is one of `n_trials`" in texts(at)[0]
    assert len(done.losses(0)) == 1, "it does not wait for the chunk's end"


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


def test_what_does_not_fit_a_warm_start_is_an_error_that_names_the_fix() -> None:
    """The source is r = 4 on q_proj with AdamW; each clone has one thing otherwise."""
    others: list[dict[str, Any]] = [{}, {"r": 2}, {"target_modules": ["q_proj", "v_proj"]}, {}, {"lora_alpha": 16}]

    def which(trial: optuna.Trial) -> int:
        return int(trial.suggest_categorical("which", [0, 1, 2, 3, 4]))

    def lora(trial: optuna.Trial) -> LoraConfig:
        r = trial.suggest_categorical("r", [2, 4])
        own = {"r": r, "lora_alpha": 8, "target_modules": ["q_proj"]} | others[which(trial)]
        return LoraConfig(**own, task_type="CAUSAL_LM")

    def optim(trial: optuna.Trial) -> str:
        return "sgd" if which(trial) == 3 else "adamw_torch"

    def ask(e: RapidFireExecutor) -> list[Any]:
        refused = e.clone(0, set={"r": 2}, warm_start=True)
        return [refused, *(e.clone(0, set={"which": k}, warm_start=True) for k in range(1, 5))]

    study = study_of()
    study.enqueue_trial({"lr": 1e-2, "which": 0, "r": 4})
    done, at = steer(
        lambda at: at.when("step", 0, ask, step=2),
        LRS[:1],
        study=study,
        slots=8,
        objective=Steps().objective(peft_config=lora, optim=optim),
    )
    fix = "Clone it without warm start, or without this change."
    assert [state for _, state in effects(at)] == ["refused"] + ["applied"] * 4
    assert texts(at)[0] == f"`r` of trial 0 is 4: an adapter can't be carried over to 2. {fix}", "its name is known"
    assert done.states() == ["COMPLETE"] + ["FAIL"] * 4
    for clone, message in enumerate(
        (
            "`r` of trial 0 is 4, here it is 2",
            "`target_modules` (or what else is trained) of trial 0 are others",
            "`optim` of trial 0 is AdamW, here it is SGD",
            "`lora_alpha` of trial 0 is 8, here it is 16",
        ),
        start=1,
    ):
        error = str(done.executor.records[clone].error)
        assert message in error
        assert error.endswith(fix)


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
