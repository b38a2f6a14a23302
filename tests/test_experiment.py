"""`Experiment`, `AutoML` and the config groups, on an engine that trains nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import optuna
import pytest

from rapidfire_automl import experiment as module
from rapidfire_automl.automl import AutoML, as_config
from rapidfire_automl.configs import RFDPOConfig, RFLoraConfig, RFModelConfig, RFSFTConfig
from rapidfire_automl.experiment import Experiment
from rapidfire_automl.groups import RFGridSearch, RFOptuna, RFRandomSearch
from rapidfire_automl.records import TrialRecord
from rapidfire_automl.search import SearchFailed, SearchInterrupted
from rapidfire_automl.space import List, Range
from rapidfire_policies import ASHA, Median
from rapidfire_policies.base import TrialState

ROWS = [{"prompt": f"{i}", "completion": f"{2 * i}"} for i in range(32)]


class Engine:
    """In place of `RapidFireExecutor`: runs every trial by itself, value = learning rate / chunk."""

    log: ClassVar[list[Engine]] = []

    def __init__(self, model: Any, **options: Any) -> None:
        self.model_given, self.options = model, options
        self.slots, self.chunks, self.seed = options["slots"], options["chunks"], options["seed"]
        self.tokenizer = options.get("tokenizer", "own")
        self.base_value, self.records, self.closed = 9.0, {}, False
        self.fail: Callable[[dict[str, Any]], bool] = lambda params: False
        Engine.log.append(self)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def add_listener(self, listener: Any) -> None: ...

    def explain(self) -> str:
        return "fake"

    def model(self, trial: optuna.Trial) -> str:
        return f"clone {trial.number}"

    def objective(self, build: Any) -> Any:
        return build

    def optimize(
        self, study: optuna.Study, objective: Any, n_trials: int, timeout_s: float | None = None, *, more: bool = True
    ) -> None:
        for _ in range(n_trials):
            trial = study.ask()
            record = self.records[trial.number] = TrialRecord(trial.number, {})
            try:
                trainer = objective(trial)
            except Exception as error:
                record.state, record.error = TrialState.FAILED, str(error)
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            record.params = dict(trial.params)
            for chunk in range(1, self.chunks + 1):
                record.values.append(trainer.args.learning_rate / chunk)
                record.boundaries.append(5 * chunk)
                record.seconds.append(1.0)
                record.tokens.append(10)
                trainer.log(5 * chunk, {"loss": float(chunk)})
            record.state, record.adapter = TrialState.COMPLETE, f"trials/{trial.number}/adapter"
            study.tell(trial, record.values[-1])


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    Engine.log = []

    def build(config: RFModelConfig, trainer_type: str, **rest: Any) -> Any:
        if config.training_args.learning_rate == 666:
            raise RuntimeError("no such rate")
        return SimpleNamespace(args=config.training_args, config=config, log=rest["logs"].add, **rest)

    monkeypatch.setattr(module, "make_executor", lambda model, options: Engine(model, **options))
    monkeypatch.setattr(module, "build_trainer", build)
    return Engine.log


def config(**fields: Any) -> RFModelConfig:
    given = {
        "model_name": "base",
        "peft_config": RFLoraConfig(r=List([4, 8])),
        "training_args": RFSFTConfig(learning_rate=List([1e-3, 1e-4]), max_steps=10),
    }
    return RFModelConfig(**{**given, **fields})


# ---------------------------------------------------------------------------------------------------------- the groups


def test_a_grid_tries_every_combination():
    (search,) = RFGridSearch(config(), trainer_type="SFT").searches()
    assert search.n_trials == 4
    assert list(search.queue) == [
        {"r": 4, "learning_rate": 1e-3},
        {"r": 4, "learning_rate": 1e-4},
        {"r": 8, "learning_rate": 1e-3},
        {"r": 8, "learning_rate": 1e-4},
    ]
    assert search.pruning is None
    assert not search.steers
    assert RFGridSearch(config()).searches(ASHA())[0].steers


def test_configurations_are_grouped_by_base():
    configs = List(
        [
            config(model_name=List(["a", "b"])),
            config(model_name="a"),
            config(model_name="a", model_kwargs={"dtype": "bfloat16"}),
            config(model_name="a", tokenizer="other"),
        ]
    )
    searches = RFGridSearch(configs, "sft").searches()
    assert [(s.base["model_name"], s.base["model_kwargs"], s.base["tokenizer"], s.n_trials) for s in searches] == [
        ("a", None, None, 8),
        ("b", None, None, 4),
        ("a", {"dtype": "bfloat16"}, None, 4),
        ("a", None, "other", 4),
    ]


def test_random_search_draws_different_configurations_and_repeats_itself():
    wide = config(training_args=RFSFTConfig(learning_rate=Range(1e-5, 1e-3, log=True), max_steps=Range(5, 50)))
    first = RFRandomSearch(wide, "SFT", num_runs=6, seed=1).searches()[0].queue
    assert first == RFRandomSearch(wide, "SFT", num_runs=6, seed=1).searches()[0].queue
    assert first != RFRandomSearch(wide, "SFT", num_runs=6, seed=2).searches()[0].queue
    assert len(RFRandomSearch(config(), "SFT", num_runs=4).searches()[0].queue) == 4
    with pytest.raises(ValueError, match="5 asked for, 4 found"):
        RFRandomSearch(config(), "SFT", num_runs=5).searches()


def test_optuna_shares_its_trials_among_bases():
    group = RFOptuna(config(model_name=List(["a", "b"])), "SFT", n_trials=5)
    assert [(s.base["model_name"], s.n_trials, s.slots) for s in group.searches()] == [("a", 3, None), ("b", 2, None)]
    assert sorted(group.searches()[0].space.distributions()) == ["learning_rate", "r"]


def test_optuna_takes_rapidfires_arguments():
    group = RFOptuna(
        configs=[config()], trainer_type="SFT", n_initial=4, budget=6, objective="maximize:rougeL", sampler="random"
    )
    (search,) = group.searches()
    assert (search.n_trials, search.slots, search.direction, search.metric) == (6, 4, "maximize", "rougeL")
    assert search.pruning == Median(average=False)
    assert RFOptuna(config(), "SFT", pruner=None).searches()[0].pruning is None
    assert RFOptuna(config(), "SFT", pruner="asha").searches()[0].pruning == ASHA()
    stock = optuna.pruners.HyperbandPruner()
    assert RFOptuna(config(), "SFT", pruner=stock).searches()[0].pruning is stock
    sampler = optuna.samplers.RandomSampler()
    assert RFOptuna(config(), "SFT", sampler=sampler).searches()[0].sampler is sampler


def test_the_trainer_type_follows_the_arguments():
    assert RFGridSearch(config()).trainer_type == "SFT"
    assert RFGridSearch(config(training_args=List([RFDPOConfig(beta=0.1)]))).trainer_type == "DPO"


def test_real_trl_and_peft_configs_are_taken():
    from peft import LoraConfig
    from trl import SFTConfig

    real = SFTConfig(learning_rate=1e-3, use_cpu=True, bf16=False)
    group = RFGridSearch(config(training_args=real, peft_config=[LoraConfig(r=3), LoraConfig(r=5)]), "SFT")
    (search,) = group.searches()
    assert list(search.queue) == [{"peft_config": "r=3"}, {"peft_config": "r=5"}]
    assert group.configs[0].training_args.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RFGridSearch(config(), "GRPO"), "`training_args` must be RFGRPOConfig"),
        (lambda: RFGridSearch(config(), "SFTT"), "Did you mean 'SFT'"),
        (lambda: RFGridSearch(config(training_args=None)), "`trainer_type` must be given"),
        (lambda: RFGridSearch([], "SFT"), "at least one RFModelConfig"),
        (lambda: RFGridSearch({"model_name": "x"}, "SFT"), "`configs` must be an RFModelConfig"),
        (lambda: RFGridSearch(config(), "DPO"), 'must be RFDPOConfig for trainer_type="DPO", got RFSFTConfig'),
        (lambda: RFGridSearch(config(peft_config=None), "SFT"), "`peft_config` must be given"),
        (lambda: RFGridSearch(config(peft_config=List([RFLoraConfig(), None])), "SFT"), "`peft_config` must be given"),
        (lambda: RFGridSearch(config(ref_model_name="other"), "SFT"), "`ref_model_name` must be the base itself"),
        (lambda: RFRandomSearch(config(), "SFT", num_runs=0), "`num_runs` must be a whole number >= 1, got 0"),
        (lambda: RFRandomSearch(config(), "SFT", num_runs=2, seed=-1), "`seed` must be a whole number >= 0"),
        (lambda: RFOptuna(config(), "SFT", n_trials=0), "`n_trials` must be a whole number >= 1"),
        (lambda: RFOptuna(config(), "SFT", sampler="tpee"), "Did you mean 'tpe'"),
        (lambda: RFOptuna(config(), "SFT", pruner="ahsa"), "Did you mean `asha`"),
        (lambda: RFOptuna(config(), "SFT", pruner=3), "must be a policy, its name, or an Optuna pruner"),
        (lambda: RFOptuna(config(), "SFT", objective="rougeL"), 'must read "minimize:eval_loss"'),
        (
            lambda: RFOptuna(config(), "SFT", objective="minimise:eval_loss"),
            '"minimize" or "maximize", got \'minimise\'',
        ),
        (lambda: RFOptuna(config(), "SFT", objective="maximize:a,maximize:b"), "must name one metric"),
        (lambda: RFOptuna(config(), "SFT", objective="maximize:a", metric="b"), "exclude each other"),
        (
            lambda: RFGridSearch(config(training_args=RFSFTConfig(learning_rate=Range(0.1, 1.0))), "SFT").searches(),
            r"`training_args.learning_rate` is a Range, and RFGridSearch needs values",
        ),
        (lambda: Experiment("../../x"), "`experiment_name` must be a plain name"),
        (lambda: Experiment(".."), "plain name"),
        (lambda: Experiment("a/b"), "plain name"),
        (lambda: Experiment(""), "plain name"),
        (lambda: Experiment("a", mode="evals"), '`mode` must be "fit"'),
        (lambda: Experiment("a", slots=0), "`slots` must be a whole number >= 1, got 0"),
        (lambda: AutoML("base", "sfft", {}), "Did you mean 'sft'"),
        (lambda: AutoML("base", "sft", {"lr": 1}), "Did you mean `learning_rate`"),
        (lambda: AutoML(object(), "sft", {}), "`tokenizer` must be given"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_missing_package_names_its_pip_line(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install cmaes"):
        RFOptuna(config(), "SFT", sampler="cmaes")


# ---------------------------------------------------------------------------------------------------------- run_fit


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"config_group": None}, "`config_group` must be"),
        ({"config_group": []}, "`config_group` must be"),
        ({"train_dataset": None}, "`train_dataset` must be given"),
        ({"train_dataset": []}, "`train_dataset` must not be empty"),
        ({"eval_dataset": []}, "`eval_dataset` must not be empty"),
        ({"train_dataset": "file.jsonl"}, "`train_dataset` must be a datasets.Dataset or a list of dicts, got str"),
        ({"train_dataset": [1, 2]}, "must hold dicts"),
        ({"num_chunks": 33}, "33 chunks and 32 examples. Write num_chunks=32 or less"),
        ({"num_chunks": 0}, "`num_chunks` must be a whole number >= 1"),
        ({"num_shards": 2.5}, "`num_shards` must be a whole number >= 1"),
        ({"num_chunks": 2, "num_shards": 4}, "mean the same, got 2 and 4"),
        ({"seed": -1}, "`seed` must be"),
        ({"num_chnks": 3}, "Did you mean `num_chunks`"),
        ({"create_model_fn": "base"}, "`create_model_fn` must be a function"),
        ({"config_group": RFOptuna(config(), "SFT"), "eval_dataset": None}, "`eval_dataset` must be given"),
        ({"config_group": RFGridSearch(config(model_name=None))}, "`model_name` must be given"),
        ({"config_group": RFOptuna(config(), "SFT", metric="rougeL")}, "must come from `compute_metrics`"),
    ],
)
def test_bad_input_is_found_before_a_model_is_loaded(engine, tmp_path, arguments, words):
    experiment = Experiment("bad", experiments_path=tmp_path)
    given = {"config_group": RFGridSearch(config()), "train_dataset": ROWS, "eval_dataset": ROWS, **arguments}
    with pytest.raises(ValueError, match=words):
        experiment.run_fit(**given)
    assert engine == []
    assert list(tmp_path.iterdir()) == []


def test_a_policy_needs_values(engine, tmp_path):
    with pytest.raises(ValueError, match="`eval_dataset` must be given"):
        Experiment("bad", experiments_path=tmp_path, policy="asha").run_fit(RFGridSearch(config()), None, ROWS)


def test_a_rapidfire_program_runs(engine, tmp_path):
    calls = []

    def create_model(model_config):
        calls.append(model_config)
        return "model", "tokenizer"

    experiment = Experiment(experiment_name="exp1-chatqa", mode="fit", experiments_path=str(tmp_path))
    group = RFGridSearch(configs=List([config(), config(model_name="b")]), trainer_type="SFT")
    fit = experiment.run_fit(group, create_model, ROWS, ROWS, 4, 7)
    experiment.end()

    assert [c["model_name"] for c in calls] == ["base", "b"]
    first = calls[0]
    assert (first["model_type"], first["model_kwargs"], first["tokenizer_kwargs"]) == ("causal_lm", {}, {})
    assert (first["trainer_type"], first["training_args"], first["peft_params"]) == ("SFT", {"max_steps": 10}, {})
    assert [(e.model_given, e.tokenizer, e.chunks, e.seed, e.slots, e.closed) for e in engine] == [
        ("model", "tokenizer", 4, 7, 4, True)
    ] * 2
    assert fit.best_value == pytest.approx(1e-4 / 4)
    assert fit.best_params["learning_rate"] == 1e-4
    assert (tmp_path / "exp1-chatqa" / "search_1" / "summary.json").is_file()
    assert (tmp_path / "exp1-chatqa" / "runs.json").is_file()

    runs = experiment.get_runs_info()
    assert list(runs["run_id"]) == list(range(1, 9))
    assert list(runs["model_name"]) == ["base"] * 4 + ["b"] * 4
    assert list(runs["learning_rate"])[:2] == [1e-3, 1e-4]
    table = experiment.get_results()
    assert len(table) == 8 * 4
    assert {"run_id", "step", "chunk", "value", "loss"} <= set(table.columns)
    assert list(table[table.run_id == 2]["value"]) == pytest.approx([1e-4 / k for k in (1, 2, 3, 4)])
    with pytest.raises(ValueError, match="has ended"):
        experiment.run_fit(group, create_model, ROWS, ROWS, 4)


def test_every_trial_gets_its_configuration(engine, tmp_path, monkeypatch):
    seen = []
    build = module.build_trainer

    def spy(config, trainer_type, **rest):
        seen.append((config.peft_config.r, config.training_args.learning_rate, rest["model"], rest["tokenizer"]))
        return build(config, trainer_type, **rest)

    monkeypatch.setattr(module, "build_trainer", spy)
    Experiment("a", experiments_path=tmp_path).run_fit(RFGridSearch(config()), None, ROWS, ROWS, num_shards=2)
    assert seen == [
        (4, 1e-3, "clone 0", "own"),
        (4, 1e-4, "clone 1", "own"),
        (8, 1e-3, "clone 2", "own"),
        (8, 1e-4, "clone 3", "own"),
    ]
    assert engine[0].model_given == "base"
    assert engine[0].chunks == 2


def test_a_grid_without_eval_dataset_is_measured_on_training_examples(engine, tmp_path):
    with pytest.warns(UserWarning, match="first 32 training examples"):
        fit = Experiment("a", experiments_path=tmp_path).run_fit(config(), None, ROWS, None)
    assert len(fit[0].records) == 4


def test_groups_of_several_kinds_run_one_after_the_other(engine, tmp_path):
    dpo = config(training_args=RFDPOConfig(learning_rate=List([1e-5])))
    optuna_group = RFOptuna(config(), "SFT", n_trials=3, n_initial=2, pruner=None)
    fit = Experiment("a", experiments_path=tmp_path).run_fit([RFGridSearch(dpo), optuna_group], None, ROWS, ROWS)
    assert [(s.trainer_type, s.metric, len(s.records), s.first_run_id) for s in fit] == [
        ("DPO", "preference_loss", 2, 1),
        ("SFT", "nll", 3, 3),
    ]
    assert engine[1].slots == 2
    assert optuna_group.study is optuna_group._study is fit[1].study
    with pytest.raises(ValueError, match="`best` needs searches with one metric"):
        _ = fit.best


def test_a_taken_name_gets_a_number(engine, tmp_path):
    names = []
    for _ in range(3):
        experiment = Experiment("chat", experiment_path=tmp_path)
        experiment.run_fit(config(), None, ROWS, ROWS)
        names.append((experiment.experiment_name, experiment.folder.name))
    assert names == [("chat", "chat"), ("chat_2", "chat_2"), ("chat_3", "chat_3")]


def test_failing_trials_cost_only_themselves(engine, tmp_path):
    some = config(training_args=RFSFTConfig(learning_rate=List([666.0, 1e-4])))
    experiment = Experiment("a", experiments_path=tmp_path)
    fit = experiment.run_fit(some, None, ROWS, ROWS)
    assert fit.best_params == {"r": 4, "learning_rate": 1e-4}
    assert [row["error"] for row in fit.runs()] == ["no such rate", None, "no such rate", None]
    assert list(experiment.get_runs_info()["status"])[:2] == ["failed", "complete"]


def test_all_failing_in_one_base_leaves_the_other(engine, tmp_path):
    bad = config(training_args=RFSFTConfig(learning_rate=666.0))
    good = config(model_name="b")
    experiment = Experiment("a", experiments_path=tmp_path)
    fit = experiment.run_fit(RFGridSearch([bad, good]), None, ROWS, ROWS)
    assert fit.best_params["learning_rate"] == 1e-4
    assert len(experiment.get_runs_info()) == 6
    with pytest.raises(SearchFailed, match="no such rate"):
        experiment.run_fit(RFGridSearch(bad), None, ROWS, ROWS)


def test_ctrl_c_keeps_what_is_finished(engine, tmp_path, monkeypatch):
    def interrupt(self, *_: Any, **__: Any) -> None:
        if self.model_given == "b":
            raise KeyboardInterrupt
        optimize(self, *_, **__)

    optimize = Engine.optimize
    monkeypatch.setattr(Engine, "optimize", interrupt)
    experiment = Experiment("a", experiments_path=tmp_path)
    with pytest.raises(SearchInterrupted):
        experiment.run_fit(RFGridSearch([config(), config(model_name="b")]), None, ROWS, ROWS)
    assert len(experiment.get_runs_info()) == 4
    assert engine[1].closed


def test_arguments_of_rapidfire_that_mean_nothing_are_warned_about(engine, tmp_path):
    with pytest.warns(UserWarning, match="`num_gpus` is ignored"):
        Experiment("a", experiments_path=tmp_path).run_fit(
            param_config=config(), train_dataset=ROWS, eval_dataset=ROWS, num_gpus=2
        )


def test_create_model_fn_must_return_a_pair(engine, tmp_path):
    for made in ("model", ("model",), ("model", None)):
        with pytest.raises(ValueError, match=r"must return \(model, tokenizer\)"):
            Experiment("a", experiments_path=tmp_path).run_fit(config(), lambda _, made=made: made, ROWS, ROWS)
    adapted = SimpleNamespace(peft_config={})
    with pytest.raises(ValueError, match="got a model with an adapter"):
        Experiment("a", experiments_path=tmp_path).run_fit(config(), lambda _: (adapted, "tok"), ROWS, ROWS)


# ---------------------------------------------------------------------------------------------------------- AutoML


def test_automl_takes_flat_fields(engine, tmp_path):
    automl = AutoML(
        "base",
        space={"learning_rate": Range(1e-5, 1e-3, log=True), "r": List([4, 8]), "formatting_func": None},
        n_trials=6,
        slots=3,
        chunks=2,
        experiments_path=tmp_path,
    )
    fit = automl.fit(ROWS, ROWS)
    assert (len(fit[0].records), engine[0].slots, engine[0].chunks) == (6, 3, 2)
    assert set(fit.best_params) == {"r", "learning_rate"}
    assert engine[0].model_given == "base"


def test_automl_repeats_itself(engine, tmp_path):
    def search():
        space = {"learning_rate": Range(1e-5, 1e-3, log=True), "r": List([4, 8])}
        return AutoML("base", space=space, n_trials=12, seed=5, experiments_path=tmp_path).fit(ROWS, ROWS)

    first, second = (search()[0].study.trials for _ in range(2))
    assert [t.params for t in first] == [t.params for t in second]


def test_automl_grid_and_loaded_model(engine, tmp_path):
    model = SimpleNamespace(config=SimpleNamespace(_name_or_path="hub/base"))
    automl = AutoML(
        model, "sft", config(), tokenizer="tok", sampler="grid", policy=None, experiments_path=tmp_path, chunks=2
    )
    fit = automl.fit(ROWS, ROWS)
    assert engine[0].model_given is model
    assert engine[0].tokenizer == "tok"
    assert [r["learning_rate"] for r in fit.runs()] == [1e-3, 1e-4, 1e-3, 1e-4]
    assert fit[0].model_name == "hub/base"


def test_nested_and_flat_fields_mix():
    made = as_config({"training_args": {"max_steps": 5}, "learning_rate": 1.0, "r": 4, "model_kwargs": {"x": 1}}, "dpo")
    assert made.training_args == RFDPOConfig(max_steps=5, learning_rate=1.0)
    assert made.peft_config == RFLoraConfig(r=4)
    with pytest.raises(ValueError, match="`r` must stand in `peft_config`"):
        as_config({"peft_config": RFLoraConfig(), "r": 4}, "sft")


def test_nan_is_never_the_best(engine, tmp_path, monkeypatch):
    space = config(training_args=RFSFTConfig(learning_rate=List([1e-3, 1e-4])))
    monkeypatch.setattr(
        module,
        "build_trainer",
        lambda config, *_, **rest: SimpleNamespace(
            args=SimpleNamespace(learning_rate=math.nan if config.training_args.learning_rate == 1e-4 else 1.0),
            log=rest["logs"].add,
        ),
    )
    fit = Experiment("a", experiments_path=tmp_path).run_fit(space, None, ROWS, ROWS)
    assert fit.best_value == 1.0 / 8


def test_the_folder_is_where_it_was_asked_for(engine, tmp_path):
    experiment = Experiment("v1.2 test", experiments_path=tmp_path / "deep" / "down")
    assert experiment.folder == Path(tmp_path / "deep" / "down" / "v1.2 test")
