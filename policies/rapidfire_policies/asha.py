"""ASHA: asynchronous successive halving, in the form that stops trials and in the form that promotes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rapidfire_policies.base import Decision, History, Policy, TrialHistory, TrialState, Verdict
from rapidfire_policies.promotion import promote
from rapidfire_policies.rungs import Cut, check_rungs, rungs, top_fraction, values_at
from rapidfire_policies.survivors import keep_one, stop_diverged


@dataclass(frozen=True)
class ASHA(Policy):
    """At each rung, stop the trials that are not among the best `1 / reduction_factor` ever seen there.

    Rungs lie at `min_resource * reduction_factor**k` chunks, below the last chunk. Let `n` trials have a value
    recorded at rung `r`, whatever became of them since. A running trial that stands at `r` (has done exactly `r`
    chunks) goes on if and only if

        rank of its value at r  <=  max(1, floor(n / reduction_factor))

    with the older trial ahead at equal values. Everything else goes on: between rungs nobody is judged, and whoever
    has passed a rung is not judged there again. All trials that stand at a rung are judged against the same `n`
    values, their own among them, so a cohort that arrives together prunes itself, and neither the order of the
    trials nor the timing of threads plays a part. With fewer than `reduction_factor` values at a rung only the best
    goes on; a lone trial always does.

    That is the form "stop". In the form "promote" a trial that stands at `r` goes on if and only if

        rank of its value at r  <=  floor(n / reduction_factor)

    and waits otherwise (PAUSE): as others come to the rung `n` grows, and a trial that waits may be promoted later.
    At most `slots` trials wait, and the most advanced goes on where all wait and none is to come
    (`rapidfire_policies.promotion.promote`).

    A live trial whose last value is NaN, inf or -inf is stopped at once, at a rung or not; its values rank behind
    every finite one. If the rule would leave no finite trial live or complete, the most advanced one goes on
    (`rapidfire_policies.survivors.keep_one`).

    Args:
        min_resource: The first rung, in chunks (the paper's `r`, with its early-stopping rate `s` = 0).
        reduction_factor: One in so many goes on, and the ratio of two rungs (the paper's eta).
        form: "stop" ends a trial that is not among the best, "promote" lets it wait.

    Raises:
        ValueError: `min_resource` is below 1, `reduction_factor` below 2, or `form` neither of the two.

    What breaks it: curves that cross after a rung, above all slow starters (raise `min_resource`); noise as large as
    the differences at the first rung; a small search (of two trials at a rung one is stopped); and the order of
    arrival where trials do not arrive together: an early one is judged against few (the form "promote" mends that, at
    the price of memory, and trains few to their end in a small search).

    Paper: Li et al., A System for Massively Parallel Hyperparameter Tuning, 2020 (https://arxiv.org/abs/1810.05934).
    Its Algorithm 2 is the form "promote", with nobody ever stopped and no limit on those that wait. In the form "stop"
    a trial is judged once, when it stands at the rung, and its memory is free at once. Optuna's
    `SuccessiveHalvingPruner` cuts at the same `max(1, floor(n / eta))`, but compares a trial only with those that
    asked before it: of 16 trials in lockstep it keeps 1 (best first) or 16 (worst first), this policy always 5. Where
    trials run one after the other the two agree, apart from ties at the cut (Optuna lets all pass), diverged trials
    (Optuna leaves NaN out of `n`, ranks -inf first and stops an infinity only at a rung) and the last chunk (no rung
    here).

    >>> from rapidfire_policies import ASHA, History, TrialHistory
    >>> losses = [0.41, 0.38, 0.52, 0.40, 0.35, 0.47]
    >>> history = History(tuple(TrialHistory(i, (loss,)) for i, loss in enumerate(losses)), chunks=9)
    >>> decisions = ASHA(reduction_factor=3).decide(history)
    >>> [number for number, decision in decisions.items() if decision.verdict == "continue"]
    [1, 4]
    >>> decisions[3].reason
    'rung 1: 0.4 ranks 3 of 6, the best 2 go on (cut 0.38)'
    """

    min_resource: int = 1
    reduction_factor: int = 3
    form: Literal["stop", "promote"] = "stop"

    def __post_init__(self) -> None:
        check_rungs(self.min_resource, self.reduction_factor)
        if self.form not in ("stop", "promote"):
            raise ValueError(f'`form` must be "stop" or "promote", got {self.form!r}.')

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Judge every live trial: at its rung, or for having diverged."""
        ladder = rungs(self.min_resource, self.reduction_factor, history.chunks)
        if self.form == "promote":
            return keep_one(history, promote(history, ladder, self.reduction_factor))
        cuts = {
            rung: top_fraction(values_at(history, rung), self.reduction_factor)
            for rung in {trial.resource for trial in history.running}.intersection(ladder)
        }
        judged = {trial.number: _judge(trial, cuts, ladder) for trial in history.live}
        return keep_one(history, judged | stop_diverged(history))


def _judge(trial: TrialHistory, cuts: Mapping[int, Cut], ladder: tuple[int, ...]) -> Decision:
    cut = cuts.get(trial.resource)
    if cut is None or trial.state is not TrialState.RUNNING:
        ahead = next((rung for rung in ladder if rung > trial.resource), None)
        return Decision(Verdict.CONTINUE, "past the last rung" if ahead is None else f"next rung is {ahead}")
    verdict = Verdict.CONTINUE if cut.keeps(trial.number) else Verdict.STOP
    return Decision(verdict, cut.words(trial.resource, trial), cut.numbers(trial.resource, trial))
