"""What an experiment has found: one table of runs, one of their values and logs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from rapidfire_automl.rankings import generates

if TYPE_CHECKING:
    from rapidfire_automl.records import TrialRecord
    from rapidfire_automl.search import SearchResult


@dataclass
class GroupResult:
    """One search: the configurations of one group on one base.

    Args:
        trainer_type: "SFT", "DPO", "GRPO" or "RLOO".
        model_name: The base.
        study: The Optuna study; its trials are numbered as `records` and `result` are.
        first_run_id: Run id of trial 0. Run ids go on from search to search, trial numbers start at 0 in each.
        direction: "minimize" or "maximize".
        metric: What the values are.
        result: What `run_search` returned, None if the search broke off before.
        records: The trials, by number.
        logs: `(trial number, optimizer step) -> what the trainer logged there`.
    """

    trainer_type: str
    model_name: str
    study: optuna.Study
    first_run_id: int
    direction: str
    metric: str
    result: SearchResult | None = None
    records: Mapping[int, TrialRecord] = field(default_factory=dict)
    logs: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)

    def recall_logs(self) -> None:
        """Put in what trainers have logged in earlier processes."""
        for number, record in self.records.items():
            for entry in record.log_history:
                logged = {name: value for name, value in entry.items() if name != "step"}
                self.logs.setdefault((number, int(entry.get("step", 0))), logged)

    def runs(self) -> Iterator[dict[str, Any]]:
        """One row a trial."""
        best = None if self.result is None else self.result.best_trial
        generating = generates(self.records)
        for number, record in sorted(self.records.items()):
            yield {
                "run_id": self.first_run_id + number,
                "trial": number,
                "status": str(record.state),
                "model_name": self.model_name,
                "trainer_type": self.trainer_type,
                "chunks": len(record.values),
                "value": record.values[-1] if record.values else None,
                "metric": self.metric,
                "best": number == best,
                "reason": record.verdicts[-1][2] if record.verdicts else "",
                "adapter": record.adapter,
                "error": record.error,
                "seconds": sum(record.seconds),
                "tokens": sum(record.tokens),
                **({"generated": sum(record.generated)} if generating else {}),
                **record.params,
            }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row a trial and optimizer step that was logged or evaluated, in that order."""
        for number, record in sorted(self.records.items()):
            points = {step: dict(logged) for (trial, step), logged in self.logs.items() if trial == number}
            for chunk, value in enumerate(record.values, start=1):
                step = record.boundaries[chunk - 1] if chunk <= len(record.boundaries) else chunk
                points.setdefault(step, {}).update(chunk=chunk, value=value)
            for step, point in sorted(points.items()):
                yield {"run_id": self.first_run_id + number, "trial": number, "step": step, **point}


@dataclass
class FitResult:
    """What `run_fit` found, search by search.

    `best` is the best search's `SearchResult` where the searches measured the same thing; of searches that didn't,
    only `searches` can tell.
    """

    searches: list[GroupResult]
    folder: Path

    def __len__(self) -> int:
        return len(self.searches)

    def __iter__(self) -> Iterator[GroupResult]:
        return iter(self.searches)

    def __getitem__(self, index: int) -> GroupResult:
        return self.searches[index]

    @property
    def best(self) -> SearchResult | None:
        """The best search's result, None where no trial has completed.

        Raises:
            ValueError: The searches measured different things.
        """
        if len({(s.metric, s.direction) for s in self.searches}) > 1:
            raise ValueError("`best` needs searches with one metric. Look at `searches` one by one.")
        found = [s.result for s in self.searches if s.result is not None and s.result.best_value is not None]
        sign = -1.0 if self.searches and self.searches[0].direction == "maximize" else 1.0
        return min(found, key=lambda result: sign * _finite(result.best_value), default=None)

    @property
    def best_params(self) -> dict[str, Any]:
        """The best trial's parameters; empty without one."""
        return self.best.best_params if self.best else {}

    @property
    def best_value(self) -> float | None:
        """The best trial's last value."""
        return self.best.best_value if self.best else None

    @property
    def best_adapter(self) -> Path | None:
        """The folder of the best trial's adapter, in PEFT's layout."""
        return self.best.best_adapter if self.best else None

    def runs(self) -> list[dict[str, Any]]:
        """One row a trial, over all searches."""
        return [row for search in self.searches for row in search.runs()]

    def rows(self) -> list[dict[str, Any]]:
        """One row a trial and step, over all searches."""
        return [row for search in self.searches for row in search.rows()]


def _finite(value: float | None) -> float:
    return math.inf if value is None else value
