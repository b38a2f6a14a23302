"""Promotion: trials wait at a rung until enough others have been there, as in the papers of ASHA and PASHA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rapidfire_policies.base import Decision, History, TrialState, Verdict, numbers_of
from rapidfire_policies.rungs import top_fraction, values_at
from rapidfire_policies.survivors import is_finite, stop_diverged
from rapidfire_policies.wording import counted


def promote(
    history: History, ladder: Sequence[int], reduction_factor: int, cap: int | None = None
) -> dict[int, Decision]:
    """Decide about every live trial: whoever belongs to the best `floor(n / reduction_factor)` at its rung goes on.

    `n` counts every value ever recorded at the rung. Who does not belong to them waits (PAUSE), perhaps until more
    trials have been there. Waiting costs memory, so at most `slots` trials wait: those at the highest rungs, at one
    rung those with the best ranks; the rest is stopped. (Then trials that wait never keep newcomers from the slots.)

    When nobody trains and nobody can be promoted, no newcomer is to come (or all that trained ended in one
    round, which looks the same). If no finite trial is complete by then, the first of those that wait goes on alone,
    rung after rung; otherwise all of them are stopped. Their values stay on record.

    Args:
        history: All trials.
        ladder: The rungs, ascending.
        reduction_factor: One in so many goes on.
        cap: At this rung and above nobody is promoted.

    Returns:
        A decision for every live trial.
    """
    decisions = stop_diverged(history)
    cuts = {
        rung: top_fraction(values_at(history, rung), reduction_factor)
        for rung in {trial.resource for trial in history.live}.intersection(ladder)
    }
    waiting = []
    for trial in (trial for trial in history.live if trial.number not in decisions):
        rung = trial.resource
        if (cut := cuts.get(rung)) is None:
            decisions[trial.number] = Decision(Verdict.CONTINUE, "on its way to a rung")
        elif cap is not None and rung >= cap:
            waiting.append((-rung, cut.ranks[trial.number], trial.number))
            numbers = numbers_of(trial, rung=rung, cap=cap)
            decisions[trial.number] = Decision(Verdict.PAUSE, f"rung {rung}: waits, the cap is {cap}", numbers)
        elif len(cut.ranks) >= reduction_factor and cut.keeps(trial.number):
            decisions[trial.number] = Decision(Verdict.CONTINUE, cut.words(rung, trial), cut.numbers(rung, trial))
        else:
            waiting.append((-rung, cut.ranks[trial.number], trial.number))
            keep = len(cut.ranks) // reduction_factor
            words = f"rung {rung}: ranks {cut.ranks[trial.number]} of {len(cut.ranks)}, waits to be among {keep}"
            rank, of = cut.ranks[trial.number], len(cut.ranks)
            numbers = cut.numbers(rung, trial) if keep else numbers_of(trial, rung=rung, rank=rank, of=of, keep=0)
            decisions[trial.number] = Decision(Verdict.PAUSE, words, numbers)
    order = [number for _, _, number in sorted(waiting)]
    for number in order[history.slots :]:
        words = f"{decisions[number].reason}; {counted(history.slots, 'better one waits', many='better ones wait')}"
        numbers = {**decisions[number].numbers, "waiting": history.slots}
        decisions[number] = Decision(Verdict.STOP, words, numbers)
    if not history.running and not any(d.verdict is Verdict.CONTINUE for d in decisions.values()):
        decisions |= _end(history, {number: decisions[number] for number in order[: history.slots]})
    return decisions


def _end(history: History, waiting: Mapping[int, Decision]) -> dict[int, Decision]:
    if any(trial.state is TrialState.COMPLETE and is_finite(trial) for trial in history.trials):
        words = "nobody is to come who could promote it"
        return {number: replace(waits, verdict=Verdict.STOP, reason=words) for number, waits in waiting.items()}
    words = "the first of those that wait, and no other trains"
    return {number: Decision(Verdict.CONTINUE, words, waiting[number].numbers) for number in list(waiting)[:1]}
