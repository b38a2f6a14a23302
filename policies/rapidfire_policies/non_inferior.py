"""NonInferior: of trials that are equally good within a margin, keep the cheaper."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rapidfire_policies._arguments import check_level, check_number
from rapidfire_policies.base import Decision, History, Number, Policy, TrialHistory, TrialState, Verdict, numbers_of
from rapidfire_policies.paired import look_at, spent, unjudged
from rapidfire_policies.paired_race import lower_bounds
from rapidfire_policies.survivors import is_finite, keep_one


@dataclass(frozen=True)
class NonInferior(Policy):
    """Stop a trial if a cheaper one is, beyond doubt, no worse than it by more than a margin.

    A trial's cost is the mean of what its chunks have cost so far. Let a running trial `i` have done `k` chunks, and
    `j` be the trial with the best mean score there among those that are cheaper and stay (running and not stopped now,
    paused or complete). Let `L(a)` be the lower confidence bound (`PairedRace`'s) of the mean over examples of
    `score_i(e) - score_j(e)`. The trial is stopped if and only if

        L(a) > -margin,   a = alpha / (chunks * (K - 1))

    where `K` counts the trials that have reported a value. Paused trials are resumed unjudged. It stops trials for
    their cost alone: a cheap one that learns nothing stays, which is the business of a race.

    The guarantee, as the number of examples grows: for every trial, the chance that it is ever stopped at a chunk at
    which every cheaper trial is worse in expectation by the margin or more is at most alpha. So a search that drops
    `num_generations=16` because 8 is as good loses more than the margin at that chunk with chance at most alpha.

    Args:
        margin: How much worse still counts as equal, in the unit of the scores.
        alpha: Chance of giving up more than the margin on a trial, for the whole search.

    Raises:
        ValueError: `margin` is negative or not finite, `alpha` is not in (0, 1); in `decide`: trials were scored on
            sets of different sizes.

    With no costs recorded, or equal ones, no trial is cheaper than another and nobody is stopped; so too a trial whose
    own costs are missing or not finite. A live trial whose last value is NaN or infinite is stopped. One with a finite
    value but no scores, or with a NaN or an infinity among them, is neither judged nor a rival. If the rule would leave
    no finite trial live or complete, the most advanced one goes on (`rapidfire_policies.survivors.keep_one`).

    What breaks it: chains over several chunks, where each trial is within the margin of the one it replaced and the
    last is not within the margin of the first; costs in seconds on a busy machine; an expensive trial whose lead
    comes late; and whatever breaks `PairedRace`.

    Paper: Piaggio et al., Reporting of noninferiority and equivalence randomized trials, JAMA 2012, for the one-sided
    bound against a margin; `PairedRace` for the bound and the spending of alpha.

    >>> import numpy as np
    >>> from rapidfire_policies import History, NonInferior, TrialHistory
    >>> reward = np.sin(np.arange(200.0))
    >>> noise = 0.1 * np.cos(np.arange(200.0))
    >>> generations = {4: -reward + 0.3 + noise, 8: -reward, 16: -reward - 0.01 + noise}
    >>> trials = tuple(TrialHistory(n, (s.mean(),), scores=(s,), costs=(n,)) for n, s in generations.items())
    >>> decisions = NonInferior(margin=0.05).decide(History(trials, chunks=6))
    >>> {number: str(decision.verdict) for number, decision in decisions.items()}
    {4: 'continue', 8: 'continue', 16: 'stop'}
    >>> decisions[16].reason
    'chunk 1: trial 8 costs 8 instead of 16 and is worse by 0.0103, at most 0.0238 (margin 0.05)'
    """

    margin: float = 0.01
    alpha: float = 0.05

    def __post_init__(self) -> None:
        check_number("margin", self.margin, at_least=0, fix="It is in the unit of the scores.")
        check_level("alpha", self.alpha, fix="0.05 is an error in 20 searches.")

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Judge every running trial against the best of the cheaper ones."""
        decisions = unjudged(history)
        for chunk in sorted({trial.resource for trial in history.running if is_finite(trial)}):
            decisions |= self._judge(history, chunk)
        return keep_one(history, decisions)

    def _judge(self, history: History, chunk: int) -> dict[int, Decision]:
        """The running trials at a chunk, the cheapest first: only who stays can take a dearer one's place."""
        level = spent(self.alpha, history)
        look = look_at(history.trials, chunk)
        place = {number: row for row, number in enumerate(look.numbers)}
        kept = (TrialState.RUNNING, TrialState.PAUSED, TrialState.COMPLETE)
        costs = {t.number: _cost(t) for t in history.trials if t.state in kept and is_finite(t) and t.resource >= chunk}
        at_chunk = {t.number: t for t in history.running if is_finite(t) and t.resource == chunk}
        decisions: dict[int, Decision] = {}
        best: int | None = None
        waiting: list[int] = []
        last = -math.inf
        for number in sorted(costs, key=lambda number: (costs[number], number)):
            if costs[number] > last:
                best, waiting, last = _best(best, waiting, look.means, place), [], costs[number]
            if number in at_chunk:
                decision = self._compare(number, best, costs, look.scores, place, level)
                numbers = numbers_of(at_chunk[number], **decision.numbers)
                decisions[number] = Decision(decision.verdict, f"chunk {chunk}: {decision.reason}", numbers)
            if number in place and (number not in decisions or decisions[number].verdict is Verdict.CONTINUE):
                waiting.append(number)
        return decisions

    def _compare(
        self,
        number: int,
        best: int | None,
        costs: Mapping[int, float],
        scores: NDArray[np.float64],
        place: Mapping[int, int],
        level: float,
    ) -> Decision:
        if number not in place:
            return Decision(Verdict.CONTINUE, "no finite scores to compare")
        if not math.isfinite(costs[number]):
            return Decision(Verdict.CONTINUE, "no costs recorded")
        if best is None:
            return Decision(Verdict.CONTINUE, "no cheaper trial to compare with")
        differences = scores[[place[number]]] - scores[place[best]]
        bound = float(lower_bounds(differences, level)[0])
        words = (
            f"trial {best} costs {costs[best]:.3g} instead of {costs[number]:.3g} and is worse by "
            f"{-differences.mean():.3g}, at most {-bound:.3g} (margin {self.margin:.3g})"
        )
        numbers: dict[str, Number] = {
            "rival": best,
            "cost": costs[number],
            "rival_cost": costs[best],
            "worse_by": float(differences.mean()),
            "worse_by_at_least": bound,
            "short_by": bound + self.margin,
            "margin": self.margin,
            "examples": differences.shape[1],
            "level": level,
        }
        return Decision(Verdict.STOP if bound > -self.margin else Verdict.CONTINUE, words, numbers)


def _cost(trial: TrialHistory) -> float:
    """The mean cost of a chunk; infinite, so cheaper than nobody's, where it isn't known."""
    if not trial.costs:
        return math.inf
    cost = sum(trial.costs) / len(trial.costs)
    return cost if math.isfinite(cost) else math.inf


def _best(best: int | None, waiting: list[int], means: NDArray[np.float64], place: Mapping[int, int]) -> int | None:
    """The trial with the best mean score among the cheaper ones so far and those of the next cost."""
    cheaper = waiting if best is None else [best, *waiting]
    return min(cheaper, key=lambda number: (means[place[number]], number), default=None)
