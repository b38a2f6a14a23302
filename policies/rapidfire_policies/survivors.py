"""The promise every policy keeps: a search that has a finite trial never ends without one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from rapidfire_policies.base import Decision, History, TrialHistory, TrialState, Verdict, numbers_of
from rapidfire_policies.rungs import rank_key


def is_finite(trial: TrialHistory) -> bool:
    """Whether the trial has a value and its last one is finite.

    >>> is_finite(TrialHistory(0, (float("nan"), 0.5))), is_finite(TrialHistory(1, (0.5, float("-inf"))))
    (True, False)
    """
    return bool(trial.values) and math.isfinite(trial.values[-1])


def stop_diverged(history: History) -> dict[int, Decision]:
    """STOP for every live trial whose last value is NaN or infinite, by number.

    >>> stop_diverged(History((TrialHistory(0, (0.5, float("nan"))), TrialHistory(1, (0.5,))), chunks=4))[0].reason
    'chunk 2: the value is nan, not finite'
    """
    return {trial.number: diverged(trial) for trial in history.live if trial.values and not is_finite(trial)}


def diverged(trial: TrialHistory) -> Decision:
    """STOP for a trial whose last value is NaN or infinite."""
    words = f"chunk {trial.resource}: the value is {trial.values[-1]}, not finite"
    return Decision(Verdict.STOP, words, numbers_of(trial))


def survives(trial: TrialHistory, decisions: Mapping[int, Decision]) -> bool:
    """Whether the trial can still be handed over as the result once the decisions are carried out."""
    if trial.state is TrialState.COMPLETE:
        return True
    decision = decisions.get(trial.number)
    return trial.is_live and (decision is None or decision.verdict is not Verdict.STOP)


def keep_one(history: History, decisions: Mapping[int, Decision]) -> dict[int, Decision]:
    """Turn one STOP into CONTINUE where the decisions would leave no finite trial live or complete.

    A rule that compares with trials of the past can condemn every live one, e.g. against the early values of a
    trial that has failed since. The trial that goes on is the one with the most chunks done, then the best last
    value, then the lowest number.

    Args:
        history: All trials.
        decisions: What a policy would say.

    Returns:
        The decisions, changed in one entry at most.

    >>> history = History((TrialHistory(0, (0.1,), TrialState.FAILED), TrialHistory(1, (0.2,))), chunks=4)
    >>> keep_one(history, {1: Decision(Verdict.STOP, "worse than 0.1")})[1].verdict
    <Verdict.CONTINUE: 'continue'>
    """
    kept = dict(decisions)
    condemned = [trial for trial in history.live if is_finite(trial)]
    if not condemned or any(survives(trial, decisions) for trial in condemned):
        return kept
    if any(survives(trial, decisions) and is_finite(trial) for trial in history.trials):
        return kept
    best = min(condemned, key=lambda trial: (-trial.resource, rank_key(trial.values[-1], trial.number)))
    kept[best.number] = replace(
        kept[best.number],
        verdict=Verdict.CONTINUE,
        reason=f"{kept[best.number].reason}; kept as the last finite trial".removeprefix("; "),
    )
    return kept


def wake_one(history: History, decisions: Mapping[int, Decision]) -> dict[int, Decision]:
    """Resume one trial where everybody is paused, nobody is complete, and the decisions say PAUSE and resume nobody.

    Otherwise the search would end there with nothing to hand over. The trial is the finite one with the most chunks
    done, then the best last value, then the lowest number.

    >>> history = History((TrialHistory(0, (0.3,), TrialState.PAUSED), TrialHistory(1, (0.2,), TrialState.PAUSED)), 4)
    >>> decisions = wake_one(history, {0: Decision(Verdict.PAUSE, "waits"), 1: Decision(Verdict.PAUSE, "waits")})
    >>> {number: str(decision.verdict) for number, decision in decisions.items()}
    {0: 'pause', 1: 'continue'}
    """
    kept = dict(decisions)
    finite = [trial for trial in history.trials if is_finite(trial)]
    going = (Verdict.CONTINUE, Verdict.COMPLETE)
    if history.running or any(trial.state is TrialState.COMPLETE for trial in finite):
        return kept
    said = [kept[trial.number].verdict for trial in history.paused if trial.number in kept]
    if Verdict.PAUSE not in said or any(verdict in going for verdict in said):
        return kept
    paused = [trial for trial in finite if trial.state is TrialState.PAUSED and survives(trial, kept)]
    if paused:
        best = min(paused, key=lambda trial: (-trial.resource, rank_key(trial.values[-1], trial.number)))
        kept[best.number] = Decision(Verdict.CONTINUE, "all trials wait, and nobody is complete")
    return kept
