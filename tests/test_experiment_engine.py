"""`Experiment` and `AutoML` on the real engine, with a random model of a few thousand parameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from rapidfire_automl.automl import AutoML
from rapidfire_automl.configs import RFDPOConfig, RFLoraConfig, RFModelConfig, RFSFTConfig
from rapidfire_automl.experiment import Experiment
from rapidfire_automl.groups import RFGridSearch, RFOptuna
from rapidfire_automl.space import List, Range

pytestmark = pytest.mark.slow

QUESTIONS = [{"instruction": f"double {i}", "response": f"{2 * i}"} for i in range(36)]
PAIRS = [{"prompt": f"double {i}", "chosen": f" {2 * i}", "rejected": " no"} for i in range(24)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    folder = str(tmp_path_factory.mktemp("base"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": row["instruction"]}],
        "completion": [{"role": "assistant", "content": row["response"]}],
    }


def create_model(model_config: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_config["model_name"], **model_config["model_kwargs"])
    return model, AutoTokenizer.from_pretrained(model_config["model_name"], **model_config["tokenizer_kwargs"])


def chat_config(base: str, **fields: Any) -> RFModelConfig:
    args = RFSFTConfig(
        learning_rate=List([1e-2, 1e-3]),
        lr_scheduler_type="linear",
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=6,
        logging_steps=2,
        warmup_ratio=0.1,
        bf16=False,
    )
    given = {
        "model_name": base,
        "peft_config": List(
            [
                RFLoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], bias="none"),
                RFLoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
            ]
        ),
        "training_args": args,
        "model_type": "causal_lm",
        "model_kwargs": {"torch_dtype": "auto", "use_cache": False},
        "formatting_func": chat,
    }
    return RFModelConfig(**{**given, **fields})


def test_the_chat_tutorial(base: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    experiment = Experiment(experiment_name="exp1-chatqa", mode="fit", experiments_path=str(tmp_path))
    group = RFGridSearch(configs=List([chat_config(base)]), trainer_type="SFT")
    fit = experiment.run_fit(group, create_model, QUESTIONS[:24], QUESTIONS[24:], num_chunks=3, seed=42)
    experiment.end()
    runs = fit.runs()
    assert [run["status"] for run in runs] == ["complete"] * 4
    assert [run["chunks"] for run in runs] == [3] * 4
    assert fit.best is not None
    assert fit.best.base_value is not None
    assert fit.best_value is not None
    assert fit.best_value < fit.best.base_value
    table = experiment.get_results()
    assert {"run_id", "step", "loss", "chunk", "value", "grad_norm"} <= set(table.columns)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(fit.best_adapter))
    assert model.peft_config["default"].r == 8
    assert (fit.folder / "search_1" / "summary.json").is_file()


def test_the_alignment_tutorial(base: str, tmp_path: Path) -> None:
    common = RFDPOConfig(
        model_adapter_name="default",
        ref_adapter_name="reference",
        force_use_ref_model=False,
        loss_type="sigmoid",
        beta=0.1,
        max_length=64,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        warmup_ratio=0.1,
        num_train_epochs=1,
        save_strategy="epoch",
        logging_steps=1,
        bf16=False,
    )
    with pytest.warns(UserWarning, match="`max_prompt_length=32` is ignored"):
        common.max_prompt_length = 32
    robust = common.copy()
    robust.loss_type = "robust"
    robust.label_smoothing = 0.1
    mixed = common.copy()
    mixed.loss_type = ["sigmoid", "bco_pair", "sft"]
    mixed.loss_weights = [0.8, 0.2, 1.0]
    adapter = RFLoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    configs = List(
        [
            RFModelConfig(
                model_name=base,
                peft_config=adapter,
                training_args=args,
                tokenizer_kwargs={"padding_side": "left"},
            )
            for args in (common, robust, mixed)
        ]
    )
    experiment = Experiment(experiment_name="dpo", experiments_path=tmp_path)
    with pytest.warns(UserWarning, match="first 24 training examples"):
        fit = experiment.run_fit(
            RFGridSearch(configs=configs, trainer_type="DPO"), create_model, PAIRS, eval_dataset=None, num_chunks=3
        )
    assert [run["error"] for run in fit.runs()] == [None] * 3
    assert fit.best_value is not None
    assert fit.best_value < math.log(2)
    assert "rewards/accuracies" in experiment.get_results().columns


def test_scores_of_generated_answers_can_be_the_objective(base: str, tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    def compute_metrics(eval_preds: tuple[list[str], list[str]]) -> dict[str, float]:
        predictions, references = eval_preds
        seen.append((predictions[0], references[0]))
        return {"letters": sum(map(len, predictions)) / len(predictions), "hits": 0.0}

    config = chat_config(base, compute_metrics=compute_metrics, generation_config={"max_new_tokens": 3})
    group = RFOptuna(
        [config], trainer_type="SFT", n_initial=2, budget=3, objective="maximize:letters", pruner="median", seed=1
    )
    experiment = Experiment("answers", experiments_path=tmp_path)
    fit = experiment.run_fit(group, create_model, QUESTIONS[:24], QUESTIONS[24:28], num_chunks=2)
    assert {reference for _, reference in seen} == {QUESTIONS[24]["response"]}
    assert fit.best_value is not None
    assert 0 <= fit.best_value <= 3 * 4
    assert {"letters", "hits"} <= set(experiment.get_results().columns)
    assert group.study is not None
    assert len(group.study.trials) == 3


def test_scores_of_answers_stand_beside_the_trainers_own_evaluations(base: str, tmp_path: Path) -> None:
    config = chat_config(
        base,
        peft_config=RFLoraConfig(r=4, target_modules=["q_proj"]),
        compute_metrics=lambda eval_preds: {"answers": float(len(eval_preds[0]))},
        generation_config={"max_new_tokens": 2},
    )
    config.training_args.eval_strategy = "steps"
    config.training_args.eval_steps = 3
    experiment = Experiment("answers", experiments_path=tmp_path)
    experiment.run_fit(config, create_model, QUESTIONS[:24], QUESTIONS[24:29], num_chunks=2)
    rows = experiment.get_results().query("step == 3")
    assert list(rows["answers"]) == [5.0, 5.0]
    assert rows["eval_loss"].notna().all()
    # The trainer's loss and our value are the same mean over tokens.
    ends = experiment.get_results().query("step == 6")
    assert list(ends["value"]) == pytest.approx(list(ends["eval_loss"]), rel=2e-2)


def test_automl_finds_an_adapter_and_repeats_itself(base: str, tmp_path: Path) -> None:
    def search(folder: str) -> Any:
        space = {
            "learning_rate": Range(1e-4, 1e-1, log=True),
            "r": List([2, 4]),
            "target_modules": "all-linear",
            "max_steps": 6,
            "bf16": False,
        }
        automl = AutoML(base, space=space, n_trials=6, slots=3, chunks=3, seed=3, experiments_path=tmp_path / folder)
        rows = [chat(row) for row in QUESTIONS]
        return automl.fit(rows[:24], rows[24:])

    first, second = search("a"), search("b")
    assert first.best_value < first.best.base_value
    assert first.best_adapter.is_dir()
    assert [(r["learning_rate"], r["value"], r["status"]) for r in first.runs()] == [
        (r["learning_rate"], r["value"], r["status"]) for r in second.runs()
    ]
