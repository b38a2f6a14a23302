"""The two searches that are compared, each run in a process of its own."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import provenance
from rapidfire_automl.settings import Settings

# -- ours, in a process of its own ---------------------------------------------------------------------------------


def search_jointly(pipe: Any, settings: Settings, folder: Path) -> None:
    """Run a search file as the command line does."""
    from rapidfire_automl import program as programs

    _quiet()
    program = programs.prepare(settings, folder)
    programs.execute(program)
    pipe.send({"peak_bytes": provenance.peak_rss_bytes()})


def read_ours(run_dir: Path) -> dict[str, Any]:
    """What a run folder of ours says."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    lines = (run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    kept = ("status", "wall_s", "first_verdict_s", "best_trial", "best_value", "base_value", "direction")
    return {
        **{name: summary[name] for name in (*kept, "chunks_used", "chunks_if_all_ran", "slots", "chunks")},
        "plan": summary.get("plan"),
        "peak_bytes": None,
        "trials": [
            {name: trial[name] for name in ("number", "state", "params", "values", "fused", "error")}
            for trial in summary["trials"]
        ],
        "reached": [
            {"time_s": e["time_s"], "trial": e["trial"], "chunk": e["chunk"], "value": e["data"]["value"]}
            for e in events
            if e["kind"] == "chunk_done"
        ],
        "finished": [
            {"time_s": e["time_s"], "trial": e["trial"], "value": e["data"]["value"]}
            for e in events
            if e["kind"] == "trial_ended" and e["data"]["state"] == "complete"
        ],
    }


# -- plain TRL, in a process of its own ----------------------------------------------------------------------------


class Plain:
    """Stands where the executor stands in the search file's objective: a newly loaded base for every trial."""

    def __init__(self, settings: Settings) -> None:
        from transformers import AutoTokenizer

        self._base = settings.base
        self.tokenizer = AutoTokenizer.from_pretrained(settings.base.tokenizer or settings.base.model)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def model(self, trial: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self._base.model, dtype=self._base.dtype)


def search_serially(
    pipe: Any,
    settings: Settings,
    folder: Path,
    configurations: Sequence[Mapping[str, Any]],
    n_trials: int,
    each_chunk: bool,
) -> None:
    """Train every trial to its end with plain TRL and send what came of it."""
    import optuna

    from rapidfire_automl import program as programs
    from rapidfire_automl.executor.evaluation import Evaluator

    _quiet()
    program = programs.prepare(settings, folder)
    evaluator = Evaluator(program.metric, settings.search.eval_batch_size)
    study = optuna.create_study(direction=settings.direction, sampler=program.sampler)
    for configuration in configurations:
        study.enqueue_trial(dict(configuration))
    minimize = settings.direction == "minimize"
    plain = Plain(settings)
    build = programs.build_objective(program, plain)
    born_s = time.perf_counter()
    for _ in range(n_trials):
        trial = study.ask()
        entry = _train(trial, build, evaluator, settings, each_chunk, minimize, born_s, program.run_dir)
        if entry["value"] is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, entry["value"])
        pipe.send(entry)
    pipe.send({"peak_bytes": provenance.peak_rss_bytes()})


def _train(
    trial: Any, build: Any, evaluator: Any, settings: Settings, each_chunk: bool, minimize: bool, born_s: float,
    run_dir: Path,
) -> dict[str, Any]:  # fmt: skip
    def now() -> float:
        return time.perf_counter() - born_s

    entry: dict[str, Any] = dict.fromkeys(("value", "build_s", "train_s", "evaluate_s", "save_s", "error"))
    entry |= {"number": trial.number, "start_s": now(), "values": []}
    try:
        trainer = build(trial)
        built_s = now()
        if each_chunk:
            trainer.add_callback(
                _chunk_evals(trainer, evaluator, settings.search.chunks, minimize, entry["values"], now)
            )
        trainer.train()
        trained_s = now()
        entry["value"] = evaluator.measure(trainer, minimize=[minimize]).value
        evaluated_s = now()
        entry["values"].append({"time_s": evaluated_s, "value": entry["value"]})
        trainer.model.save_pretrained(str(run_dir / "trials" / str(trial.number) / "adapter"))
        entry |= {
            "build_s": built_s - entry["start_s"],
            "train_s": trained_s - built_s,
            "evaluate_s": evaluated_s - trained_s,
            "save_s": now() - evaluated_s,
        }
        if not math.isfinite(entry["value"]):
            entry |= {"value": None, "error": f"the last value is {entry['value']}"}
    except Exception as error:  # a failing trial ends no search, on neither side
        entry |= {"value": None, "error": f"{type(error).__name__}: {error}"}
    return {**entry, "params": dict(trial.params), "end_s": now()}


def _chunk_evals(trainer: Any, evaluator: Any, chunks: int, minimize: bool, values: list[Any], now: Any) -> Any:
    """A callback that evaluates at every chunk's end but the last."""
    from transformers import TrainerCallback

    from rapidfire_automl.chunks import chunk_boundaries

    class ChunkEvals(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
            ends = chunk_boundaries(len(trainer.train_dataset), per_step, state.max_steps, chunks)
            if state.global_step in ends[:-1]:
                value = evaluator.measure(trainer, minimize=[minimize]).value
                values.append({"time_s": now(), "value": value if math.isfinite(value) else None})

    return ChunkEvals()


def _quiet() -> None:
    import datasets
    import optuna
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
