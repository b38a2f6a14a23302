"""Wilcoxon: the classical signed-rank test against the best trial, uncorrected."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from rapidfire_policies._arguments import check_level
from rapidfire_policies.base import Decision, History, Number, Policy
from rapidfire_policies.paired import race
from rapidfire_policies.wording import counted

MOST_EXACT = 50


@dataclass(frozen=True)
class Wilcoxon(Policy):
    """Stop a trial whose per-example scores a signed-rank test finds worse than those of the best trial at its chunk.

    Let a running trial `i` have done `k` chunks, `j` be the trial with the best mean score there (whatever became of it
    since), and `p` the one-sided p-value of Wilcoxon's signed-rank test on `score_i(e) - score_j(e)` (equal scores
    count half on each side, as in Optuna). The trial is stopped if and only if

        p < alpha

    Paused trials are resumed unjudged.

    Args:
        alpha: Chance of an error in one test between two trials named in advance: not what is done here, see below.

    Raises:
        ValueError: `alpha` is not in (0, 1); in `decide`: trials were scored on sets of different sizes.

    A live trial whose last value is NaN or infinite is stopped. One with a finite value but no scores, or with a NaN or
    an infinity among them, is neither judged nor a rival. If the rule would leave no finite trial live or complete, the
    most advanced one goes on (`rapidfire_policies.survivors.keep_one`).

    What breaks it: its own purpose. The rival is the best of all by the same scores, and every chunk is a new test. At
    alpha .05, 5 chunks and 50 examples with normal differences, a trial as good as any is stopped in 23% of searches
    over 2 trials and 97% over 16 (13% and 88% where four of five differences stay as they were from chunk to chunk).
    And it tests medians where a race is about means: with skewed differences a trial that is equal in the mean is
    stopped the more surely the more examples there are (85% and 100%). It is here to compare with: `PairedRace` keeps
    its word. All rates are in `experiments/policies/error_control.json`.

    Paper: Wilcoxon, Individual comparisons by ranking methods, 1945. Optuna's `WilcoxonPruner` is this test for trials
    that run one after the other, its looks at every example.

    >>> import numpy as np
    >>> from rapidfire_policies import History, TrialHistory, Wilcoxon
    >>> scores = {0: np.zeros(5), 1: np.array([1.0, 2, 3, 4, 5]), 2: np.array([-1.0, 2, 3, 4, 5])}
    >>> trials = tuple(TrialHistory(n, (s.mean(),), scores=(s,)) for n, s in scores.items())
    >>> decisions = Wilcoxon().decide(History(trials, chunks=4))
    >>> {number: str(decision.verdict) for number, decision in decisions.items()}
    {0: 'continue', 1: 'stop', 2: 'continue'}
    >>> decisions[1].reason
    'chunk 1: against trial 0, worse by 3, p = 0.0312 (5 examples)'
    """

    alpha: float = 0.05

    def __post_init__(self) -> None:
        check_level("alpha", self.alpha, fix="0.05 is an error in 20 searches.")

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Judge every running trial against the best at its chunk."""

        def judge(differences: NDArray[np.float64]) -> Iterator[tuple[bool, str, dict[str, Number]]]:
            examples = differences.shape[1]
            for mean, p in zip(differences.mean(axis=1).tolist(), p_values(differences).tolist(), strict=True):
                words = f"worse by {mean:.3g}, p = {p:.3g} ({counted(examples, 'example')})"
                yield p < self.alpha, words, {"worse_by": mean, "p": p, "alpha": self.alpha, "examples": examples}

        return race(history, judge)


def p_values(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """One-sided p-values of the signed-rank test that differences lie above 0.

    Exact for up to 50 differences without ties or zeros, from the normal approximation otherwise, as in SciPy.

    Args:
        differences: Shape `(pairs, examples)` float64.

    Returns:
        Shape `(pairs,)` float64.
    """
    n = differences.shape[1]
    ranks = _ranks(np.abs(differences))
    positive = (ranks * ((differences > 0) + 0.5 * (differences == 0))).sum(axis=1)
    # All signs equally likely, each rank counts or not: the variance is the sum of squared halves, ties or not.
    z = (positive - n * (n + 1) / 4) / np.sqrt((ranks * ranks).sum(axis=1) / 4)
    p: NDArray[np.float64] = ndtr(-z)
    distinct = (np.diff(np.sort(ranks, axis=1), axis=1) == 1).all(axis=1) & differences.all(axis=1)
    if n <= MOST_EXACT and distinct.any():
        p[distinct] = _tail(n)[positive[distinct].astype(np.int64)]
    return p


# Not SciPy's two: `scipy.stats` takes half a second to import, in the middle of the first round.


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The ranks in each row, equal values sharing their mean, `(pairs, examples)` as `values`."""
    ascending = np.sort(values, axis=1)
    places = [
        np.searchsorted(among, row, "left") + np.searchsorted(among, row, "right")
        for among, row in zip(ascending, values, strict=True)
    ]
    ranks: NDArray[np.float64] = (np.array(places).reshape(values.shape) + 1) / 2
    return ranks


@functools.cache
def _tail(n: int) -> NDArray[np.float64]:
    """The chance that the positive ones of the ranks 1 to n sum to w or more, by w, if all signs are equally likely."""
    ways = np.ones(1)
    for rank in range(1, n + 1):
        ways = np.pad(ways, (0, rank)) + np.pad(ways, (rank, 0))
    tail: NDArray[np.float64] = np.cumsum(ways[::-1])[::-1] / 2.0**n
    return tail
