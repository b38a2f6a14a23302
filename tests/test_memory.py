"""What is free goes back to the system."""

from __future__ import annotations

import gc
import weakref

from rapidfire_automl.memory import give_back


class Knot:
    def __init__(self) -> None:
        self.me = self


def test_garbage_goes() -> None:
    gc.disable()
    try:
        knot = weakref.ref(Knot())
        assert knot() is not None
        give_back()
        assert knot() is None
    finally:
        gc.enable()
