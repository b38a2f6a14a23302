"""What GRPO and RLOO ask of their arguments: found for every combination of a space, before any model is loaded."""

from __future__ import annotations

import importlib.util
import math
import re
from typing import Any

import pytest
from trl import GRPOConfig

from rapidfire_automl import List, Range, RFGRPOConfig, RFRLOOConfig, Sampling, rl
from rapidfire_automl.chunks import generation_boundaries

DEFAULTS = RFGRPOConfig.defaults()


def message(**args: Any) -> str:
    with pytest.raises(ValueError, match="`") as caught:
        rl.check_arguments(args, DEFAULTS)
    return str(caught.value)


def test_the_showcase_fits() -> None:
    rl.check_arguments({"num_generations": List([4, 8, 16]), "per_device_train_batch_size": 16}, DEFAULTS)
    rl.check_arguments({"num_generations": List([4, 8]), "generation_batch_size": 32}, DEFAULTS)
    rl.check_arguments({"num_generations": List([2, 4]), "per_device_train_batch_size": Range(4, 16, step=4)}, DEFAULTS)
    rl.check_arguments({}, RFRLOOConfig.defaults())


def test_one_combination_of_a_grid_that_does_not_divide_is_found_and_mended() -> None:
    text = message(num_generations=List([4, 8, 16]), per_device_train_batch_size=List([8, 16]))
    assert "got 16 and 8 = 8 `per_device_train_batch_size` x 1 `gradient_accumulation_steps`" in text
    assert "`num_generations` 8, `per_device_train_batch_size` 16" in text


def test_the_nearest_values_lie_on_both_sides() -> None:
    text = message(num_generations=3, per_device_train_batch_size=8)
    assert "`num_generations` 2, `num_generations` 4, " in text
    assert "`per_device_train_batch_size` 6, `per_device_train_batch_size` 9." in text


def test_steps_per_generation_counts_in() -> None:
    rl.check_arguments({"num_generations": 8, "per_device_train_batch_size": 2, "steps_per_generation": 4}, DEFAULTS)
    text = message(num_generations=16, per_device_train_batch_size=2, steps_per_generation=4)
    assert "got 16 and 8 = 2 `per_device_train_batch_size` x 4 `steps_per_generation`" in text
    assert "`per_device_train_batch_size` 4" in text


def test_a_generation_batch_of_its_own() -> None:
    assert "`generation_batch_size` 16, `generation_batch_size` 32" in message(
        num_generations=16, generation_batch_size=24
    )
    assert "The nearest: 16 or 24." in message(generation_batch_size=20)
    assert "exclude each other" in message(generation_batch_size=16, steps_per_generation=2)


def test_a_range_draws_what_lies_between() -> None:
    text = message(num_generations=List([4, 8]), per_device_train_batch_size=Range(8, 16))
    assert "(and " in text
    assert text.endswith("A range also draws what lies between: list the values.")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"num_generations": List([1, 4])}, "`num_generations` must be >= 2, got 1: an answer is judged against"),
        ({"num_generations": None}, "`num_generations` must be >= 2, got None"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be >= 1, got 0."),
        ({"steps_per_generation": 0}, "`steps_per_generation` must be >= 1, got 0."),
        ({"eval_strategy": "steps", "per_device_eval_batch_size": 6}, "multiple of the 8 generations"),
        ({"use_transformers_continuous_batching": True}, "generation loop of its own"),
        ({"use_transformers_paged": List([False, True])}, "generation loop of its own"),
    ],
)
def test_other_mistakes(args: dict[str, Any], named: str) -> None:
    assert named in message(**args)


def test_vllm_is_refused_installed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert importlib.util.find_spec("vllm") is None
    assert 'not installed: pip install "trl[vllm]"' in message(use_vllm=True)
    monkeypatch.setattr(rl, "find_spec", lambda name: object())
    assert "merge the adapter into the base" in message(use_vllm=True)


@pytest.mark.parametrize("size", [4, 6, 8])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("n", [2, 3, 4, 6, 8, 12])
def test_it_refuses_what_trl_refuses(size: int, steps: int, n: int, tmp_path: Any) -> None:
    args = {"per_device_train_batch_size": size, "steps_per_generation": steps, "num_generations": n}

    def refused(call: Any) -> bool:
        try:
            call()
        except ValueError:
            return True
        return False

    trl = refused(lambda: GRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **args))
    assert refused(lambda: rl.check_arguments(args, DEFAULTS)) is trl


