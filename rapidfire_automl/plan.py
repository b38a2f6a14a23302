"""How requests are split into joint passes: a plan, calibrated once and recorded, that can be replayed; torch-free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar


class Sized(Protocol):
    """What the planner needs to know of a request."""

    @property
    def rows(self) -> int:
        """Rows of the request."""

    @property
    def width(self) -> int:
        """Tokens of a row, padding included."""


R = TypeVar("R", bound=Sized)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much goes into one joint pass.

    Args:
        budget_tokens: Most padded tokens of a pass with several trials; a single trial's request may be larger.
        trials_per_pass: Most trials of a pass, None for no limit; 1 is time-slicing with free adapter swaps.
        max_padding: A request joins a pass only while padded tokens stay below this multiple of the real ones.
        rollout_rows: Most rows of a joint rollout of several trials; a single trial's may have more.
        reason: Why, for people.
        tokens_per_s: What calibration measured: pass size in tokens to throughput, forward and backward.
        short_attention: By dtype, the widest sequence for which a CPU computes attention without the stock kernel.
    """

    budget_tokens: int = 4096
    trials_per_pass: int | None = None
    max_padding: float = 1.35
    rollout_rows: int = 256
    reason: str = "default"
    tokens_per_s: tuple[tuple[int, float], ...] = ()
    short_attention: tuple[tuple[str, int], ...] = (("bfloat16", 256), ("float32", 64))

    def __post_init__(self) -> None:
        if self.budget_tokens < 1:
            raise ValueError(f"`budget_tokens` must be >= 1, got {self.budget_tokens}.")
        if self.trials_per_pass is not None and self.trials_per_pass < 1:
            raise ValueError(f"`trials_per_pass` must be >= 1 or None, got {self.trials_per_pass}.")
        if self.rollout_rows < 1:
            raise ValueError(f"`rollout_rows` must be >= 1, got {self.rollout_rows}.")

    def halved(self) -> Plan:
        """The plan after a pass ran out of memory."""
        return replace(self, budget_tokens=max(1, self.budget_tokens // 2), reason="halved after out of memory")

    def split(self, requests: Sequence[R]) -> list[list[R]]:
        """Group requests into passes.

        Requests of similar width go together, ties in the given order, so that the grouping depends on the requests
        alone.

        Args:
            requests: In trial order.

        Returns:
            Passes, each in the given order.
        """
        order = sorted(range(len(requests)), key=lambda i: (requests[i].width, i))
        passes: list[list[int]] = []
        rows = real = 0
        for i in order:
            request = requests[i]
            width, tokens = request.width, request.rows * request.width
            padded = (rows + request.rows) * width
            if (
                not passes
                or padded > self.budget_tokens
                or padded > self.max_padding * (real + tokens)
                or len(passes[-1]) == self.trials_per_pass
            ):
                passes.append([])
                rows = real = 0
            passes[-1].append(i)
            rows, real = rows + request.rows, real + tokens
        return [[requests[i] for i in sorted(members)] for members in passes]

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a recorded plan.

        Raises:
            ValueError: The file is not a plan.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            fields["tokens_per_s"] = tuple((int(n), float(rate)) for n, rate in fields.get("tokens_per_s", ()))
            fields["short_attention"] = tuple((str(d), int(n)) for d, n in fields.get("short_attention", ()))
            return cls(**fields)
        except (OSError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"`plan` must be a recorded plan (plan.json), could not read {path}: {error}.") from error


def choose(measured: Sequence[tuple[int, float]], *, tolerance: float = 0.05) -> Plan:
    """The plan that a calibration speaks for.

    The budget is the smallest pass whose throughput is within `tolerance` of the best: what is larger costs memory and
    gains nothing. Where the smallest size is that one, fusing gains nothing and each trial gets a pass of its own.

    Args:
        measured: Pass size in tokens and tokens a second.
        tolerance: Loss of throughput to accept for a smaller pass.

    Returns:
        The plan.
    """
    if not measured:
        return Plan(reason="not calibrated")
    best = max(rate for _, rate in measured)
    budget = min(size for size, rate in measured if rate >= (1 - tolerance) * best)
    smallest, rate = min(measured)
    if budget == smallest:
        return Plan(
            budget_tokens=budget,
            trials_per_pass=1,
            reason=f"passes of {smallest} tokens already fill the machine ({rate:.0f} tokens/s): one trial per pass",
            tokens_per_s=tuple(measured),
        )
    largest = max(size for size, _ in measured)
    return Plan(
        budget_tokens=budget,
        reason=(
            f"passes of {budget} tokens have {best / rate:.1f}x the throughput of {smallest}-token ones"
            + (" (the largest size measured)" if budget == largest else ", larger ones gain no more")
        ),
        tokens_per_s=tuple(measured),
    )
