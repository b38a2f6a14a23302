"""Train the tests' language model from scratch: `python -m tests.tiny.make_model`, minutes on one core.

A Llama of 0.9M parameters and a byte-level BPE of 1,024 tokens, both trained on nothing but what `reasoning-gym` 0.1.25
generates. Training ends as soon as a third of the one-digit additions is answered: tests need room to learn.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny.data import MODEL, additions

SEED = 0
MAX_STEPS = 3000
ROWS = 64
ENOUGH = 33
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


def texts() -> list[str]:
    """Prompts with their answers, shuffled: half of them sums, the rest for words to make tokens of."""
    from reasoning_gym import create_dataset

    def answers(name: str, size: int, **settings: Any) -> Iterator[tuple[str, str]]:
        for row in create_dataset(name, size=size, seed=SEED, **settings):
            yield row["question"], row["answer"]

    rows = []
    for terms in (2, 3):
        for question, answer in answers(
            "chain_sum", 6000, min_terms=terms, max_terms=terms, min_digits=1, max_digits=1
        ):
            rows.append(f"{question.rsplit(': ', 1)[1]} {answer}")
    for question, answer in answers("word_sequence_reversal", 6000, min_words=2, max_words=3):
        rows.append(f"reverse: {question.rsplit('words: ', 1)[1].strip()} = {answer}")
    for question, answer in answers("leg_counting", 2000, min_animals=1, max_animals=2, max_instances=4):
        rows.append(f"legs: {question.rsplit('if you have ', 1)[1].strip()} = {answer}")
    Random(SEED).shuffle(rows)
    return rows


def train_tokenizer(rows: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1,024 tokens, digits kept apart."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        rows,
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=["<pad>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", model_max_length=256, padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model() -> LlamaForCausalLM:
    """The model, untrained."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


@torch.no_grad()
def answered(model: Any, tokenizer: Any) -> int:
    """How many of the hundred one-digit additions the model answers, greedily."""
    rows = additions()
    batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True, padding_side="left")
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    out = model.generate(**batch, max_new_tokens=4, do_sample=False)
    said = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(text == row["completion"] for text, row in zip(said, rows, strict=True))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[str]) -> None:
    """Next-token training on whole rows until a third of the additions is answered."""
    ids = [torch.tensor([*tokenizer(row).input_ids, tokenizer.eos_token_id]) for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    start = time.monotonic()
    for step in range(MAX_STEPS):
        at = step * ROWS % (len(ids) - ROWS)
        batch = torch.nn.utils.rnn.pad_sequence(ids[at : at + ROWS], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids[at : at + ROWS]], batch_first=True)
        loss = model(input_ids=batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 24:
            right = answered(model.eval(), tokenizer)
            model.train()
            print(
                f"step {step + 1}: loss {loss.item():.3f}, {right} of 100 sums, {time.monotonic() - start:.0f} s",
                flush=True,
            )
            if right >= ENOUGH:
                return
    raise RuntimeError(f"Fewer than {ENOUGH} of 100 sums after {MAX_STEPS} steps.")


def checksums(folder: Path) -> str:
    """The folder's files as `sha256sum` lists them."""
    return "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  model/{path.name}\n" for path in sorted(folder.iterdir())
    )


def main() -> None:
    """Train, save, and write the checksums."""
    torch.set_num_threads(1)  # the same sums in the same order, whatever the machine
    rows = texts()
    tokenizer, model = train_tokenizer(rows), new_model()
    print(f"{len(rows)} rows, {model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer, rows)
    model.eval().save_pretrained(MODEL)
    tokenizer.save_pretrained(MODEL)
    (MODEL.parent / "SHA256SUMS").write_text(checksums(MODEL), encoding="utf-8")


if __name__ == "__main__":
    main()
