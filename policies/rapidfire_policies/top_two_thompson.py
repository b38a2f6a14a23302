"""TopTwoThompson: who gets the next chunk is drawn from what is believed about where each trial will end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rapidfire_policies._arguments import check_int, check_level, check_number
from rapidfire_policies.base import Decision, History, Number, Policy, TrialHistory, TrialState, Verdict, numbers_of
from rapidfire_policies.rungs import bounded
from rapidfire_policies.survivors import diverged, is_finite, keep_one
from rapidfire_policies.wording import counted

_DRAWS = 256
"""Draws from the posterior of all trials for one round; the slots are rarely still free after the first few."""


@dataclass(frozen=True)
class TopTwoThompson(Policy):
    """Give the next chunks to the likely best trials and to their likely rivals, and stop those without a chance.

    A trial that has done `k` of `n` chunks is believed to end at a value

        theta ~ Normal(mean, noise^2 + (reach * (k^-1/2 - n^-1/2))^2),   reach = max(|b|, doubt * (median - best))

    `mean` continues its curve `a + b * t^-1/2` to chunk `n`, fitted by least squares to its last half (at least three
    chunks; with fewer, its last value and the median `b` of the other trials are taken). `noise` is the median of what
    the fits leave over; `median` and `best` are those of the last values of all finite trials that are live or
    complete: a trial is believed to move as far as its own curve says, or as the field lies behind its best. A complete
    trial ends where it is. The *leader* is the trial with the least mean. Then

        STOP      who beats the leader with a probability Phi((mean_leader - mean) / sqrt(var + var_leader)) < `chance`,
                  and all but the leader once `budget` chunks are spent
        PAUSE     everybody else while somebody is running: trials not yet seen get a chunk before any gets its second
        CONTINUE  the leader and up to `slots - 1` more when nobody is running, by top-two sampling: draw theta of all
                  trials; with probability `beta` the best one trains, else the second best

    The draws depend on `seed` and on the chunks done by all trials together, and are dealt in the order of the means,
    so that neither the trials' order nor their numbers play a part and a replay repeats them.

    Args:
        beta: Share of the draws that goes to the best rather than to its rival, between 0 and 1.
        seed: Of the draws.
        chance: Below this chance of beating the leader a trial is stopped, between 0 and 1.
        doubt: How far a trial may still move, in units of what the median trial lies behind the best. Over 24
            searches on recorded curves (TaskSet, 64 trials) 1 spent a 13th of the full search, 1.5 a 9th, 2 a 6th.
        budget: Chunks of all trials together after which only the leader trains on, by default half of the full search
            (trials * chunks / 2). Beyond it come the round that reaches it, the leader's rest, and the first chunk of
            every trial that arrives later.

    Raises:
        ValueError: `beta` or `chance` is not between 0 and 1, `seed` is negative, `doubt` not above 0, or `budget`
            below 1.

    A live trial whose last value is NaN, inf or -inf is stopped at once; such values are left out of every fit. If the
    rule would leave no finite trial live or complete, the most advanced one goes on
    (`rapidfire_policies.survivors.keep_one`).

    What breaks it: the belief is a guess, not a calibrated one: where the curves of most trials cross late, the winner
    is written off; so is a curve that stands still and then falls. In plain Optuna a paused trial trains on.

    Paper: Russo, Simple Bayesian Algorithms for Best-Arm Identification, 2016 (https://arxiv.org/abs/1602.08448),
    section 3.3. Its arms give independent rewards for ever; a curve here has an end, and what is believed of it is the
    extrapolation above.

    >>> from rapidfire_policies import History, TopTwoThompson, TrialHistory, TrialState
    >>> curves = [(0.9, 0.6, 0.5), (0.9, 0.58, 0.47), (0.9, 0.9, 0.9)]
    >>> waiting = tuple(TrialHistory(i, curve, TrialState.PAUSED) for i, curve in enumerate(curves))
    >>> decisions = TopTwoThompson().decide(History(waiting, chunks=8, slots=1))
    >>> {number: str(decision.verdict) for number, decision in sorted(decisions.items())}
    {0: 'pause', 1: 'continue', 2: 'stop'}
    >>> decisions[2].reason
    'ends at 0.9 ± 0.02; a chance of 0.0019 to beat trial 1'
    """

    beta: float = 0.5
    seed: int = 0
    chance: float = 0.01
    doubt: float = 1.5
    budget: int | None = None

    def __post_init__(self) -> None:
        check_level("beta", self.beta, fix="0.5 gives the rivals as many chunks as the best.")
        check_level("chance", self.chance)
        check_number("doubt", self.doubt, above=0)
        check_int("seed", self.seed, at_least=0)
        if self.budget is not None:
            check_int("budget", self.budget, at_least=1, fix="It is in chunks, all trials together.")

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Stop who has no chance; when nobody is running, draw who trains next."""
        live = sorted((trial for trial in history.trials if trial.is_live), key=lambda trial: trial.number)
        decisions = {trial.number: diverged(trial) for trial in live if trial.values and not is_finite(trial)}
        arms = [t for t in history.trials if is_finite(t) and (t.is_live or t.state is TrialState.COMPLETE)]
        if not arms:
            return decisions
        belief = _Belief(arms, history, self.doubt)
        judged = self._stopped(belief, history)
        unseen = [trial for trial in live if not trial.values]
        if not history.running:
            judged |= {trial.number: Decision(Verdict.CONTINUE, "not seen yet") for trial in unseen}
            judged |= self._drawn(belief, judged, history, slots=history.slots - len(unseen))
        wait = "waits until all have been seen" if history.running else "not drawn"
        for arm in belief.arms:
            if arm.is_live and arm.number not in judged:
                words = f"{wait}; {belief.words(arm.number)}"
                judged[arm.number] = Decision(Verdict.PAUSE, words, belief.numbers(arm))
        return keep_one(history, decisions | judged)

    def _stopped(self, belief: _Belief, history: History) -> dict[int, Decision]:
        spent = sum(trial.resource for trial in history.trials)
        budget = math.ceil(len(history.trials) * history.chunks / 2) if self.budget is None else self.budget
        leader = belief.arms[0]
        stopped = {}
        for arm, chance in zip(belief.arms[1:], belief.chances[1:].tolist(), strict=True):
            if not arm.is_live:
                continue
            if chance < self.chance:
                why = f"a chance of {chance:.2g} to beat trial {leader.number}"
                more: dict[str, Number] = {"chance": chance, "least_chance": self.chance}
            elif spent >= budget:
                why = f"{spent} of {counted(budget, 'chunk')} are spent, trial {leader.number} leads"
                more = {"spent": spent, "budget": budget}
            else:
                continue
            numbers = belief.numbers(arm) | {"rival": leader.number} | more
            stopped[arm.number] = Decision(Verdict.STOP, f"{belief.words(arm.number)}; {why}", numbers)
        return stopped

    def _drawn(
        self, belief: _Belief, stopped: Mapping[int, Decision], history: History, slots: int
    ) -> dict[int, Decision]:
        """CONTINUE for the leader and those that top-two sampling picks, `slots` trials at most, at least one."""
        spent = sum(trial.resource for trial in history.trials)
        random = np.random.default_rng([self.seed, spent])
        thetas = belief.means + belief.deviations * random.standard_normal((_DRAWS, len(belief.arms)))
        coins = random.random(_DRAWS) < self.beta
        best_two = np.argsort(thetas, axis=1, kind="stable")[:, :2]
        picks = np.where(coins, best_two[:, 0], best_two[:, -1]).tolist()
        by_rank = {i: arm for i, arm in enumerate(belief.arms) if arm.is_live and arm.number not in stopped}
        # Where the draws keep to few trials the rest of the slots goes by rank: an idle slot helps nobody.
        order = dict.fromkeys(place for place in [0, *picks, *by_rank] if place in by_rank)
        drawn = [belief.arms[place].number for place in order][: max(1, slots)]
        return {number: Decision(Verdict.CONTINUE, f"drawn; {belief.words(number)}") for number in drawn}


class _Belief:
    """Where the trials are believed to end, the leader first.

    Args:
        trials: Finite ones, live or complete.
        history: All trials; the failed and stopped ones' curves teach how curves go.
        doubt: How far a trial may still move, see `TopTwoThompson`.
    """

    def __init__(self, trials: Sequence[TrialHistory], history: History, doubt: float) -> None:
        fits = {trial.number: fit for trial in history.trials if (fit := _fit(trial, history.chunks)) is not None}
        slope = float(np.median([fit.slope for fit in fits.values()])) if fits else 0.0
        noise = float(np.median([fit.residual for fit in fits.values()])) if fits else 0.0
        last = bounded([trial.values[-1] for trial in trials])
        done = np.array([_ends_at(trial, history.chunks) for trial in trials], dtype=np.float64)
        left = done**-0.5 - history.chunks**-0.5
        slopes = np.array([fits[trial.number].slope if trial.number in fits else slope for trial in trials])
        ends = np.array([fits[trial.number].end if trial.number in fits else np.nan for trial in trials])
        means = np.where(left > 0, np.where(np.isnan(ends), last - slope * left, ends), last)
        reach = np.maximum(np.abs(slopes), doubt * (np.median(last) - last.min()))
        deviations = np.where(left > 0, np.hypot(noise, reach * left), 0.0)
        order = sorted(range(len(trials)), key=lambda i: (means[i], last[i], -done[i], trials[i].number))
        self.arms = [trials[i] for i in order]
        self.means: NDArray[np.float64] = means[order]
        self.deviations: NDArray[np.float64] = deviations[order]
        both = np.hypot(self.deviations, self.deviations[0])
        gap = self.means[0] - self.means
        # Two that are known exactly: the one behind has no chance, an equal one has an even one.
        z = np.divide(gap, both, out=np.where(gap < 0, -np.inf, 0.0), where=both > 0)
        self.chances: NDArray[np.float64] = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z.tolist()])
        ends_at = zip(self.means.tolist(), self.deviations.tolist(), strict=True)
        self._ends_at = dict(zip((arm.number for arm in self.arms), ends_at, strict=True))

    def words(self, number: int) -> str:
        """What is believed of a trial."""
        mean, deviation = self._ends_at[number]
        return f"ends at {mean:.4g} ± {deviation:.2g}"

    def numbers(self, trial: TrialHistory) -> dict[str, Number]:
        """What is believed of a trial, as a decision's numbers."""
        mean, deviation = self._ends_at[trial.number]
        return numbers_of(trial, forecast=mean, deviation=deviation)


