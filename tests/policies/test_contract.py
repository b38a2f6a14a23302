"""Every exported policy passes the contract, and every check of the contract can fail."""

from __future__ import annotations

import importlib
import math
import os
import pkgutil
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rapidfire_policies
from rapidfire_policies import (
    ASHA,
    PASHA,
    Auto,
    CostAware,
    Decision,
    FixedStep,
    Guard,
    History,
    Hyperband,
    Median,
    Patience,
    Policy,
    RisingBound,
    SequentialHalving,
    Spare,
    SuccessiveHalving,
    TopTwoThompson,
    TrialHistory,
    TrialState,
    Verdict,
    WarmUp,
    testing,
)
from rapidfire_policies._search import search
from rapidfire_policies.base import numbers_of
from rapidfire_policies.survivors import keep_one

EXPORTED = [
    exported
    for name in rapidfire_policies.__all__
    if isinstance(exported := getattr(rapidfire_policies, name), type)
    and issubclass(exported, Policy)
    and exported is not Policy
]
PACKAGES = str(Path(rapidfire_policies.__file__).parents[1])
CONFIGURED = [
    ASHA(reduction_factor=2),
    Auto(budget=20),
    CostAware(Median(), unit=2.0, min_chunks=2),
    CostAware(SequentialHalving()),
    SequentialHalving(budget=6),
    TopTwoThompson(beta=0.2, seed=3, chance=0.3, budget=12),
    ASHA(min_resource=2, reduction_factor=4),
    ASHA(reduction_factor=2, form="promote"),
    FixedStep(chunks=2, keep=1),
    Guard(Hyperband(reduction_factor=2), divergence=2.0, patience=1, margin=0.0, max_kl=1.0, flat=1),
    Guard(ASHA(form="promote"), patience=1),
    Median(average=False),
    Median(grace=2, min_peers=3),
    PASHA(reduction_factor=2, percentile=50),
    Patience(SuccessiveHalving(reduction_factor=2), patience=0),
    RisingBound(window=1, keep=1, errors=2.0),
    Spare(Median(average=False), share=0.5),
    WarmUp(Guard(Patience(Median(average=False)))),
    WarmUp(ASHA(reduction_factor=2, form="promote"), chunks=3),
]


@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("policy", [cls() for cls in EXPORTED], ids=repr)
@pytest.mark.parametrize("seed", [0, 1])
def test_exported_policies_keep_the_contract(policy: Policy, check: Callable[..., None], seed: int) -> None:
    check(policy, seed=seed)


@pytest.mark.parametrize("policy", CONFIGURED, ids=repr)
def test_so_they_do_with_other_hyperparameters(policy: Policy) -> None:
    testing.check_policy(policy)


@pytest.mark.parametrize("policy", [cls() for cls in EXPORTED], ids=repr)
@pytest.mark.parametrize("slots", [1, 8, 16])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_nothing_overflows_where_finite_values_explode(policy: Policy, slots: int) -> None:
    rng = np.random.default_rng(0)
    curves = 1 / np.arange(1.0, 13) + rng.random((16, 1))
    curves[3] = 1e200
    curves[5, 2:] = 1.7e308
    curves[7, 4:] = 10.0 ** rng.uniform(0, 308, 8)
    curves[9, :5] = rng.choice((1.7e308, -1.7e308), 5)
    trials = tuple(TrialHistory(n, tuple(curve), TrialState.COMPLETE) for n, curve in enumerate(curves.tolist()))
    for _ in search(policy, History(trials, chunks=12, slots=slots)):
        pass


def test_policies_need_neither_torch_nor_optuna_nor_the_library() -> None:
    code = (
        "import sys, rapidfire_policies, rapidfire_policies.testing\n"
        "assert not {'torch', 'optuna', 'rapidfire_automl'} & set(sys.modules)\n"
        # Nor the half second that scipy.stats takes, at the import or at the first verdict.
        "rapidfire_policies.testing.check_policy(rapidfire_policies.Wilcoxon())\n"
        "assert 'scipy.stats' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": PACKAGES})


def test_one_policy_a_file_and_all_are_exported() -> None:
    defined = {}
    for module in pkgutil.iter_modules(rapidfire_policies.__path__, "rapidfire_policies."):
        names = vars(importlib.import_module(module.name)).items()
        policies = [value for _, value in names if isinstance(value, type) and issubclass(value, Policy)]
        defined[module.name] = [cls for cls in policies if cls.__module__ == module.name and cls is not Policy]
    assert set(EXPORTED) == {cls for classes in defined.values() for cls in classes if not cls.__name__.startswith("_")}
    assert all(len(classes) <= 1 for classes in defined.values())


