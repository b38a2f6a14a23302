"""The judgement at the end of a round: report, build the history, ask the policy or the pruner once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import optuna

from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.histories import CHUNKS_ATTR, history_from_study
from rapidfire_automl.pruners import PolicyPruner
from rapidfire_automl.records import TrialRecord
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, TrialState, Verdict


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
