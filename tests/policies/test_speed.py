"""What a verdict costs: under a millisecond a trial, and no more than linear in the trials."""

from __future__ import annotations

import time

import numpy as np
import pytest

import rapidfire_policies
from rapidfire_policies import ASHA, History, Median, Policy, TrialHistory, TrialState

POLICIES = [
    *(
        exported()
        for name in rapidfire_policies.__all__
        if isinstance(exported := getattr(rapidfire_policies, name), type)
        and issubclass(exported, Policy)
        and exported is not Policy
    ),
    ASHA(form="promote"),
    Median(average=False),
]
MOST_MS_A_TRIAL = {"CurvePredict": 5.0}
"""Where the limit is not 1 ms."""
CHUNKS = 50
STATES = (TrialState.RUNNING, TrialState.PAUSED, TrialState.STOPPED, TrialState.COMPLETE)


def history(count: int, *, in_lockstep: bool) -> History:
    """Noisy curves that fall, with 32 scores a chunk; all at chunk 50 of 60, or all over the place."""
    rng = np.random.default_rng(0)
    trials = []
    for number in range(count):
        resource = CHUNKS if in_lockstep else int(rng.integers(1, CHUNKS + 1))
        state = TrialState.RUNNING if in_lockstep else STATES[rng.choice(4, p=(0.4, 0.2, 0.3, 0.1))]
        scores = rng.normal(rng.normal() + 3.0 / np.arange(1, resource + 1)[:, None] ** 0.5, 0.3, (resource, 32))
        trials.append(
            TrialHistory(
                number,
                tuple(scores.mean(axis=1).tolist()),
                state,
                scores=tuple(scores),
                costs=(1.0,) * resource,
                params={"r": int(rng.choice((4, 16))), "learning_rate": float(10 ** rng.uniform(-5, -2))},
                metrics={"kl": (0.1,) * resource, "reward_std": (0.5,) * resource},
            )
        )
    return History(tuple(trials), chunks=CHUNKS + 10, slots=32)


def seconds(policy: Policy, judged: History, times: int) -> float:
    """The best of several: a busy machine only ever adds."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        policy.decide(judged)
        best = min(best, time.perf_counter() - start)
    return best


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("in_lockstep", [True, False], ids=["lockstep", "staggered"])
def test_a_verdict_costs_a_millisecond_a_trial_and_grows_linearly(policy: Policy, in_lockstep: bool) -> None:
    few, many = history(256, in_lockstep=in_lockstep), history(1024, in_lockstep=in_lockstep)
    most_ms = MOST_MS_A_TRIAL.get(type(policy).__name__, 1.0)
    for attempt in range(6):
        times = 2 + 2 * attempt
        cost_few, cost_many = seconds(policy, few, times), seconds(policy, many, times)
        # Below a hundredth of the limit the ratio of two small numbers says nothing.
        linear = cost_many <= 6 * cost_few or cost_many / 1024 < most_ms / 1e3 / 100
        if cost_few / 256 < most_ms / 1e3 and linear:
            return
    pytest.fail(f"256 trials take {cost_few * 1e3:.2f} ms, 1024 take {cost_many * 1e3:.2f} ms")
