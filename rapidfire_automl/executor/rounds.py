"""The end of a round: record, report, build the history, ask the policy or the pruner once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import optuna
from numpy.typing import NDArray

from rapidfire_automl import failpoints
from rapidfire_automl.attempts import VECTORS_ATTR, last_attempts
from rapidfire_automl.events import warn
from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.histories import CHUNKS_ATTR, COST_ATTR, history_from_study
from rapidfire_automl.pruners import PolicyPruner
from rapidfire_automl.records import TrialRecord
from rapidfire_policies.base import (
    Decision,
    History,
    Policy,
    TrialHistory,
    TrialState,
    Verdict,
    flipped,
    numbers_of,
)
from rapidfire_policies.pareto import scalarize

Cost = Literal["tokens", "seconds"]
TAKEN_OVER = "another worker has taken it over"
Said = tuple[int, int, Mapping[str, Any]]


class Referee:
    """Closes rounds; called in the conductor's thread.

    Args:
        records: Of all trials, by number; filled here, and read.
        chunks: Of a whole trial.
        slots: Trials that train at a time.
        tell: Emits an event (kind, arm, data).
        cost: What a policy sees as the cost of a chunk.
        keep: Puts a round's verdicts, `(trial, chunk, verdict, reason)` each, on disk before they take effect, and
            `(trial, chunk, data)` of the events that tell of them; marks arms as lost where others have taken their
            trial over.
        peers: Brings the records of other workers' trials up to date.
        share: Lets other workers see a chunk that was recorded.
    """

    def __init__(
        self,
        records: Mapping[int, TrialRecord],
        chunks: int,
        slots: int,
        tell: Callable[..., None],
        cost: Cost,
        keep: Callable[[list[tuple[int, int, str, str]], list[Said]], None] = lambda verdicts, said: None,
        peers: Callable[[], None] = lambda: None,
        share: Callable[[TrialRecord], None] = lambda record: None,
    ) -> None:
        self._past: tuple[TrialHistory, ...] = ()
        self._cost = cost
        self._records = records
        self._chunks = chunks
        self._slots = slots
        self._tell = tell
        self._keep = keep
        self._peers = peers
        self._share = share

    def begin(self, study: optuna.Study) -> None:
        """Take up a study; says so once where its pruner will have no say."""
        self._past = past(study, self._chunks)
        several, stock = len(study.directions) > 1, not isinstance(study.pruner, PolicyPruner)
        if several and stock and not isinstance(study.pruner, optuna.pruners.NopPruner):
            name = type(study.pruner).__name__
            warn(self._tell, f"{name} isn't asked in a study with several objectives; a PolicyPruner would be.")

    def leave_out(self, numbers: Iterable[int]) -> None:
        """Trials of this search that an earlier process has begun are known by their records."""
        numbers = set(numbers)
        self._past = tuple(trial for trial in self._past if trial.number not in numbers)

    def __call__(self, waiting: Sequence[Arm], paused: Sequence[Arm]) -> dict[int, Decision]:
        """Report what the arms at a boundary have come to, and judge.

        Args:
            waiting: Arms at a boundary.
            paused: Paused arms.

        Returns:
            A decision per trial number; whoever is left out goes on as it is.
        """
        report(waiting)
        failpoints.hit("round.reported")
        taken_over = [arm for arm in [*waiting, *paused] if arm.lost]
        waiting = [arm for arm in waiting if not arm.lost]
        paused = [arm for arm in paused if not arm.lost]
        self._peers()
        ended = [arm for arm in waiting if len(arm.record.values) >= len(arm.record.boundaries)]
        for arm in ended:
            finite = bool(np.isfinite(arm.record.last_vector).all())
            arm.record.state = TrialState.COMPLETE if finite else TrialState.FAILED
        # Chunks beyond those of a whole trial were asked for by a person, and so was what a person has decided.
        ruled = {arm.number: arm.ruling for arm in [*waiting, *paused] if arm.ruling is not None}
        going = [arm for arm in waiting if arm not in ended and arm.number not in ruled]
        going = [arm for arm in going if len(arm.record.values) < self._chunks]
        free = [arm for arm in paused if arm.number not in ruled and len(arm.record.values) < self._chunks]
        decisions: dict[int, Decision] = {}
        by = ""
        if going or free:
            one = (going or free)[0]
            now = history(
                self._records.values(),
                minimize=one.minimize,
                chunks=self._chunks,
                slots=self._slots,
                cost=self._cost,
            )
            trials = [_as_judged(trial, self._chunks, ruled.get(trial.number)) for trial in now.trials]
            whole = replace(now, trials=(*self._past, *trials))
            decisions = dict(judge(one.trial.study, going, free, whole))
            by = _name(one.trial.study.pruner)
            if one.minimize == (False,):  # the policy saw the values with their sign flipped
                decisions = {n: replace(said, numbers=flipped(said.numbers)) for n, said in decisions.items()}
        decisions.update(ruled)
        for arm in ended:
            decisions[arm.number] = Decision(Verdict.COMPLETE, "trained to the end", arm.record.standing)
        both = sorted([*waiting, *paused], key=lambda arm: arm.number)
        verdicts, said = [], []
        for arm in both:
            arm.judged = max(arm.judged, len(arm.record.values))
            made = decisions.get(arm.number)
            stays = made is None or (arm in paused and made.verdict is Verdict.PAUSE)
            settled = arm.number in ruled and arm not in ended  # it is in the journal since it was decided
            verdict, reason = ("", "") if made is None or stays or settled else (str(made.verdict), made.reason)
            verdicts.append((arm.number, arm.judged, verdict, reason))
            if made is not None and not stays and not (arm in paused and settled):
                author = "" if arm in ended or arm.number in ruled else by
                data = {
                    "verdict": str(made.verdict),
                    "reason": made.reason,
                    "by": author,
                    "numbers": dict(made.numbers),
                }
                said.append((arm, data))
        self._keep(verdicts, [(arm.number, len(arm.record.values), data) for arm, data in said])
        taken_over += [arm for arm in both if arm.lost and arm not in taken_over]
        decisions.update({arm.number: Decision(Verdict.STOP, TAKEN_OVER) for arm in taken_over})
        for arm, data in said:
            if arm.lost:
                continue
            arm.record.verdicts.append((len(arm.record.values), str(data["verdict"]), str(data["reason"])))
            self._tell("verdict", arm, **data)
        return decisions

    def record(self, arm: Arm, vector: tuple[float, ...], scores: Any, metrics: Mapping[str, float]) -> None:
        """Take down what an arm's chunk has come to; called in its thread.

        Args:
            arm: Whose.
            vector: A value an objective, in the user's sign.
            scores: Per example, in the user's sign, `(examples,)`, or `(objectives, examples)` with several objectives.
            metrics: What the trainer has logged in this chunk, by name.
        """
        record = arm.record
        arm.charge_baton()
        scores = np.asarray(scores, dtype=np.float64)
        record.add_chunk(vector, scores, metrics, arm.chunk_seconds, arm.chunk_tokens, arm.chunk_generated)
        if len(record.values) == 1:
            arm.trial.set_user_attr(COST_ATTR, arm.chunk_tokens + arm.chunk_generated)
        self._share(record)
        several = {"vector": vector} if len(vector) > 1 else {}
        self._tell(
            "chunk_done",
            arm,
            value=record.values[-1],
            seconds=arm.chunk_seconds,
            tokens=arm.chunk_tokens,
            generated=arm.chunk_generated,
            **several,
        )
        arm.chunk_seconds, arm.chunk_tokens, arm.chunk_generated = 0.0, 0, 0


def report(arms: Sequence[Arm]) -> None:
    """Tell Optuna each arm's newest value, in trial order; vectors, which it refuses, as an attribute of the trial.

    An arm whose trial others have taken over is marked as lost.
    """
    for arm in arms:
        record = arm.record
        if arm.reported == len(record.values):
            continue
        arm.reported = len(record.values)
        try:
            if record.vectors:
                arm.trial.set_user_attr(VECTORS_ATTR, [list(vector) for vector in record.vectors])
            else:
                value = record.values[-1]
                # Some samplers take minus infinity for the best there is; what is not a number they put last.
                arm.trial.report(value if math.isfinite(value) else math.nan, step=len(record.values))
        except optuna.exceptions.UpdateFinishedTrialError:
            arm.lost = True


def history(
    records: Iterable[TrialRecord], *, minimize: Sequence[bool], chunks: int, slots: int, cost: Cost = "tokens"
) -> History:
    """The search as a policy sees it, lower is better. Trials that still wait for a slot are left out.

    With several objectives a trial's value after chunk k is where its vector stands among those of all trials after
    chunk k (`rapidfire_policies.pareto.scalarize`), and there are no per-example scores.

    Args:
        records: All trials.
        minimize: Whether the study minimises, by objective.
        chunks: Of a whole trial.
        slots: Trials that train at a time.
        cost: What becomes of `TrialHistory.costs`.
    """
    shown = [
        record
        for record in sorted(records, key=lambda r: r.number)
        if record.values or record.state not in (TrialState.RUNNING, TrialState.PAUSED, TrialState.STOPPED)
    ]
    signs = np.where(minimize, 1.0, -1.0)
    one = len(minimize) == 1
    values = (
        {r.number: [float(signs[0] * value) for value in r.values] for r in shown} if one else _ranked(shown, signs)
    )
    return History(
        tuple(
            TrialHistory(
                number=record.number,
                values=tuple(values[record.number]),
                state=record.state,
                scores=_signed(record.scores, signs[0]) if one else (),
                costs=_costs(record, cost),
                params=dict(record.params),
                metrics={name: tuple(numbers) for name, numbers in record.metrics.items()},
            )
            for record in shown
        ),
        chunks=chunks,
        slots=slots,
    )


def _as_judged(trial: TrialHistory, chunks: int, ruling: Decision | None) -> TrialHistory:
    """A trial as its judge sees it: one that a person has paused is not waited for, and extra chunks don't count."""
    if trial.is_live and ruling is not None:
        going_on = ruling.verdict is Verdict.CONTINUE
        trial = replace(trial, state=TrialState.RUNNING if going_on else TrialState.STOPPED)
    if trial.resource < chunks or not (trial.is_live or trial.resource > chunks):
        return trial
    return replace(
        trial,
        values=trial.values[:chunks],
        scores=trial.scores[:chunks],
        costs=trial.costs[:chunks],
        metrics={name: numbers[:chunks] for name, numbers in trial.metrics.items()},
        state=TrialState.COMPLETE if trial.is_live else trial.state,
    )


