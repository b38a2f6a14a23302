"""PolicyPruner in plain Optuna: what the policy gets to see, what comes of it, and policies by name."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

import rapidfire_policies
from rapidfire_automl.histories import CHUNKS_ATTR, history_from_study
from rapidfire_automl.pruners import PolicyPruner, policy_from_name, policy_names
from rapidfire_policies import ASHA, CostAware, Decision, History, Median, Nop, Policy, TrialState, Verdict

optuna.logging.set_verbosity(optuna.logging.WARNING)
Create = Callable[..., optuna.Study]
Direction = Literal["minimize", "maximize"]


def sampler() -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=0)


@pytest.fixture(params=["memory", "sqlite", "journal"])
def create(request: pytest.FixtureRequest, tmp_path: Path) -> Create:
    def build(**arguments: object) -> optuna.Study:
        storage: object = None
        if request.param == "sqlite":
            storage = f"sqlite:///{tmp_path / 'study.db'}"
        elif request.param == "journal":
            backend = JournalFileBackend(str(tmp_path / "journal.log"))
            storage = optuna.storages.JournalStorage(backend)
        return optuna.create_study(storage=storage, sampler=sampler(), **arguments)  # type: ignore[arg-type]

    return build


def report(trial: optuna.Trial, values: list[float], steps: list[int] | None = None) -> None:
    for step, value in zip(steps or range(1, len(values) + 1), values, strict=True):
        trial.report(value, step=step)


def test_every_optuna_state_is_mapped(create: Create) -> None:
    study = create()
    trials = [study.ask() for _ in range(4)]
    for trial in trials:
        trial.suggest_float("x", 0.0, 1.0)
        report(trial, [0.5, 0.25])
    study.tell(trials[0], 0.25)
    study.tell(trials[1], state=optuna.trial.TrialState.PRUNED)
    study.tell(trials[2], state=optuna.trial.TrialState.FAIL)
    study.enqueue_trial({"x": 0.5})
    history = history_from_study(study, chunks=4, slots=2)
    assert [trial.number for trial in history.trials] == [0, 1, 2, 3]
    states = [TrialState.COMPLETE, TrialState.STOPPED, TrialState.FAILED, TrialState.RUNNING]
    assert [trial.state for trial in history.trials] == states
    assert {trial.values for trial in history.trials} == {(0.5, 0.25)}
    assert [dict(trial.params) for trial in history.trials] == [trial.params for trial in study.trials[:4]]
    assert (history.chunks, history.slots) == (4, 2)


def test_non_finite_values_come_through_and_maximize_flips_the_sign(create: Create) -> None:
    study = create(direction="maximize")
    report(study.ask(), [0.5, math.inf, -math.inf, math.nan])
    [trial] = history_from_study(study).trials
    assert trial.values[:3] == (-0.5, -math.inf, math.inf)
    assert math.isnan(trial.values[3])


def test_steps_count_from_one_in_their_own_order() -> None:
    study = optuna.create_study(sampler=sampler())
    report(study.ask(), [3.0, 1.0, 2.0], steps=[300, 0, 100])
    assert history_from_study(study).trials[0].values == (1.0, 2.0, 3.0)


def test_chunks_come_from_the_argument_the_study_or_the_trials() -> None:
    study = optuna.create_study(sampler=sampler())
    assert history_from_study(study).chunks == 1
    first = study.ask()
    report(first, [0.3, 0.2])
    assert history_from_study(study).chunks == 3, "a running trial may not be at its end"
    study.tell(first, 0.2)
    assert history_from_study(study).chunks == 2
    report(study.ask(), [0.3, 0.2, 0.1])
    assert history_from_study(study).chunks == 4
    study.set_user_attr(CHUNKS_ATTR, 9)
    assert history_from_study(study).chunks == 9
    assert history_from_study(study, chunks=12).chunks == 12
    assert history_from_study(study, chunks=1).chunks == 3, "never below what a trial has done"


def test_slots_default_to_the_running_trials() -> None:
    study = optuna.create_study(sampler=sampler())
    assert history_from_study(study).slots == 1
    for _ in range(3):
        study.ask()
    assert history_from_study(study).slots == 3


def test_several_objectives_are_refused() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"], pruner=PolicyPruner(ASHA()))
    study.ask()
    with pytest.raises(ValueError, match="`study` must have one objective, got 2"):
        study.pruner.prune(study, study.get_trials()[0])


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("chunks", [9, None])
def test_a_plain_loop_on_a_quadratic(direction: Direction, chunks: int | None) -> None:
    """One trial after the other: fewer chunks, the same winner as the full search."""
    sign = 1.0 if direction == "minimize" else -1.0
    spent = []

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", -3.0, 3.0)
        for chunk in range(1, 10):
            spent.append(trial.number)
            trial.report(sign * ((x - 1.0) ** 2 + 1.0 / chunk), step=chunk)
            if trial.should_prune():
                raise optuna.TrialPruned
        return sign * ((x - 1.0) ** 2 + 1.0 / 9)

    study = optuna.create_study(direction=direction, sampler=sampler(), pruner=PolicyPruner(ASHA(), chunks=chunks))
    study.optimize(objective, n_trials=30)
    drawn = [trial.params["x"] for trial in study.trials]
    assert study.best_params["x"] == min(drawn, key=lambda x: (x - 1.0) ** 2)
    assert len(spent) < 30 * 9 / 2
    states = {trial.state for trial in study.trials}
    assert states == {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED}


def test_threads_in_plain_optuna() -> None:
    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", -3.0, 3.0)
        for chunk in range(1, 10):
            trial.report(x * x + 1.0 / chunk, step=chunk)
            if trial.should_prune():
                raise optuna.TrialPruned
        return x * x

    study = optuna.create_study(sampler=sampler(), pruner=PolicyPruner(ASHA(), chunks=9))
    study.optimize(objective, n_trials=24, n_jobs=4)
    assert 0 < sum(trial.state is optuna.trial.TrialState.PRUNED for trial in study.trials) < 24


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("chunks", [9, None])
def test_lockstep_in_plain_optuna_is_independent_of_the_order(direction: Direction, chunks: int | None) -> None:
    """All report, then each asks and leaves at once if it must: best first and worst first keep the same five."""
    ladder = [i / 16 for i in range(16)]
    for values in (ladder, ladder[::-1]):
        study = optuna.create_study(direction=direction, sampler=sampler(), pruner=PolicyPruner(ASHA(), chunks=chunks))
        trials = [study.ask() for _ in values]
        for trial, value in zip(trials, values, strict=True):
            trial.report(value, step=1)
        kept = []
        for trial, value in zip(trials, values, strict=True):
            if trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                kept.append(value)
        assert sorted(kept) == (ladder[:5] if direction == "minimize" else ladder[-5:])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_a_diverged_trial_is_pruned(bad: float, direction: Direction) -> None:
    study = optuna.create_study(direction=direction, sampler=sampler(), pruner=PolicyPruner(ASHA(), chunks=9))
    trial = study.ask()
    report(trial, [0.5, bad])
    assert trial.should_prune()


def test_every_storage_prunes(create: Create) -> None:
    study = create(pruner=PolicyPruner(ASHA(), chunks=9))
    trials = [study.ask() for _ in range(3)]
    for trial, value in zip(trials, [0.2, 0.1, math.nan], strict=True):
        trial.report(value, step=1)
    assert [trial.should_prune() for trial in trials] == [True, False, True]


WAIT_OR_LACK_SCORES = (
    "successive_halving", "hyperband", "pasha", "sequential_halving",
    "paired_race", "betting_race", "wilcoxon", "non_inferior",
)  # fmt: skip


@pytest.mark.parametrize("name", WAIT_OR_LACK_SCORES)
@pytest.mark.parametrize("in_lockstep", [False, True])
def test_who_pauses_or_needs_scores_stops_only_the_diverged_in_plain_optuna(name: str, in_lockstep: bool) -> None:
    study = optuna.create_study(sampler=sampler(), pruner=PolicyPruner(policy_from_name(name), chunks=9))
    trials = [study.ask() for _ in range(12)] if in_lockstep else []
    pruned = set()
    for number in range(12):
        for trial in trials or [study.ask()]:
            for chunk in range(1, 9) if not in_lockstep else [number + 1] if number < 8 else []:
                if trial.number not in pruned:
                    trial.report(math.nan if trial.number == 4 and chunk == 3 else trial.number + 1.0 / chunk, chunk)
                    if trial.should_prune():
                        pruned.add(trial.number)
                        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            if not in_lockstep and trial.number not in pruned:
                study.tell(trial, float(trial.number))
    assert pruned == {4}


def test_before_the_first_report_nothing_is_pruned() -> None:
    study = optuna.create_study(sampler=sampler(), pruner=PolicyPruner(ASHA(), chunks=9))
    assert not study.ask().should_prune()


@dataclass(frozen=True)
class Says(Policy):
    """One verdict for all, or none at all."""

    verdict: Verdict | None = None

    def decide(self, history: History) -> Mapping[int, Decision]:
        return {t.number: Decision(self.verdict, "so") for t in history.trials} if self.verdict else {}


@pytest.mark.parametrize("verdict", [None, *Verdict])
def test_only_stop_prunes_in_plain_optuna(verdict: Verdict | None) -> None:
    study = optuna.create_study(sampler=sampler(), pruner=PolicyPruner(Says(verdict)))
    trial = study.ask()
    trial.report(0.5, step=1)
    assert trial.should_prune() is (verdict is Verdict.STOP)


def test_the_pruner_shows_its_policy_and_refuses_what_is_none() -> None:
    pruner = PolicyPruner(ASHA(reduction_factor=2), chunks=8)
    assert pruner.policy == ASHA(reduction_factor=2)
    assert repr(pruner) == "PolicyPruner(ASHA(min_resource=1, reduction_factor=2, form='stop'), chunks=8)"
    with pytest.raises(ValueError, match=r"`policy` must be a rapidfire_policies.Policy, .* Write `ASHA\(\)`"):
        PolicyPruner(ASHA)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got 'asha'\. Use policy_from_name"):
        PolicyPruner("asha")  # type: ignore[arg-type]
    for chunks in (0, -3, True, 2.0, "8"):
        with pytest.raises(ValueError, match="`chunks` must be an integer >= 1, got "):
            PolicyPruner(Nop(), chunks=chunks)  # type: ignore[arg-type]


def test_policies_by_name() -> None:
    names = policy_names()
    assert names.items() >= {"asha": ASHA, "median": Median, "nop": Nop}.items()
    assert all(cls.__name__ in rapidfire_policies.__all__ and cls() == policy_from_name(n) for n, cls in names.items())
    assert policy_from_name("asha") == policy_from_name("ASHA") == ASHA()
    assert policy_from_name("asha", min_resource=2, reduction_factor=4) == ASHA(2, 4)
    assert policy_from_name("nop") == Nop()
    assert policy_from_name("rapidfire_policies.asha:ASHA", reduction_factor=2) == ASHA(reduction_factor=2)


def test_a_wrapped_policy_by_name() -> None:
    assert policy_from_name("cost_aware", policy="median") == CostAware(Median())
    assert policy_from_name("CostAware", policy=Median(), min_chunks=2) == CostAware(Median(), min_chunks=2)
    table = {"name": "asha", "reduction_factor": 2}
    assert policy_from_name("cost-aware", policy=table) == CostAware(ASHA(reduction_factor=2))
    assert policy_from_name("cost_aware", policy={"name": "cost_aware", "policy": table}) == CostAware(
        CostAware(ASHA(reduction_factor=2))
    )
    outside = {"name": "rapidfire_policies.asha:ASHA", "min_resource": 2}
    assert policy_from_name("cost_aware", policy=outside) == CostAware(ASHA(min_resource=2))
    assert table == {"name": "asha", "reduction_factor": 2}


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ("ahsa", r"^`policy\.policy` must be one of .*got 'ahsa'\. Did you mean `asha`\?"),
        ({"name": "ahsa"}, r"^`policy\.policy` must be one of .*got 'ahsa'\. Did you mean `asha`\?"),
        ({"reduction_factor": 2}, r"`policy\.policy` needs a `name`, like \{name = \"asha\"\}, got "),
        ({"name": 3}, r"`policy\.policy` must be named by a string, got 3"),
        (
            {"name": "asha", "reduction_facto": 2},
            "`reduction_facto` is no argument of ASHA. Did you mean `reduction_fa",
        ),
        ({"name": "asha", "reduction_factor": 1}, "`reduction_factor` must be an integer >= 2, got 1"),
        ({"name": "cost_aware", "policy": "ahsa"}, r"^`policy\.policy\.policy` must be one of "),
        ({"name": "cost_aware", "policy": 3}, r"^`policy\.policy\.policy` must be a policy, got 3"),
        ("math:pi", r"`policy\.policy` 'math:pi' is no policy"),
        ("nowhere:ASHA", r"`policy\.policy` 'nowhere:ASHA' cannot be imported"),
        (3, r"`policy\.policy` must be a policy, got 3"),
        (ASHA, r"`policy\.policy` must be a policy, got .* Write `ASHA\(\)`"),
    ],
)
def test_bad_wrapped_policies(inner: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_from_name("cost_aware", policy=inner)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ahsa", {}, r"one of asha, .*, nop.* or .*got 'ahsa'\. Did you mean `asha`\?"),
        ("policy", {}, r"one of asha, .*, nop.* or .*got 'policy'\.$"),
        ("", {}, "got ''"),
        ("asha", {"eta": 3}, r"`eta` is no argument of ASHA\. It takes: min_resource, reduction_factor, form\."),
        ("asha", {"reduction_facto": 3}, r"Did you mean `reduction_factor`\?"),
        ("nop", {"eta": 3}, r"`eta` is no argument of Nop\. It takes: none\."),
        ("asha", {"reduction_factor": 1}, "`reduction_factor` must be an integer >= 2, got 1"),
        ("asha", {"reduction_factor": "3"}, "`reduction_factor` must be an integer >= 2, got '3'"),
        ("nowhere.at_all:ASHA", {}, "cannot be imported: No module named 'nowhere'"),
        (":ASHA", {}, "cannot be imported"),
        ("rapidfire_policies:Asha", {}, r"has no 'Asha'\. Did you mean `ASHA`\?"),
        ("rapidfire_policies:History", {}, "is no policy"),
        ("rapidfire_policies:Policy", {}, "is no policy"),
        ("math:pi", {}, "is no policy"),
        ("outside_policies:Needs", {}, r"Needs cannot be built from \{\}: .*missing .*'budget'"),
    ],
)
def test_bad_names_and_arguments(
    name: str, arguments: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Needs(Nop):
        budget: int

    outside = types.ModuleType("outside_policies")
    outside.Needs = Needs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "outside_policies", outside)
    with pytest.raises(ValueError, match=message):
        policy_from_name(name, **arguments)
