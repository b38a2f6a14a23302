"""Calibration: how large a joint pass should be on this machine, measured once for a base and remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model

from rapidfire_automl.caches import cache_folder
from rapidfire_automl.executor import attention, seams
from rapidfire_automl.executor.base import Base
from rapidfire_automl.executor.context import generators_of_its_own
from rapidfire_automl.executor.requests import Forward
from rapidfire_automl.memory import give_back
from rapidfire_automl.plan import Plan, choose

logger = logging.getLogger("rapidfire_automl")

_SIZES = (16, 64, 256, 1024)
_LARGER = (4096,)  # on a GPU; a CPU's caches are long full, and the activations of such a pass take gigabytes
_LEAST = 256
_in_this_process: dict[Path, Plan] = {}


def plan_for(base: Base, slots: int) -> Plan:
    """The plan for a base on this machine: the one remembered, or a new calibration, which is then remembered.

    That a plan is remembered makes searches repeatable from one process to the next: another split of the same
    requests would round differently in the last digit. What was measured while other processes wanted the processors
    is measured again when they don't.
    """
    if slots == 1:
        return Plan(trials_per_pass=1, reason="one slot")
    quiet = cache_folder() / "plans" / f"{_fingerprint(base)}.json"
    busy = quiet.with_suffix(".busy.json")  # believed only until there is a better one
    if quiet in _in_this_process:
        return _in_this_process[quiet]
    while_busy = _is_busy()
    for path in (quiet, busy) if while_busy else (quiet,):
        with contextlib.suppress(ValueError):
            return _in_this_process.setdefault(quiet, Plan.load(path))
    plan = _in_this_process[quiet] = calibrate(base)
    give_back()
    path = busy if while_busy else quiet
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        plan.save(temporary)
        temporary.replace(path)
    except OSError as error:
        logger.warning("The plan could not be remembered: %s", error)
    return plan


def _is_busy() -> bool:
    """Whether other processes want most of the processors, so that what is measured now says little."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1) + 0.5


def _fingerprint(base: Base) -> str:
    """Of what a calibration depends on: the base's shape, the machine and the libraries."""
    config = base.model.config.get_text_config()
    shape = {
        k: v for k, v in sorted(config.to_dict().items()) if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    device = base.multiplexer.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {os.cpu_count()}"
    facts = [shape, str(base.dtype), place, torch.get_num_threads(), torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def calibrate(base: Base, *, limit_s: float = 4.0) -> Plan:
    """Measure passes of growing size, forward and backward, and choose.

    Args:
        base: The base.
        limit_s: Stop growing after so many seconds, but not below passes of 256 tokens.

    Returns:
        The plan, with what was measured.
    """
    plan = Plan()
    device = base.multiplexer.device
    autocast = torch.bfloat16 if base.dtype == torch.bfloat16 else None
    if device.type == "cpu":
        dtypes = dict.fromkeys((base.dtype, torch.bfloat16))
        measured_widths = attention.widths(base.model.config.get_text_config(), dtypes)
        plan = replace(plan, short_attention=tuple(measured_widths.items()))
        base.multiplexer.use(plan)
    sizes = _SIZES if device.type == "cpu" else _SIZES + _LARGER
    begin = time.perf_counter()
    measured: list[tuple[int, float]] = []
    with generators_of_its_own(0):
        model = get_peft_model(base.clone(), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        sites, why = seams.find_sites(model)
        if why:
            return replace(plan, trials_per_pass=1, reason=f"trials run unfused: {why}")
        probe = seams.Probe(sites)
        probe.row = base.bank.add(sites)
        base.multiplexer.wrap(sites)
        try:
            for size in sizes:
                late = time.perf_counter() - begin > limit_s
                if late and size > _LEAST:
                    break
                rate = max(_rate(base, probe, size, autocast) for _ in range(1 if late else 3))
                measured.append((size, rate))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not measured or not seams.is_out_of_memory(error):
                raise
        finally:
            base.bank.remove(probe.row)
            base.bank.reset()
    return replace(choose(measured), short_attention=plan.short_attention)


def _rate(base: Base, probe: seams.Probe, tokens: int, autocast: torch.dtype | None) -> float:
    """Tokens a second of one pass, forward and backward, in rows of at most 64 tokens."""
    width = min(tokens, 64)
    ids = torch.ones(tokens // width, width, dtype=torch.long, device=base.multiplexer.device)
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
