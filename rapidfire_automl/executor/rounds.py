"""The end of a round: record, report, build the history, ask the policy or the pruner once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import optuna

from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.histories import CHUNKS_ATTR, COST_ATTR, history_from_study
from rapidfire_automl.pruners import PolicyPruner
from rapidfire_automl.records import TrialRecord
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, TrialState, Verdict


class Referee:
    """Closes rounds; called in the conductor's thread.

    Args:
        records: Of all trials, by number; filled here, and read.
        chunks: Of a whole trial.
        slots: Trials that train at a time.
        tell: Emits an event (kind, arm, data).
    """

    def __init__(self, records: Mapping[int, TrialRecord], chunks: int, slots: int, tell: Callable[..., None]) -> None:
        self.past: tuple[TrialHistory, ...] = ()
        self._records = records
        self._chunks = chunks
        self._slots = slots
        self._tell = tell

    def __call__(self, waiting: Sequence[Arm], paused: Sequence[Arm]) -> dict[int, Decision]:
        """Record what the arms at a boundary have to say, and judge.

        Args:
            waiting: Arms at a boundary.
            paused: Paused arms.

        Returns:
            A decision per trial number; whoever is left out goes on as it is.
        """
        for arm in waiting:
            self._record(arm)
        report(waiting)
        ended = [arm for arm in waiting if len(arm.record.values) >= len(arm.record.boundaries)]
        for arm in ended:
            arm.record.state = TrialState.COMPLETE
        going = [arm for arm in waiting if arm not in ended]
        decisions: dict[int, Decision] = {}
        if going or paused:
            one = (going or paused)[0]
            now = history(self._records.values(), minimize=one.minimize, chunks=self._chunks, slots=self._slots)
            whole = replace(now, trials=(*self.past, *now.trials))
            decisions = dict(judge(one.trial.study, going, paused, whole))
        for arm in ended:
            decisions[arm.number] = Decision(Verdict.COMPLETE, "trained to the end")
        for arm in sorted([*waiting, *paused], key=lambda arm: arm.number):
            decision = decisions.get(arm.number)
            if decision is None or (arm in paused and decision.verdict is Verdict.PAUSE):
                continue
            arm.record.verdicts.append((len(arm.record.values), str(decision.verdict), decision.reason))
            self._tell("verdict", arm, verdict=str(decision.verdict), reason=decision.reason)
        return decisions

    def _record(self, arm: Arm) -> None:
        request, record = arm.request, arm.record
        record.values.append(request.value)
        record.scores.append(np.asarray(request.scores, dtype=np.float64))
        record.seconds.append(arm.chunk_seconds)
        record.tokens.append(arm.chunk_tokens)
        if len(record.values) == 1:
            arm.trial.set_user_attr(COST_ATTR, arm.chunk_tokens)
        self._tell("chunk_done", arm, value=request.value, seconds=arm.chunk_seconds, tokens=arm.chunk_tokens)
        arm.chunk_seconds, arm.chunk_tokens = 0.0, 0


def report(arms: Sequence[Arm]) -> None:
    """Report each arm's newest value to Optuna, in trial order."""
    for arm in arms:
        arm.trial.report(arm.record.values[-1], step=len(arm.record.values))


def history(records: Iterable[TrialRecord], *, minimize: bool, chunks: int, slots: int) -> History:
    """The search as a policy sees it, lower is better. Trials that still wait for a slot are left out.

    Args:
        records: All trials.
        minimize: Whether the study minimises.
        chunks: Of a whole trial.
        slots: Trials that train at a time.
    """
    sign = 1.0 if minimize else -1.0
    return History(
        tuple(
            TrialHistory(
                number=record.number,
                values=tuple(sign * value for value in record.values),
                state=record.state,
                scores=tuple(sign * np.asarray(s) for s in record.scores if len(s)),
                costs=tuple(record.seconds),
                params=dict(record.params),
            )
            for record in sorted(records, key=lambda r: r.number)
            if record.values or record.state is not TrialState.RUNNING
        ),
        chunks=chunks,
        slots=slots,
    )


def past(study: optuna.Study, chunks: int) -> tuple[TrialHistory, ...]:
    """Finished trials an earlier executor left in the study, if it cut trials into as many chunks."""
    if CHUNKS_ATTR not in study.user_attrs:
        study.set_user_attr(CHUNKS_ATTR, chunks)
    if study.user_attrs[CHUNKS_ATTR] != chunks:
        return ()
    return tuple(trial for trial in history_from_study(study).trials if not trial.is_live)


def judge(
    study: optuna.Study, waiting: Sequence[Arm], paused: Sequence[Arm], history: History
) -> Mapping[int, Decision]:
    """One judgement over the whole history.

    Args:
        study: Its pruner decides: a `PolicyPruner`'s policy at once, a stock one trial by trial.
        waiting: Arms at a boundary that are not at their end.
        paused: Paused arms.
        history: All trials.

    Returns:
        Decisions; whoever is left out goes on as it is.
    """
    pruner = study.pruner
    if isinstance(pruner, PolicyPruner):
        return _policy(pruner.policy, history)
    decisions = {}
    for arm in waiting:
        if arm.trial.should_prune():
            decisions[arm.number] = Decision(Verdict.STOP, f"{type(pruner).__name__} says so")
    for arm in paused:
        decisions[arm.number] = Decision(Verdict.CONTINUE, "")
    return decisions


def _policy(policy: Policy, history: History) -> Mapping[int, Decision]:
    if not any(trial.is_live for trial in history.trials):
        return {}
    known = {trial.number for trial in history.trials if trial.state in (TrialState.RUNNING, TrialState.PAUSED)}
    return {number: decision for number, decision in policy.decide(history).items() if number in known}
