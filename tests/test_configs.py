"""The RapidFire configs: every field of TRL and PEFT, the removed ones, and what `build` makes of them."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import optuna
import pytest

from rapidfire_automl.configs import FieldConfig, RFDPOConfig, RFLoraConfig, RFModelConfig, RFSFTConfig
from rapidfire_automl.removed import REMOVED
from rapidfire_automl.space import List, Range, Space, is_concrete

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.mark.parametrize("config", [RFLoraConfig, RFSFTConfig, RFDPOConfig])
def test_every_field_of_the_real_class_is_taken_as_list(config: type[FieldConfig]):
    for name in config.known():
        assert getattr(config(**{name: List([None])}), name) == List([None])


def test_build_makes_the_real_objects():
    import peft
    import trl

    lora = RFLoraConfig(r=4, target_modules=["q_proj"], lora_alpha=8).build({"task_type": "CAUSAL_LM", "r": 99})
    assert (type(lora), lora.r, lora.target_modules, lora.task_type) == (peft.LoraConfig, 4, {"q_proj"}, "CAUSAL_LM")
    sft = RFSFTConfig(learning_rate=1e-3, max_steps=3).build(CPU, {"max_steps": 5})
    assert (type(sft), sft.learning_rate, sft.max_steps) == (trl.SFTConfig, 1e-3, 5)
    dpo = RFDPOConfig(beta=0.2, loss_type="robust").build(CPU)
    assert (type(dpo), dpo.beta, dpo.loss_type) == (trl.DPOConfig, 0.2, ["robust"])


def test_build_leaves_what_it_was_given_alone():
    kwargs = {"use_reentrant": False}
    config = RFSFTConfig(gradient_checkpointing_kwargs=kwargs)
    config.build(CPU).gradient_checkpointing_kwargs["x"] = 1
    assert kwargs == {"use_reentrant": False}


def test_build_refuses_an_open_choice():
    with pytest.raises(ValueError, match="still holds a List or a Range"):
        RFLoraConfig(r=List([4, 8])).build()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RFSFTConfig(learning_rte=1), "`learning_rte` is no field of SFTConfig. Did you mean `learning_rate`"),
        (lambda: RFSFTConfig(lr=1), "Did you mean `learning_rate`"),
        (lambda: RFSFTConfig(beta=0.1), "`beta` is no field of SFTConfig"),
        (lambda: RFLoraConfig(rank=4), "Did you mean `r`"),
        (lambda: RFSFTConfig(tokenizer="x"), r"Write RFModelConfig\(tokenizer=\.\.\.\)"),
        (
            lambda: RFSFTConfig(learning_rate="1e-4"),
            r'RFSFTConfig.learning_rate` must be a number, got the string "1e-4"',
        ),
        (lambda: RFSFTConfig(learning_rate=List([1e-3, "1e-4"])), "must be a number, got the string"),
        (lambda: RFSFTConfig(learning_rate=math.nan), "must be finite, got nan"),
        (lambda: RFSFTConfig(learning_rate=List([math.inf])), "must be finite, got inf"),
        (lambda: RFSFTConfig(max_steps=2.5), "`RFSFTConfig.max_steps` must be a whole number, got 2.5"),
        (lambda: RFLoraConfig(r=Range(4.0, 8.0)), "draws fractions"),
        (lambda: RFSFTConfig(packing="yes"), "must be True or False"),
        (lambda: RFModelConfig(modl_name="x"), "`modl_name` is no field of RFModelConfig. Did you mean `model_name`"),
        (lambda: RFModelConfig(learning_rate=1e-3), "It belongs into RFSFTConfig"),
        (lambda: RFModelConfig(model_kwargs="bf16"), "`model_kwargs` must be a dict"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_numbers_the_fields_do_take():
    RFSFTConfig(learning_rate=1, num_train_epochs=0.5, warmup_steps=0.1, max_length=None, bf16=None, save_steps=10)
    RFLoraConfig(lora_alpha=Range(8.0, 32.0), lora_dropout=0)


def test_attributes_read_set_and_copy():
    base = RFDPOConfig(beta=0.1, loss_type="sigmoid")
    other = base.copy()
    other.loss_type = "robust"
    other.label_smoothing = 0.2
    assert (base.loss_type, other.loss_type, other.label_smoothing) == ("sigmoid", "robust", 0.2)
    assert base.label_smoothing == 0.0  # TRL's default
    with pytest.raises(ValueError, match="`beat` is no field"):
        other.beat = 1
    with pytest.raises(AttributeError):
        _ = other.nothing
    for clone in (copy.deepcopy(base), copy.copy(base), pickle.loads(pickle.dumps(base))):
        assert clone == base
    model = RFModelConfig("m", peft_config=RFLoraConfig(r=4), training_args=base)
    clone = model.copy()
    clone.peft_config.r = 8
    assert model.peft_config.r == 4


def test_a_real_config_is_taken_apart_and_put_together():
    import trl
    from peft import LoraConfig

    real = trl.SFTConfig(learning_rate=3e-4, max_steps=7, lr_scheduler_type="cosine", max_length=99, **CPU)
    again = RFSFTConfig.of(real).build()
    assert (again.learning_rate, again.max_steps, again.lr_scheduler_type, again.max_length, again.bf16) == (
        3e-4,
        7,
        "cosine",
        99,
        False,
    )
    lora = LoraConfig(r=5, target_modules=["q_proj", "v_proj"], use_rslora=True)
    assert RFLoraConfig.of(lora).build() == lora


def test_names_within_a_model_config():
    config = RFModelConfig(
        model_name="m",
        peft_config=[RFLoraConfig(r=List([4, 8]), bias="none"), RFLoraConfig(r=List([4, 8]), use_rslora=True)],
        training_args=RFSFTConfig(learning_rate=Range(1e-5, 1e-3, log=True), optim=List(["adamw_torch", "sgd"])),
    )
    space = Space(config)
    assert list(space.distributions()) == ["peft_config", "r", "learning_rate", "optim"]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = space.suggest(study.ask())
    assert is_concrete(drawn)
    assert isinstance(drawn.peft_config, RFLoraConfig)
    assert drawn.training_args.build(CPU).learning_rate == drawn.training_args.learning_rate
    assert not is_concrete(config)


# Each removed field: what is given, and what today's fields become (an exception's words if nothing does).
CASES: dict[str, tuple[dict[str, object], dict[str, object] | str]] = {
    "adafactor": ({"adafactor": True}, {"optim": "adafactor"}),
    "base_model_attribute_name": ({"base_model_attribute_name": "model"}, {}),
    "chars_per_token": ({"chars_per_token": 3.6}, {}),
    "dataset_batch_size": ({"dataset_batch_size": 100}, {}),
    "dispatch_batches": ({"dispatch_batches": False}, {"accelerator_config": {"dispatch_batches": False}}),
    "evaluation_strategy": ({"evaluation_strategy": "no"}, {"eval_strategy": "no"}),
    "force_use_ref_model": ({"force_use_ref_model": True}, {}),
    "fp16_backend": ({"fp16_backend": "auto"}, {}),
    "fp16_opt_level": ({"fp16_opt_level": "O2"}, {}),
    "fsdp_min_num_params": ({"fsdp_min_num_params": 5}, "Use `fsdp_config`"),
    "fsdp_transformer_layer_cls_to_wrap": ({"fsdp_transformer_layer_cls_to_wrap": "X"}, "Use `fsdp_config`"),
    "generate_during_eval": ({"generate_during_eval": True}, {}),
    "group_by_length": ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
    "half_precision_backend": ({"half_precision_backend": "apex"}, {}),
    "include_inputs_for_metrics": ({"include_inputs_for_metrics": True}, {"include_for_metrics": ["inputs"]}),
    "include_tokens_per_second": ({"include_tokens_per_second": True}, {}),
    "is_encoder_decoder": ({"is_encoder_decoder": True}, "causal models only"),
    "jit_mode_eval": ({"jit_mode_eval": True}, {}),
    "label_pad_token_id": ({"label_pad_token_id": 0}, "masks the prompt by itself"),
    "logging_dir": ({"logging_dir": "logs"}, {}),
    "max_completion_length": ({"max_completion_length": 10, "max_prompt_length": 20}, {"max_length": 30}),
    "max_prompt_length": ({"max_prompt_length": 20, "max_length": 25}, {"max_length": 25}),
    "max_seq_length": ({"max_seq_length": 64}, {"max_length": 64}),
    "max_target_length": ({"max_target_length": 10, "max_prompt_length": 20}, {"max_length": 30}),
    "model_adapter_name": ({"model_adapter_name": "mine"}, "which PEFT calls `default`"),
    "mp_parameters": ({"mp_parameters": ""}, {}),
    "no_cuda": ({"no_cuda": True}, {"use_cpu": True}),
    "num_of_sequences": ({"num_of_sequences": 8}, {}),
    "overwrite_output_dir": ({"overwrite_output_dir": True}, {}),
    "padding_value": ({"padding_value": 0}, "tokenizer.pad_token"),
    "past_index": ({"past_index": 2}, "No causal model needs it"),
    "per_gpu_eval_batch_size": ({"per_gpu_eval_batch_size": 3}, {"per_device_eval_batch_size": 3}),
    "per_gpu_train_batch_size": ({"per_gpu_train_batch_size": 3}, {"per_device_train_batch_size": 3}),
    "push_to_hub_model_id": ({"push_to_hub_model_id": "me/x"}, {"hub_model_id": "me/x"}),
    "push_to_hub_organization": ({"push_to_hub_organization": "me"}, "hub_model_id"),
    "push_to_hub_token": ({"push_to_hub_token": "t"}, {"hub_token": "t"}),
    "ray_scope": ({"ray_scope": "last"}, {}),
    "ref_adapter_name": ({"ref_adapter_name": "other"}, "adapter switched off"),
    "ref_model_init_kwargs": ({"ref_model_init_kwargs": {"a": 1}}, "adapter switched off"),
    "reference_free": ({"reference_free": True}, "trl.experimental.cpo"),
    "rpo_alpha": ({"rpo_alpha": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "save_safetensors": ({"save_safetensors": False}, {}),
    "split_batches": ({"split_batches": True}, {"accelerator_config": {"split_batches": True}}),
    "tools": ({"tools": [len]}, "`tools` column"),
    "torchdynamo": ({"torchdynamo": "eager"}, {"torch_compile_backend": "eager"}),
    "tpu_metrics_debug": ({"tpu_metrics_debug": True}, {"debug": "tpu_metrics_debug"}),
    "tpu_num_cores": ({"tpu_num_cores": 8}, {}),
    "use_ipex": ({"use_ipex": True}, {}),
    "use_legacy_prediction_loop": ({"use_legacy_prediction_loop": True}, {}),
    "use_liger": ({"use_liger": True}, {"use_liger_kernel": True}),
    "use_liger_loss": ({"use_liger_loss": True}, {}),
    "use_logits_to_keep": ({"use_logits_to_keep": True}, {}),
    "use_mps_device": ({"use_mps_device": True}, {}),
    "warmup_ratio": ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
}


def test_every_removed_field_has_a_case_and_is_really_gone():
    assert sorted(CASES) == sorted(REMOVED)
    for name, entry in REMOVED.items():
        for config in (RFSFTConfig, RFDPOConfig):
            if entry.only in (None, config.real_name):
                assert name not in config.known(), f"{name} is back in {config.real_name}"


@pytest.mark.parametrize("name", sorted(CASES))
def test_removed_field(name: str):
    from rapidfire_automl.removed import migrate

    given, expected = CASES[name]
    config = RFDPOConfig if REMOVED[name].only == "DPOConfig" else RFSFTConfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                config(**given)
            return
        made = config(**given)
    today = migrate(made.search_fields(), config.real_name, config.known())
    assert today == expected
    assert set(today) <= set(config.known())


@pytest.mark.parametrize("name", sorted(n for n, e in REMOVED.items() if e.becomes is not None and not e.exact))
def test_a_field_that_is_ignored_is_warned_about(name: str):
    value = CASES[name][0][name]
    config = RFDPOConfig if REMOVED[name].only == "DPOConfig" else RFSFTConfig
    if any(value == harmless and type(value) is type(harmless) for harmless in REMOVED[name].harmless):
        value = "else"
    with pytest.warns(UserWarning, match=f"`{name}=.*is ignored"):
        config(**{name: value})


def test_harmless_values_are_silent():
    for name, entry in REMOVED.items():
        config = RFDPOConfig if entry.only == "DPOConfig" else RFSFTConfig
        for value in entry.harmless:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                made = config(**{name: value})
            assert made.build(CPU) is not None


def test_removed_fields_may_be_searched_too():
    space = Space(RFSFTConfig(warmup_ratio=List([0.0, 0.1])))
    assert [p.params for p in space.grid()] == [{"warmup_ratio": 0.0}, {"warmup_ratio": 0.1}]
    assert [p.value.build(CPU).warmup_steps for p in space.grid()] == [0.0, 0.1]
    with pytest.raises(ValueError, match="`warmup_ratio` must be >= 0 and < 1"):
        RFSFTConfig(warmup_ratio=List([0.1, 1.5]))
    with pytest.raises(ValueError, match="`reference_free=True`"):
        RFDPOConfig(reference_free=List([False, True]))


def test_old_and_new_names_must_agree():
    with pytest.raises(ValueError, match=r"`max_seq_length=64` contradicts `max_length=32`\. Drop `max_seq_length`"):
        RFSFTConfig(max_seq_length=64, max_length=32).build(CPU)
    assert RFSFTConfig(warmup_ratio=0.1, warmup_steps=7).build(CPU).warmup_steps == 7
    both = RFDPOConfig(loss_type=["hinge"], rpo_alpha=0.25).build(CPU)
    assert (both.loss_type, both.loss_weights) == (["hinge", "sft"], [1.0, 0.25])
    args = RFSFTConfig(dispatch_batches=False, split_batches=True).build(CPU).accelerator_config
    assert (args.dispatch_batches, args.split_batches) == (False, True)