@dataclass(frozen=True)
class _Fit:
    """`a + b * t^-1/2` through the end of a curve.

    Args:
        slope: `b`.
        end: Its value at the last chunk of a whole trial.
        residual: The root mean square of what it leaves over, for the two numbers that were fitted.
    """

    slope: float
    end: float
    residual: float


def _fit(trial: TrialHistory, chunks: int) -> _Fit | None:
    """The fit, or None with fewer than three finite values at the end of the curve."""
    window = max(3, math.ceil(trial.resource / 2))
    values = np.array(trial.values[-window:])
    x = np.arange(trial.resource - len(values) + 1.0, trial.resource + 1.0) ** -0.5
    finite = np.isfinite(values)
    x, values = x[finite], bounded(values[finite])
    if len(values) < 3:
        return None
    # Large finite values (a loss that explodes) would overflow in the squares.
    scale = max(float(np.abs(values).max()), 1e-300)
    scaled = values / scale
    centred = x - x.mean()
    slope = float(centred @ scaled / (centred @ centred))
    start = float(scaled.mean() - slope * x.mean())
    residual = math.sqrt(float(np.square(scaled - start - slope * x).sum()) / (len(x) - 2))
    return _Fit(slope * scale, (start + slope * chunks**-0.5) * scale, residual * scale)


def _ends_at(trial: TrialHistory, chunks: int) -> int:
    """Chunks a trial counts as having done: all, if its last value is final."""
    return chunks if trial.state is TrialState.COMPLETE else min(trial.resource, chunks)
