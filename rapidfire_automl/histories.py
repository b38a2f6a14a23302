"""Optuna's view of a search as a policy's: a `History` built from a study."""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from rapidfire_policies import History, TrialHistory, TrialState

CHUNKS_ATTR = "rapidfire:chunks"
"""The study attribute that holds the chunks of a whole trial."""
COST_ATTR = "rapidfire:chunk_cost"
"""The trial attribute that holds what its first chunk cost: in the executor its tokens, which no clock falsifies."""

_STATES = {
    OptunaState.RUNNING: TrialState.RUNNING,
    OptunaState.COMPLETE: TrialState.COMPLETE,
    OptunaState.PRUNED: TrialState.STOPPED,
    OptunaState.FAIL: TrialState.FAILED,
}


def history_from_study(study: optuna.Study, *, chunks: int | None = None, slots: int | None = None) -> History:
    """What a policy may know of a study: states, parameters and reported values, minimised.

    A trial's steps count from one in the order of their numbers: whatever it reports at (0, 1, 2 or 100, 200, 300), the
    k-th step is its chunk k. Trials are comparable if all report equally often. WAITING trials are left out.

    Args:
        study: A study with one objective. With "maximize" the values' signs are flipped.
        chunks: Reports of a whole trial. By default the study's attribute "rapidfire:chunks"; without that, what the
            COMPLETE trials have, or one more than the longest trial has (it may not be at its end).
        slots: Trials that train at a time. By default as many as are running, at least 1.

    Raises:
        ValueError: The study has several objectives.
    """
    if len(study.directions) != 1:
        raise ValueError(
            f"`study` must have one objective, got {len(study.directions)}. "
            "Optuna itself reports and prunes for one objective only."
        )
    sign = -1.0 if study.directions[0] is StudyDirection.MAXIMIZE else 1.0
    frozen = [trial for trial in study.get_trials(deepcopy=False) if trial.state in _STATES]
    trials = tuple(_trial_history(trial, sign) for trial in frozen)
    running = sum(trial.state is TrialState.RUNNING for trial in trials)
    wanted = study.user_attrs.get(CHUNKS_ATTR) if chunks is None else chunks
    return History(trials, chunks=_largest_resource(trials, wanted), slots=max(1, running) if slots is None else slots)


def _trial_history(trial: FrozenTrial, sign: float) -> TrialHistory:
    reported = trial.intermediate_values
    return TrialHistory(
        number=trial.number,
        values=tuple(sign * float(reported[step]) for step in sorted(reported)),
        state=_STATES[trial.state],
        params=dict(trial.params),
    )


def _largest_resource(trials: Sequence[TrialHistory], wanted: int | None) -> int:
    """`wanted` unless trials have gone further; without it, what the trials suggest."""
    longest = max((trial.resource for trial in trials), default=0)
    if wanted is not None:
        return max(wanted, longest)
    complete = max((trial.resource for trial in trials if trial.state is TrialState.COMPLETE), default=0)
    return complete if 0 < complete == longest else longest + 1
