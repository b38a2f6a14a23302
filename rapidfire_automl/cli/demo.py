"""`rapidfire-automl demo`: a whole search on a small real model, from nothing."""

from __future__ import annotations


def demo() -> None:
    """Stub."""
