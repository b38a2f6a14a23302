"""Fixtures of all tests."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _collected() -> None:
    """What the modules before have left is freed."""
    gc.unfreeze()
    gc.collect()


@pytest.fixture(autouse=True)
def _frozen(_collected: None) -> None:
    """What torch, TRL and earlier tests have left is not walked again.

    Each trainer has the garbage collected a few times; over a million old objects that takes longer than it trains.
    """
    gc.freeze()  # at each test: an executor that closes thaws the heap
