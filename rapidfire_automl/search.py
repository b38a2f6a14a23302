"""One search from start to end: drive the executor, keep what happened, and write the run folder.

This is the file to read first. `run_search` is what the command line, `Experiment` and the demo call.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from optuna.study import StudyDirection

from rapidfire_automl.disk import is_full, make_folder
from rapidfire_automl.event_log import FILE, WORKERS, EventLog
from rapidfire_automl.events import Event, Listener
from rapidfire_automl.jsonable import dumps, jsonable
from rapidfire_automl.mailboxes import FolderMailbox
from rapidfire_automl.patience import StorageAway
from rapidfire_automl.rankings import best_so_far, generates, has_failed, rank
from rapidfire_automl.refusals import FolderInUse, SearchDiffers
from rapidfire_automl.versions import installed
from rapidfire_policies.base import TrialState
from rapidfire_policies.wording import counted

if TYPE_CHECKING:
    import optuna

    from rapidfire_automl.records import TrialRecord

_log = logging.getLogger(__name__)


class Executor(Protocol):
    """What a search needs of `RapidFireExecutor`."""

    @property
    def slots(self) -> int:
        """Trials that train at a time."""

    @property
    def chunks(self) -> int:
        """Chunks of a whole trial."""

    @property
    def base_value(self) -> float | None:
        """The untrained base's value; None before it is known."""

    @property
    def records(self) -> Mapping[int, TrialRecord]:
        """What became of each trial so far."""

    def optimize(
        self,
        study: optuna.Study,
        objective: Callable[..., Any],
        n_trials: int,
        timeout_s: float | None = None,
        *,
        more: bool = True,
    ) -> None:
        """Search, in one thread's order."""

    def add_listener(self, listener: Listener) -> None:
        """Have a listener told of every event."""

    def explain(self) -> str:
        """What the planner chose and why."""

    def __enter__(self) -> Any:
        """Load the base."""

    def __exit__(self, *error: Any) -> Any:
        """Free everything."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found and what it cost.

    Args:
        best_trial: Number of the best COMPLETE trial with a finite last value, ties to the lower number; or None.
        best_value: Its last value, in the user's sign.
        best_params: Its parameters; empty without a best trial.
        best_adapter: The folder of its adapter in PEFT's layout.
        base_value: The untrained base's value on the same examples.
        values: Trial number -> one value per chunk.
        chunks_used: Chunks trained, of all trials.
        chunks_if_all_ran: Chunks it would have taken to train every trial to its end. A trial that failed counts
            with the chunks it did: without a verdict, too, it would have failed there.
        first_verdict_s: Seconds from the start to the first verdict; None if there was none.
        wall_s: Seconds from start to end, loading the base included where the executor had not.
        run_dir: The run folder.
        summary: `summary.json` as a dictionary; NaN and infinities are strings there.
    """

    best_trial: int | None
    best_value: float | None
    best_params: dict[str, Any]
    best_adapter: Path | None
    base_value: float | None
    values: dict[int, list[float]]
    chunks_used: int
    chunks_if_all_ran: int
    first_verdict_s: float | None
    wall_s: float
    run_dir: Path
    summary: dict[str, Any]

    def why(self, trial: int) -> str:
        """Why a trial stopped, or how it stands, and what it would have taken to go on; a sentence or two.

        Args:
            trial: Its number.

        Raises:
            ValueError: The run folder is gone, or knows no such trial.
        """
        from rapidfire_automl.stories import why

        return why(trial, self.run_dir)


