"""`Experiment`: searches over configurations, with the names RapidFire AI users know.

Configurations are grouped by base; each group is one search on one `RapidFireExecutor`, run one after the other.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import optuna
from optuna.study import StudyDirection

from rapidfire_automl.attempts import last_attempts, number_of
from rapidfire_automl.bases import CreateModel, load_model, make_executor
from rapidfire_automl.control import Command, ControlError, Controls, Sent
from rapidfire_automl.events import Listener
from rapidfire_automl.experiment_folders import ExperimentFolder, facts_of
from rapidfire_automl.fit_checks import check_data, check_search, eval_sampling_of
from rapidfire_automl.groups import (
    ConfigGroup,
    Pruning,
    RFGridSearch,
    RFOptuna,
    RFRandomSearch,
    Search,
    as_groups,
)
from rapidfire_automl.hints import nearest
from rapidfire_automl.jsonable import dumps
from rapidfire_automl.metrics import METRICS, Metric, builtin_metric
from rapidfire_automl.names import check_folder, check_name
from rapidfire_automl.results import FitResult, GroupResult
from rapidfire_automl.sampling import Sampling
from rapidfire_automl.strategies import check_count, check_direction, make_pruning
from rapidfire_automl.trainers import Data, Logs, answer_metric, build_trainer, quiet_datasets

__all__ = ["Experiment", "RFGridSearch", "RFOptuna", "RFRandomSearch"]

DEFAULT_CHUNKS = 8
_log = logging.getLogger("rapidfire_automl")
_FOREIGN = ("num_gpus", "monte_carlo_simulations")
"""Arguments of RapidFire AI's `run_fit` that mean nothing here."""


