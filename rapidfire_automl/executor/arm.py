"""An arm: one trial while it trains, in a thread of its own that runs only while it holds the baton."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
import torch

from rapidfire_automl.executor.adapters import LoraSite
from rapidfire_automl.executor.context import TrialContext
from rapidfire_automl.executor.passes import OpenPass
from rapidfire_automl.executor.walks import CheapWalks
from rapidfire_automl.records import TrialRecord
from rapidfire_policies.base import Decision


class Leave(BaseException):
    """Raised in a trial's thread when the search ends; no `except Exception` of a user's catches it."""


class Halt(BaseException):
    """Raised in a trial's thread when somebody stops it in the middle of a chunk."""


@dataclass(eq=False)
class Arm:
    """A trial and where it stands.

    Args:
        trial: Optuna's trial.
        context: Its share of the process-wide state.
        record: Its story.
        minimize: Whether its study minimises, by objective.
        trained: Chunks that its trainer has done; fewer than are recorded where a checkpoint was lost.
        judged: Chunks on which there is a verdict.
        final: The verdict on the last of them, where an earlier process has ended it there.
        restored: What it goes on from, where an earlier process has begun it.
        extensions: Steps at which it is to be extended as it was before, and where its chunks end then.
        attempt: Which attempt at the trial this is, from 1.
        begun: Whether it trains in this process: its trainer stands where it goes on from.
        lost: Whether other workers have taken it over: nothing it says counts any more.
        logged: Entries of its trainer's log that belong to earlier chunks.
        save_due: Whether its state is wanted on the disk at the end of its step.
    """

    trial: optuna.Trial
    context: TrialContext
    record: TrialRecord
    minimize: tuple[bool, ...]
    row: int = -1
    sites: Mapping[str, LoraSite] = field(default_factory=dict)
    walks: CheapWalks | None = None
    request: Any = None
    answer: Any = None
    open_passes: list[OpenPass] = field(default_factory=list)
    has_slot: bool = False
    done: bool = False
    chunk_seconds: float = 0.0
    chunk_tokens: int = 0
    chunk_generated: int = 0
    logged: int = 0
    step: int = 0
    save_due: bool = False
    trained: int = 0
    judged: int = 0
    reported: int = 0
    final: Decision | None = None
    restored: Any = None
    extensions: list[tuple[int, list[int]]] = field(default_factory=list)
    attempt: int = 1
    begun: bool = False
    lost: bool = False
    asked: int = 0
    span_start_s: float = 0.0
    baton_since_s: float = 0.0
    go: threading.Event = field(default_factory=threading.Event)
    decision: Decision | None = None
    trainer: Any = None
    ruling: Decision | None = None
    """What a person has decided: PAUSE until further notice, CONTINUE until it has a slot again, STOP for good."""

    @property
    def number(self) -> int:
        """Optuna's number of the trial."""
        return self.record.number

    @property
    def progress(self) -> float:
        """Share of the running chunk that is done, 0 to 1."""
        return self._share(self.step)

    @property
    def next_progress(self) -> float:
        """`progress` when the step it is in, or about to begin, is done."""
        return self._share(self.step + 1)

    def _share(self, step: int) -> float:
        ends = self.record.boundaries
        chunk = self.trained
        if chunk >= len(ends):
            return 1.0
        start = ends[chunk - 1] if chunk else 0
        return (step - start) / (ends[chunk] - start)

    def within_chunk(self) -> dict[str, Any]:
        """How far it has come in its chunk, for a checkpoint."""
        names = ("step", "chunk_seconds", "chunk_tokens", "chunk_generated", "logged")
        return {name: getattr(self, name) for name in names}

    def generator(self, device: torch.device) -> torch.Generator:
        """A generator on a device, in the trial's present state."""
        return self.context.generator(device)

    def put_generator(self, generator: torch.Generator) -> None:
        """Go on from where a pass's draws have left off."""
        self.context.take(generator)

    def charge_baton(self) -> None:
        """Charge the chunk with the time since the arm was handed the baton, or was charged last."""
        now = time.perf_counter()
        self.chunk_seconds += now - self.baton_since_s
        self.baton_since_s = now

    def abandon_passes(self) -> None:
        """Say that no backward will come from the trial's open passes."""
        for opened in self.open_passes:
            for part in opened.parts:
                if part.member is self:
                    part.live = False
        self.open_passes.clear()
