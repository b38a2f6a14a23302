"""Guard: end trials that have gone wrong by themselves, whatever the others do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import median

from rapidfire_policies._arguments import check_inner, check_int, check_number
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, TrialState, Verdict, numbers_of
from rapidfire_policies.nop import Nop
from rapidfire_policies.survivors import is_finite, keep_one, stop_diverged
from rapidfire_policies.wording import counted

_ENDED = {Verdict.STOP: TrialState.STOPPED, Verdict.COMPLETE: TrialState.COMPLETE}


@dataclass(frozen=True)
class Guard(Policy):
    """End a trial that has diverged, overfits, left its reference or learns nothing; then ask the inner policy.

    Let `v[1], ..., v[r]` be a live trial's values and `f` the first finite one. The first line that applies decides:

    - STOP if `v[r]` is NaN, inf or -inf.
    - STOP if `v[r] > f + (divergence - 1) * |f|` (for a positive `f`: `divergence * f`) and `v[r]` is above the median
      of all trials' `|f|`. The second condition is for values near zero or below: there a multiple of the first value
      means little, and a value no larger than is usual for this metric is no divergence.
    - STOP if the last "kl" in the trial's metrics is above `max_kl`.
    - STOP if in each of the last `flat` chunks "reward_std" is 0, or "frac_reward_zero_std" is 1: all answers to a
      prompt earn the same, so that GRPO's and RLOO's advantages are 0 and nothing is learned.
    - COMPLETE if each of the last `patience` values is above `best + margin * |best|`, `best` being the least finite
      value before them: it overfits, and it is no bad trial for that.

    The inner policy decides about the rest, and sees the ended trials as STOPPED or COMPLETE already. If all this would
    leave no finite trial live or complete, the most advanced one goes on (`rapidfire_policies.survivors.keep_one`). NaN
    in a metric stands for a chunk without one: it breaks a run of flat chunks, and is below every cap.

    Args:
        policy: The inner policy.
        divergence: Multiple of the first value, above 1; None switches the rule off.
        patience: Chunks above the best value after which a trial is complete; None switches the rule off.
        margin: What counts as above the best value, a fraction of it.
        max_kl: Cap on the KL divergence from the reference model, in nats a token, as GRPO and RLOO log it (only where
            their `beta` is not 0); None switches the rule off.
        flat: Chunks without variance in the reward; None switches the rule off.

    Raises:
        ValueError: `policy` is no policy, or a number is out of its range.

    What breaks it: values that may change sign (a reward, a margin) rarely count as diverged; values that first rise
    and then fall (double descent) are taken for overfitting; GRPO's estimate of the KL is a mean of exponentials, which
    a single token can blow up.

    >>> from rapidfire_policies import Guard, History, TrialHistory
    >>> trials = (
    ...     TrialHistory(0, (2.0, 1.5, 1.2, 1.1)),
    ...     TrialHistory(1, (2.0, 1.5, 9.0, 30.0)),
    ...     TrialHistory(2, (2.0, 1.0, 1.2, 1.3)),
    ...     TrialHistory(3, (0.9, 0.8), metrics={"kl": (0.2, 14.0)}),
    ... )
    >>> for number, decision in Guard(patience=2).decide(History(trials, chunks=9)).items():
    ...     if decision.reason:
    ...         print(number, decision.verdict, decision.reason)
    1 stop chunk 4: 30 is beyond 10 times the first value 2
    2 complete chunk 4: 2 values above the best, 1
    3 stop chunk 2: KL 14 is above 10
    """

    policy: Policy = field(default_factory=Nop)
    divergence: float | None = 10.0
    patience: int | None = 3
    margin: float = 0.02
    max_kl: float | None = 10.0
    flat: int | None = 3

    def __post_init__(self) -> None:
        check_inner(self.policy)
        check_number("margin", self.margin, at_least=0)
        if self.divergence is not None:
            check_number("divergence", self.divergence, above=1, fix="10 stops a trial at ten times its first value.")
        if self.patience is not None:
            check_int("patience", self.patience, at_least=1, fix="It is in chunks.")
        if self.max_kl is not None:
            check_number("max_kl", self.max_kl, above=0)
        if self.flat is not None:
            check_int("flat", self.flat, at_least=1, fix="It is in chunks.")

    @property
    def by_age(self) -> bool:
        """As the inner policy."""
        return self.policy.by_age

    def decide(self, history: History) -> Mapping[int, Decision]:
        """End what has gone wrong, then ask the inner policy about the rest."""
        ended = stop_diverged(history)
        firsts = [abs(value) for trial in history.trials if (value := _first(trial)) is not None]
        usual = median(firsts) if firsts else 0.0
        for trial in history.live:
            if is_finite(trial) and (decision := self._judge(trial, usual)) is not None:
                ended[trial.number] = decision
        states = {number: _ENDED[decision.verdict] for number, decision in ended.items()}
        trials = tuple(replace(t, state=states.get(t.number, t.state)) for t in history.trials)
        inner = dict(self.policy.decide(replace(history, trials=trials)))
        return keep_one(history, dict(sorted((inner | ended).items())))

    def _judge(self, trial: TrialHistory, usual: float) -> Decision | None:
        value, where, first = trial.values[-1], f"chunk {trial.resource}:", _first(trial)
        if self.divergence is not None and first is not None:
            limit = first + (self.divergence - 1) * abs(first)
            if value > limit and value > usual:
                words = f"{where} {value:.4g} is beyond {self.divergence:.4g} times the first value {first:.4g}"
                return Decision(Verdict.STOP, words, numbers_of(trial, threshold=max(limit, usual), first=first))
        if self.max_kl is not None and (kl := trial.metrics.get("kl", ())) and kl[-1] > self.max_kl:
            words = f"{where} KL {kl[-1]:.4g} is above {self.max_kl:.4g}"
            return Decision(Verdict.STOP, words, numbers_of(trial, kl=kl[-1], max_kl=self.max_kl))
        if self.flat is not None and self._is_flat(trial, self.flat):
            words = f"{where} no variance in the reward for {counted(self.flat, 'chunk')}"
            return Decision(Verdict.STOP, words, numbers_of(trial, flat=self.flat))
        if self.patience is not None and 0 < self.patience < trial.resource:
            best = min(filter(math.isfinite, trial.values[: -self.patience]), default=math.inf)
            limit = best + self.margin * abs(best)
            if all(math.isfinite(v) and v > limit for v in trial.values[-self.patience :]):
                words = f"{where} {counted(self.patience, 'value')} above the best, {best:.4g}"
                return Decision(Verdict.COMPLETE, words, numbers_of(trial, threshold=limit, best=best))
        return None

    @staticmethod
    def _is_flat(trial: TrialHistory, chunks: int) -> bool:
        stds = trial.metrics.get("reward_std", ())[-chunks:]
        shares = trial.metrics.get("frac_reward_zero_std", ())[-chunks:]
        return (len(stds) == chunks and all(std <= 0 for std in stds)) or (
            len(shares) == chunks and all(share >= 1 for share in shares)
        )


def _first(trial: TrialHistory) -> float | None:
    return next(filter(math.isfinite, trial.values), None)
