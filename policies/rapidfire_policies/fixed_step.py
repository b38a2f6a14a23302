"""FixedStep: train everybody for a while, keep the best few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rapidfire_policies._arguments import check_int
from rapidfire_policies.base import Decision, History, Policy, Verdict
from rapidfire_policies.rungs import top, values_at
from rapidfire_policies.survivors import keep_one, stop_diverged


@dataclass(frozen=True)
class FixedStep(Policy):
    """Train every trial for `chunks` chunks, then only the best `keep` of them: the baseline every other must beat.

    A trial that has done at least `chunks` chunks goes on if and only if

        rank of its value after `chunks` chunks  <=  keep

    among all values ever recorded there, whatever became of the trials since, with the older ahead at equal values.
    Nobody waits: where trials do not arrive together, a trial that passed is stopped at a later chunk as soon as `keep`
    better values are on record, so that in the end at most `keep` have been spared in whatever order they came
    (unless a trial was through before a better one came). With `chunks` at or past a whole trial nobody is stopped.

    A live trial whose last value is NaN, inf or -inf is stopped at once; such values rank behind every finite one. If
    the rule would leave no finite trial live or complete, the most advanced one goes on
    (`rapidfire_policies.survivors.keep_one`).

    Args:
        chunks: Chunks that everybody gets.
        keep: Trials that go on after that.

    Raises:
        ValueError: An argument below 1.

    What breaks it: values after `chunks` chunks that say little of the end; a `keep` that is as large as the search.

    Paper: none; it is what people do by hand, and hard to beat where curves rarely cross (Bohdal et al., PASHA, 2023,
    compare with it as the "one-epoch baseline").

    >>> from rapidfire_policies import FixedStep, History, TrialHistory
    >>> history = History(tuple(TrialHistory(i, (loss,)) for i, loss in enumerate([0.4, 0.3, 0.5, 0.2])), chunks=4)
    >>> decisions = FixedStep(chunks=1, keep=2).decide(history)
    >>> [number for number, decision in decisions.items() if decision.verdict == "continue"]
    [1, 3]
    >>> decisions[0].reason
    'rung 1: 0.4 ranks 3 of 4, the best 2 go on (cut 0.3)'
    """

    chunks: int = 1
    keep: int = 3

    def __post_init__(self) -> None:
        check_int("chunks", self.chunks, at_least=1, fix="It is what every trial gets.")
        check_int("keep", self.keep, at_least=1, fix="It is how many trials go on after that.")

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Stop whoever is not among the best `keep` after `chunks` chunks."""
        decisions = {trial.number: Decision(Verdict.CONTINUE, "still warming up") for trial in history.live}
        judged = [trial for trial in history.live if self.chunks <= trial.resource]
        if judged and self.chunks < history.chunks:
            cut = top(values_at(history, self.chunks), self.keep)
            for trial in judged:
                verdict = Verdict.CONTINUE if cut.keeps(trial.number) else Verdict.STOP
                numbers = cut.numbers(self.chunks, trial)
                decisions[trial.number] = Decision(verdict, cut.words(self.chunks, trial), numbers)
        return keep_one(history, decisions | stop_diverged(history))
