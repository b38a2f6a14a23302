"""PairedRace: stop a trial once its examples say that another is better."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from rapidfire_policies._arguments import check_level
from rapidfire_policies.base import Decision, History, Number, Policy
from rapidfire_policies.paired import race, spent
from rapidfire_policies.wording import counted

MIN_EXAMPLES = 20


@dataclass(frozen=True)
class PairedRace(Policy):
    """Stop a trial whose per-example scores are significantly worse than those of the best trial at its chunk.

    Let a running trial `i` have done `k` chunks, `j` be the trial with the best mean score there (whatever became of it
    since), `d_e = score_i(e) - score_j(e)` over the `n` examples, and `L(a)` the lower confidence bound of the mean of
    `d` at level `a` (`lower_bounds`). The trial is stopped if and only if

        L(a) > 0   with   a = alpha / (chunks * (K - 1)),   n >= max(20, 4 ln(1 / a))

    where `K` counts the trials that have reported a value. Paused trials are resumed unjudged.

    The guarantee, as `n` grows: for every trial, the chance that it is ever stopped at a chunk at which no other is
    better in expectation over examples is at most alpha. So a trial that is best at chunks 1 to k is stopped there or
    before with chance at most alpha. No test could promise that to a trial that is best at k alone: it may be found
    worse, rightly, where it was worse. The bounds of all chunks and pairs hold together, whatever the dependence
    between chunks. Below 20 examples nobody is stopped; from there on `experiments/policies/error_control.json` has the
    rates for normal, skewed, binary and t(3) differences.

    Args:
        alpha: Chance of stopping a best trial, for the whole search.

    Raises:
        ValueError: `alpha` is not in (0, 1); in `decide`: trials were scored on sets of different sizes.

    A live trial whose last value is NaN or infinite is stopped. One with a finite value but no scores, or with a NaN or
    an infinity among them, is neither judged nor a rival. If the rule would leave no finite trial live or complete, the
    most advanced one goes on (`rapidfire_policies.survivors.keep_one`).

    What breaks it: curves that cross later (hold it off with a warm-up); rare examples on which a trial is far better,
    none of which was drawn (where scores are bounded, `BettingRace` is exact); examples that trials were trained on,
    that depend on each other, or whose scores told a sampler what to try next: a newcomer that owes its existence to
    them is no independent rival, and a number of trials that follows the noise spends alpha on rivals not yet counted.

    Paper: Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, Time-uniform central limit theory and asymptotic confidence
    sequences, 2024 (https://arxiv.org/abs/2103.06476). Time is the chunk here: all examples of a chunk are there at
    once, so what their mixture boundary pays for peeking between examples (1.5 to 2 times the examples at the same
    power) would buy nothing; a union over the chunks takes its place. Hall, On the removal of skewness by
    transformation, 1992: normal tails are far off for skewed differences at the small levels that many pairs need.

    >>> import numpy as np
    >>> from rapidfire_policies import History, PairedRace, TrialHistory
    >>> wave = np.sin(np.arange(100.0))
    >>> scores = {0: wave, 1: wave + 0.1 + 0.2 * np.cos(np.arange(100.0)), 2: wave[::-1] + 0.1}
    >>> trials = tuple(TrialHistory(n, (s.mean(),), scores=(s,)) for n, s in scores.items())
    >>> decisions = PairedRace().decide(History(trials, chunks=10))
    >>> {number: str(decision.verdict) for number, decision in decisions.items()}
    {0: 'continue', 1: 'stop', 2: 'continue'}
    >>> decisions[1].reason
    'chunk 1: against trial 0, worse by 0.0992, at least 0.0574 (100 examples, level 0.0025)'
    """

    alpha: float = 0.05

    def __post_init__(self) -> None:
        check_level("alpha", self.alpha, fix="0.05 is an error in 20 searches.")

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Judge every running trial against the best at its chunk."""
        level = spent(self.alpha, history)

        def judge(differences: NDArray[np.float64]) -> Iterator[tuple[bool, str, dict[str, Number]]]:
            examples = differences.shape[1]
            bounds = lower_bounds(differences, level).tolist()
            for mean, bound in zip(differences.mean(axis=1).tolist(), bounds, strict=True):
                words = f"worse by {mean:.3g}, at least {bound:.3g} ({counted(examples, 'example')}, level {level:.2g})"
                # The bound moves with the mean: had all scores been better by more, it would lie below 0.
                numbers: dict[str, Number] = {"worse_by": mean, "worse_by_at_least": bound, "short_by": bound}
                yield bound > 0, words, numbers | {"examples": examples, "level": level}

        return race(history, judge)


def lower_bounds(differences: NDArray[np.float64], level: float) -> NDArray[np.float64]:
    """One-sided lower confidence bounds of means: Student's, corrected for skewness after Hall.

    With mean `m`, standard deviation `s` and the `t` quantile `q` of `n` differences, `L = m - s * w`, where `w` solves
    `((1 + g w / 3)**3 - 1) / g + g / (6 n) = q / sqrt(n)`. Student's bound is the limit `g = 0`. Only a long tail to
    the left makes it too high, and there a sample's skewness is too small, most of all in the samples that err; so
    `g = min(0, 1.5 * skewness - sqrt(6 / n))`, the square root being the skewness's standard error.

    Args:
        differences: Shape `(pairs, examples)` float64.
        level: The chance that a bound lies above its mean.

    Returns:
        Shape `(pairs,)` float64; `-inf` where there are fewer examples than `max(20, 4 ln(1 / level))`.
    """
    pairs, n = differences.shape
    if n < max(MIN_EXAMPLES, 4 * math.log(1 / level)):
        return np.full(pairs, -np.inf)
    means = differences.mean(axis=1)
    centred = differences - means[:, None]
    squares = centred * centred
    second = squares.mean(axis=1)
    third = np.einsum("pe,pe->p", squares, centred) / n
    skewness = third / np.maximum(second**1.5, np.finfo(np.float64).tiny)
    # At zero the formula divides by zero; this close to it, it is Student's to 12 digits.
    g = np.minimum(1.5 * skewness - math.sqrt(6 / n), -1e-6)
    q = -stdtrit(n - 1, level)
    w = 3 / g * (np.cbrt(1 + g * (q / math.sqrt(n) - g / (6 * n))) - 1)
    bounds: NDArray[np.float64] = means - np.sqrt(second * n / (n - 1)) * w
    return bounds
