"""Rising bandits: stop whoever could not catch up even at its recent pace."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rapidfire_policies._arguments import check_int, check_number
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, TrialState, Verdict, numbers_of
from rapidfire_policies.rungs import rank_key
from rapidfire_policies.survivors import diverged, is_finite, keep_one
from rapidfire_policies.wording import counted


@dataclass(frozen=True)
class RisingBound(Policy):
    """Stop a trial whose optimistic straight line to the last chunk stays above what a rival has already.

    Let `T` be the chunks of a whole trial, `r` the chunks a running trial has done, `m(k)` the best of its first `k`
    values, and `w = min(r - 1, max(window, floor(growth * r)))`. What the trial can still reach is at best

        bound = m(r) - (T - r) * (m(r - w) - m(r)) / w - errors * s

    since learning curves flatten out: the pace of the last `w` chunks is not kept up. `s` is the noise of its distance
    to the leader: the standard error of the mean paired difference between the last per-example scores of the two, 0
    where one of them has none. The trial is stopped if and only if

        r > window,  it is not among the best `keep` by last value,  and  bound > lead

    where `lead` is the smallest value that a rival (live or complete) has surely reached: the worse of its last two.

    On curves that fall and flatten out (convex, no noise) the trial that ends best is never stopped: its bound lies
    below its end, and its end below every rival's lead.

    Args:
        window: Least chunks over which the pace is measured (the paper's C); the first `window` chunks are not judged.
        growth: The window as a share of the chunks done, 0 to 1: a pause in the progress of a long curve says less.
        keep: So many of the best are never stopped; noise at the top then costs nothing.
        errors: Standard errors by which the bound is lowered.

    Raises:
        ValueError: `window` or `keep` below 1, `growth` outside [0, 1), `errors` below 0.

    A live trial whose last value is NaN or infinite is stopped; earlier such values are skipped in `m`, and without a
    finite value `w` chunks ago the trial is not judged. If the rule would leave no finite trial live or complete, the
    most advanced one goes on (`rapidfire_policies.survivors.keep_one`).

    What breaks it: a plateau longer than the window before a late drop; a value that gets worse at the end of a trial
    (the bound only looks at the best so far); few chunks, since it takes `window + 1` of them to say anything.

    Paper: Li et al., Efficient Automatic CASH via Rising Bandits, AAAI 2020 (https://arxiv.org/abs/2012.04371), with
    its smoothed growth rate; the growing window and the protected top are ours. Theirs eliminates against every rival's
    current value, which is `growth=0, keep=1` but for the worse of two, and knows no scores.

    >>> from rapidfire_policies import History, RisingBound, TrialHistory
    >>> curves = [(0.9, 0.5, 0.4), (0.9, 0.8, 0.6), (0.7, 0.69, 0.68)]
    >>> history = History(tuple(TrialHistory(i, curve) for i, curve in enumerate(curves)), chunks=6)
    >>> decisions = RisingBound(window=2, keep=1).decide(history)
    >>> [str(decisions[number].verdict) for number in range(3)]
    ['continue', 'continue', 'stop']
    >>> decisions[2].reason
    'chunk 3: 0.68 can reach 0.65 at its pace of 0.01 a chunk, and trial 0 has 0.5'
    """

    window: int = 2
    growth: float = 1 / 3
    keep: int = 3
    errors: float = 0.0

    def __post_init__(self) -> None:
        check_int("window", self.window, at_least=1, fix="It is the chunks over which the pace is measured.")
        check_int("keep", self.keep, at_least=1, fix="The best trial is never stopped.")
        check_number("growth", self.growth, at_least=0, fix="It is a share of the chunks done.")
        check_number("errors", self.errors, at_least=0, fix="2 stops nobody whose distance may well be noise.")
        if self.growth >= 1:
            raise ValueError(f"`growth` must be a number < 1, got {self.growth!r}. It is a share of the chunks done.")

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Judge every running trial against the rivals that are live or complete."""
        rivals = [t for t in history.trials if (t.is_live or t.state is TrialState.COMPLETE) and is_finite(t)]
        rivals.sort(key=lambda t: rank_key(t.values[-1], t.number))
        top = {trial.number: trial.values[-1] for trial in rivals[: self.keep]}
        leader = min(rivals, key=lambda t: (_surely(t.values), t.number), default=None)
        running = [trial for trial in history.running if trial.values]
        return keep_one(history, {t.number: self._judge(t, leader, top, history.chunks) for t in running})

    def _judge(
        self, trial: TrialHistory, leader: TrialHistory | None, top: Mapping[int, float], chunks: int
    ) -> Decision:
        value, done = trial.values[-1], trial.resource
        if not is_finite(trial) or leader is None:
            return diverged(trial)
        if trial.number in top:
            return Decision(Verdict.CONTINUE, f"chunk {done}: {value:.4g} is among the best {self.keep}")
        if done <= self.window:
            return Decision(Verdict.CONTINUE, f"chunk {done}: too early to judge")
        width = min(done - 1, max(self.window, math.floor(self.growth * done)))
        best, before = _best(trial.values), _best(trial.values[: done - width])
        if not math.isfinite(before):
            return Decision(Verdict.CONTINUE, f"chunk {done}: no finite value {counted(width, 'chunk')} ago")
        pace = (before - best) / width
        noise = self.errors * _standard_error(trial, leader) if self.errors else 0.0
        bound, lead = best - (chunks - done) * pace - noise, _surely(leader.values)
        # The value at which the line would just meet the lead, or that of the last of the best, if that is easier.
        meets = before + (lead + noise - before) * width / (width + chunks - done)
        threshold = max(meets, max(top.values()))
        numbers = numbers_of(trial, threshold=threshold, bound=bound, pace=pace, lead=lead, rival=leader.number)
        if bound <= lead:
            words = f"{value:.4g} can reach {bound:.4g}, the lead is {lead:.4g}"
            return Decision(Verdict.CONTINUE, f"chunk {done}: {words}", numbers)
        words = f"{value:.4g} can reach {bound:.4g} at its pace of {pace:.3g} a chunk"
        words += f" and {self.errors:g} standard errors" if noise else ""
        return Decision(Verdict.STOP, f"chunk {done}: {words}, and trial {leader.number} has {lead:.4g}", numbers)


def _best(values: Sequence[float]) -> float:
    """The smallest finite value, inf without one."""
    return min((value for value in values if math.isfinite(value)), default=math.inf)


def _surely(values: Sequence[float]) -> float:
    """The worse of the last two values: one good evaluation may be luck."""
    return max((value for value in values[-2:] if math.isfinite(value)), default=math.inf)


def _standard_error(trial: TrialHistory, leader: TrialHistory) -> float:
    """Of the mean difference between the last scores of two trials; 0 without two finite scores of each.

    >>> scores = [(np.array([1.0, 0.0, 1.0]),), (np.array([0.0, 0.0, 0.0]),)]
    >>> round(_standard_error(*(TrialHistory(n, (0.5,), scores=one) for n, one in enumerate(scores))), 4)
    0.3333
    """
    if not trial.scores or not leader.scores:
        return 0.0
    mine, theirs = (np.asarray(one.scores[-1], dtype=np.float64).ravel() for one in (trial, leader))
    if mine.size != theirs.size or mine.size < 2:
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        error = float(np.std(mine - theirs, ddof=1)) / math.sqrt(mine.size)
    return error if math.isfinite(error) else 0.0
