"""What GRPO and RLOO ask of a trial's arguments, checked for every combination of a space; torch-free.

A generation batch is what a trial samples at once: `per_device_train_batch_size` x `steps_per_generation` answers, or
`generation_batch_size`, in whole groups of `num_generations` answers to one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from typing import Any

from rapidfire_automl.chunks import examples_after
from rapidfire_automl.sampling import Sampling
from rapidfire_automl.space import List, Range

TRAINERS = ("GRPO", "RLOO")
"""Trainer types that generate."""

_OWN_ROLLOUTS = "Leave it out: the rollouts of all trials are generated together, on the base they share."
_REFUSED = {
    "use_vllm": f"TRL would merge the adapter into the base for it, and all trials share that base. {_OWN_ROLLOUTS}",
    "use_transformers_continuous_batching": f"it gives every trial a generation loop of its own. {_OWN_ROLLOUTS}",
    "use_transformers_paged": f"it gives every trial a generation loop of its own. {_OWN_ROLLOUTS}",
}


@dataclass(frozen=True, slots=True)
class Batch:
    """How one combination samples.

    Args:
        per_device: `per_device_train_batch_size`: answers of one forward and backward.
        accumulation: `gradient_accumulation_steps`.
        steps: Forwards that one generation batch feeds.
        iterations: `num_iterations`: times that it is trained on.
        steps_name: The field that `steps` comes from.
    """

    per_device: int
    accumulation: int
    steps: int
    iterations: int
    steps_name: str

    @property
    def size(self) -> int:
        """Answers in a generation batch."""
        return self.per_device * self.steps

    def chunk_ends(self, num_generations: int, prompts: int, epochs: float, max_steps: int) -> int:
        """Optimizer steps of a whole trial at which a chunk may end: all that was generated has been trained on.

        0 where the prompts do not fill one generation batch; those that are left over fill none either.
        """
        every = self.steps * self.iterations
        per_epoch = prompts // (self.size // num_generations) * every
        if per_epoch == 0:
            return 0
        if max_steps <= 0:
            max_steps = math.ceil(epochs * math.ceil(per_epoch / self.accumulation))
        used = (examples_after(per_epoch, self.accumulation, step) for step in range(1, max_steps))
        return sum(batches % every == 0 for batches in used) + 1


def check_arguments(args: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse what no trial of a space, or not every trial, could be trained with.

    Args:
        args: Fields of `GRPOConfig` or `RLOOConfig` that were given; values may be a `List` or a `Range`.
        defaults: The config's own values for the others.

    Raises:
        ValueError: A generation batch that some combination can't divide into groups (names the nearest values that
            fit all of them), groups of one answer, contradicting fields, or a generation engine of TRL's.
    """
    for name, why in _REFUSED.items():
        if any(members(args.get(name, False))):
            if name == "use_vllm" and find_spec("vllm") is None:
                raise ValueError(
                    f'`use_vllm=True` needs vLLM, which is not installed: pip install "trl[vllm]". {_OWN_ROLLOUTS}'
                )
            raise ValueError(f"`{name}=True` can't be used here: {why}")
    both = {**defaults, **args}
    groups = _positive("num_generations", both, least=2, why=": an answer is judged against others to its prompt")
    batches = list(_batches(both))
    bad = [(n, batch) for n in groups for batch in batches if batch.size % n]
    if bad:
        raise ValueError(_indivisible(bad, groups, batches, both))
    if any(strategy not in ("no", None) for strategy in members(both.get("eval_strategy", "no"))):
        _check_evaluation(both, groups)