def test_every_chunk_needs_a_generation_batch() -> None:
    args = {"num_generations": List([4, 8]), "per_device_train_batch_size": 8, "num_train_epochs": 1}
    rl.check_length(args, DEFAULTS, prompts=16, chunks=8, chunks_name="num_chunks")
    with pytest.raises(ValueError, match=r"`num_chunks` must be <= 7, .* got 8: 15 prompts, 2 a generation batch\."):
        rl.check_length(args, DEFAULTS, prompts=15, chunks=8, chunks_name="num_chunks")
    # 6 optimizer steps of 2 forwards, each batch of 2 forwards trained on twice: 3 generation batches.
    reused = {**args, "max_steps": 6, "gradient_accumulation_steps": 2, "num_iterations": 2}
    rl.check_length(reused, DEFAULTS, prompts=64, chunks=3, chunks_name="num_chunks")
    with pytest.raises(ValueError, match="`num_chunks` must be <= 3"):
        rl.check_length(reused, DEFAULTS, prompts=64, chunks=4, chunks_name="num_chunks")
    with pytest.raises(ValueError, match=r"`num_chunks` must be <= 0, .* got 1: 3 prompts, 4 a generation batch"):
        rl.check_length({"num_generations": 2}, DEFAULTS, prompts=3, chunks=1, chunks_name="num_chunks")


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("max_steps", [-1, 7, 12])
def test_chunks_end_where_the_executor_ends_them(accumulation: int, iterations: int, max_steps: int) -> None:
    batch = rl.Batch(per_device=4, accumulation=accumulation, steps=2, iterations=iterations, steps_name="")
    fewest = batch.chunk_ends(4, prompts=9, epochs=2.0, max_steps=max_steps)
    per_epoch = 4 * 2 * iterations  # 9 prompts fill 4 generation batches of 2
    steps = max_steps if max_steps > 0 else 2 * math.ceil(per_epoch / accumulation)
    found = generation_boundaries(per_epoch, accumulation, 2 * iterations, steps, fewest)
    assert len(found) == fewest
    with pytest.raises(ValueError, match="`chunks` must be <="):
        generation_boundaries(per_epoch, accumulation, 2 * iterations, steps, fewest + 1)


def test_trials_that_cannot_be_compared() -> None:
    def one() -> None: ...
    def two() -> None: ...

    rl.check_comparable([[one, two]], [[1, 0], [0, 1]], (1.0, 1.0))
    with pytest.raises(ValueError, match="`reward_funcs` must be the same for all trials"):
        rl.check_comparable([[one], [two]], [None], None)
    with pytest.raises(ValueError, match="`reward_weights` differ between trials"):
        rl.check_comparable([[one, two]], [[1, 0], [0, 1]], None)
    with pytest.raises(ValueError, match="got 1 for 2"):
        rl.check_comparable([[one, two]], [None], (1.0,))


def test_the_evaluation_samples_as_all_trials_do() -> None:
    shared = {**DEFAULTS, "max_completion_length": List([16, 64]), "temperature": 0.7}
    assert rl.default_sampling([shared]) == Sampling(max_completion_length=64, temperature=0.7)
    assert rl.default_sampling([{**shared, "temperature": Range(0.7, 1.2)}]).temperature == 1.0
    assert rl.default_sampling([shared], num_generations=1, temperature=0.0).temperature == 0.0


@pytest.mark.parametrize(
    "args",
    [
        {"num_generations": List([4, 12, 16]), "per_device_train_batch_size": 8},
        {
            "num_generations": List([4, 6]),
            "per_device_train_batch_size": 6,
            "gradient_accumulation_steps": List([1, 2]),
        },
        {"num_generations": 6, "generation_batch_size": 16, "per_device_train_batch_size": 4},
        {"num_generations": 9, "per_device_train_batch_size": List([8, 12])},
    ],
)
def test_what_is_proposed_fits_every_combination(args: dict[str, Any]) -> None:
    proposed = re.findall(r"`(\w+)` (\d+)(?=[,.])", message(**args).partition("nearest that fit:")[2])
    assert proposed
    for name, value in proposed:
        rl.check_arguments({**args, name: int(value)}, DEFAULTS)
