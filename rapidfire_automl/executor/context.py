"""The context switch: process-wide state that belongs to one trial is swapped with the baton.

Grad mode and autocast are thread-local and stay with the trial's thread; everything here is not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

_SHARED = (PartialState, AcceleratorState, GradientState)


class Generators:
    """States of the process-wide random generators: torch (CPU, CUDA), NumPy and `random`.

    Args:
        seed: What they start from.
    """

    def __init__(self, seed: int) -> None:
        self.torch_state = torch.Generator().manual_seed(seed).get_state()
        self._cuda: list[torch.Tensor] | None = None
        if torch.cuda.is_available():
            self._cuda = [
                torch.Generator(device=f"cuda:{i}").manual_seed(seed).get_state()
                for i in range(torch.cuda.device_count())
            ]
        self._numpy: Any = np.random.RandomState(seed % 2**32).get_state()
        self._python = random.Random(seed).getstate()

    def generator(self, device: torch.device) -> torch.Generator:
        """A generator on a device, in this trial's present state there."""
        generator = torch.Generator(device=device)
        generator.set_state(
            self.torch_state if self._cuda is None or device.type != "cuda" else self._cuda[_index(device)]
        )
        return generator

    def take(self, generator: torch.Generator) -> None:
        """Go on from where a generator of `generator` has got to."""
        if self._cuda is not None and generator.device.type == "cuda":
            self._cuda[_index(generator.device)] = generator.get_state()
        else:
            self.torch_state = generator.get_state()

    def save(self) -> None:
        """Take the states as they are now."""
        self.torch_state = torch.get_rng_state()
        if self._cuda is not None:
            self._cuda = torch.cuda.get_rng_state_all()
        self._numpy = np.random.get_state()  # noqa: NPY002
        self._python = random.getstate()

    def tree(self) -> dict[str, Any]:
        """These states for a checkpoint."""
        return {"torch": self.torch_state, "cuda": self._cuda, "numpy": self._numpy, "python": self._python}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Generators:
        """States that `tree` has given.

        Raises:
            ValueError: They come from a machine with another number of GPUs.
        """
        generators = cls(0)
        there, here = (len(states or ()) for states in (tree["cuda"], generators._cuda))
        if there != here:
            raise ValueError(f"The random generators come from a machine with {there} GPUs; this one has {here}.")
        generators.torch_state, generators._cuda = tree["torch"], tree["cuda"]
        generators._numpy, generators._python = tree["numpy"], tree["python"]
        return generators

    @classmethod
    def in_force(cls) -> Generators:
        """The states as they are now."""
        generators = cls(0)
        generators.save()
        return generators

    def enter(self) -> None:
        """Put these states in force."""
        torch.set_rng_state(self.torch_state)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@contextmanager
def generators_of_its_own(seed: int) -> Iterator[None]:
    """Draw from a stream of one's own inside; outside nobody notices."""
    outer = Generators.in_force()
    Generators(seed).enter()
    try:
        yield
    finally:
        outer.enter()


class TrialContext(Generators):
    """Generators (torch, NumPy, `random`) and accelerate's shared states of one trial.

    accelerate keeps each state in a class-level dict that its objects alias from birth, so a trial gets dicts of its
    own and a switch points the classes at them; a trainer and its config must be built inside. `PartialState` (the
    process and its devices) starts as a copy of the process's: it holds what can't be set up twice.

    Args:
        seed: What the generators start from; TRL seeds them again when a trainer is built.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        PartialState()
        self._states: tuple[dict[str, Any], ...] = (dict(PartialState._shared_state), {}, {})

    @classmethod
    def capture(cls) -> TrialContext:
        """The context that is in force now, to return to."""
        context = cls(0)
        context._states = tuple(state._shared_state for state in _SHARED)
        context.save()
        return context

    def enter(self) -> None:
        """Put this context in force."""
        super().enter()
        for state, own in zip(_SHARED, self._states, strict=True):
            state._shared_state = own
