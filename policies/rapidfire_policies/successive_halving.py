"""Successive halving, synchronous: everybody waits at a rung for the others, then the best of them go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rapidfire_policies.base import Decision, History, Policy, TrialHistory, TrialState, Verdict, numbers_of
from rapidfire_policies.rungs import check_rungs, rungs, top_fraction
from rapidfire_policies.survivors import keep_one, stop_diverged


@dataclass(frozen=True)
class SuccessiveHalving(Policy):
    """Wait at each rung until nobody is to come, then keep the best `1 / reduction_factor` and stop the rest.

    Rungs lie at `min_resource * reduction_factor**k` chunks, below the last chunk. A trial that has done exactly `r`
    chunks, `r` a rung, waits there (PAUSE) as long as any trial that has done at most `r` chunks is RUNNING. After
    that it goes on if and only if

        rank of its value at r  <=  max(1, floor(n / reduction_factor))

    of the `n` values ever recorded at `r`, with the older trial ahead at equal values; otherwise it is stopped. Between
    rungs everybody goes on. Since those that wait give up their slots, newcomers come until there are no more or no
    more may live at a time: the cohort is what is there then. Trials that come later are judged as the next cohort,
    against all values at the rung.

    A live trial whose last value is NaN, inf or -inf is stopped at once; its values rank behind every finite one. If
    the rule would leave no finite trial live or complete, the most advanced one goes on
    (`rapidfire_policies.survivors.keep_one`).

    Args:
        min_resource: The first rung, in chunks (the papers' `r`).
        reduction_factor: One in so many goes on, and the ratio of two rungs (eta).

    Raises:
        ValueError: `min_resource` is below 1 or `reduction_factor` below 2.

    What breaks it: stragglers, for whom the whole cohort waits while slots idle (ASHA does not wait); memory, since
    a cohort is at most what may live at a time; curves that cross after a rung. In a plain Optuna loop, where nobody
    can wait, it stops nobody.

    Paper: Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization, 2016
    (https://arxiv.org/abs/1502.07943), with the geometric rungs of Li et al., Hyperband, 2018.

    >>> from rapidfire_policies import History, SuccessiveHalving, TrialHistory, TrialState
    >>> losses = [0.4, 0.3, 0.5]
    >>> def history(state):
    ...     return History(tuple(TrialHistory(i, (loss,), state) for i, loss in enumerate(losses)), chunks=9)
    >>> [str(decision.verdict) for decision in SuccessiveHalving().decide(history(TrialState.RUNNING)).values()]
    ['pause', 'pause', 'pause']
    >>> [str(decision.verdict) for decision in SuccessiveHalving().decide(history(TrialState.PAUSED)).values()]
    ['stop', 'continue', 'stop']
    """

    min_resource: int = 1
    reduction_factor: int = 3

    def __post_init__(self) -> None:
        check_rungs(self.min_resource, self.reduction_factor)

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Judge those that wait where nobody is to come, let the others wait or go on."""
        ladder = rungs(self.min_resource, self.reduction_factor, history.chunks)
        judged = halve(history.trials, ladder, self.reduction_factor)
        return keep_one(history, judged | stop_diverged(history))


def halve(
    cohort: Sequence[TrialHistory], ladder: Sequence[int], reduction_factor: int, *, open_to_more: bool = False
) -> dict[int, Decision]:
    """One round of successive halving.

    Args:
        cohort: Trials that are compared with one another, in any order and state.
        ladder: The rungs, ascending.
        reduction_factor: One in so many goes on.
        open_to_more: More trials are to join the cohort.

    Returns:
        A decision for every live trial of the cohort, by number.
    """
    behind = 0 if open_to_more else min((t.resource for t in cohort if t.state is TrialState.RUNNING), default=None)
    live = sorted((trial for trial in cohort if trial.is_live), key=lambda trial: trial.number)
    cuts = {
        rung: top_fraction({t.number: t.values[rung - 1] for t in cohort if t.resource >= rung}, reduction_factor)
        for rung in {trial.resource for trial in live}.intersection(ladder)
        if behind is None or behind > rung
    }
    decisions = {}
    for trial in live:
        rung = trial.resource
        if rung not in ladder:
            decisions[trial.number] = Decision(Verdict.CONTINUE, "on its way to a rung")
        elif (cut := cuts.get(rung)) is None:
            waits = numbers_of(trial, rung=rung)
            decisions[trial.number] = Decision(Verdict.PAUSE, f"rung {rung}: waits for the others", waits)
        else:
            verdict = Verdict.CONTINUE if cut.keeps(trial.number) else Verdict.STOP
            decisions[trial.number] = Decision(verdict, cut.words(rung, trial), cut.numbers(rung, trial))
    return decisions