def _costs(record: TrialRecord, cost: Cost) -> tuple[float, ...]:
    """What each chunk cost; in tokens, those generated to train on count like those trained."""
    if cost == "seconds":
        return tuple(record.seconds)
    return tuple(float(trained + made) for trained, made in zip(record.tokens, record.generated, strict=True))


def _signed(scores: Sequence[NDArray[np.float64]], sign: float) -> tuple[NDArray[np.float64], ...]:
    """The scores by chunk, empty for a chunk without; nothing if no chunk has any."""
    return tuple(sign * np.asarray(of_chunk) for of_chunk in scores) if any(map(len, scores)) else ()


def _ranked(records: Sequence[TrialRecord], signs: NDArray[np.float64]) -> dict[int, list[float]]:
    """Per trial, where it stands after each chunk among all that got there."""
    values: dict[int, list[float]] = {record.number: [] for record in records}
    for chunk in range(max((len(record.vectors) for record in records), default=0)):
        there = [record for record in records if len(record.vectors) > chunk]
        scalars = scalarize(np.array([record.vectors[chunk] for record in there]) * signs)
        for record, scalar in zip(there, scalars.tolist(), strict=True):
            values[record.number].append(scalar)
    return values


def past(study: optuna.Study, chunks: int) -> tuple[TrialHistory, ...]:
    """Finished trials an earlier executor left in the study, if it cut trials into as many chunks.

    With several objectives none are: where a trial stood among others is nothing to compare with.
    """
    if CHUNKS_ATTR not in study.user_attrs:
        study.set_user_attr(CHUNKS_ATTR, chunks)
    if study.user_attrs[CHUNKS_ATTR] != chunks or len(study.directions) > 1:
        return ()
    last = {trial.number: number for number, trial in last_attempts(study).items()}
    seen = [trial for trial in history_from_study(study).trials if not trial.is_live and trial.number in last]
    return tuple(_as_judged(replace(trial, number=last[trial.number]), chunks, None) for trial in seen)


