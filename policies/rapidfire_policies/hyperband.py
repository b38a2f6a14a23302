"""Hyperband: successive halving from several first rungs at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rapidfire_policies.base import Decision, History, Policy
from rapidfire_policies.rungs import check_rungs
from rapidfire_policies.successive_halving import halve
from rapidfire_policies.survivors import keep_one, stop_diverged


@dataclass(frozen=True)
class Bracket:
    """One run of successive halving.

    Args:
        size: Trials that enter it.
        ladder: Its rungs, in chunks; the end of a trial is none.
    """

    size: int
    ladder: tuple[int, ...]


def brackets(min_resource: int, reduction_factor: int, chunks: int) -> tuple[Bracket, ...]:
    """The brackets of one round of Hyperband, the most aggressive first.

    With `R = chunks`, `eta = reduction_factor` and `s_max` the largest integer with `R / eta**s_max >= min_resource`,
    bracket `s = s_max, ..., 0` takes `ceil((s_max + 1) / (s + 1) * eta**s)` trials and cuts them after
    `floor(R / eta**s), ..., floor(R / eta)` chunks.

    >>> for bracket in brackets(1, 3, chunks=27):
    ...     print(bracket)
    Bracket(size=27, ladder=(1, 3, 9))
    Bracket(size=12, ladder=(3, 9))
    Bracket(size=6, ladder=(9,))
    Bracket(size=4, ladder=())
    """
    most = 0
    while chunks >= min_resource * reduction_factor ** (most + 1):
        most += 1
    return tuple(
        Bracket(
            size=-(-(most + 1) * reduction_factor**s // (s + 1)),
            ladder=tuple(chunks // reduction_factor**k for k in range(s, 0, -1)),
        )
        for s in range(most, -1, -1)
    )


@dataclass(frozen=True)
class Hyperband(Policy):
    """Successive halving in brackets that differ in the first rung: some cut early and hard, the last one never.

    The brackets and their sizes are those of the paper (`rapidfire_policies.hyperband.brackets`), filled by count: the
    first trials by number fill the most aggressive bracket, the next ones the second, and so on; when all are
    full the round starts again. Each filling is a cohort of its own, in which

        rank of its value at r  <=  max(1, floor(n / reduction_factor))

    decides who of the `n` trials that ever stood at the bracket's rung `r` goes on, the older ahead at equal values. A
    trial waits at its rung (PAUSE) until its cohort is full and none of it is RUNNING with at most `r` chunks done;
    when nobody at all is RUNNING no more trials are to come, or no more may live at a time, and all who wait are
    judged.

    A live trial whose last value is NaN, inf or -inf is stopped at once; its values rank behind every finite one. If
    the rule would leave no finite trial live or complete, the most advanced one goes on
    (`rapidfire_policies.survivors.keep_one`).

    Args:
        min_resource: No rung lies before so many chunks.
        reduction_factor: One in so many goes on, and the ratio of two rungs (the paper's eta).

    Raises:
        ValueError: `min_resource` is below 1 or `reduction_factor` below 2.

    What breaks it: a search that ends in the middle of a round (all brackets cost about the same, but the last of them
    hold few trials: with 27 chunks the last 10 of 49 do half of the work); memory, since a cohort that may not live at
    a time is judged in parts. In a plain Optuna loop, where nobody can wait, it stops nobody. Optuna's own
    `HyperbandPruner` draws the bracket from a hash of the study's name and the trial's number, so the sizes are right
    on average only.

    Paper: Li et al., Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization, JMLR 2018
    (https://arxiv.org/abs/1603.06560), Algorithm 1.

    >>> from rapidfire_policies import History, Hyperband, TrialHistory, TrialState
    >>> trials = tuple(TrialHistory(i, (0.1 * i,), TrialState.PAUSED) for i in range(5))
    >>> decisions = Hyperband().decide(History(trials, chunks=3))
    >>> [str(decisions[number].verdict) for number in range(5)]
    ['continue', 'stop', 'stop', 'continue', 'continue']
    """

    min_resource: int = 1
    reduction_factor: int = 3

    def __post_init__(self) -> None:
        check_rungs(self.min_resource, self.reduction_factor)

    @property
    def by_age(self) -> bool:
        """The older trials fill the first brackets."""
        return True

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Fill the brackets by number, then halve in each."""
        one_round = brackets(self.min_resource, self.reduction_factor, history.chunks)
        trials = sorted(history.trials, key=lambda trial: trial.number)
        judged: dict[int, Decision] = {}
        start, turn = 0, 0
        while start < len(trials):
            bracket = one_round[turn % len(one_round)]
            cohort = trials[start : start + bracket.size]
            open_to_more = len(cohort) < bracket.size and bool(history.running)
            judged |= halve(cohort, bracket.ladder, self.reduction_factor, open_to_more=open_to_more)
            start, turn = start + bracket.size, turn + 1
        return keep_one(history, judged | stop_diverged(history))
