"""Fixtures of the executor's tests, and quiet libraries."""

from __future__ import annotations

import datasets
import optuna
import pytest
from transformers import LlamaForCausalLM

from tests.executor.helpers import tiny_llama

datasets.disable_progress_bars()
optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(scope="session")
def base() -> LlamaForCausalLM:
    """A tiny random Llama in float32; tests work on copies."""
    return tiny_llama()
