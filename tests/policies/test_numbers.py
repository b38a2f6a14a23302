"""The numbers of a verdict: what they promise holds, and every policy gives them."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from rapidfire_policies import (
    ASHA,
    PASHA,
    Auto,
    BettingRace,
    CostAware,
    CurvePredict,
    Decision,
    FixedStep,
    Guard,
    History,
    Hyperband,
    Median,
    NonInferior,
    PairedRace,
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
    Wilcoxon,
)
from rapidfire_policies.base import IN_VALUES, Number, flipped, numbers_of

LATE = (TrialState.RUNNING, TrialState.STOPPED, TrialState.COMPLETE)


def test_numbers_are_no_part_of_what_makes_decisions_equal() -> None:
    one = Decision(Verdict.STOP, "worse", {"value": math.nan})
    other = pickle.loads(pickle.dumps(one))
    assert one == other == Decision(Verdict.STOP, "worse")
    assert hash(one) == hash(other)
    assert math.isnan(other.numbers["value"])


def test_flipped_turns_values_and_nothing_else() -> None:
    numbers: dict[str, Number] = dict.fromkeys(IN_VALUES, 2.0)
    more: dict[str, Number] = {"rank": 3, "worse_by": 0.5, "ahead": (1, 2), "unit": "tokens"}
    assert flipped({**numbers, **more}) == {**dict.fromkeys(IN_VALUES, -2.0), **more}


def histories(count: int) -> Iterator[History]:
    """Searches over coarse finite values with ties: lockstep, all over the place, and all paused."""
    rng = np.random.default_rng(0)
    for index in range(count):
        chunks, size = int(rng.choice((4, 6, 9, 12))), int(rng.integers(2, 14))
        trials = []
        for number in range(size):
            resource = int(rng.integers(1, chunks)) if index % 2 else 1 + index % (chunks - 1)
            values = np.round(rng.uniform(0, 1, resource) + 1.0 / np.arange(1, resource + 1), 1)
            state = LATE[int(rng.integers(0, 3))] if index % 4 == 1 else TrialState.RUNNING
            state = TrialState.PAUSED if index % 5 == 0 else state
            trials.append(TrialHistory(number, tuple(values.tolist()), state))
        yield History(tuple(trials), chunks=chunks, slots=4)


@pytest.mark.parametrize(
    "policy",
    [
        ASHA(reduction_factor=2),
        ASHA(reduction_factor=2, form="promote"),
        Auto(),
        FixedStep(),
        Hyperband(),
        Median(),
        Median(average=False),
        RisingBound(keep=1),
        RisingBound(window=1, growth=0.0, keep=2),
        Spare(RisingBound(window=1, growth=0.0, keep=1), share=0.1),
        SequentialHalving(budget=12),
        SuccessiveHalving(),
        WarmUp(ASHA()),
    ],
    ids=repr,
)
def test_below_its_threshold_a_trial_goes_on_and_above_it_does_not(policy: Policy) -> None:
    """Change the value that was judged, and nothing else."""
    tried = 0
    for history in histories(300):
        for trial in history.live:
            decision = policy.decide(history).get(trial.number)
            if decision is None or decision.verdict is not Verdict.STOP:
                continue
            if "threshold" not in decision.numbers:  # where nobody is promoted yet
                continue
            threshold = float(decision.numbers["threshold"])  # type: ignore[arg-type]
            place = int(decision.numbers.get("rung", trial.resource))  # type: ignore[arg-type]
            for value, goes_on in ((threshold - 1e-3, True), (threshold + 1e-3, False)):
                values = (*trial.values[: place - 1], value, *trial.values[place:])
                if not goes_on and value > float(decision.numbers["value"]):  # type: ignore[arg-type]
                    continue  # at a tie the older one is ahead
                changed = tuple(replace(t, values=values) if t is trial else t for t in history.trials)
                said = policy.decide(replace(history, trials=changed))[trial.number]
                assert (said.verdict is Verdict.CONTINUE) is goes_on, (history, trial.number, decision, said)
            tried += 1
    assert tried > 20


def test_what_a_budget_cannot_carry_would_have_stayed_in_the_place_of_the_last_that_does() -> None:
    trials = tuple(TrialHistory(n, (value,)) for n, value in enumerate((0.5, 0.3, 0.4, 0.6)))
    decisions = Auto(budget=12).decide(History(trials, chunks=4))
    stopped = {number: d.numbers["threshold"] for number, d in decisions.items() if d.verdict is Verdict.STOP}
    assert stopped == {0: 0.4, 3: 0.4}
    assert decisions[3].numbers["rival"] == 2
    assert {name: decisions[3].numbers[name] for name in ("spent", "to_come", "budget")} == {
        "spent": 4, "to_come": 12, "budget": 12,
    }  # fmt: skip
    better = (*trials[:3], TrialHistory(3, (0.39,)))
    assert Auto(budget=12).decide(History(better, chunks=4))[3].verdict is Verdict.CONTINUE


@pytest.mark.parametrize("policy", [PairedRace(), NonInferior(margin=0.05)], ids=repr)
def test_scores_better_by_more_than_short_by_would_have_gone_on(policy: Policy) -> None:
    wave = np.sin(np.arange(100.0))
    off = 0.1 if isinstance(policy, PairedRace) else -0.01

    def judged(shift: float) -> Decision:
        scores = {0: wave, 1: wave + off - shift + 0.1 * np.cos(np.arange(100.0))}
        costs = {0: (1.0,), 1: (2.0,)}
        trials = tuple(TrialHistory(n, (s.mean(),), scores=(s,), costs=costs[n]) for n, s in scores.items())
        return policy.decide(History(trials, chunks=4))[1]

    short_by = float(judged(0.0).numbers["short_by"])  # type: ignore[arg-type]
    assert short_by > 0
    assert judged(short_by - 1e-6).verdict is Verdict.STOP
    assert judged(short_by + 1e-6).verdict is Verdict.CONTINUE


def falling(level: float, chunks: int) -> tuple[float, ...]:
    return tuple(level + 0.5 / k for k in range(1, chunks + 1))


def scored(*levels: float) -> tuple[TrialHistory, ...]:
    rows = [level + 0.05 * np.cos(np.arange(60.0) * (1 + n)) for n, level in enumerate(levels)]
    return tuple(TrialHistory(n, (float(row.mean()),), scores=(row,), costs=(n + 1.0,)) for n, row in enumerate(rows))


BAD = TrialHistory(1, (0.5, 0.9), metrics={"kl": (0.1, 40.0)})
FLAT = TrialHistory(1, (0.5, 0.5, 0.5), metrics={"reward_std": (0.0, 0.0, 0.0)})
LINE = tuple(TrialHistory(n, (0.1 * (n + 1),)) for n in range(6))
LINE_PAUSED = tuple(replace(trial, state=TrialState.PAUSED) for trial in LINE)
CURVES = tuple(TrialHistory(n, falling(level, 6)) for n, level in enumerate((0.1, 0.12, 0.5, 0.9)))


@pytest.mark.parametrize(
    ("policy", "trials", "number", "names"),
    [
        (ASHA(), LINE, 5, {"rung", "rank", "of", "keep", "threshold", "rival", "ahead"}),
        (PASHA(), LINE, 2, {"rung", "rank", "of", "keep", "threshold"}),
        (PASHA(), (*LINE, TrialHistory(6, (0.7,))), 6, {"rank", "threshold", "waiting"}),
        (ASHA(form="promote", reduction_factor=9), LINE, 1, {"rung", "rank", "of", "keep"}),
        (SuccessiveHalving(), LINE, 5, {"rung"}),
        (Hyperband(), LINE_PAUSED, 5, {"rung"}),
        (SequentialHalving(), LINE, 5, {"value"}),
        (FixedStep(keep=1), LINE, 5, {"rank", "threshold"}),
        (Median(), LINE, 5, {"peers", "threshold"}),
        (RisingBound(keep=1), CURVES, 3, {"bound", "pace", "lead", "rival", "threshold"}),
        (CurvePredict(keep=1), CURVES, 3, {"forecast", "lead", "rival", "chance", "least_chance"}),
        (TopTwoThompson(), CURVES, 3, {"forecast", "deviation", "chance", "least_chance", "rival"}),
        (TopTwoThompson(chance=1e-300, budget=1), CURVES, 2, {"spent", "budget"}),
        (PairedRace(), scored(0.1, 0.9), 1, {"rival", "worse_by", "worse_by_at_least", "examples", "level"}),
        (BettingRace(), scored(0.1, 0.9), 1, {"capital", "most_capital"}),
        (Wilcoxon(), scored(0.1, 0.9), 1, {"p", "alpha"}),
        (NonInferior(margin=0.5), scored(0.1, 0.1), 1, {"cost", "rival_cost", "margin", "short_by"}),
        (Guard(), (LINE[0], BAD), 1, {"kl", "max_kl"}),
        (Guard(divergence=1.5, max_kl=None), (LINE[0], BAD), 1, {"threshold", "first"}),
        (Guard(), (LINE[0], FLAT), 1, {"flat"}),
        (Guard(patience=1, max_kl=None), (LINE[0], BAD), 1, {"threshold", "best"}),
        (Patience(Median(), patience=0), (TrialHistory(0, (0.2, 0.1)), BAD), 1, {"threshold", "peers"}),
        (Spare(RisingBound(keep=1)), CURVES, 3, {"bound", "lead", "rival", "threshold"}),
        (WarmUp(ASHA(), chunks=1), LINE, 5, {"rank", "threshold"}),
        (CostAware(ASHA(), unit=0.5), scored(0.1, 0.2, 0.3, 0.4), 3, {"unit", "paid", "rung", "threshold"}),
    ],
    ids=lambda value: repr(value) if isinstance(value, Policy) else None,
)
def test_every_policy_gives_its_rules_numbers(
    policy: Policy, trials: tuple[TrialHistory, ...], number: int, names: set[str]
) -> None:
    decision = policy.decide(History(trials, chunks=12, slots=4))[number]
    assert decision.verdict is not Verdict.CONTINUE
    assert names <= set(decision.numbers)
    assert decision.numbers["resource"] == trials[number].resource
    json.dumps(dict(decision.numbers), allow_nan=False)


def test_the_last_finite_trial_keeps_the_numbers_of_the_verdict_it_is_spared() -> None:
    past = TrialHistory(0, (0.1,), TrialState.FAILED)
    decision = ASHA(reduction_factor=2).decide(History((past, TrialHistory(1, (0.2,))), chunks=4))[1]
    assert decision.verdict is Verdict.CONTINUE
    assert decision.reason.endswith("kept as the last finite trial")
    assert decision.numbers["threshold"] == 0.1


def test_a_diverged_trial_is_judged_by_what_it_reported() -> None:
    history = History((TrialHistory(0, (0.5,)), TrialHistory(1, (0.4, math.inf))), chunks=4)
    assert (
        dict(ASHA().decide(history)[1].numbers) == numbers_of(history.trials[1]) == {"resource": 2, "value": math.inf}
    )
