"""CostAware: the rungs of another policy in tokens or seconds instead of chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from rapidfire_policies._arguments import check_inner, check_int, check_number
from rapidfire_policies.asha import ASHA
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, TrialState, Verdict
from rapidfire_policies.survivors import is_finite, keep_one, wake_one

_FINEST = 64
"""Units a chunk of median cost is cut into at most."""
_ROUNDING = 1 + 1e-9
_SEVERITY = (Verdict.STOP, Verdict.PAUSE, Verdict.COMPLETE, Verdict.CONTINUE)


@dataclass(frozen=True)
class CostAware(Policy):
    """Ask another policy about trials that have spent equally much instead of trained equally many chunks.

    Let `C_k` be what a trial's first `k` chunks have cost (`TrialHistory.costs`, tokens or seconds). The inner policy
    sees a history whose resource `j` means "`j` units spent":

        resource   = floor(C_k / unit)                                 after k chunks, 0 before `min_chunks`
        value at j = the value after max(min_chunks, the most chunks whose C <= j * unit)

    so a trial whose chunks cost twice the median stands at rung 4 after two of them, against cheap trials that have
    done four. Scores and metrics go along, every unit costs `unit`, and `History.chunks` becomes the units that the
    dearest trial takes to its end. A trial that has done all its chunks keeps its last value at every later budget: a
    dear trial has to beat what the cheap ones came to.

    A running trial is judged when its last chunk has crossed a boundary between two units. If it has crossed several,
    the inner policy is asked about each of them and the hardest answer counts (STOP, then PAUSE, COMPLETE, CONTINUE),
    so that a big chunk jumps over no rung. Where it has crossed none it goes on.

    A PAUSE of the inner policy is carried out. A paused trial is asked about at the boundaries its last chunk has
    crossed, or where it stands if it has crossed none, and resumes when the inner policy lets it go at all of them.

    If all chunks cost the same, or nobody has recorded costs, this is the inner policy, decision for decision.

    Args:
        policy: The policy that judges; what its reasons call chunks or rungs are units.
        unit: Tokens or seconds of a unit, as the costs are; by default the median over all chunks so far. One below a
            64th of that median counts as a 64th.
        min_chunks: Chunks before which no trial is judged, however dear they are, so that a trial with large batches or
            long completions is not condemned for its first few steps.

    Raises:
        ValueError: `policy` is no policy, `unit` is not above 0, or `min_chunks` is below 1.

    A trial whose last value is NaN or infinite stands where it stands with that value as its last, crossed a boundary
    or not, and the inner policy's rule applies to it. A chunk whose cost is missing, negative or not finite counts as
    one unit. If the verdicts would leave no finite trial, the most advanced one goes on
    (`rapidfire_policies.survivors.keep_one`).

    What breaks it: the default unit moves while trials arrive, and the boundaries with it, so that a trial can be
    judged twice at a rung or pass one unseen (give `unit`); seconds differ from run to run, and the verdicts with them
    (tokens do not); a cost that has nothing to do with what a chunk is worth.

    Paper: none; successive halving lets any unit be the resource (Jamieson and Talwalkar, 2016,
    https://arxiv.org/abs/1502.07943), but presumes that it is the same one for all.

    >>> from rapidfire_policies import ASHA, CostAware, History, TrialHistory
    >>> cheap = TrialHistory(0, (0.9, 0.8, 0.7), costs=(1.0, 1.0, 1.0))
    >>> dear = TrialHistory(1, (0.75,), costs=(3.0,))
    >>> fair = CostAware(ASHA(min_resource=3, reduction_factor=2), unit=1.0)
    >>> decisions = fair.decide(History((cheap, dear), chunks=9))
    >>> str(decisions[1].verdict), decisions[1].reason
    ('stop', 'rung 3: 0.75 ranks 2 of 2, the best goes on (cut 0.7)')
    """

    policy: Policy = field(default_factory=ASHA)
    unit: float | None = None
    min_chunks: int = 1

    def __post_init__(self) -> None:
        check_inner(self.policy)
        if self.unit is not None:
            check_number("unit", self.unit, above=0, fix="It is in what `TrialHistory.costs` holds, tokens or seconds.")
        check_int("min_chunks", self.min_chunks, at_least=1)

    def decide(self, history: History) -> Mapping[int, Decision]:
        """Show the inner policy each trial at what it has spent."""
        median = _median_cost(history)
        unit = median if self.unit is None else max(self.unit, median / _FINEST)
        ledgers = {trial.number: _Ledger(trial, unit, self.min_chunks, history.chunks) for trial in history.trials}
        whole = max([ledger.whole for ledger in ledgers.values()], default=history.chunks)
        judged: dict[int, Decision | None] = {}
        # Boundary by boundary: whoever has crossed fewer of them stands where it stands.
        for step in range(max((ledger.crossed for ledger in ledgers.values()), default=0) or 1):
            shown = tuple(ledger.shown_at(ledger.before + 1 + step, whole) for ledger in ledgers.values())
            answers = self.policy.decide(History(shown, chunks=whole, slots=history.slots))
            for number, ledger in ledgers.items():
                if ledger.is_asked(step):
                    answer = ledger.in_units(answers.get(number))
                    judged[number] = answer if step == 0 else _harder(ledger.trial, judged[number], answer)
        said = {number: answer for number, answer in judged.items() if answer is not None}
        return wake_one(history, keep_one(history, said))


def _harder(trial: TrialHistory, one: Decision | None, other: Decision | None) -> Decision | None:
    """The harder of two answers, the second of equal ones; a trial that is left out goes on as it is."""
    as_it_is = Verdict.PAUSE if trial.state is TrialState.PAUSED else Verdict.CONTINUE
    ranks = [_SEVERITY.index(as_it_is if answer is None else answer.verdict) for answer in (one, other)]
    return one if ranks[0] < ranks[1] else other


class _Ledger:
    """A trial beside what it has spent.

    Args:
        trial: The trial.
        unit: The cost of a unit.
        min_chunks: Chunks before which it stands at 0 units.
        chunks: Of a whole trial.
    """

    def __init__(self, trial: TrialHistory, unit: float, min_chunks: int, chunks: int) -> None:
        self.trial = trial
        self._unit, self._min_chunks = unit, min_chunks
        self._spent = np.cumsum(_costs(trial, unit))
        self._most = _FINEST * chunks
        done = trial.resource
        mean = self._spent[-1] / done if done else unit
        projected = min(self._units(mean * chunks), self._most)
        self._is_whole = trial.state is TrialState.COMPLETE and done >= chunks
        self.diverged = trial.is_live and done > 0 and not is_finite(trial)
        self.before = self._standing(done - 1)
        self.now = self._standing(done)
        if self.diverged and self.now == 0:
            self.now = 1
        self.crossed = self.now - self.before if trial.is_live else 0
        self.whole = max(projected, self.now, 1)
        self._known: tuple[int, TrialHistory] | None = None

    def _units(self, cost: float) -> int:
        return int(cost / self._unit * _ROUNDING)

    def _standing(self, done: int) -> int:
        """Whole units spent after `done` chunks."""
        return 0 if done < self._min_chunks else min(self._units(float(self._spent[done - 1])), self._most)

    def is_asked(self, step: int) -> bool:
        """Whether the inner policy's answer at the boundary `step` after the last is about this trial."""
        if not self.trial.is_live:
            return False
        if self.crossed == 0:
            unseen = self.trial.resource == 0 or self.trial.state is TrialState.PAUSED
            return step == 0 and (unseen or self.diverged)
        return step < self.crossed

    def in_units(self, answer: Decision | None) -> Decision | None:
        """The inner policy's answer, with numbers that tell its units from chunks."""
        if answer is None or not answer.numbers:
            return answer
        spent = float(self._spent[-1]) if self.trial.resource else 0.0
        units = {"rung": answer.numbers.get("rung", answer.numbers.get("resource", self.now))}
        own = {"resource": self.trial.resource, "paid": spent, "unit": self._unit}
        return replace(answer, numbers={**answer.numbers, **units, **own})

    def shown_at(self, resource: int, whole: int) -> TrialHistory:
        """The trial as if it stood at `resource` units, or where it stands if that is less."""
        if self._is_whole:
            return self._up_to(whole)
        now = self._up_to(self.now)
        if self.crossed == 0 or resource >= self.now:
            return now
        return replace(
            now,
            values=now.values[:resource],
            scores=now.scores[:resource],
            costs=now.costs[:resource],
            metrics={name: numbers[:resource] for name, numbers in now.metrics.items()},
        )

    def _up_to(self, units: int) -> TrialHistory:
        """The trial's curve over units, as far as `units`."""
        if self._known is not None and self._known[0] == units:
            return self._known[1]
        trial = self.trial
        budgets = np.arange(1, units + 1) * (self._unit * _ROUNDING)
        within = np.searchsorted(self._spent, budgets, side="right")
        chunk = np.clip(within, self._min_chunks, max(trial.resource, 1)) - 1
        if self.diverged:
            chunk[-1] = trial.resource - 1
        places: list[int] = chunk.tolist()
        shown = replace(
            trial,
            values=tuple(trial.values[k] for k in places),
            scores=tuple(trial.scores[k] for k in places) if len(trial.scores) == trial.resource else (),
            costs=(self._unit,) * units if trial.costs else (),
            metrics={
                name: tuple(numbers[k] for k in places)
                for name, numbers in trial.metrics.items()
                if len(numbers) == trial.resource
            },
        )
        self._known = (units, shown)
        return shown


def _costs(trial: TrialHistory, unit: float) -> NDArray[np.float64]:
    """The cost of each chunk, shape `(chunks done,)`; one unit where it is unknown."""
    costs = np.full(trial.resource, unit)
    given = np.asarray(trial.costs[: trial.resource], dtype=np.float64)
    known = np.isfinite(given) & (given >= 0)
    costs[: len(given)][known] = given[known]
    return costs


def _median_cost(history: History) -> float:
    costs = [np.asarray(trial.costs, dtype=np.float64) for trial in history.trials if trial.costs]
    known = np.concatenate(costs) if costs else np.empty(0)
    known = known[np.isfinite(known) & (known > 0)]
    return float(np.median(known)) if len(known) else 1.0
