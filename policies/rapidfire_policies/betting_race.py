"""BettingRace: bet against a trial on one example after the other; stop it once the bets have won enough."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rapidfire_policies._arguments import check_level
from rapidfire_policies.base import Decision, History, Number, Policy
from rapidfire_policies.paired import race, spent
from rapidfire_policies.wording import counted

LARGEST_BET = 0.9


@dataclass(frozen=True)
class BettingRace(Policy):
    """Stop a trial once betting that the best trial at its chunk is better has multiplied the stake often enough.

    Let a running trial `i` have done `k` chunks, `j` be the trial with the best mean score there (whatever became of it
    since), and `d_e = (score_i(e) - score_j(e)) / (high - low)` on example `e`, between -1 and 1. The capital starts at
    1 and example `e` multiplies it by `1 + bet_e * d_e`, with a bet in [0, 0.9] that depends on earlier examples alone
    (`log_capitals`). The trial is stopped if and only if

        max over e of capital_e  >=  1 / a,   a = alpha / (chunks * (K - 1))

    where `K` counts the trials that have reported a value. Paused trials are resumed unjudged.

    The guarantee, for any number of examples drawn independently: for every trial, the chance that it is ever stopped
    at a chunk at which no other is better in expectation over examples is at most alpha. Where the trial is at least as
    good as a rival, the capital cannot grow in expectation, so it reaches `1 / a` with chance at most `a` (Ville's
    inequality); there are `K - 1` rivals and `chunks` looks. So a trial that is best at chunks 1 to k is stopped there
    or before with chance at most alpha; one that is best at k alone may be stopped before, rightly, where it was worse.

    Args:
        alpha: Chance of stopping a best trial, for the whole search.
        low: The lowest score there can be, as the metric has it.
        high: The highest. Only `high - low` plays a part, so the sign of a metric that is maximised does not.

    Raises:
        ValueError: `alpha` is not in (0, 1) or `low` and `high` are not finite and in order; in `decide`: trials were
            scored on sets of different sizes.

    A live trial whose last value is NaN or infinite is stopped. One with a finite value but no scores, or with a NaN or
    an infinity among them, is neither judged nor a rival; nor is one judged whose difference on some example is beyond
    `high - low`: the reason says so. If the rule would leave no finite trial live or complete, the most advanced one
    goes on (`rapidfire_policies.survivors.keep_one`).

    What breaks it: bounds much wider than the scores (no bet is larger than 0.9 of the width); curves that cross later;
    examples that trials were trained on, that depend on each other, or whose scores told a sampler what to try next; an
    order of examples chosen by their scores. It pays for certainty: see its power beside `PairedRace`'s in
    `experiments/policies/error_control.json`.

    Paper: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, 2024
    (https://arxiv.org/abs/2010.09686). The bet is their predictable plug-in for a fixed number of examples, on the
    second moment of the differences.

    >>> import numpy as np
    >>> from rapidfire_policies import BettingRace, History, TrialHistory
    >>> right = {0: [1] * 30, 1: [1, 0, 0] * 10, 2: [1, 1, 1, 1, 0] * 6}
    >>> trials = tuple(TrialHistory(n, (-np.mean(r),), scores=(-np.array(r, float),)) for n, r in right.items())
    >>> decisions = BettingRace().decide(History(trials, chunks=4))
    >>> {number: str(decision.verdict) for number, decision in decisions.items()}
    {0: 'continue', 1: 'stop', 2: 'continue'}
    >>> decisions[2].reason
    'chunk 1: against trial 0, worse by 0.2, capital 47 of 160 (30 examples)'
    """

    alpha: float = 0.05
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_level("alpha", self.alpha, fix="0.05 is an error in 20 searches.")
        numbers = all(isinstance(bound, (int, float)) and math.isfinite(bound) for bound in (self.low, self.high))
        if not numbers or self.low >= self.high:
            raise ValueError(
                f"`low` and `high` must be finite, `low` below `high`, got {self.low!r} and {self.high!r}."
            )

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Judge every running trial against the best at its chunk."""
        level = spent(self.alpha, history)
        width = self.high - self.low

        def judge(differences: NDArray[np.float64]) -> Iterator[tuple[bool, str, dict[str, Number]]]:
            examples = differences.shape[1]
            largest = np.abs(differences).max(axis=1)
            bounded = largest <= width * (1 + 1e-9)
            capitals = np.zeros(len(differences))
            capitals[bounded] = log_capitals(differences[bounded] / width, level).max(axis=1)
            columns = (differences.mean(axis=1), largest, bounded, capitals)
            for mean, most, fits, log_capital in zip(*(column.tolist() for column in columns), strict=True):
                capital = math.exp(min(log_capital, 99))
                won = f"worse by {mean:.3g}, capital {capital:.3g} of {1 / level:.3g} ({counted(examples, 'example')})"
                beyond = f"a difference of {most:.3g} is beyond `high` - `low` = {width:.3g}: not judged"
                numbers: dict[str, Number] = {"worse_by": mean, "capital": capital, "most_capital": 1 / level}
                is_worse = log_capital >= math.log(1 / level)
                yield is_worse, won if fits else beyond, numbers | {"examples": examples, "level": level}

        return race(history, judge)


def log_capitals(differences: NDArray[np.float64], level: float) -> NDArray[np.float64]:
    """The logarithm of the capital after each example, for one who bets on positive differences.

    The bet on example `e` of `n` is `sqrt(2 ln(1 / level) / (n v_e))`, 0.9 at most: the best one if the last example is
    to decide. `v_e = (1/4 + sum of earlier d**2) / e` is the second moment so far, a guess of 1/4 counted as one.

    Args:
        differences: Shape `(pairs, examples)` float64, between -1 and 1, in the order of the examples.
        level: What the bets aim at: a capital of `1 / level`.

    Returns:
        Shape `(pairs, examples)` float64; the capital at the start is 1.
    """
    n = differences.shape[1]
    earlier = np.cumsum(differences**2, axis=1) - differences**2
    seconds = (0.25 + earlier) / np.arange(1, n + 1)
    bets = np.minimum(LARGEST_BET, np.sqrt(2 * math.log(1 / level) / (n * seconds)))
    capitals: NDArray[np.float64] = np.cumsum(np.log1p(bets * differences), axis=1)
    return capitals
