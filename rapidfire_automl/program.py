"""From a search file to a search: everything checked first, then the same engine that Python users have.

`prepare` reads and checks, loads no model, and can be called by itself (`rapidfire-automl run --check`). `execute`
builds the executor, the study and the objective, and hands them to `run_search`.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from rapidfire_automl import rl, sharing
from rapidfire_automl import space as spaces
from rapidfire_automl.attempts import number_of
from rapidfire_automl.data import check_files, load_data
from rapidfire_automl.disk import make_folder
from rapidfire_automl.errors_of_storages import redacted
from rapidfire_automl.event_log import FILE, EventLog
from rapidfire_automl.events import Listener
from rapidfire_automl.fields import TRAINERS, args_defaults, check_fields, eval_sampling
from rapidfire_automl.hints import unknown
from rapidfire_automl.jsonable import dumps
from rapidfire_automl.lookups import FACTS, check_base, find_base, first_line, load, no_such, run_dir_of
from rapidfire_automl.metrics import METRICS
from rapidfire_automl.rewards import RewardFunc, as_rewards, check_columns
from rapidfire_automl.samplers import ChunkSampler
from rapidfire_automl.search import SearchResult, run_search
from rapidfire_automl.settings import GENERATING, Settings, SettingsError
from rapidfire_automl.space import Space
from rapidfire_automl.storages import StorageError, open_storage, shown
from rapidfire_automl.tables import Plugin
from rapidfire_policies.wording import counted

if TYPE_CHECKING:
    from datasets import Dataset

    from rapidfire_automl.executor import RapidFireExecutor

_SAMPLERS = {
    "tpe": "TPESampler",
    "random": "RandomSampler",
    "gp": "GPSampler",
    "cmaes": "CmaEsSampler",
    "qmc": "QMCSampler",
    "nsgaii": "NSGAIISampler",
}


@dataclass(frozen=True)
class Program:
    """A search file that was checked.

    Args:
        settings: What it says.
        space: `{"args": ..., "lora": ...}`, keyword arguments with `List` and `Range` where there is a choice.
        train: The training examples.
        held_out: The examples trials are compared on.
        sampler: Proposes trials; with `sampler = "grid"` all are proposed beforehand.
        pruner: Judges them.
        metric: A name the executor knows, a function, or None for the trainer's own.
        run_dir: Where the search will be written; not made yet.
        rewards: The reward functions, of trainers that generate.
        facts: What is searched, to tell the search that goes on from another one.
        files: Where the files it names are looked up first.
    """

    settings: Settings
    space: Space
    train: Dataset
    held_out: Dataset
    sampler: optuna.samplers.BaseSampler
    pruner: optuna.pruners.BasePruner
    metric: str | Callable[..., Any] | None
    run_dir: Path
    rewards: tuple[RewardFunc, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    files: Path = Path()

    @property
    def n_trials(self) -> int:
        """Trials to run: a grid has no more than its combinations."""
        if self.settings.search.sampler.name == "grid":
            return min(self.settings.search.n_trials, len(self.space.grid()))
        return self.settings.search.n_trials


def prepare(settings: Settings, folder: Path, name: str = "search", run_dir: Path | None = None) -> Program:
    """Check everything that can be checked without a model.

    Args:
        settings: A search file.
        folder: Its folder, where the files it names are looked up first.
        name: Names the run folder where the file does not: `runs/<name>`, or `runs/<name>-2` when that is taken.
        run_dir: The folder of a shared search that others have begun.

    Raises:
        SettingsError: What is wrong, one line per mistake.
    """
    check_files(settings, folder)
    facts = _facts(settings)
    if run_dir is None and settings.search.shared:
        run_dir = Path(settings.output.dir or f"runs/{settings.search.study}")
    if run_dir is None:
        run_dir = run_dir_of(settings.output.dir, name, facts)
    files = folder
    sampler, pruner = build_sampler(settings), build_pruner(settings)
    metric = _metric(settings)
    rewards = _rewards(settings, folder)
    space = check_fields(settings)
    base = find_base(settings.base.model, folder)
    settings = settings.model_copy(update={"base": settings.base.model_copy(update={"model": base})})
    train, held_out = load_data(settings, folder)
    for key, rows in (("data.train", train), ("data.eval", held_out)):
        if rewards:
            _check_rows(key, rows, rewards)
    _check_steps(settings, space, len(train))
    program = Program(settings, space, train, held_out, sampler, pruner, metric, run_dir, rewards, facts, files)
    _try_out(program)
    check_base(base)
    return program


def execute(program: Program, listeners: Sequence[Listener] = (), *, joins: bool = False) -> SearchResult:
    """Run a checked search; see `run_search` for what it writes and raises.

    Others are kept out of the run folder before anything is written there.

    Args:
        program: What to run.
        listeners: Called with every event.
        joins: Whether others have begun it.
    """
    try:
        make_folder(program.run_dir)
    except OSError as error:
        raise SettingsError(f"`output.dir`: {program.run_dir} cannot be made: {error.strerror}.") from None
    with nullcontext() if program.settings.search.shared else EventLog(program.run_dir / FILE) as log:
        return _execute(program, listeners, build_study(program, joins=joins), log)


def _execute(
    program: Program, listeners: Sequence[Listener], study: optuna.Study, log: EventLog | None
) -> SearchResult:
    settings = program.settings
    try:
        executor = build_executor(program)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return run_search(
        executor,
        build_objective(program, executor),
        study=study,
        n_trials=program.n_trials,
        run_dir=program.run_dir,
        timeout_s=settings.search.timeout_s,
        listeners=listeners,
        mlflow_experiment=settings.output.mlflow,
        facts={
            "settings": without_passwords(settings.model_dump()),
            "train_examples": len(program.train),
            "eval_examples": len(program.held_out),
        },
        own=True,
        shared=settings.search.shared,
        more=False,
        log=log,
    )


def build_executor(program: Program) -> RapidFireExecutor:
    """The executor a search file asks for; the base is loaded at its first use."""
    from rapidfire_automl.executor import RapidFireExecutor

    base, search = program.settings.base, program.settings.search
    tokenizer = None
    if base.tokenizer is not None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(base.tokenizer)
        except (OSError, ValueError) as error:
            raise SettingsError(f"`base.tokenizer`: {base.tokenizer} cannot be loaded: {first_line(error)}") from error
    return RapidFireExecutor(
        base.model,
        slots=search.slots,
        chunks=search.chunks,
        tokenizer=tokenizer,
        dtype=base.dtype,
        device=base.device,
        seed=search.seed,
        metric=program.metric,
        cost=search.cost,
        eval_batch_size=search.eval_batch_size,
        eval_sampling=eval_sampling(program.settings, program.space) if program.rewards else None,
        output_dir=program.run_dir,
        storage_patience_s=search.storage_patience_s,
    )


def build_objective(program: Program, executor: Any) -> Callable[[optuna.Trial], Any]:
    """The function a TRL and Optuna user would have written by hand."""
    settings = program.settings
    trainer_name, config_name = TRAINERS[settings.trainer]

    def build(trial: optuna.Trial) -> Any:
        import trl
        from peft import LoraConfig
        from transformers.trainer_callback import PrinterCallback

        choice = program.space.suggest(trial)
        args = _with_defaults(choice["args"], settings, program.run_dir / "trials" / str(number_of(trial)))
        trainer = getattr(trl, trainer_name)(
            model=executor.model(trial),
            peft_config=LoraConfig(**{"task_type": "CAUSAL_LM", **choice["lora"]}),
            args=getattr(trl, config_name)(**args),
            train_dataset=program.train,
            eval_dataset=program.held_out,
            processing_class=executor.tokenizer,
            **({"reward_funcs": list(program.rewards)} if program.rewards else {}),
        )
        trainer.remove_callback(PrinterCallback)  # it prints each log line to stdout when tqdm is off
        return trainer

    return build


def build_study(program: Program, *, joins: bool = False) -> optuna.Study:
    """A new study, or that of the search that goes on; with `sampler = "grid"` its trials wait in it."""
    search = program.settings.search
    goes_on = (program.run_dir / FACTS).exists()
    if search.shared:
        grid = [point.params for point in program.space.grid()] if search.sampler.name == "grid" else []
        base = program.settings.base.model_copy(update={"model": program.facts["base.model"]})  # found elsewhere there
        settings = program.settings.model_copy(update={"base": base})
        shared = sharing.Shared(settings, program.files, program.run_dir, program.facts)
        n_trials = None if joins else program.n_trials
        return sharing.join(shared, program.sampler, program.pruner, n_trials, grid)
    name = search.study or "search"
    where = search.storage or str((program.run_dir / "study.db").absolute())
    try:
        study = optuna.create_study(
            storage=open_storage(where, patience_s=search.storage_patience_s),
            study_name=name,
            load_if_exists=goes_on,
            direction=program.settings.direction,
            sampler=program.sampler,
            pruner=program.pruner,
        )
    except optuna.exceptions.DuplicatedStudyError:
        where = shown(where)
        raise SettingsError(
            f"`search.study`: {where} already has a study {name}; take another name, like `--study NAME`."
        ) from None
    except StorageError as error:
        raise SettingsError(f"`search.storage`: {error}") from None
    except Exception as error:  # every storage has its own kinds of errors
        why = redacted(first_line(error))
        raise SettingsError(f"`search.storage`: {shown(where)} cannot be opened: {why}") from error
    if search.sampler.name == "grid" and not study.get_trials(deepcopy=False):
        for point in program.space.grid():
            study.enqueue_trial(point.params)
    (program.run_dir / FACTS).write_text(dumps(program.facts, indent=2) + "\n", encoding="utf-8")
    return study


def _facts(settings: Settings) -> dict[str, Any]:
    """What is searched, by key; how long it may take is no part of that."""
    facts: dict[str, Any] = {}
    for table, value in settings.model_dump(mode="json").items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        facts.update({f"{table}.{key}".rstrip("."): inner for key, inner in entries})
    free = ("n_trials", "slots", "timeout_s", "heartbeat_s", "grace_s", "storage_patience_s", "shared")
    ignored = (*(f"search.{key}" for key in free), "output.dir", "output.mlflow")
    if settings.search.shared:  # each worker may come to it by another way, and sees its files elsewhere
        ignored = (*ignored, "search.storage", "base.device")
    plain: dict[str, Any] = json.loads(dumps({key: value for key, value in facts.items() if key not in ignored}))
    if plain.get("search.storage"):
        plain["search.storage"] = shown(plain["search.storage"])
    return plain


def without_passwords(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they may be written down."""
    where = settings["search"]["storage"]
    return {**settings, "search": {**settings["search"], "storage": None if where is None else shown(where)}}


