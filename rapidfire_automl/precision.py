"""Which number format is fast here: many CPUs only emulate bfloat16, and take far longer for it than for float32."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

_ROWS, _INNER, _COLUMNS = 128, 512, 512


@cache
def bfloat16_cost() -> float:
    """How many times as long as in float32 this CPU takes for a matrix product in bfloat16; measured once."""
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(_ROWS, _INNER, dtype=dtype), torch.ones(_INNER, _COLUMNS, dtype=dtype)
        runs = []
        for _ in range(3):  # the first sets up kernels
            begin = time.perf_counter()
            left @ right
            runs.append(time.perf_counter() - begin)
        seconds[dtype] = min(runs)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def is_bfloat16_fast() -> bool:
    """Whether bfloat16 takes no longer than float32 on the device that a search takes by default."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.accelerator.is_available() or bfloat16_cost() <= 1.0


def why_slow(model: Any, args: Any) -> str:
    """What makes training slow here that needn't be; "" if nothing does.

    Args:
        model: The base; one that is small is never slow.
        args: A trainer's `TrainingArguments`.
    """
    import torch

    where = next(model.parameters())
    uses = where.dtype is torch.bfloat16 or bool(getattr(args, "bf16", False))
    if where.device.type != "cpu" or not uses or model.num_parameters() < 20e6 or bfloat16_cost() < 2.0:
        return ""
    return (
        f"bfloat16 takes {bfloat16_cost():.0f} times as long as float32 on this CPU: load the base with "
        "dtype='float32' and train with bf16=False"
    )
