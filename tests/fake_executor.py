"""An executor that trains nothing: made-up curves, the real events and records, a clock of its own."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import optuna

from rapidfire_automl.events import ENDED_WITH_SEARCH, Event, Listener
from rapidfire_automl.records import TrialRecord
from rapidfire_policies.base import TrialState


class FakeExecutor:
    """Stands in for `RapidFireExecutor` in `run_search`.

    Every trial's curve falls from the base's value to a floor that its learning rate and rank decide. After chunks 1,
    2, 4, ... a trial in the worse half of those that got there stops.

    Args:
        slots, chunks, seed: As of `RapidFireExecutor`.
        fails: Trial number -> error text.
        values: Trial number -> its values, in place of made-up ones.
        interrupt_after: Raise KeyboardInterrupt after so many chunks.
        cancel_after: Be cancelled by a person after so many chunks.
        prune: Whether to stop trials.
        pace_s: Real seconds to sleep per round.
        generates: Tokens that a chunk generates for each of `num_generations`.
    """

    def __init__(
        self,
        slots: int = 8,
        chunks: int = 8,
        seed: int = 0,
        *,
        fails: Mapping[int, str] | None = None,
        values: Mapping[int, list[float]] | None = None,
        interrupt_after: int | None = None,
        cancel_after: int | None = None,
        prune: bool = True,
        pace_s: float = 0.0,
        generates: int = 0,
    ) -> None:
        self.slots, self.chunks, self.seed = slots, chunks, seed
        self.base_value: float | None = None
        self.records: dict[int, TrialRecord] = {}
        self.plan = {"budget_tokens": 4096, "trials_per_pass": slots}
        self._listeners: list[Listener] = []
        self._fails, self._values = dict(fails or {}), dict(values or {})
        self.cancelled, self._cancel_after = False, cancel_after
        self._interrupt_after, self._prune, self._pace_s = interrupt_after, prune, pace_s
        self._now, self._done, self._generates = 0.0, 0, generates
        self._random = random.Random(seed)

    def add_listener(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def __enter__(self) -> FakeExecutor:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def explain(self) -> str:
        return f"{self.slots} trials per pass under a budget of 4096 tokens (fake)"

    def optimize(
        self,
        study: optuna.Study,
        objective: Callable[..., Any],
        n_trials: int,
        timeout_s: float | None = None,
        *,
        more: bool = True,
    ) -> None:
        self._now = 1.5
        self._tell("plan", budget_tokens=4096, trials_per_pass=self.slots, reason="fake")
        self.base_value = 2.31
        self._tell("base_evaluated", value=self.base_value)
        live: list[optuna.Trial] = []
        started = 0
        while live or started < n_trials:
            while len(live) < self.slots and started < n_trials:
                trial = study.ask()
                started += 1
                if self._start(trial, objective):
                    live.append(trial)
                else:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
            if live:
                self._round(live)
                live = self._judge(study, live)
            if self._cancel_after is not None and self._done >= self._cancel_after:
                self._cancel(live)
                return
        if all(record.state is TrialState.FAILED for record in self.records.values()):
            raise RuntimeError("All trials failed.")

    def _start(self, trial: optuna.Trial, objective: Callable[..., Any]) -> bool:
        record = TrialRecord(number=trial.number, params={}, state=TrialState.RUNNING)
        self.records[trial.number] = record
        try:
            if trial.number in self._fails:
                raise RuntimeError(self._fails[trial.number])
            objective(trial)
        except Exception as error:
            record.state, record.error = TrialState.FAILED, f"{type(error).__name__}: {error}"
            self._tell("trial_ended", trial, state="failed", value=None, reason=record.error, adapter=None)
            return False
        record.params, record.trainer = dict(trial.params), "SFTTrainer"
        record.boundaries = [6 * (k + 1) for k in range(self.chunks)]
        self._tell(
            "trial_started",
            trial,
            params=record.params,
            trainer="SFTTrainer",
            max_steps=6 * self.chunks,
            boundaries=record.boundaries,
            fused=True,
        )
        return True

    def _round(self, live: list[optuna.Trial]) -> None:
        start = self._now
        seconds = 0.9 * len(live) ** 0.5 * self._random.uniform(0.9, 1.2)
        for trial in live:
            record = self.records[trial.number]
            k = len(record.values) + 1
            for step in range(6 * (k - 1) + 1, 6 * k + 1):
                self._now = start + seconds * (step - 6 * (k - 1)) / 6
                self._tell("step", trial, chunk=k - 1, step=step, max_steps=6 * self.chunks)
        if self._pace_s:
            time.sleep(self._pace_s)
        self._now = start + seconds
        for trial in live:
            record = self.records[trial.number]
            record.values.append(self._value(trial, len(record.values) + 1))
            record.seconds.append(seconds / len(live))
            record.tokens.append(960)
            record.generated.append(self._generates * int(trial.params.get("num_generations", 1)))
            self._hold(record, start)
            self._done += 1
            self._tell(
                "chunk_done",
                trial,
                chunk=len(record.values),
                value=record.values[-1],
                seconds=record.seconds[-1],
                tokens=960,
                generated=record.generated[-1],
            )
            if self._interrupt_after is not None and self._done >= self._interrupt_after:
                raise KeyboardInterrupt

    def _cancel(self, live: list[optuna.Trial]) -> None:
        self.cancelled = True
        for trial in live:
            record = self.records[trial.number]
            record.state, record.error = TrialState.FAILED, ENDED_WITH_SEARCH
            record.adapter = f"trials/{trial.number}/adapter"
            self._tell("trial_ended", trial, state="failed", value=None, reason=ENDED_WITH_SEARCH, adapter=None)

    def _hold(self, record: TrialRecord, start: float) -> None:
        """As the executor does it: one span for as long as a trial keeps its slot."""
        if record.spans and record.spans[-1][1] >= start:
            start = record.spans.pop()[0]
        record.spans.append((start, self._now))

    def _value(self, trial: optuna.Trial, k: int) -> float:
        if trial.number in self._values:
            return self._values[trial.number][k - 1]
        rate = float(trial.params.get("learning_rate", 1e-3))
        miss = math.log10(rate / 2e-3)
        floor = 0.35 + 0.35 * miss**2 - 0.02 * math.log2(float(trial.params.get("r", 8)))
        if rate > 8e-3:
            return 2.31 + 0.9 * k
        speed = 0.75 * 10 ** min(miss, 0)
        noise = 0.02 * self._random.gauss(0, 1)
        return floor + (2.31 - floor) * math.exp(-speed * k) + noise

    def _judge(self, study: optuna.Study, live: list[optuna.Trial]) -> list[optuna.Trial]:
        stay = []
        for trial in live:
            record = self.records[trial.number]
            k, value = len(record.values), record.values[-1]
            peers = sorted(r.values[k - 1] for r in self.records.values() if len(r.values) >= k)
            rank = peers.index(value) + 1 if value == value else len(peers)
            reason = f"rank {rank} of {len(peers)} after {k} chunk{'s' if k > 1 else ''}"
            if k == self.chunks:
                self._verdict(trial, k, "complete", "trained to the end")
                record.state, record.adapter = TrialState.COMPLETE, f"trials/{trial.number}/adapter"
                study.tell(trial, value)
                self._tell(
                    "trial_ended", trial, chunk=k, state="complete", value=value, reason="", adapter=record.adapter
                )
            elif self._prune and k in (1, 2, 4) and rank > max(1, math.ceil(len(peers) / 2)):
                self._verdict(trial, k, "stop", reason + ", the better half goes on")
                record.state = TrialState.STOPPED
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                self._tell("trial_ended", trial, chunk=k, state="pruned", value=value, reason=reason, adapter=None)
            else:
                self._verdict(trial, k, "continue", reason)
                stay.append(trial)
        return stay

    def _verdict(self, trial: optuna.Trial, k: int, verdict: str, reason: str) -> None:
        self.records[trial.number].verdicts.append((k, verdict, reason))
        self._tell("verdict", trial, chunk=k, verdict=verdict, reason=reason)

    def _tell(self, kind: str, trial: optuna.Trial | None = None, chunk: int | None = None, **data: Any) -> None:
        event = Event(kind, self._now, trial.number if trial else None, chunk, data)
        for listener in self._listeners:
            listener(event)


def fake_objective(trial: optuna.Trial) -> None:
    """Suggest what a small LoRA search would."""
    trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
    trial.suggest_categorical("r", [4, 8, 16])