def build_sampler(settings: Settings) -> optuna.samplers.BaseSampler:
    """The sampler, seeded with `search.seed` where it takes a seed and `[search]` gives it none."""
    plugin = settings.search.sampler
    if plugin.name == "grid":
        if plugin.arguments:
            raise SettingsError("`search.sampler`: a grid takes no arguments; the choices stand in [space].")
        return optuna.samplers.RandomSampler(seed=settings.search.seed)
    if ":" in plugin.name:
        cls = load(plugin.name, "search.sampler")
    elif plugin.name == "chunk":
        cls = ChunkSampler
    elif plugin.name in _SAMPLERS:
        cls = getattr(optuna.samplers, _SAMPLERS[plugin.name])
    else:
        raise SettingsError(no_such("search.sampler", plugin.name, [*_SAMPLERS, "chunk", "grid"]))
    sampler: optuna.samplers.BaseSampler
    sampler = _build(plugin, cls, "search.sampler", optuna.samplers.BaseSampler, settings.search.seed)
    return sampler


def build_pruner(settings: Settings) -> optuna.pruners.BasePruner:
    """The policy in a `PolicyPruner`, or a stock pruner named like "optuna.pruners:MedianPruner"."""
    from rapidfire_automl.pruners import PolicyPruner, policy_from_name

    plugin = settings.search.policy
    if ":" in plugin.name:
        cls = load(plugin.name, "search.policy")
        if inspect.isclass(cls) and issubclass(cls, optuna.pruners.BasePruner):
            pruner: optuna.pruners.BasePruner = _build(plugin, cls, "search.policy", optuna.pruners.BasePruner)
            return pruner
    try:
        return PolicyPruner(policy_from_name(plugin.name, **plugin.arguments), chunks=settings.search.chunks)
    except ValueError as error:
        message = str(error)
        if message.startswith(("`policy`", "`policy.policy")):
            raise SettingsError(message.replace("`policy", "`search.policy", 1)) from None
        raise SettingsError(f"`search.policy`: {message}") from None