def check_length(
    args: Mapping[str, Any], defaults: Mapping[str, Any], *, prompts: int, chunks: int, chunks_name: str
) -> None:
    """Refuse a space with a trial that has too few places for its chunks to end: each ends at a whole generation batch.

    Args:
        args: As for `check_arguments`, which must have passed.
        defaults: Likewise.
        prompts: Training prompts.
        chunks: Chunks of a trial.
        chunks_name: What the user calls them.

    Raises:
        ValueError: A trial can be too short.
    """
    both = {**defaults, **args}
    epochs = min(float(value) for value in members(both["num_train_epochs"]))
    max_steps = min(int(value) for value in members(both["max_steps"]))
    groups = _positive("num_generations", both)
    pairs = dict.fromkeys((batch, n) for batch in _batches(both) for n in groups)
    found = [(batch.chunk_ends(n, prompts, epochs, max_steps), batch, n) for batch, n in pairs]
    fewest, batch, n = min(found, key=lambda one: one[0])
    if fewest < chunks:
        raise ValueError(
            f"`{chunks_name}` must be <= {fewest}, the times that a trial has trained on all it has generated, got "
            f"{chunks}: {prompts} prompts, {batch.size // n} a generation batch. Take fewer chunks, more prompts, more "
            "epochs or smaller batches."
        )


def check_weights(weights: Sequence[float] | None, rewards: Iterable[Sequence[Any]]) -> None:
    """Refuse `reward_weights` that are not one a reward function.

    Args:
        weights: One number a function, or None for 1 each.
        rewards: The lists of reward functions that trials choose from.

    Raises:
        ValueError: The numbers differ.
    """
    for functions in rewards:
        if weights is not None and len(weights) != len(functions):
            raise ValueError(
                f"`reward_weights` must have one number a reward function, got {len(weights)} for {len(functions)}."
            )


def check_comparable(
    rewards: Sequence[Sequence[Any]], weights: Sequence[Any], evaluation: Sequence[float] | None
) -> None:
    """Refuse trials whose rewards don't say which of them is better.

    Args:
        rewards: The lists of reward functions that trials choose from.
        weights: The `reward_weights` that they choose from.
        evaluation: The weights that they are compared by; None for their own.

    Raises:
        ValueError: Different functions, or different weights and no common ones.
    """
    if any(list(functions) != list(rewards[0]) for functions in rewards):
        raise ValueError(
            "`reward_funcs` must be the same for all trials, which are compared by them. Give all functions to every "
            "trial and choose `reward_weights` (0 switches one off), or compare by a `metric` function."
        )
    if evaluation is not None:
        check_weights(evaluation, rewards)
    elif any(one != weights[0] for one in weights):
        raise ValueError(
            "`reward_weights` differ between trials, and those that trials are compared by are not given. Set them: "
            "eval_sampling=Sampling(reward_weights=...), or `reward_weights` in [evaluation]."
        )


def default_sampling(fields: Iterable[Mapping[str, Any]], **given: Any) -> Sampling:
    """How trials answer when they are compared, where nothing else is said.

    Args:
        fields: Every field of the training arguments, for each set of them that trials choose from.
        given: What is said.

    Returns:
        Answers at the temperature that all trials share (1 where they don't), up to the most tokens that any of them
        may generate.
    """
    everyone = list(fields)
    lengths = [n for both in everyone for n in members(both["max_completion_length"]) if n is not None]
    temperatures = {float(t) for both in everyone for t in members(both["temperature"])}
    ours: dict[str, Any] = {"max_completion_length": int(max(lengths))} if lengths else {}
    if len(temperatures) == 1 and min(temperatures) > 0:
        ours["temperature"] = min(temperatures)
    return Sampling(**{**ours, **given})


def members(value: Any) -> list[Any]:
    """Every value that a field can take; of a `Range` of fractions its two ends."""
    if isinstance(value, List):
        return [concrete for member in value.values for concrete in members(member)]
    if isinstance(value, Range):
        if value.is_int:
            return list(range(int(value.start), int(value.end) + 1, int(value.step or 1)))
        return [value.start, value.end]
    return [value]


def _positive(name: str, fields: Mapping[str, Any], least: int = 1, why: str = "") -> list[int]:
    values = members(fields[name])
    for value in values:
        if value is None or value < least:
            raise ValueError(f"`{name}` must be >= {least}, got {value}{why}.")
    return list(dict.fromkeys(int(value) for value in values))