def judge(
    study: optuna.Study, waiting: Sequence[Arm], paused: Sequence[Arm], history: History
) -> Mapping[int, Decision]:
    """One judgement over the whole history.

    Args:
        study: Its pruner decides: a `PolicyPruner`'s policy at once, a stock one trial by trial (with one objective).
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
        if len(arm.minimize) == 1 and arm.trial.should_prune():
            seen = next(trial for trial in history.trials if trial.number == arm.number)
            decisions[arm.number] = Decision(Verdict.STOP, f"{type(pruner).__name__} says so", numbers_of(seen))
    for arm in paused:
        decisions[arm.number] = Decision(Verdict.CONTINUE, "")
    return decisions


def _name(judge: object) -> str:
    """A policy's or a pruner's name, with what it wraps: "WarmUp(ASHA)"."""
    if isinstance(judge, PolicyPruner):
        return _name(judge.policy)
    name, inner = type(judge).__name__, getattr(judge, "policy", None)
    return f"{name}({_name(inner)})" if isinstance(inner, Policy) else name


def _policy(policy: Policy, history: History) -> Mapping[int, Decision]:
    if not any(trial.is_live for trial in history.trials):
        return {}
    known = {trial.number for trial in history.trials if trial.state in (TrialState.RUNNING, TrialState.PAUSED)}
    return {number: decision for number, decision in policy.decide(history).items() if number in known}
