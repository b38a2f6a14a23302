"""What a search looks like at the moment, gathered from its events; no output here."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rapidfire_automl.events import ENDED_WITH_SEARCH, Event
from rapidfire_policies.wording import counted

State = Literal["running", "paused", "complete", "pruned", "cancelled", "failed"]
LIVE: tuple[State, ...] = ("running", "paused")


@dataclass
class Row:
    """One trial on the screen."""

    number: int
    params: Mapping[str, Any] = field(default_factory=dict)
    state: State = "running"
    chunk: int = 0
    step: int = 0
    boundaries: tuple[int, ...] = ()
    value: float | None = None
    verdict: str = ""
    reason: str = ""
    generated: int = 0
    tokens: int = 0
    seconds: float = 0.0
    worker: str = ""
    """Which other worker has it, where there are several."""

    @property
    def progress(self) -> float:
        """Chunks done, the part of the current one included."""
        if self.state != "running" or self.chunk >= len(self.boundaries):
            return float(self.chunk)
        start = self.boundaries[self.chunk - 1] if self.chunk else 0
        length = self.boundaries[self.chunk] - start
        return self.chunk + (min(max(self.step - start, 0) / length, 1.0) if length > 0 else 0.0)


class SearchView:
    """A listener that keeps the state of every trial and of the search.

    Args:
        n_trials: Trials to run.
        chunks: Chunks of a whole trial.
        maximize: Whether higher is better.
    """

    def __init__(self, n_trials: int, chunks: int, *, maximize: bool = False) -> None:
        self.n_trials, self.chunks, self.maximize = n_trials, chunks, maximize
        self.rows: dict[int, Row] = {}
        self.base_value: float | None = None
        self.plan = ""
        self.warnings: list[str] = []
        self.commands: list[str] = []
        self.disk_bytes = 0
        self.disk_is_full = False
        self.lock = threading.RLock()
        self._start_s = time.monotonic()
        self._training_since_s: float | None = None

    def __call__(self, event: Event) -> None:
        """Take an event in."""
        with self.lock:
            if event.trial is None:
                self._about_search(event)
            else:
                self._about_trial(self.rows.setdefault(event.trial, Row(event.trial)), event)

    def _about_search(self, event: Event) -> None:
        if event.kind == "base_evaluated":
            self.base_value = event.data["value"]
        elif event.kind == "plan":
            self.plan = str(event.data.get("reason", ""))
        elif event.kind == "warning":
            self.warnings.append(str(event.data["message"]))
        elif event.kind == "command":
            self._about_command(event)
        elif event.kind == "elsewhere":
            self._about_another(event)
        elif event.kind == "storage_away":
            self.warnings.append(f"The study's storage is away ({event.data['reason']}); training goes on meanwhile.")
        elif event.kind == "storage_back":
            self.warnings.append(f"The study's storage is back after {event.data['seconds']:.0f} s.")
        elif event.kind == "trial_orphaned":
            self.warnings.append(f"Trial {event.data['of']} is left behind by {event.data['worker'] or 'its worker'}.")
        elif event.kind == "trial_given_up":
            self.warnings.append(f"Trial {event.data['of']} was {event.data['reason']}.")
        elif event.kind == "checkpoint":
            self.disk_bytes = event.data.get("disk_bytes", 0)
        elif event.kind in ("writing_paused", "writing_resumed"):
            self.disk_is_full = event.kind == "writing_paused"
            self.warnings.append(writing(event))
        elif event.kind in ("writing_failed", "writing_lost"):
            self.warnings.append(writing(event))
        elif event.kind == "out_of_memory":
            self.warnings.append(
                f"Out of memory; passes now have at most {counted(event.data['budget_tokens'], 'token')}."
            )

    def _about_trial(self, row: Row, event: Event) -> None:
        data = event.data
        if event.kind == "trial_started":
            self._training_since_s = self._training_since_s or time.monotonic()
            row.params, row.boundaries = data["params"], tuple(data.get("boundaries", ()))
        elif event.kind == "trial_resumed":
            row.params, row.boundaries = data["params"], tuple(data.get("boundaries", ()))
            row.state, row.chunk, row.worker = "running", event.chunk or 0, ""
        elif event.kind == "trial_lost":
            row.worker = str(data["worker"])
            self.warnings.append(f"Trial {row.number} was taken over by {row.worker or 'another worker'} meanwhile.")
        elif event.kind == "step":
            row.step = data["step"]
        elif event.kind == "chunk_done":
            row.chunk, row.value = event.chunk or row.chunk + 1, data["value"]
            row.generated += data.get("generated", 0)
            row.tokens += data.get("tokens", 0)
            row.seconds += data.get("seconds", 0.0)
        elif event.kind == "verdict":
            row.verdict, row.reason = str(data["verdict"]), str(data.get("reason", ""))
            if row.state in LIVE:
                row.state = "paused" if row.verdict == "pause" else "running"
        elif event.kind == "trial_ended":
            row.state = "cancelled" if data.get("reason") == ENDED_WITH_SEARCH else data["state"]
            if data.get("reason"):
                row.reason = str(data["reason"])
        elif event.kind == "command":
            self._about_command(event)
        elif event.kind == "warning":
            self.warnings.append(f"Trial {row.number}: {data['message']}")

    def _about_another(self, event: Event) -> None:
        """How another worker's trial fares."""
        data = event.data
        row = self.rows.setdefault(data["of"], Row(data["of"]))
        row.worker, row.params = str(data["worker"]), data["params"]
        row.chunk, row.value = data["chunk"], data["value"]
        row.state = "pruned" if data["state"] == "stopped" else data["state"]

    def _about_command(self, event: Event) -> None:
        """Somebody has stepped in."""
        verb, of, text = event.data["verb"], event.data["of"], event.data["text"]
        self.commands.append(f"{verb}{'' if of is None else f' {of}'} ({event.data['effect']}): {text}")
        if event.data["effect"] != "applied":
            return
        row = self.rows.get(of)
        if verb in ("add", "clone"):
            self.n_trials += 1
        elif row is not None and row.state in LIVE and verb in ("pause", "resume"):
            row.state = "paused" if verb == "pause" and "withdrawn" not in text else "running"
            row.verdict, row.reason = verb, text

    @property
    def elapsed_s(self) -> float:
        """Seconds since the view was made."""
        return time.monotonic() - self._start_s

    @property
    def chunks_done(self) -> int:
        """Chunks trained, of all trials."""
        return sum(row.chunk for row in self.rows.values())

    @property
    def chunks_if_all_run(self) -> int:
        """Chunks of all trials if none is stopped."""
        return self.n_trials * self.chunks

    @property
    def generates(self) -> bool:
        """Whether any trial has generated something to train on."""
        return any(row.generated for row in self.rows.values())

    def count(self, *states: State) -> int:
        """Trials in one of these states."""
        return sum(row.state in states for row in self.rows.values())

    @property
    def best(self) -> Row | None:
        """The trial with the best value so far, finished or not; failed ones and values that are not finite are out."""
        finite = [
            r for r in self.rows.values() if r.value is not None and math.isfinite(r.value) and r.state != "failed"
        ]
        if not finite:
            return None
        return min(finite, key=lambda r: (-(r.value or 0.0) if self.maximize else r.value or 0.0, r.number))

    @property
    def expected_chunks(self) -> float:
        """Chunks the whole search will train if trials to come fare like those that have ended."""
        ended = [row.chunk for row in self.rows.values() if row.state not in LIVE]
        usual = sum(ended) / len(ended) if ended else float(self.chunks)
        total = float(sum(ended)) + max(self.n_trials - len(self.rows), 0) * usual
        for row in self.rows.values():
            if row.state in LIVE:
                # A trial that has outlived the usual one was found good and will most likely go to the end.
                total += usual if row.chunk < usual else self.chunks
        return max(total, float(self.chunks_done))

    @property
    def left_s(self) -> float | None:
        """Seconds left, by the pace so far; None before the first chunk is done and after the last."""
        done = sum(row.progress for row in self.rows.values())
        if len(self.rows) >= self.n_trials and self.count(*LIVE) == 0:
            return None
        if self._training_since_s is None or self.chunks_done == 0:
            return None
        pace = (time.monotonic() - self._training_since_s) / done
        return pace * max(self.expected_chunks - done, 0.0)


def writing(event: Event) -> str:
    """What the writer of checkpoints has to say."""
    said = {
        "writing_paused": "Checkpoints wait, training goes on",
        "writing_resumed": "Checkpoints are written again",
        "writing_failed": f"{event.data['folder']} could not be written",
        "writing_lost": f"{event.data['folder']} was not written",
    }
    return f"{said[event.kind]}: {event.data['reason']}."


def clock(seconds: float) -> str:
    """90.4 -> "1:30"."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def number(value: float | None) -> str:
    """A value in four digits; "-" when there is none."""
    if value is None:
        return "-"
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def against(value: float | None, base: float | None) -> str:
    """How a value stands to the untrained base's: "84% below base 2.31"."""
    if value is None or base is None or not (math.isfinite(value) and math.isfinite(base)) or base == 0:
        return ""
    change = (value - base) / abs(base)
    return f"{abs(change):.0%} {'below' if change < 0 else 'above'} base {number(base)}"