def _batches(fields: Mapping[str, Any]) -> Iterator[Batch]:
    sizes, accumulations, iterations = (
        _positive(name, fields)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_iterations")
    )
    wholes, steps = fields.get("generation_batch_size"), fields.get("steps_per_generation")
    if any(v is not None for v in members(wholes)) and any(v is not None for v in members(steps)):
        raise ValueError("`generation_batch_size` and `steps_per_generation` exclude each other. Drop one.")
    found = product(sizes, accumulations, iterations, members(wholes), members(steps))
    for size, accumulation, repeat, whole, step in found:
        if whole is not None:
            if whole < 1 or whole % size:
                fits = " or ".join(map(str, _around(whole, size)))
                raise ValueError(
                    "`generation_batch_size` must be a multiple of `per_device_train_batch_size`, got "
                    f"{whole} and {size}. The nearest: {fits}."
                )
            yield Batch(size, accumulation, whole // size, repeat, "generation_batch_size")
        elif step is not None:
            if step < 1:
                raise ValueError(f"`steps_per_generation` must be >= 1, got {step}.")
            yield Batch(size, accumulation, step, repeat, "steps_per_generation")
        else:
            yield Batch(size, accumulation, accumulation, repeat, "gradient_accumulation_steps")


def _indivisible(
    bad: list[tuple[int, Batch]], groups: list[int], batches: list[Batch], fields: Mapping[str, Any]
) -> str:
    n, batch = bad[0]
    whole = batch.steps_name == "generation_batch_size"
    made = "" if whole else f" = {batch.per_device} `per_device_train_batch_size` x {batch.steps} `{batch.steps_name}`"
    others = len({(n, batch.size) for n, batch in bad}) - 1
    more = f" (and {others} more such pair{'s' if others > 1 else ''})" if others else ""
    common = math.gcd(*(batch.size for batch in batches))
    fits = [f"`num_generations` {value}" for value in _nearest(n, (d for d in range(2, common + 1) if common % d == 0))]
    # A batch that fits must take every group size of the space, in every combination with the other fields.
    every = math.lcm(*groups)
    if whole:
        name, now, unit = "generation_batch_size", batch.size, math.lcm(every, *(b.per_device for b in batches))
    else:
        name, now = "per_device_train_batch_size", batch.per_device
        unit = math.lcm(*(every // math.gcd(every, b.steps) for b in batches))
    if unit <= 64 * now:
        fits += [f"`{name}` {value}" for value in _around(now, unit)]
    hint = f" The nearest that fit: {', '.join(fits)}." if fits else ""
    if any(isinstance(fields.get(field), Range) for field in ("num_generations", name)):
        hint += " A range also draws what lies between: list the values."
    return f"`num_generations` must divide the generation batch, got {n} and {batch.size}{made}{more}.{hint}"


def _check_evaluation(fields: Mapping[str, Any], groups: list[int]) -> None:
    """TRL's own evaluation, which only runs when `eval_strategy` asks for it."""
    own = [value for value in members(fields.get("num_generations_eval")) if value]
    for n in own or groups:
        for size in _positive("per_device_eval_batch_size", fields):
            if size % n:
                raise ValueError(
                    f"`per_device_eval_batch_size` must be a multiple of the {n} generations of an evaluation, got "
                    f"{size}. The nearest: {' or '.join(map(str, _around(size, n)))}. Or leave `eval_strategy` out: "
                    "trials are evaluated after every chunk anyway."
                )


def _around(value: int, unit: int) -> list[int]:
    """The positive multiples of `unit` next to `value`, below and above."""
    below = value // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple > 0 and multiple != value]


def _nearest(value: int, among: Iterable[int]) -> list[int]:
    """The nearest of some numbers below a value and above it."""
    others = list(among)
    below, above = [n for n in others if n < value], [n for n in others if n > value]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]