class Experiment(Controls):
    """A folder of searches; its verbs (`pause`, `clone`, ...) steer the one that runs, from another thread.

    One whose process was killed or interrupted goes on where the same program is run again: what has come to its end is
    found again, the search that was cut short is taken up. One that is done is left alone, and a new one begins.

    Args:
        experiment_name: Name of the folder; a number is added where it is taken.
        mode: "fit"; RapidFire AI's other mode, evaluation of prompts, isn't part of this library.
        experiments_path: Where experiment folders lie.
        slots: Trials that train at a time.
        policy: For groups that bring no policy of their own: one of `rapidfire_policies`, its name ("asha"), or an
            Optuna pruner. None trains every grid and random configuration to its end.
        metric: For groups that bring none: None for the trainer's own (SFT: mean token NLL, DPO: preference loss, GRPO
            and RLOO: mean reward), a name the executor knows, a key of what `compute_metrics` returns, or
            `metric(trainer) -> number or scores`.
        direction: Whether small or large values of it are good; None for what the metric is by nature: "maximize" for a
            reward, else "minimize".
        eval_sampling: How GRPO and RLOO trials answer when they are compared; by default at the temperature they all
            share, to the most tokens that any of them may generate.
        listeners: Called with every event.
        mlflow_experiment: MLflow experiment to log to.
        executor_options: Further arguments of `RapidFireExecutor`, e.g. `{"eval_batch_size": 8}`.
        experiment_path: RapidFire AI's newer name of `experiments_path`.

    Raises:
        ValueError: A name that leaves the folder, another mode, or an argument out of range.

    Example:
        ```python
        config = RFModelConfig(
            model_name="HuggingFaceTB/SmolLM2-135M-Instruct",
            peft_config=RFLoraConfig(r=List([4, 16]), target_modules="all-linear"),
            training_args=RFSFTConfig(learning_rate=List([1e-4, 1e-3]), max_steps=100),
        )
        with Experiment("chat", slots=4) as experiment:
            fit = experiment.run_fit(RFGridSearch(config, "SFT"), None, train, held_out, num_chunks=8)
        print(fit.best_params, fit.best_adapter)
        ```
    """

    def __init__(
        self,
        experiment_name: str,
        mode: str = "fit",
        experiments_path: str | Path = "./rapidfire_experiments",
        *,
        slots: int = 8,
        policy: Pruning = None,
        metric: Metric | None = None,
        direction: str | None = None,
        eval_sampling: Sampling | None = None,
        listeners: Sequence[Listener] = (),
        mlflow_experiment: str | None = None,
        executor_options: Mapping[str, Any] | None = None,
        experiment_path: str | Path | None = None,
    ) -> None:
        check_name(experiment_name, "experiment_name")
        if mode != "fit":
            raise ValueError(f'`mode` must be "fit", got {mode!r}.')
        self.experiment_name = experiment_name
        self.mode = mode
        self.slots = check_count("slots", slots)
        self.policy = make_pruning(policy)
        self.metric = metric
        self.direction = None if direction is None else check_direction(direction)
        self.eval_sampling = eval_sampling
        self.listeners = tuple(listeners)
        self.mlflow_experiment = mlflow_experiment
        self.executor_options = dict(executor_options or {})
        parent = experiments_path if experiment_path is None else experiment_path
        self._parent = Path(check_folder(parent, "experiments_path"))
        self._folder: ExperimentFolder | None = None
        self._searches: list[GroupResult] = []
        self._ended = False
        self._running: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def run_fit(
        self,
        config_group: Any = None,
        create_model_fn: CreateModel | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        num_chunks: int | None = None,
        seed: int = 42,
        *,
        num_shards: int | None = None,
        param_config: Any = None,
        timeout_s: float | None = None,
        **foreign: Any,
    ) -> FitResult:
        """Train a group of configurations, judged after every chunk.

        Everything that can be wrong with the arguments is found before a model is loaded.

        Args:
            config_group: `RFGridSearch`, `RFRandomSearch`, `RFOptuna`, a config, or a list of such.
            create_model_fn: `dict -> (model, tokenizer)`, called once a base; the dict has `model_name`, `model_type`,
                `model_kwargs`, `tokenizer`, `tokenizer_kwargs` and what else the group's configurations share. None
                loads `model_name`.
            train_dataset: A `datasets.Dataset`, or a list of dicts.
            eval_dataset: Likewise; all trials are compared on it. None is allowed where no value decides anything: then
                training examples stand in for it.
            num_chunks: Verdicts a trial (8 by default); a chunk is that part of its training.
            seed: Of the data order, the adapters' initial values and the evaluation.
            num_shards: RapidFire AI's newer name of `num_chunks`.
            param_config: RapidFire AI's older name of `config_group`.
            timeout_s: Seconds after which no further trial is started, for each search.
            foreign: Other arguments of RapidFire AI's, which are ignored with a warning.

        Returns:
            The searches with their results; also in `get_results` and `get_runs_info`.

        Raises:
            ValueError: Anything wrong with the arguments.
            SearchFailed: Every trial of every search failed.
            SearchInterrupted: Ctrl-C; what has finished is kept.
        """
        if self._ended:
            raise ValueError(f"Experiment {self.experiment_name!r} has ended. Make a new one.")
        _check_foreign(foreign)
        groups = as_groups(param_config if config_group is None else config_group)
        chunks = _chunks(num_chunks, num_shards)
        check_count("seed", seed, least=0)
        plans = [(g, s) for g in groups for s in g.searches(self.policy, self.metric, self.direction)]
        for _, search in plans:
            check_search(search, create_model_fn, self.eval_sampling)
        data = check_data(train_dataset, eval_dataset, chunks, [search for _, search in plans])
        return self._run(plans, create_model_fn, data, chunks, seed, timeout_s)

    def get_results(self) -> Any:
        """Values and training logs as a pandas data frame: one row a run and optimizer step."""
        return _frame([row for search in self._searches for row in search.rows()])

    def get_runs_info(self) -> Any:
        """The runs as a pandas data frame: state, last value, why it ended, where its adapter is, its parameters."""
        return _frame([row for search in self._searches for row in search.runs()])

    def add_listener(self, listener: Listener) -> None:
        """Have a function called with every event, of the search that runs and of those to come."""
        self.listeners = (*self.listeners, listener)
        if self._running is not None:
            self._running.add_listener(listener)

    def _send(self, command: Command) -> Sent:
        if self._running is None:
            raise ControlError(f"`{command.verb}` steers a search that runs: none does. Run it `in_background`.")
        sent: Sent = self._running._send(command)
        return sent

    def end(self) -> None:
        """Close the experiment; results stay readable."""
        self._ended = True
        if self._folder is not None:
            self._folder.close()

    @property
    def folder(self) -> Path:
        """The experiment's folder; a new one where it is asked for before the first `run_fit`."""
        return self._open({}).path

    def _open(self, facts: Mapping[str, Any]) -> ExperimentFolder:
        if self._folder is None:
            self._folder = ExperimentFolder(self._parent, self.experiment_name, facts)
            name = self._folder.path.name
            if self._folder.goes_on:
                _log.warning("%s was cut short; it goes on.", self._folder.path)
            elif name != self.experiment_name:
                _log.warning("%s exists; this experiment is %s.", self._parent / self.experiment_name, name)
            self.experiment_name = name
        return self._folder

    def _run(
        self,
        plans: Sequence[tuple[ConfigGroup, Search]],
        create_model_fn: CreateModel | None,
        data: Data,
        chunks: int,
        seed: int,
        timeout_s: float | None,
    ) -> FitResult:
        from rapidfire_automl.search import SearchFailed, SearchInterrupted

        done: list[GroupResult] = []
        failed: list[SearchFailed] = []
        facts = facts_of(chunks, seed, [_facts(search) for _, search in plans])
        folder = self._open(facts)
        folder.begin(facts)
        try:
            for group, search in plans:
                found = self._begin(group, search)
                done.append(found)
                try:
                    with quiet_datasets():
                        self._search(search, found, create_model_fn, data, chunks, seed, timeout_s)
                except SearchFailed as error:
                    found.result = error.result
                    failed.append(error)
                    _log.error("%s", error)
                except SearchInterrupted as error:
                    found.result = error.result
                    raise
        finally:
            rows = [row for search in self._searches for row in search.runs()]
            (self.folder / "runs.json").write_text(dumps(rows, indent=2), encoding="utf-8")
        folder.end()
        if len(failed) == len(plans):
            raise failed[-1]
        return FitResult(done, self.folder)

    def _begin(self, group: ConfigGroup, search: Search) -> GroupResult:
        from rapidfire_automl.pruners import PolicyPruner
        from rapidfire_policies import Policy

        pruning = search.pruning
        study = optuna.create_study(
            study_name=f"{self.folder.name}-{len(self._searches) + 1}",
            storage=f"sqlite:///{(self.folder / 'study.db').absolute()}",
            load_if_exists=True,
            direction=StudyDirection[search.direction.upper()],
            sampler=search.sampler,
            pruner=PolicyPruner(pruning) if isinstance(pruning, Policy) else pruning or optuna.pruners.NopPruner(),
        )
        for params in search.queue if not study.get_trials(deepcopy=False) else ():
            study.enqueue_trial(dict(params))
        if isinstance(group, RFOptuna):
            group.studies.append(study)
        last = self._searches[-1] if self._searches else None
        found = GroupResult(
            trainer_type=search.trainer_type,
            model_name=str(search.base["model_name"]),
            study=study,
            first_run_id=1 if last is None else last.first_run_id + max(len(last_attempts(last.study)), 1),
            direction=search.direction,
            metric=_metric_name(search),
        )
        self._searches.append(found)
        return found

    def _search(
        self,
        search: Search,
        found: GroupResult,
        create_model_fn: CreateModel | None,
        data: Data,
        chunks: int,
        seed: int,
        timeout_s: float | None,
    ) -> None:
        from rapidfire_automl.search import run_search

        run_dir = self.folder / f"search_{len(self._searches)}"
        model, tokenizer = load_model(search, create_model_fn)
        metric: Any
        builtin, metric = builtin_metric(search.metric)
        options = {
            "slots": min(self.slots if search.slots is None else search.slots, search.n_trials),
            "seed": seed,
            "metric": metric if builtin else answer_metric(metric),
            "output_dir": run_dir,
            "chunks": chunks,
            **({"tokenizer": tokenizer} if tokenizer is not None else {}),
            **eval_sampling_of(search, self.eval_sampling),
            **self.executor_options,
        }
        with make_executor(model, options) as executor:
            del model
            found.records = executor.records
            self._running = executor

            @executor.objective
            def objective(trial: optuna.Trial) -> Any:
                def add(step: int, logged: Mapping[str, Any]) -> None:
                    found.logs.setdefault((number_of(trial), step), {}).update(logged)

                return build_trainer(
                    search.space.suggest(trial),
                    search.trainer_type,
                    model=executor.model(trial),
                    tokenizer=executor.tokenizer,
                    data=data,
                    output_dir=run_dir / "trials" / str(number_of(trial)),
                    seed=seed,
                    logs=Logs(add),
                )

            try:
                found.result = run_search(
                    executor,
                    objective,
                    study=found.study,
                    n_trials=search.n_trials,
                    run_dir=run_dir,
                    timeout_s=timeout_s,
                    listeners=self.listeners,
                    mlflow_experiment=self.mlflow_experiment,
                    more=False,
                    facts={"experiment": self.experiment_name, "base": dict(search.base), "metric": found.metric},
                )
            finally:
                self._running = None
                found.records = dict(executor.records)
                if self._folder is not None and self._folder.goes_on:
                    found.recall_logs()


