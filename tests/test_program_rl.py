"""Search files for GRPO and RLOO: from the file to what the executor and TRL are given."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rapidfire_automl import program
from rapidfire_automl.program import Program, build_objective, build_study, prepare
from rapidfire_automl.sampling import Sampling
from rapidfire_automl.settings import SettingsError, load_settings, parse_settings

ROOT = Path(__file__).parent.parent
MODEL = str(ROOT / "tests" / "tiny" / "model")

GOOD: dict[str, Any] = {
    "base": MODEL,
    "trainer": "grpo",
    "reward": "reasoning_gym",
    "data": {"reasoning_gym": {"tasks": "chain_sum", "size": 64, "eval_size": 8}},
    "args": {"per_device_train_batch_size": 16, "num_train_epochs": 2},
    "space": {"num_generations": [4, 8, 16], "learning_rate": {"low": 1e-6, "high": 1e-4, "log": True}},
}
FILES = {"train": "train.jsonl", "eval": "eval.jsonl"}


def message(*overrides: str, folder: Path = ROOT, **changes: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        prepare(parse_settings({**GOOD, **changes}, overrides), folder)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in FILES.values():
        rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(64)]
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "rewards_of_a_search.py").write_text(
        "def short(completions, **_):\n    return [-float(len(c)) for c in completions]\n\n"
        "def sourced(completions, source, **_):\n    return [0.0] * len(completions)\n"
    )
    return tmp_path


def test_a_task_becomes_prompts_and_the_reward_scores_them(folder: Path) -> None:
    prepared = prepare(parse_settings(GOOD), ROOT)
    assert (len(prepared.train), len(prepared.held_out)) == (64, 8)
    (reward,) = prepared.rewards
    columns = {name: prepared.train[name] for name in prepared.train.column_names}
    completions = columns.pop("answer")
    assert reward(prompts=columns.pop("prompt"), completions=completions, **columns) == [1.0] * 64
    assert prepared.settings.direction == "maximize"
    prepared.run_dir.mkdir(parents=True)
    assert build_study(prepared).direction.name == "MAXIMIZE"


def test_a_function_beside_the_file_and_weights(folder: Path) -> None:
    settings = parse_settings(
        GOOD,
        [
            'reward=["rewards_of_a_search:short", "exact_match"]',
            "args.reward_weights=[0.1, 1.0]",
            "trainer=rloo",
            f"data={{train = '{FILES['train']}', eval = '{FILES['eval']}'}}",
        ],
    )
    prepared = prepare(settings, folder)
    assert [reward.__name__ for reward in prepared.rewards] == ["short", "exact_match"]


def test_what_the_executor_and_trl_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import optuna
    import trl

    import rapidfire_automl.executor as executors

    given: dict[str, Any] = {}
    monkeypatch.setattr(executors, "RapidFireExecutor", lambda model, **options: given.update(options))
    prepared = prepare(
        parse_settings(GOOD, ["args.temperature=0.8", "args.max_completion_length=12", "evaluation.num_generations=2"]),
        ROOT,
    )
    program.build_executor(prepared)
    assert given["eval_sampling"] == Sampling(num_generations=2, temperature=0.8, max_completion_length=12)

    def trainer(**arguments: Any) -> Any:
        given.update(arguments)
        return SimpleNamespace(remove_callback=lambda callback: None)

    monkeypatch.setattr(trl, "GRPOTrainer", trainer)
    fixed = optuna.trial.FixedTrial({"num_generations": 8, "learning_rate": 1e-5})
    build_objective(prepared, SimpleNamespace(model=lambda trial: "clone", tokenizer="tokenizer"))(fixed)
    assert given["reward_funcs"] == list(prepared.rewards)
    assert given["args"].num_generations == 8
    assert given["model"] == "clone"


def test_sft_takes_a_tasks_answers(folder: Path) -> None:
    warm = {**GOOD, "trainer": "sft", "args": {}, "space": {"r": [4, 8]}}
    del warm["reward"]
    prepared = prepare(parse_settings(warm), folder)
    assert prepared.train[0]["completion"] == f" {prepared.train[0]['answer']}"
    chat = prepare(parse_settings(warm, ["data.reasoning_gym.chat=true"]), folder)
    assert chat.train[0]["completion"][0]["role"] == "assistant"
    assert prepared.settings.direction == "minimize"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("reward=''", '`reward` must be "module:function" or one of exact_match, reasoning_gym'),
        ("reward=3", "`reward` must be a name or a list of names, got 3."),
        ("reward=no_module:f", "`reward`: no_module:f cannot be imported"),
        ("reward=os:no_function", "`reward`: os has no function no_function."),
        ("trainer=sft", '`reward` is for grpo and rloo, got `trainer = "sft"`; drop it.'),
        ("trainer=grop", "`trainer` must be one of 'sft', 'dpo', 'grpo' or 'rloo'"),
        ("args.per_device_train_batch_size=8", "got 16 and 8 = 8 `per_device_train_batch_size`"),
        ("space.num_generations=[1, 4]", "`num_generations` must be >= 2, got 1"),
        ("args.use_vllm=true", 'pip install "trl[vllm]"'),
        ("args.use_transformers_continuous_batching=true", "generation loop of its own"),
        ("args.num_generation=4", "did you mean `args.num_generations`?"),
        ("args.reward_weights=[1.0, 2.0]", "`reward_weights` must have one number a reward function, got 2 for 1."),
        ("space.reward_weights=[[1.0], [0.5]]", "`reward_weights` in [evaluation]"),
        ("space.temperature=[0.7, 'hot']", "`space.temperature` must be a number"),
        ("search.metric=nll", "`search.metric` must be one of reward"),
        ("search.chunks=33", "`search.chunks` must be <= 32, the times"),
        ("data.reasoning_gym=chain_sun", "`data.reasoning_gym`: reasoning-gym has no task 'chain_sun'."),
        ("data.reasoning_gym=game_of_life_halting", "game_of_life_halting can't be a reward"),
        ("data.reasoning_gym.tasks={task = 'chain_sum', terms = 3}", "`terms` is no option of the task chain_sum."),
        ("data.reasoning_gym.tasks=[]", "`data.reasoning_gym.tasks` needs at least one task, got []."),
        ("data.reasoning_gym.sise=3", "did you mean `data.reasoning_gym.size`?"),
        ("data.reasoning_gym.template=go", "`template` must hold {question}"),
        ("data.train=a.jsonl", "`data.reasoning_gym` makes all rows, and `data.train` is given, too"),
        ("evaluation.temperatur=1", "did you mean `evaluation.temperature`?"),
        ("evaluation.top_p=2", "`evaluation.top_p` must be <= 1.0, got 2."),
        ("evaluation.temperature=0", "[evaluation] `num_generations` must be 1 at temperature 0"),
        ("evaluation.reward_weights=[1.0, 2.0]", "got 2 for 1"),
    ],
)
def test_mistakes(override: str, expected: str) -> None:
    assert expected in message(override)


def test_more_mistakes(folder: Path) -> None:
    assert 'Write `reward = "reasoning_gym"`.' in message(reward=[])
    assert 'Write `reward = "module:function"`.' in message(reward=[], data=FILES)
    assert "`data.train` is missing." in message(data={"eval": "a.jsonl"})
    asked = "`data.train` lacks the column `source`, which the reward sourced asks for"
    assert asked in message(folder=folder, data=FILES, reward="rewards_of_a_search:sourced")
    assert "lacks the column `task_entry`" in message(folder=folder, data=FILES)
    pairs = {**GOOD, "trainer": "dpo", "args": {}, "space": {"beta": [0.1, 0.2]}}
    del pairs["reward"]
    with pytest.raises(SettingsError, match="needs pairs of answers"):
        prepare(parse_settings(pairs), folder)


def test_the_example_is_a_search() -> None:
    prepared = prepare(load_settings(ROOT / "examples" / "grpo.toml", [f"base.model='{MODEL}'"]), ROOT)
    assert isinstance(prepared, Program)
    assert set(prepared.space.names.values()) == {"num_generations", "learning_rate", "beta"}