def _build(plugin: Plugin, cls: Any, key: str, kind: type, seed: int | None = None) -> Any:
    if not (inspect.isclass(cls) and issubclass(cls, kind)):
        raise SettingsError(f"`{key}`: {plugin.name} is no {kind.__name__}.")
    takes = set(inspect.signature(cls).parameters)
    for name in plugin.arguments:
        if name not in takes:
            raise SettingsError(unknown(name, takes, key))
    seeded = {"seed": seed} if seed is not None and "seed" in takes else {}
    try:
        return cls(**{**seeded, **plugin.arguments})
    except Exception as error:  # whatever a class of the user's own raises
        raise SettingsError(f"`{key}`: {plugin.name} cannot be built: {first_line(error)}") from error


def _metric(settings: Settings) -> str | Callable[..., Any] | None:
    name, mine = settings.search.metric, METRICS[settings.trainer.upper()]
    if name is None or name in mine:
        return name
    if ":" not in name:
        raise SettingsError(no_such("search.metric", name, mine))
    metric = load(name, "search.metric")
    if not callable(metric):
        raise SettingsError(f"`search.metric`: {name} is no function.")
    return metric  # type: ignore[no-any-return]


def _rewards(settings: Settings, folder: Path) -> tuple[RewardFunc, ...]:
    if settings.trainer not in GENERATING:
        return ()
    try:
        return tuple(as_rewards(settings.reward, "reward", folder))
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _check_rows(key: str, rows: Dataset, rewards: Sequence[RewardFunc]) -> None:
    try:
        check_columns(rewards, rows.column_names, key)
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _with_defaults(args: Mapping[str, Any], settings: Settings, output_dir: Path) -> dict[str, Any]:
    """What the search needs set, under what the file sets."""
    ours: dict[str, Any] = {
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": settings.search.seed,
        "output_dir": str(output_dir),
    }
    if settings.base.device == "cpu" or (settings.base.device is None and not _accelerator()):
        ours["use_cpu"] = True  # without it TRL's default, bf16, is refused where there is no GPU
    return {**ours, **args}


