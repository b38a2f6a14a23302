"""Scores of generated answers, as RapidFire AI calls `compute_metrics`: `(predictions, references) -> numbers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_DEFAULTS: Mapping[str, Any] = {"max_new_tokens": 128}
_OURS = ("max_input_length", "add_generation_prompt", "truncation_side", "use_cache")
"""Keys of `generation_config` that are not for `model.generate`."""


@contextmanager
def contiguous_head(model: Any) -> Iterator[None]:
    """While open, the LM head sees contiguous hidden states.

    `generate` hands it the last position of every row as a strided slice, which PyTorch on a CPU turns into a batched
    product with a copy of the head for each row: 1.8 GB for 32 rows of SmolLM2-135M.

    Args:
        model: A causal language model, with an adapter or without.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


@dataclass
class AnswerScores:
    """Generates an answer to every held-out prompt and has the user's function score them.

    Args:
        rows: The held-out rows: `prompt` with `completion` (or `chosen`), `messages`, `input` with `output`, or
            `instruction` with `response`; text or chat messages.
        tokenizer: The base's.
        compute_metrics: `(predictions, references) -> {name: number}`.
        generation_config: Arguments of `model.generate`; `max_input_length` and `add_generation_prompt` are ours.
        batch_size: Prompts at a time.

    Raises:
        ValueError: No row has a prompt and a reference.
    """

    rows: Iterable[Mapping[str, Any]]
    tokenizer: Any
    compute_metrics: Callable[[tuple[list[str], list[str]]], Mapping[str, float]]
    generation_config: Mapping[str, Any]
    batch_size: int = 8
    _prompts: list[str] = field(default_factory=list)
    _references: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for row in self.rows:
            prompt, reference = self._pair(row)
            if prompt and reference:
                self._prompts.append(prompt)
                self._references.append(reference)
        if not self._prompts:
            raise ValueError(
                "`eval_dataset` must have prompts with references for `compute_metrics`: columns `prompt` and "
                "`completion`, or `messages`. Have `formatting_func` make them."
            )

    def measure(self, model: Any) -> dict[str, float]:
        """Generate and score; the model's mode and the random state are as before when it returns.

        Args:
            model: A causal language model.

        Raises:
            ValueError: `compute_metrics` returns no mapping of numbers.
        """
        import torch

        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(), contiguous_head(model):
                answers = [
                    answer
                    for start in range(0, len(self._prompts), self.batch_size)
                    for answer in self._generate(model, self._prompts[start : start + self.batch_size])
                ]
        finally:
            model.train(was_training)
        scores = self.compute_metrics((answers, list(self._references)))
        if not isinstance(scores, Mapping):
            raise ValueError(f"`compute_metrics` must return a dict of numbers, got {scores!r}.")
        return {str(name): float(value) for name, value in scores.items()}

    def _generate(self, model: Any, prompts: list[str]) -> list[str]:
        tokenizer = self.tokenizer
        arguments = {**_DEFAULTS, **{k: v for k, v in self.generation_config.items() if k not in _OURS}}
        limit = self.generation_config.get("max_input_length")
        # A chat template has put the special tokens in already.
        batch = tokenizer(prompts, add_special_tokens=not self._templated, padding=False)["input_ids"]
        batch = [ids if limit is None else ids[-int(limit) :] for ids in batch]
        inputs = tokenizer.pad({"input_ids": batch}, padding=True, padding_side="left", return_tensors="pt")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        arguments.setdefault("pad_token_id", pad)
        made = model.generate(**inputs.to(model.device), **arguments)
        answers: list[str] = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    _templated: bool = False

    def _pair(self, row: Mapping[str, Any]) -> tuple[str, str]:
        for prompt, reference in (
            ("prompt", "completion"),
            ("prompt", "chosen"),
            ("input", "output"),
            ("instruction", "response"),
        ):
            if prompt in row and reference in row:
                return self._prompt(row[prompt]), _text(row[reference])
        messages = row.get("messages")
        if messages and messages[-1]["role"] == "assistant":
            return self._prompt(messages[:-1]), _text(messages[-1:])
        return "", ""

    def _prompt(self, prompt: Any) -> str:
        if isinstance(prompt, str):
            return prompt
        self._templated = True
        turn = self.generation_config.get("add_generation_prompt", True)
        return str(self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=turn))


def _text(reference: Any) -> str:
    return (reference if isinstance(reference, str) else str(reference[-1]["content"])).strip()