def test_the_contract_runs_every_check() -> None:
    for check in vars(testing).values():
        is_check = callable(check) and getattr(check, "__name__", "").startswith("check_")
        assert not is_check or check in (*testing.CHECKS, testing.check_policy)


@dataclass(frozen=True)
class Base(Policy):
    """Stops the worse half of the running trials of each resource, by value; right, so each child breaks one clause."""

    def decide(self, history: History) -> Mapping[int, Decision]:
        decisions = {}
        for trial in history.running:
            peers = sorted(self.key(t) for t in history.running if t.resource == trial.resource)
            better = trial.resource == 0 or peers.index(self.key(trial)) < max(1, len(peers) // 2)
            better = better and (trial.resource == 0 or math.isfinite(trial.values[-1]))
            verdict = Verdict.CONTINUE if better else Verdict.STOP
            decisions[trial.number] = Decision(verdict, "worse half", numbers_of(trial) if trial.values else {})
        return keep_one(history, decisions)

    def key(self, trial: TrialHistory) -> tuple[object, ...]:
        if not trial.values:
            return (True, 0.0, trial.number)
        finite = math.isfinite(trial.values[-1])
        return (not finite, trial.values[-1] if finite else 0.0, trial.number)


def test_the_base_of_the_broken_ones_is_sound() -> None:
    testing.check_policy(Base())


@dataclass(frozen=True)
class ReturnsAList(Base):
    def decide(self, history: History) -> Any:
        return list(super().decide(history).values())


@dataclass(frozen=True)
class AnswersWithABool(Base):
    def decide(self, history: History) -> Any:
        return {number: decision.verdict is Verdict.STOP for number, decision in super().decide(history).items()}


@dataclass(frozen=True)
class Chokes(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        return {trial.number: Decision(Verdict.CONTINUE, str(trial.params["lora_r"])) for trial in history.trials}


@dataclass(frozen=True)
class InventsATrial(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        return {**super().decide(history), 10_000: Decision(Verdict.CONTINUE)}


@dataclass(frozen=True)
class GivesNoReason(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        return {number: replace(decision, reason="") for number, decision in super().decide(history).items()}


@dataclass(frozen=True)
class PausesWithoutAReason(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        return {trial.number: Decision(Verdict.PAUSE, numbers=numbers_of(trial)) for trial in history.live}


@dataclass(frozen=True)
class KeepsItsNumbers(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        return {number: replace(decision, numbers={}) for number, decision in super().decide(history).items()}


@dataclass(frozen=True)
class GivesAnotherTrialsValue(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        worse = {"value": 7.5}
        return {number: replace(decision, numbers=worse) for number, decision in super().decide(history).items()}


@dataclass(frozen=True)
class GivesAnArray(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        return {
            number: replace(decision, numbers={**decision.numbers, "peers": np.arange(2)})  # type: ignore[dict-item]
            for number, decision in super().decide(history).items()
        }


@dataclass(frozen=True)
class CountsInNumbers(Base):
    """Says the same every time, with a number that grows."""

    seen: list[int] = field(default_factory=list, compare=False)

    def decide(self, history: History) -> Mapping[int, Decision]:
        self.seen.append(0)
        counted = {"calls": len(self.seen)}
        decisions = super().decide(history).items()
        return {number: replace(decision, numbers={**decision.numbers, **counted}) for number, decision in decisions}


@dataclass(frozen=True)
class ReasonsInParagraphs(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        return {number: replace(decision, reason="a\nb") for number, decision in super().decide(history).items()}


@dataclass(frozen=True)
class StopsTheUnseen(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        unseen = {trial.number: Decision(Verdict.STOP, "slow") for trial in history.running if not trial.values}
        return {**super().decide(history), **unseen}


@dataclass(frozen=True)
class DecidesOnNothing(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        return super().decide(history) or ({0: Decision(Verdict.CONTINUE)} if not history.trials else {})


@dataclass(frozen=True)
class Remembers(Base):
    seen: list[int] = field(default_factory=list, compare=False)

    def decide(self, history: History) -> Mapping[int, Decision]:
        self.seen.append(len(history.trials))
        return super().decide(history) if len(self.seen) % 7 else {}


@dataclass(frozen=True)
class TossesNumPysCoin(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        np.random.random()  # noqa: NPY002
        return super().decide(history)


@dataclass(frozen=True)
class TossesPythonsCoin(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        random.random()
        return super().decide(history)


@dataclass(frozen=True)
class SortsScoresInPlace(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        for trial in history.trials:
            for scores in trial.scores:
                scores.sort()
        return super().decide(history)


@dataclass(frozen=True)
class WritesParams(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        for trial in history.trials:
            trial.params["seen"] = True  # type: ignore[index]
        return super().decide(history)


@dataclass(frozen=True)
class FavoursTheFirstListed(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        decisions = dict(super().decide(history))
        if history.running:
            first = next(trial for trial in history.trials if trial in history.running)
            decisions[first.number] = Decision(Verdict.CONTINUE, "came first")
        return decisions


@dataclass(frozen=True)
class FavoursEvenNumbers(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        return {
            number: decision if number % 2 else Decision(Verdict.CONTINUE, "even")
            for number, decision in super().decide(history).items()
        }


@dataclass(frozen=True)
class BelievesMinusInfinity(Base):
    """The bare comparison of floats: -inf wins, and NaN lands wherever sorting leaves it."""

    def decide(self, history: History) -> Mapping[int, Decision]:
        decisions = {}
        for trial in history.running:
            values = [t.values[-1] for t in history.running if t.resource == trial.resource and t.values]
            stop = bool(values) and trial.values[-1] > min(values)
            decisions[trial.number] = Decision(Verdict.STOP if stop else Verdict.CONTINUE, "not the best")
        return decisions


@dataclass(frozen=True)
class CompletesTheDiverged(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        diverged = [t for t in history.running if t.values and not math.isfinite(t.values[-1])]
        return {**super().decide(history), **{t.number: Decision(Verdict.COMPLETE, "done") for t in diverged}}


@dataclass(frozen=True)
class StopsBothOfAPair(Base):
    """Stops whatever is not strictly better than all others: equal trials kill one another."""

    def decide(self, history: History) -> Mapping[int, Decision]:
        decisions = {}
        for trial in history.running:
            others = [t.values for t in history.running if t is not trial and t.resource == trial.resource]
            stop = any(trial.values and not trial.values[-1] < other[-1] for other in others)
            decisions[trial.number] = Decision(Verdict.STOP if stop else Verdict.CONTINUE, "not better")
        return decisions


@dataclass(frozen=True)
class BreaksTiesByPosition(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        running = [trial for trial in history.trials if trial.is_live and trial.values]
        best = min(running, key=lambda trial: trial.values[-1], default=None)
        return {
            trial.number: Decision(Verdict.CONTINUE if trial is best else Verdict.STOP, "not the best")
            for trial in running
        }


@dataclass(frozen=True)
class StopsEveryoneAboveZero(Base):
    """An absolute threshold, sound in itself, that can end the search with nothing to hand over."""

    def decide(self, history: History) -> Mapping[int, Decision]:
        return {
            trial.number: Decision(Verdict.STOP, "above zero")
            for trial in history.trials
            if trial.is_live and trial.values and not trial.values[-1] <= 0
        }


@dataclass(frozen=True)
class ParksForever(Base):
    """Lets nobody past the first chunk, and stops nobody: the search waits for itself."""

    def decide(self, history: History) -> Mapping[int, Decision]:
        return {trial.number: Decision(Verdict.PAUSE, "waits") for trial in history.live if trial.resource == 1}


@dataclass(frozen=True)
class WritesMetrics(Base):
    def decide(self, history: History) -> Mapping[int, Decision]:
        for trial in history.trials:
            trial.metrics["seen"] = ()  # type: ignore[index]
        return super().decide(history)


@dataclass(frozen=True)
class ByAge(Base):
    """Says that age matters, and lets the even numbers go on, which is not age."""

    @property
    def by_age(self) -> bool:
        return True

    def decide(self, history: History) -> Mapping[int, Decision]:
        return FavoursEvenNumbers().decide(history)


@dataclass(frozen=True)
class HoldsALambda(Base):
    rule: Callable[[], int] = field(default=lambda: 1)


@dataclass(frozen=True)
class ForgetsWhenPickled(Base):
    strict: bool = True

    def decide(self, history: History) -> Mapping[int, Decision]:
        return super().decide(history) if self.strict else {}

    def __setstate__(self, state: dict[str, object]) -> None:
        object.__setattr__(self, "strict", False)


@pytest.mark.parametrize(
    ("check", "broken", "message"),
    [
        (testing.check_answers, ReturnsAList(), "returns list, not a mapping"),
        (testing.check_answers, AnswersWithABool(), "no Decision with a Verdict"),
        (testing.check_answers, Chokes(), "raises KeyError: 'lora_r'"),
        (testing.check_answers, InventsATrial(), "trial 10000, which is unknown"),
        (testing.check_answers, GivesNoReason(), "says stop to trial .* without a reason"),
        (testing.check_answers, PausesWithoutAReason(), "says pause to trial .* without a reason"),
        (testing.check_numbers, KeepsItsNumbers(), "without its `value`"),
        (testing.check_numbers, GivesAnotherTrialsValue(), "by the value 7.5, which it never had"),
        (testing.check_numbers, GivesAnArray(), "no place in JSON"),
        (testing.check_pure, CountsInNumbers(), "is not pure"),
        (testing.check_answers, ReasonsInParagraphs(), "several lines"),
        (testing.check_answers, StopsTheUnseen(), "no value yet"),
        (testing.check_empty, DecidesOnNothing(), "empty history"),
        (testing.check_pure, Remembers(), "is not pure"),
        (testing.check_pure, TossesNumPysCoin(), "global random generator"),
        (testing.check_pure, TossesPythonsCoin(), "global random generator"),
        (testing.check_input_untouched, SortsScoresInPlace(), "changes its input"),
        (testing.check_input_untouched, WritesParams(), "changes its input"),
        (testing.check_input_untouched, WritesMetrics(), "changes its input"),
        (testing.check_order_invariant, FavoursTheFirstListed(), "depends on the order of trials"),
        (testing.check_relabel_stable, FavoursEvenNumbers(), "depends on trial numbers without a tie"),
        (testing.check_relabel_stable, ByAge(), "depends on trial numbers without a tie"),
        (testing.check_non_finite, BelievesMinusInfinity(), "over trial"),
        (testing.check_non_finite, CompletesTheDiverged(), "completes trial"),
        (testing.check_ties, StopsBothOfAPair(), "stops every one of equal trials"),
        (testing.check_ties, BreaksTiesByPosition(), "by the order in which trials are listed"),
        (testing.check_survivor, StopsEveryoneAboveZero(), "stops the last finite trial"),
        (testing.check_resumes, ParksForever(), "leaves all trials paused"),
        (testing.check_pickle, HoldsALambda(), "cannot be pickled"),
        (testing.check_pickle, ForgetsWhenPickled(), "its pickled copy does not"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Policy) else None,
)
def test_every_check_can_fail(check: Callable[..., None], broken: Policy, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(broken)
    with pytest.raises(AssertionError):
        testing.check_policy(broken)


def test_every_check_has_a_broken_policy() -> None:
    [mark] = test_every_check_can_fail.pytestmark
    assert {row[0] for row in mark.args[1]} == set(testing.CHECKS)


def test_the_drawn_histories_hold_what_the_contract_is_about() -> None:
    histories = list(testing.draw_histories(0))
    values = [value for history in histories for trial in history.trials for value in trial.values]
    for kind in (math.isnan, lambda value: value == math.inf, lambda value: value == -math.inf):
        assert sum(map(kind, values)) > 100
    cohorts = [history for history in histories if len({trial.resource for trial in history.trials}) == 1]
    assert 20 < len(cohorts) < len(histories) - 20
    assert any(not trial.values for history in histories for trial in history.trials)
    assert repr(list(testing.draw_histories(0))) == repr(histories) != repr(list(testing.draw_histories(1)))
    assert sum(not history.running and bool(history.paused) for history in histories) > 20
    metrics = [
        number for h in histories for trial in h.trials for numbers in trial.metrics.values() for number in numbers
    ]
    assert 0.0 in metrics
    assert any(map(math.isnan, metrics))


@dataclass(frozen=True)
class ResumesTheOldest(Base):
    """Pauses everybody after every chunk, and takes the oldest back when all wait."""

    def decide(self, history: History) -> Mapping[int, Decision]:
        decisions = {trial.number: Decision(Verdict.PAUSE, "waits") for trial in history.live}
        if not history.running and history.paused:
            decisions[history.paused[0].number] = Decision(Verdict.CONTINUE, "the oldest")
        return decisions


def test_a_search_in_miniature() -> None:
    """Three trials of two chunks on one slot: two may live at a time."""
    whole = History(tuple(TrialHistory(i, (0.5, 0.4), TrialState.COMPLETE) for i in range(3)), chunks=2, slots=1)
    asked = list(search(ResumesTheOldest(), whole))
    seen = [[(t.resource, str(t.state)) for t in history.trials] for history, _, _ in asked]
    assert seen == [
        [(1, "running")],
        [(1, "paused"), (1, "running")],
        [(1, "paused"), (1, "paused")],
        [(2, "complete"), (1, "paused")],
        [(2, "complete"), (2, "complete"), (1, "running")],
        [(2, "complete"), (2, "complete"), (1, "paused")],
    ]
    assert [last for _, _, last in asked] == [False, False, True, False, False, True]