def _accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def _check_steps(settings: Settings, space: Space, examples: int) -> None:
    """Every trial must have at least as many optimizer steps, or generation batches, as chunks: each ends at one."""
    args = space.value["args"]
    if settings.trainer in GENERATING:
        defaults = args_defaults(settings.trainer)
        try:
            rl.check_length(
                args, defaults, prompts=examples, chunks=settings.search.chunks, chunks_name="search.chunks"
            )
        except ValueError as error:
            raise SettingsError(str(error)) from None
        return
    if args.get("packing"):
        return
    most = {name: _largest(args.get(name, 8 if "batch" in name else 1)) for name in _BATCH}
    per_epoch = math.ceil(math.ceil(examples / most[_BATCH[0]]) / most[_BATCH[1]])
    steps = math.ceil(per_epoch * _smallest(args.get("num_train_epochs", 3)))
    max_steps = _smallest(args.get("max_steps", -1))
    if max_steps > 0:
        steps = int(max_steps)
    if steps < settings.search.chunks:
        raise SettingsError(
            f"A trial can be as short as {counted(steps, 'optimizer step')}, fewer than `search.chunks` = "
            f"{settings.search.chunks}. Take fewer chunks, smaller batches, more epochs or more examples."
        )


_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def _largest(node: Any) -> float:
    return float(max(node.values) if isinstance(node, spaces.List) else getattr(node, "end", node))


def _smallest(node: Any) -> float:
    return float(min(node.values) if isinstance(node, spaces.List) else getattr(node, "start", node))


def _try_out(program: Program) -> None:
    """Build one configuration of the space, for what only TRL and PEFT themselves can say about it."""
    import trl
    from peft import LoraConfig

    corner: dict[str, Any] = {}
    for name, distribution in program.space.distributions().items():
        choices = getattr(distribution, "choices", None)
        corner[name] = choices[0] if choices else getattr(distribution, "low", None)
    choice = program.space.suggest(optuna.trial.FixedTrial(corner))
    try:
        lora = LoraConfig(**{"task_type": "CAUSAL_LM", **choice["lora"]})
        config = getattr(trl, TRAINERS[program.settings.trainer][1])
        config(**_with_defaults(choice["args"], program.settings, program.run_dir / "trials" / "0"))
    except Exception as error:  # both raise what they like
        raise SettingsError(f"A trial of this search cannot be built: {first_line(error)}") from error
    try:
        from rapidfire_automl.executor.seams import refuse
    except ImportError:  # moved; the executor itself refuses then
        return
    try:
        refuse(lora)
    except ValueError as error:
        raise SettingsError(f"[lora] {error}") from None