class SearchFailed(RuntimeError):
    """Every trial failed. The run folder is written all the same; `result` is what stands in it."""

    def __init__(self, message: str, result: SearchResult) -> None:
        super().__init__(message)
        self.result = result


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C. Finished trials are kept, the run folder is written, and `result` is what stands in it."""

    def __init__(self, result: SearchResult) -> None:
        super().__init__("The search was interrupted.")
        self.result = result


def run_search(
    executor: Executor,
    objective: Callable[..., Any],
    *,
    study: optuna.Study,
    n_trials: int,
    run_dir: str | os.PathLike[str],
    timeout_s: float | None = None,
    listeners: Sequence[Listener] = (),
    mlflow_experiment: str | None = None,
    facts: Mapping[str, object] | None = None,
    own: bool = False,
    shared: bool = False,
    more: bool = True,
    log: EventLog | None = None,
) -> SearchResult:
    """Search, and write `events.jsonl`, `summary.json`, `plan.json`, `curves.png` and `timeline.png`.

    Where trials generate what they train on, there are also `generated.png`, values against generated tokens, and
    `rankings` in the summary: who is best at equal steps, and who at equal cost.

    Args:
        executor: A `RapidFireExecutor`, entered or not.
        objective: Builds and returns a TRL trainer; decorated with `executor.objective` or plain.
        study: Any Optuna study with one direction.
        n_trials: Trials to run.
        run_dir: The run folder; made when missing. Events are appended to those of an earlier search in it.
        timeout_s: Seconds after which no further trial is started.
        listeners: Called with every event, after it is in `events.jsonl`.
        mlflow_experiment: Name of an MLflow experiment to log to, or None for none.
        facts: Entries to add to the summary (settings, data set, ...); they do not replace ours.
        own: Whether to enter and close the executor here, so that loading the base is timed and its events are kept;
            else both are the caller's.
        shared: Whether other workers search the same study (`RapidFireExecutor.work`). Each then has its events in
            `workers/<its name>/events.jsonl` of the run folder, and who comes to the end last has the whole summary.
        more: As of `RapidFireExecutor.optimize`: whether a search in `run_dir` that is over is followed by another.
        log: The run folder's `events.jsonl` where the caller has opened it, to keep others out before; closed here.

    While it runs it can be steered: from this process by the executor's verbs, from others by `Search(run_dir)` and
    the command line.

    Returns:
        What was found. `best_trial` is None when no trial completed with a finite value but some were pruned.

    Raises:
        SearchFailed: Every trial failed; the message shows the first reasons.
        SearchInterrupted: Ctrl-C; a `KeyboardInterrupt` that carries the result.
        FolderInUse: A search is under way in `run_dir`; nothing there was changed.
        SearchDiffers: Another search in `run_dir` has not come to its end.
        ValueError: `n_trials` < 1, or a study with several directions.
    """
    if n_trials < 1:
        raise ValueError(f"`n_trials` must be >= 1, got {n_trials}.")
    if len(study.directions) != 1:
        raise ValueError(f"`study` must have one direction, got {len(study.directions)}.")
    run_dir = Path(run_dir)
    make_folder(run_dir)
    before = set(executor.records)
    maximize = study.direction is StudyDirection.MAXIMIZE
    folder = run_dir
    if shared:
        folder = run_dir / WORKERS / executor.worker.name  # type: ignore[attr-defined]
        folder.mkdir(parents=True, exist_ok=True)
    with log or EventLog(folder / FILE) as log:
        if hasattr(executor, "check_folder") and not shared:
            executor.check_folder(study)
        tracker = _mlflow(mlflow_experiment, run_dir)
        log.add_listeners([*([tracker] if tracker else []), *listeners])
        log(_started(executor, study, n_trials))
        executor.add_listener(log)
        if hasattr(executor, "add_mailbox") and not shared:
            executor.add_mailbox(FolderMailbox(run_dir))
        with executor if own else nullcontext():
            status, begun = "crashed", True
            try:
                asked = None if shared else n_trials
                status = _optimize(executor, study, objective, asked, timeout_s, before, more=more)
            except (FolderInUse, SearchDiffers):
                begun = any(number not in before for number in executor.records)
                raise
            except (SystemExit, StorageAway):  # SIGTERM, or the study can't be reached
                status = "interrupted"
                raise
            finally:
                log(Event("search_ended", log.elapsed_s, data={"status": status}))
                records = {n: r for n, r in sorted(executor.records.items()) if n not in before}
                result = _result(executor, records, log, run_dir, status, maximize, facts or {})
                try:
                    if begun:  # else it would have no trials, and take the place of one that has
                        _write(result, executor, records, log.chunk_ends_s)
                except OSError as error:
                    if not is_full(error):
                        raise
                    _log.error("The disk is full: %s has no summary. Make room and run it again.", run_dir)
                if tracker is not None:
                    tracker.finish(result.summary)
    if status == "interrupted":
        raise SearchInterrupted(result)
    if status == "failed":
        raise SearchFailed(_reasons(records), result)
    return result


def _optimize(
    executor: Executor,
    study: optuna.Study,
    objective: Callable[..., Any],
    n_trials: int | None,
    timeout_s: float | None,
    before: set[int],
    *,
    more: bool,
) -> str:
    """Drive the executor, with others where `n_trials` is None.

    Returns:
        How it ended: "complete", "cancelled", "failed" (every trial) or "interrupted".
    """

    def all_failed() -> bool:
        states = [record.state for number, record in executor.records.items() if number not in before]
        return bool(states) and all(state is TrialState.FAILED for state in states)

    try:
        if n_trials is None:
            executor.work(study, objective, timeout_s=timeout_s)  # type: ignore[attr-defined]
        else:
            executor.optimize(study, objective, n_trials=n_trials, timeout_s=timeout_s, more=more)
    except KeyboardInterrupt:
        return "interrupted"
    except RuntimeError:
        if not all_failed():
            raise
    if getattr(executor, "cancelled", False):
        return "cancelled"
    return "failed" if all_failed() else "complete"


def _started(executor: Executor, study: optuna.Study, n_trials: int) -> Event:
    """What a reader of the events has to know about all that follow."""
    about = {"study": study.study_name, "direction": study.direction.name.lower(), "n_trials": n_trials}
    return Event("search_started", 0.0, data={**about, "chunks": executor.chunks, "slots": executor.slots})


def best_trial(records: Mapping[int, TrialRecord], *, maximize: bool) -> int | None:
    """The COMPLETE trial with the best finite last value; ties go to the lower number, None without any."""
    complete = {number: record for number, record in records.items() if record.state is TrialState.COMPLETE}
    return best_so_far(complete, maximize=maximize)


def _result(
    executor: Executor,
    records: Mapping[int, TrialRecord],
    log: EventLog,
    run_dir: Path,
    status: str,
    maximize: bool,
    facts: Mapping[str, object],
) -> SearchResult:
    best = best_trial(records, maximize=maximize)
    record = records[best] if best is not None else None
    adapter = Path(record.adapter).absolute() if record is not None and record.adapter else None
    used = sum(len(r.values) for r in records.values())
    full = sum(len(r.values) if has_failed(r) else max(executor.chunks, len(r.boundaries)) for r in records.values())
    wall_s = log.elapsed_s
    generating = generates(records)
    summary = {
        "status": status,
        "best_trial": best,
        "best_value": record.values[-1] if record else None,
        "best_params": record.params if record else None,
        "best_adapter": adapter,
        "base_value": executor.base_value,
        "direction": "maximize" if maximize else "minimize",
        "values": {n: r.values for n, r in records.items()},
        "first_verdict_s": log.first_verdict_s,
        "chunks_used": used,
        "chunks_if_all_ran": full,
        "wall_s": wall_s,
        "slots": executor.slots,
        "chunks": executor.chunks,
        "seed": getattr(executor, "seed", None),
        "trials": [_trial(r, generating) for r in records.values()],
        "checkpoints": getattr(executor, "spent", None),
        **({"best_so_far": _so_far(executor, records, maximize)} if status in ("cancelled", "interrupted") else {}),
        **({"rankings": rank(records, maximize=maximize)} if generating else {}),
        "explain": _explain(executor),
        "versions": installed(),
    }
    return SearchResult(
        best_trial=best,
        best_value=record.values[-1] if record else None,
        best_params=dict(record.params) if record else {},
        best_adapter=adapter,
        base_value=executor.base_value,
        values={n: list(r.values) for n, r in records.items()},
        chunks_used=used,
        chunks_if_all_ran=full,
        first_verdict_s=log.first_verdict_s,
        wall_s=wall_s,
        run_dir=run_dir,
        summary=jsonable({**summary, **{name: fact for name, fact in facts.items() if name not in summary}}),
    )


def _so_far(executor: Executor, records: Mapping[int, TrialRecord], maximize: bool) -> dict[str, Any] | None:
    """The best trial of a search that was cut short, finished or not, in the summary's words; None without any."""
    number = best_so_far(records, maximize=maximize)
    if number is None:
        return None
    record = records[number]
    return {
        "trial": number,
        "value": record.values[-1],
        "params": record.params,
        "adapter": Path(record.adapter).absolute() if record.adapter else None,
        "chunk": len(record.values),
        "of": len(record.boundaries) or executor.chunks,
    }


