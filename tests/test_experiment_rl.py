"""`Experiment`, `AutoML` and the config groups with GRPO and RLOO, on an engine that trains nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rapidfire_automl.automl import AutoML
from rapidfire_automl.configs import RFGRPOConfig, RFLoraConfig, RFModelConfig, RFRLOOConfig, RFSFTConfig
from rapidfire_automl.experiment import Experiment
from rapidfire_automl.groups import RFGridSearch, RFOptuna, RFRandomSearch
from rapidfire_automl.rewards import exact_match
from rapidfire_automl.sampling import Sampling
from rapidfire_automl.space import List, Range
from tests.test_experiment import Engine, engine  # noqa: F401 (a fixture)

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(64)]
MODEL = Path(__file__).parent / "tiny" / "model"


def short(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [-float(len(completion)) for completion in completions]


def config(**fields: Any) -> RFModelConfig:
    args = {"num_generations": List([4, 8, 16]), "per_device_train_batch_size": 16, **fields.pop("args", {})}
    given = {
        "model_name": "base",
        "peft_config": RFLoraConfig(r=4),
        "training_args": RFGRPOConfig(**args),
        "reward_funcs": exact_match,
    }
    return RFModelConfig(**{**given, **fields})


def test_a_sweep_of_group_sizes() -> None:
    swept = config(args={"beta": List([0.0, 0.04]), "loss_type": List(["dapo", "grpo"]), "learning_rate": 1e-4})
    (search,) = RFGridSearch(swept, trainer_type="GRPO").searches()
    assert search.n_trials == 12
    assert search.direction == "maximize"
    assert RFGridSearch(swept).trainer_type == "GRPO"
    drawn = config(args={"temperature": Range(0.7, 1.2)})
    assert RFRandomSearch(drawn, "GRPO", num_runs=5).searches()[0].n_trials == 5


def test_the_direction_is_the_metrics_own_unless_said() -> None:
    assert RFGridSearch(config()).searches(metric="reward")[0].direction == "maximize"
    assert RFGridSearch(config()).searches(direction="minimize")[0].direction == "minimize"
    assert RFGridSearch(config()).searches(metric=lambda trainer: 0.0)[0].direction == "minimize"
    assert RFOptuna(config(), objective="maximize:eval_reward").searches()[0].direction == "maximize"
    assert RFOptuna(config()).searches()[0].direction == "maximize"
    sft = config(training_args=RFSFTConfig(), reward_funcs=None)
    assert RFGridSearch(sft, "SFT").searches()[0].direction == "minimize"


def test_rewards_by_name_and_choices_of_them() -> None:
    assert RFGridSearch(config(reward_funcs="exact_match")).configs[0].reward_funcs == [exact_match]
    both = config(reward_funcs=[f"{__name__}:short", exact_match])
    names = [reward.__name__ for reward in RFGridSearch(both).configs[0].reward_funcs]
    assert names == ["short", "exact_match"]
    choice = RFGridSearch(config(reward_funcs=List([short, [short, exact_match]])))
    assert choice.searches()[0].n_trials == 6


def test_rapidfires_and_older_trls_fields_are_taken() -> None:
    from trl import GRPOConfig

    with pytest.warns(UserWarning, match="no longer cuts prompts"):
        args = RFGRPOConfig(max_prompt_length=64, num_generations=8)
    assert args.build(overrides={"use_cpu": True, "output_dir": "x"}).num_generations == 8
    old = RFRLOOConfig(rloo_k=4, kl_coef=0.1, per_device_train_batch_size=8)
    built = old.build(overrides={"use_cpu": True, "output_dir": "x"})
    assert (built.num_generations, built.beta) == (4, 0.1)
    real = GRPOConfig(num_generations=4, use_cpu=True, output_dir="x")
    assert RFGridSearch(config(training_args=real)).configs[0].training_args.num_generations == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"args": {"per_device_train_batch_size": 8}}, "got 16 and 8 = 8 `per_device_train_batch_size`"),
        ({"args": {"num_generations": 1}}, "`num_generations` must be >= 2, got 1"),
        ({"args": {"use_vllm": True}}, r'pip install "trl\[vllm\]"'),
        ({"args": {"use_transformers_continuous_batching": True}}, "generation loop of its own"),
        ({"args": {"reward_weights": [1.0, 2.0]}}, "got 2 for 1"),
        ({"reward_funcs": None}, "`reward_funcs` must be given"),
        ({"reward_funcs": "no_such_module:f"}, "cannot be imported"),
        ({"reward_funcs": [exact_match, 3]}, "`reward_funcs` must be a function"),
        ({"compute_metrics": lambda pair: {}}, "`compute_metrics` is not for GRPO"),
        ({"training_args": RFRLOOConfig()}, "`training_args` must be RFGRPOConfig"),
        (
            {"training_args": List([RFGRPOConfig(), RFGRPOConfig(num_generations=3)])},
            "`num_generations` must divide the generation batch, got 3 and 8",
        ),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RFGridSearch(config(**change), "GRPO")


def test_rewards_are_for_those_who_learn_from_them() -> None:
    with pytest.raises(ValueError, match="`reward_funcs` are for GRPO and RLOO"):
        RFGridSearch(config(training_args=RFSFTConfig()), "SFT")


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"reward_funcs": List([short, exact_match])}, {}, "`reward_funcs` must be the same for all trials"),
        (
            {"reward_funcs": [short, exact_match], "args": {"reward_weights": List([[1.0, 0.0], [1.0, 0.5]])}},
            {},
            "`reward_weights` differ between trials",
        ),
        ({}, {"metric": "nll"}, "`metric` must be one of reward, or a function, for GRPO, got 'nll'"),
        ({}, {"metric": "rougeL"}, "`metric` must be one of reward"),
        ({}, {"train_dataset": [{"question": "1+1="}] * 64}, "`train_dataset` lacks the column `prompt`"),
        ({}, {"train_dataset": [{"prompt": "1+1="}] * 64}, "lacks the column `answer`, which the reward exact_match"),
        ({}, {"eval_dataset": [{"prompt": "1+1="}] * 8}, "`eval_dataset` lacks the column `answer`"),
        ({"args": {"num_train_epochs": 1, "num_generations": 2}}, {}, "`num_chunks` must be <= 8"),
    ],
)
def test_bad_searches_are_found_before_a_model_is_loaded(
    engine: list[Engine],  # noqa: F811
    tmp_path: Path,
    change: dict[str, Any],
    options: dict[str, Any],
    words: str,
) -> None:
    metric = options.pop("metric", None)
    data = {"train_dataset": ROWS, "eval_dataset": ROWS[:8], "num_chunks": 9, **options}
    with pytest.raises(ValueError, match=words):
        Experiment("a", experiments_path=tmp_path, metric=metric).run_fit(RFGridSearch(config(**change)), **data)
    assert engine == []


def test_the_engine_is_told_how_to_compare(engine: list[Engine], tmp_path: Path) -> None:  # noqa: F811
    with Experiment("rl", experiments_path=tmp_path) as experiment:
        fit = experiment.run_fit(
            RFGridSearch(config(args={"max_completion_length": 32, "temperature": 0.9})),
            train_dataset=ROWS,
            eval_dataset=ROWS[:8],
            num_chunks=2,
        )
    assert engine[0].options["eval_sampling"] == Sampling(max_completion_length=32, temperature=0.9)
    assert (fit[0].direction, fit[0].metric) == ("maximize", "reward")
    assert fit.best is not None
    assert "generated" not in fit.runs()[0]
    fit[0].records[0].generated = [7, 8]
    assert [row["generated"] for row in fit.runs()] == [15, 0, 0]


def test_automl_takes_flat_fields(engine: list[Engine], tmp_path: Path) -> None:  # noqa: F811
    space = {
        "num_generations": List([4, 8]),
        "learning_rate": Range(1e-6, 1e-4, log=True),
        "r": List([4, 8]),
        "reward_funcs": "exact_match",
    }
    sampling = Sampling(num_generations=2)
    search = AutoML("base", "grpo", space, n_trials=3, experiments_path=tmp_path, eval_sampling=sampling)
    fit = search.fit(ROWS, ROWS[:8])
    assert engine[0].options["eval_sampling"] is sampling
    assert fit[0].direction == "maximize"
    assert {"num_generations", "learning_rate", "r"} == set(fit[0].records[0].params)


@pytest.mark.slow
@pytest.mark.parametrize(("trainer_type", "args_class"), [("GRPO", RFGRPOConfig), ("RLOO", RFRLOOConfig)])
def test_the_trainer_is_trls_own(trainer_type: str, args_class: Any, tmp_path: Path) -> None:
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rapidfire_automl.trainers import Data, Logs, as_dataset, build_trainer

    rewards = [short, exact_match]
    built = build_trainer(
        config(training_args=args_class(num_generations=4, bf16=False), reward_funcs=rewards),
        trainer_type,
        model=AutoModelForCausalLM.from_pretrained(MODEL),
        tokenizer=AutoTokenizer.from_pretrained(MODEL),
        data=Data(as_dataset("train", ROWS), as_dataset("eval", ROWS[:8])),
        output_dir=tmp_path,
        seed=3,
        logs=Logs(lambda step, logged: None),
    )
    assert type(built) is getattr(trl, f"{trainer_type}Trainer")
    assert built.reward_funcs == rewards
    assert built.reward_funcs is not rewards
    assert built.args.seed == 3
