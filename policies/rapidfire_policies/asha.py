"""ASHA: asynchronous successive halving, in the form that stops trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rapidfire_policies.base import Decision, History, Policy, TrialHistory, TrialState, Verdict
from rapidfire_policies.rungs import Cut, check_rungs, rungs, top_fraction, values_at
from rapidfire_policies.survivors import is_finite, keep_one


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

    A live trial whose last value is NaN, inf or -inf is stopped at once, at a rung or not; its values rank behind
    every finite one. If the rule would leave no finite trial live or complete, the most advanced one goes on
    (`rapidfire_policies.survivors.keep_one`).

    Args:
        min_resource: The first rung, in chunks (the paper's `r`, with its early-stopping rate `s` = 0).
        reduction_factor: One in so many goes on, and the ratio of two rungs (the paper's eta).

    Raises:
        ValueError: `min_resource` is below 1 or `reduction_factor` below 2.

    What breaks it: curves that cross after a rung, above all slow starters (raise `min_resource`); noise as large as
    the differences at the first rung; a small search (of two trials at a rung one is stopped); and the order of
    arrival where trials do not arrive together: an early one is judged against few.

    Paper: Li et al., A System for Massively Parallel Hyperparameter Tuning, 2020 (https://arxiv.org/abs/1810.05934).
    Its Algorithm 2 promotes: a trial waits at its rung until it belongs to the top `floor(n / eta)`, possibly long
    after it arrived, and a rung with fewer than eta trials promotes nobody. Here a trial is judged once, when it
    stands at the rung, and is stopped rather than parked, so that its slot is free for a newcomer. Optuna's
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

    def __post_init__(self) -> None:
        check_rungs(self.min_resource, self.reduction_factor)

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Judge every live trial: at its rung, or for having diverged."""
        ladder = rungs(self.min_resource, self.reduction_factor, history.chunks)
        cuts = {
            rung: top_fraction(values_at(history, rung), self.reduction_factor)
            for rung in {trial.resource for trial in history.running}.intersection(ladder)
        }
        return keep_one(history, {trial.number: _judge(trial, cuts, ladder) for trial in history.live})


def _judge(trial: TrialHistory, cuts: Mapping[int, Cut], ladder: tuple[int, ...]) -> Decision:
    if trial.values and not is_finite(trial):
        return Decision(Verdict.STOP, f"chunk {trial.resource}: the value is {trial.values[-1]}, not finite")
    cut = cuts.get(trial.resource)
    if cut is None or trial.state is not TrialState.RUNNING:
        ahead = next((rung for rung in ladder if rung > trial.resource), None)
        return Decision(Verdict.CONTINUE, "past the last rung" if ahead is None else f"next rung is {ahead}")
    best = "the best goes on" if cut.keep == 1 else f"the best {cut.keep} go on"
    reason = (
        f"rung {trial.resource}: {trial.values[-1]:.4g} ranks {cut.ranks[trial.number]} of {len(cut.ranks)}, "
        f"{best} (cut {cut.value:.4g})"
    )
    return Decision(Verdict.CONTINUE if cut.keeps(trial.number) else Verdict.STOP, reason)
