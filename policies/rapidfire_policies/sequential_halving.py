"""SequentialHalving: a fixed budget of chunks, spent in rounds that halve the field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rapidfire_policies._arguments import check_int
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, TrialState, Verdict, numbers_of
from rapidfire_policies.rungs import top, values_at
from rapidfire_policies.survivors import diverged, is_finite, keep_one
from rapidfire_policies.wording import counted


@dataclass(frozen=True)
class SequentialHalving(Policy):
    """Spend a budget of chunks in `log2(K)` equal rounds, and keep the better half after each.

    Of `K` trials, `|S_0| = K` take part in the first round and `|S_(r+1)| = ceil(|S_r| / 2)` in each later one, until
    one is left; these are `L = ceil(log2 K)` rounds. Round `r` trains each of its trials for

        t_r = max(1, floor(budget / (|S_r| * L)))   chunks more,  up to  R_r = t_0 + ... + t_r

    Where the paper draws fresh rewards, a curve goes on: `R_r` chunks are done, and the value after them is what the
    trial is judged by. In the first round nobody gets a second chunk before all trials have had one, since `K` is not
    known until they have come. Who has done `R_r` chunks is paused until the round is complete, which is when nobody is
    running and no living trial has done less. Then a trial that stands at `R_r` goes on if and only if, of the `n`
    trials with a value recorded there,

        rank of its value at R_r  <=  ceil(n / 2)

    with the older trial ahead at equal values; the rest is stopped. The last one trains to its end, at most
    `History.chunks` chunks that the budget does not count.

    `K` counts every trial of the history. If more are asked for than can live at a time (the executor's `n_jobs`), they
    come in waves: newcomers fill the places of stopped trials, the rounds are laid out anew for the larger `K`, each
    wave is judged against everybody who ever got where it stands, and a trial that is paused between two rounds goes on
    to the next. For one cohort, as the paper has it, let `slots + max_paused` be at least the number of trials.

    Args:
        budget: Chunks to spend on halving, all trials together; one chunk a trial and round is spent in any case. By
            default `L * History.chunks / (1/|S_0| + ... + 1/|S_(L-1)|)`, with which the last round ends whole trials:
            about `L / K` of the full search.

    Raises:
        ValueError: `budget` is below 1.

    A live trial whose last value is NaN, inf or -inf is stopped at once; its values rank behind every finite one and
    count in `n`. If the rule would leave no finite trial live or complete, the most advanced one goes on
    (`rapidfire_policies.survivors.keep_one`).

    What breaks it: curves that cross after a round, above all after the first, where half are stopped at `R_0`; waves
    that get better and better, which nothing halves; plain Optuna, where a paused trial trains on, so that nothing is
    ever stopped.

    Paper: Karnin, Koren and Somekh, Almost Optimal Exploration in Multi-Armed Bandits, 2013, Algorithm 3. Its
    non-stochastic use on curves: Jamieson and Talwalkar, 2016 (https://arxiv.org/abs/1502.07943).

    >>> from rapidfire_policies import History, SequentialHalving, TrialHistory, TrialState
    >>> SequentialHalving(budget=24).resources(trials=8, chunks=9)
    (1, 3, 7)
    >>> losses = [0.41, 0.38, 0.52, 0.40]
    >>> waiting = tuple(TrialHistory(i, (loss,), TrialState.PAUSED) for i, loss in enumerate(losses))
    >>> decisions = SequentialHalving(budget=8).decide(History(waiting, chunks=9, slots=4))
    >>> {number: str(decision.verdict) for number, decision in decisions.items()}
    {0: 'stop', 1: 'continue', 2: 'stop', 3: 'continue'}
    >>> decisions[0].reason
    'round 1, 1 chunk: 0.41 ranks 3 of 4, the best 2 go on (cut 0.4)'
    """

    budget: int | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            check_int("budget", self.budget, at_least=1, fix="It is in chunks, all trials together.")

    def resources(self, trials: int, chunks: int) -> tuple[int, ...]:
        """The chunks `R_r` after which the rounds end, those below `chunks`.

        Args:
            trials: Trials in all.
            chunks: Chunks of a whole trial; who stands there has nothing left to train.
        """
        sizes = []
        while trials > 1:
            sizes.append(trials)
            trials = math.ceil(trials / 2)
        a_round = 0.0
        if sizes:
            a_round = chunks / sum(1 / s for s in sizes) if self.budget is None else self.budget / len(sizes)
        ends, done = [], 0
        for size in sizes:
            done += max(1, int(a_round / size + 1e-9))
            ends.append(done)
        return tuple(end for end in ends if end < chunks)

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Pause who has done a round's chunks; halve when nobody is running."""
        ends = self.resources(len(history.trials), history.chunks)
        live = sorted((trial for trial in history.trials if trial.is_live), key=lambda trial: trial.number)
        anyone_runs = bool(history.running)
        decisions = {trial.number: _between(trial, ends, anyone_runs) for trial in live}
        standing = [trial for trial in live if is_finite(trial) and trial.resource in ends]
        furthest = max((trial.resource for trial in history.trials), default=0)
        for end in sorted({trial.resource for trial in standing}):
            here = [trial for trial in standing if trial.resource == end]
            judged = _judge(here, values_at(history, end), ends.index(end) + 1)
            behind = (t for t in live if t.resource < end and decisions[t.number].verdict is not Verdict.STOP)
            if anyone_runs or any(behind):
                # The round is not complete; or it was, and those that it let go still wait for a slot.
                free = {t.number for t in here if t.state is TrialState.PAUSED and furthest > end}
                for number, decision in judged.items():
                    if number not in free or decision.verdict is Verdict.STOP:
                        judged[number] = replace(
                            decision, verdict=Verdict.PAUSE, reason="waits for its round to be complete"
                        )
            decisions.update(judged)
        return keep_one(history, decisions)


def _judge(standing: Sequence[TrialHistory], values: Mapping[int, float], number: int) -> dict[int, Decision]:
    """The better half of all values recorded at the end of round `number` goes on."""
    cut = top(values, math.ceil(len(values) / 2))
    best = "the best goes on" if cut.keep == 1 else f"the best {cut.keep} go on"
    return {
        trial.number: Decision(
            Verdict.CONTINUE if cut.keeps(trial.number) else Verdict.STOP,
            f"round {number}, {counted(trial.resource, 'chunk')}: {trial.values[-1]:.4g} ranks "
            f"{cut.ranks[trial.number]} of {len(values)}, {best} (cut {cut.value:.4g})",
            cut.numbers(trial.resource, trial),
        )
        for trial in standing
    }


def _between(trial: TrialHistory, ends: tuple[int, ...], anyone_runs: bool) -> Decision:
    """What is said of a trial that does not stand at the end of a round."""
    if trial.values and not is_finite(trial):
        return diverged(trial)
    if anyone_runs and trial.values and trial.resource < max(2, min(ends, default=0)):
        return Decision(Verdict.PAUSE, "waits until all trials have come", numbers_of(trial))
    ahead = next((end for end in ends if end > trial.resource), None)
    return Decision(Verdict.CONTINUE, "past the last round" if ahead is None else f"the round ends at chunk {ahead}")
