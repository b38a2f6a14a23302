"""Calibration: how large a joint pass should be on this machine, measured at start."""

from __future__ import annotations

import time

import torch
from peft import LoraConfig, get_peft_model

from ..plan import Plan, choose
from . import seams
from .base import Base
from .context import generators_of_its_own
from .requests import Forward

_SIZES = (16, 64, 256, 1024, 4096)


def calibrate(base: Base, slots: int, *, limit_s: float = 4.0) -> Plan:
    """Measure passes of growing size, forward and backward, and choose.

    Args:
        base: The base.
        slots: Trials that train at a time.
        limit_s: Stop growing after so many seconds.

    Returns:
        The plan, with what was measured.
    """
    if slots == 1:
        return Plan(trials_per_pass=1, reason="one slot")
    begin = time.perf_counter()
    measured: list[tuple[int, float]] = []
    with generators_of_its_own(0):
        model = get_peft_model(base.clone(), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        sites, _ = seams.find_sites(model)
        probe = seams.Probe(sites)
        if not sites:
            return Plan(trials_per_pass=1, reason="no Linear to adapt")
        probe.row = base.bank.add(sites)
        base.multiplexer.wrap(sites)
        try:
            for size in _SIZES:
                rate = max(_rate(base, probe, size) for _ in range(2))
                measured.append((size, rate))
                if time.perf_counter() - begin > limit_s or size > 16 and rate < 0.8 * max(r for _, r in measured):
                    break
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not measured or ("memory" not in str(error) and not isinstance(error, torch.OutOfMemoryError)):
                raise
        finally:
            base.bank.remove(probe.row)
            base.bank.reset()
    return choose(measured)


def _rate(base: Base, probe: seams.Probe, tokens: int) -> float:
    """Tokens a second of one pass, forward and backward, in rows of at most 64 tokens."""
    width = min(tokens, 64)
    ids = torch.ones(tokens // width, width, dtype=torch.long, device=base.multiplexer.device)
    dtype = base.dtype()
    autocast = torch.bfloat16 if dtype == torch.bfloat16 else None
    request = Forward(ids, None, None, grad=True, autocast=autocast, checkpointing=False, adapter=True)
    _sync(ids)
    begin = time.perf_counter()
    parts, opened = base.multiplexer.forward([(probe, request)])
    assert opened is not None
    leaf = parts[0].leaves["hidden"]
    leaf.grad = torch.ones_like(leaf)
    base.multiplexer.backward(opened)
    for site in probe.sites.values():
        site.a.grad = site.b.grad = None
    _sync(ids)
    return tokens / (time.perf_counter() - begin)


def _sync(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()