def _chunks(num_chunks: int | None, num_shards: int | None) -> int:
    if num_chunks is not None and num_shards is not None and num_chunks != num_shards:
        raise ValueError(f"`num_chunks` and `num_shards` mean the same, got {num_chunks} and {num_shards}. Drop one.")
    name, value = ("num_chunks", num_chunks) if num_chunks is not None else ("num_shards", num_shards)
    return DEFAULT_CHUNKS if value is None else check_count(name, value)


def _check_foreign(foreign: Mapping[str, Any]) -> None:
    known = ("config_group", "create_model_fn", "train_dataset", "eval_dataset", "num_chunks", "seed", "num_shards")
    for name in foreign:
        if name not in _FOREIGN:
            near = nearest(name, known)
            raise ValueError(f"`{name}` is no argument of run_fit.{f' Did you mean `{near}`?' if near else ''}")
        warnings.warn(f"`{name}` is ignored: it means nothing to rapidfire_automl.", stacklevel=3)


def _facts(search: Search) -> dict[str, Any]:
    """What makes it another search."""
    return {
        "trainer": search.trainer_type,
        "base": dict(search.base),
        "space": search.space.value,
        "trials": search.n_trials,
        "queue": search.queue,
        "direction": search.direction,
        "metric": _metric_name(search),
    }


def _metric_name(search: Search) -> str:
    metric = builtin_metric(search.metric)[1]
    if metric is None:
        return METRICS[search.trainer_type][0]
    return metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")


def _frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    import pandas as pd

    return pd.DataFrame(list(rows))