def _trial(record: TrialRecord, generating: bool) -> dict[str, Any]:
    """A trial's entry in the summary: everything but its per-example scores; `generated` where any trial does."""
    return {
        "number": record.number,
        "state": record.state,
        "params": record.params,
        "values": record.values,
        "metrics": record.metrics,
        "seconds": record.seconds,
        "tokens": record.tokens,
        **({"generated": record.generated} if generating else {}),
        "boundaries": record.boundaries,
        "verdicts": [{"chunk": c, "verdict": str(v), "reason": reason} for c, v, reason in record.verdicts],
        "spans": record.spans,
        "adapter": Path(record.adapter).absolute() if record.adapter else None,
        "trainer": record.trainer,
        "fused": record.fused,
        "why_unfused": record.why_unfused or None,
        "error": record.error,
    }


def _explain(executor: Executor) -> str | None:
    """The planner's account; a search that ended before the base was loaded has none."""
    try:
        return executor.explain()
    except Exception as error:  # an account that cannot be given must not cost the results
        return f"no explanation: {error}"


def _write(
    result: SearchResult,
    executor: Executor,
    records: Mapping[int, TrialRecord],
    chunk_ends_s: Mapping[int, Sequence[float]],
) -> None:
    """Write the run folder: the numbers first, and the pictures after them."""
    from rapidfire_automl import pictures
    from rapidfire_automl.cost_picture import draw_cost

    plan = getattr(executor, "plan", None)
    if plan is not None:
        _replace(result.run_dir / "plan.json", dumps(plan, indent=2))
        result.summary["plan"] = jsonable(plan)
    summary_path = result.run_dir / "summary.json"
    _replace(summary_path, dumps(result.summary, indent=2))
    if not any(record.values for record in records.values()):
        return
    maximize = result.summary["direction"] == "maximize"
    drawn = {}
    try:
        drawn["curves"] = pictures.draw_curves(
            result.run_dir / "curves.png",
            records,
            chunks=executor.chunks,
            best=result.best_trial,
            base_value=result.base_value,
            maximize=maximize,
        )
        if generates(records):
            drawn["generated"] = draw_cost(
                result.run_dir / "generated.png",
                records,
                best=result.best_trial,
                base_value=result.base_value,
                maximize=maximize,
            )
        drawn["timeline"] = pictures.draw_timeline(
            result.run_dir / "timeline.png",
            records,
            chunks=executor.chunks,
            slots=executor.slots,
            best=result.best_trial,
            maximize=maximize,
            chunk_ends_s=chunk_ends_s,
        )
    except Exception as error:  # a picture that cannot be drawn must not cost the results
        _log.warning("No pictures: %s", error)
    result.summary["pictures"] = jsonable({name: path.absolute() for name, path in drawn.items()})
    _replace(summary_path, dumps(result.summary, indent=2))


def add_to_summary(result: SearchResult, entries: Mapping[str, object]) -> None:
    """Add what was found out after the search to its summary, in memory and in `summary.json`."""
    result.summary.update(jsonable(entries))
    _replace(result.run_dir / "summary.json", dumps(result.summary, indent=2))


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _reasons(records: Mapping[int, TrialRecord], most: int = 3) -> str:
    """What went wrong, each reason once, with the trials it hit."""
    hit: dict[str, list[int]] = {}
    for number, record in records.items():
        reason = (record.error or "no reason recorded").strip().splitlines()[-1]
        hit.setdefault(reason, []).append(number)
    lines = ["The only trial failed." if len(records) == 1 else f"All {len(records)} trials failed."]
    for reason, numbers in list(hit.items())[:most]:
        named = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        lines.append(f"trial{'s' if len(numbers) > 1 else ''} {named}: {reason}")
    if len(hit) > most:
        lines.append(f"and {counted(len(hit) - most, 'more reason')} in summary.json")
    return "\n".join(lines)


def _mlflow(experiment: str | None, run_dir: Path) -> Any:
    if experiment is None:
        return None
    from rapidfire_automl.tracking import MlflowListener

    return MlflowListener(experiment, run_dir)
