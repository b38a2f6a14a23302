"""Fixtures of all tests."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _heap_of_imports() -> None:
    """What torch, TRL and earlier tests have left is not walked again.

    Each trainer has the garbage collected a few times; over a million old objects that takes longer than it trains.
    """
    gc.unfreeze()
    gc.collect()


@pytest.fixture(autouse=True)
def _frozen(_heap_of_imports: None) -> None:
    """An executor that closes thaws the heap."""
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()
