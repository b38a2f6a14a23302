"""Every policy that only stops, in a plain Optuna study around a plain torch loop."""

from __future__ import annotations

import functools
import inspect

import optuna
import pytest
import torch
from torch.nn import functional as F

from rapidfire_automl.pruners import PolicyPruner, policy_names
from rapidfire_policies import ASHA, CostAware, Median, Policy, Verdict, testing

optuna.logging.set_verbosity(optuna.logging.WARNING)
EPOCHS = 9
RATES = [10.0**exponent for exponent in (-3.5, -0.5, -2.0, -1.0, -3.0, -1.5, -2.5, -4.0, 0.0, -1.25, -0.75, 6.0)]
"""In no order; the last one diverges to NaN."""


def only_stops(policy: Policy) -> bool:
    answers = (d for history in testing.draw_histories(0) for d in policy.decide(history).values())
    return all(decision.verdict is not Verdict.PAUSE for decision in answers)


STOPPING = [policy for policy in (cls() for cls in policy_names().values()) if only_stops(policy)]


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Ten classes of noisy 8 x 8 patterns, `(400, 64)`, and their labels, `(400,)`."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 64, generator=generator)
    labels = torch.randint(10, (400,), generator=generator)
    return patterns[labels] + 0.7 * torch.randn(400, 64, generator=generator), labels


def objective(trial: optuna.Trial) -> float:
    rate = trial.suggest_float("rate", 1e-5, 1e7, log=True)
    images, labels = digits()
    weight = torch.zeros(64, 10, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=rate, momentum=0.9)
    for epoch in range(1, EPOCHS + 1):
        for start in range(0, 300, 50):
            loss = F.cross_entropy(images[start : start + 50] @ weight, labels[start : start + 50])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            held_out = float(F.cross_entropy(images[300:] @ weight, labels[300:]))
        trial.report(held_out, step=epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return held_out


def run(policy: Policy) -> optuna.Study:
    study = optuna.create_study(
        sampler=optuna.samplers.RandomSampler(seed=0), pruner=PolicyPruner(policy, chunks=EPOCHS)
    )
    for rate in RATES:
        study.enqueue_trial({"rate": rate})
    study.optimize(objective, n_trials=len(RATES))
    return study


@functools.cache
def full_search() -> list[float]:
    study = optuna.create_study(pruner=optuna.pruners.NopPruner(), sampler=optuna.samplers.RandomSampler(seed=0))
    for rate in RATES:
        study.enqueue_trial({"rate": rate})
    study.optimize(objective, n_trials=len(RATES))
    return [trial.value for trial in study.trials if trial.value is not None]


@pytest.mark.parametrize("policy", STOPPING, ids=lambda policy: type(policy).__name__)
def test_a_policy_prunes_in_a_plain_torch_loop(policy: Policy) -> None:
    study = run(policy)
    states = {trial.state.name for trial in study.trials}
    assert states <= {"COMPLETE", "PRUNED", "FAIL"}, "FAIL is Optuna's word for a value that is NaN in the end"
    assert len(study.trials) == len(RATES)
    better = sum(value < study.best_value for value in full_search())
    assert better <= len(RATES) // 3, "what it hands over is among the best third of the full search"
    reported = sum(len(trial.intermediate_values) for trial in study.trials)
    assert reported <= EPOCHS * len(RATES)


@pytest.mark.parametrize("policy", [ASHA(), Median(), CostAware()], ids=lambda policy: type(policy).__name__)
def test_the_savings_are_real(policy: Policy) -> None:
    study = run(policy)
    reported = sum(len(trial.intermediate_values) for trial in study.trials)
    assert reported < 0.7 * EPOCHS * len(RATES)
    assert study.trials[-1].state.name == "PRUNED", "the diverged one"
    assert len(study.trials[-1].intermediate_values) <= 2


def test_the_list_of_policies_is_the_exported_one() -> None:
    assert {ASHA(), Median(), CostAware()} <= set(STOPPING)
    assert all(inspect.isclass(cls) for cls in policy_names().values())
