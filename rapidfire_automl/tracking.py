"""MLflow beside the run folder: one run for the search, a nested one for each trial.

Uses `MlflowClient` with explicit run ids: nothing global is set, so a user's own MLflow runs are left alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rapidfire_automl.events import Event

_ENDED = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


class MlflowListener:
    """Logs every trial's parameters and its value per chunk.

    Args:
        experiment: The MLflow experiment's name; made when missing.
        run_dir: The run folder; its name is the parent run's.
        tracking_uri: Where to log; None means `mlflow.db` (SQLite) in the run folder. Look at it with
            `mlflow ui --backend-store-uri sqlite:///<run folder>/mlflow.db`.

    Raises:
        ImportError: mlflow is not installed.
    """

    def __init__(self, experiment: str, run_dir: Path, tracking_uri: str | None = None) -> None:
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise ImportError(
                "`mlflow` logging needs the package mlflow: pip install 'mlflow>=3.13,<4,!=3.18.0'"
            ) from error
        self.tracking_uri = tracking_uri or f"sqlite:///{(run_dir / 'mlflow.db').absolute()}"
        self._client: Any = MlflowClient(self.tracking_uri)
        found = self._client.get_experiment_by_name(experiment)
        self._experiment = (
            found.experiment_id
            if found
            else self._client.create_experiment(experiment, artifact_location=(run_dir / "mlflow").absolute().as_uri())
        )
        self._parent = self._client.create_run(self._experiment, run_name=run_dir.name).info.run_id
        self._runs: dict[int, str] = {}

    def __call__(self, event: Event) -> None:
        """Log one event; kinds that mean nothing to MLflow are passed over."""
        if event.trial is None:
            if event.kind == "base_evaluated":
                self._metric(self._parent, "base_value", event.data["value"])
            return
        if event.kind == "trial_started":
            self._start(event.trial, event.data.get("params", {}))
        run = self._runs.get(event.trial)
        if run is None:
            return
        if event.kind == "chunk_done":
            self._metric(run, "value", event.data["value"], step=event.chunk or 0)
            if event.data.get("generated"):
                for name in ("generated", "tokens"):
                    self._metric(run, name, event.data[name], step=event.chunk or 0)
        elif event.kind == "verdict":
            self._client.set_tag(run, "verdict", f"{event.data['verdict']}: {event.data.get('reason', '')}")
        elif event.kind == "trial_ended":
            for tag in ("state", "reason", "adapter"):
                if event.data.get(tag):
                    self._client.set_tag(run, tag, str(event.data[tag]))
            self._client.set_terminated(run, _ENDED.get(str(event.data["state"]), "FINISHED"))
            del self._runs[event.trial]

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log the search's result and end every run that is still open."""
        for run in self._runs.values():
            self._client.set_terminated(run, "KILLED")
        self._runs.clear()
        for name in ("best_value", "chunks_used", "chunks_if_all_ran", "first_verdict_s", "wall_s"):
            self._metric(self._parent, name, summary.get(name))
        if summary.get("best_trial") is not None:
            self._client.set_tag(self._parent, "best_trial", str(summary["best_trial"]))
        ended = {"complete": "FINISHED", "interrupted": "KILLED"}.get(str(summary.get("status")), "FAILED")
        self._client.set_terminated(self._parent, ended)

    def _start(self, number: int, params: Mapping[str, Any]) -> None:
        tags = {"mlflow.parentRunId": self._parent}
        run = self._client.create_run(self._experiment, run_name=f"trial {number}", tags=tags).info.run_id
        self._runs[number] = run
        for name, value in params.items():
            self._client.log_param(run, name, value)

    def _metric(self, run: str, name: str, value: object, step: int = 0) -> None:
        """Log a number; databases refuse NaN and infinities, so these become a tag."""
        if not isinstance(value, (int, float)):
            return
        if math.isfinite(value):
            self._client.log_metric(run, name, float(value), timestamp=int(time.time() * 1000), step=step)
        else:
            self._client.set_tag(run, f"{name} at {step}", str(value))
