"""`rapidfire-automl doctor`: what this machine can do for a search."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from rapidfire_automl.cli.run import Debug
from rapidfire_automl.cli.terminal import Terminal
from rapidfire_automl.precision import bfloat16_cost
from rapidfire_automl.versions import TESTED, installed
from rapidfire_policies.wording import counted

Grade = Literal["good", "note", "bad"]
_MARK = {"good": ("ok", "green"), "note": ("note", "yellow"), "bad": ("bad", "bold red")}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        name: What was looked at.
        text: What was found, and what to do about it if anything.
        grade: "bad" means that searches will not run, "note" that they could run better.
    """

    name: str
    text: str
    grade: Grade = "good"


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Say what this machine can do: cores, memory, device, number formats, versions, joint passes.

    Exit codes: 0 when searches can run, 1 when not.
    """
    terminal = Terminal(as_json=as_json, debug=debug)
    with terminal.session():
        findings = list(examine())
        if as_json:
            terminal.json(findings)
        else:
            _show(findings, terminal.console)
        if any(finding.grade == "bad" for finding in findings):
            raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """Look at the machine, cheapest first."""
    yield Finding("system", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _versions()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield _cores(cores)
    yield _memory()
    try:
        import torch  # noqa: F401
    except ImportError as error:
        yield Finding("torch", f"cannot be imported: {error}", "bad")
        return
    yield from _device()
    yield from _precision()
    yield _threads(cores)
    yield _joint_passes()


def _versions() -> Iterator[Finding]:
    found = installed()
    missing = [name for name in TESTED if found[name] is None]
    if missing:
        yield Finding("packages", f"missing: {', '.join(missing)}. Run: pip install {' '.join(missing)}", "bad")
    strip = {name: (version or "").partition("+")[0] for name, version in found.items()}
    other = [f"{name} {strip[name]} ({tested})" for name, tested in TESTED.items() if strip[name] not in ("", tested)]
    same = [f"{name} {found[name]}" for name, tested in TESTED.items() if strip[name] == tested]
    if same:
        yield Finding("packages", f"as tested: {', '.join(same)}")
    if other:
        yield Finding("packages", f"other than tested (in brackets): {', '.join(other)}", "note")


def _cores(cores: int) -> Finding:
    return Finding("cpu", counted(cores, "core"))


def _memory() -> Finding:
    import psutil  # type: ignore[import-untyped]

    memory = psutil.virtual_memory()
    free_gib, total_gib = memory.available / 2**30, memory.total / 2**30
    if free_gib < 3:
        return Finding("memory", f"{free_gib:.1f} of {total_gib:.1f} GiB free; the demo needs 3", "note")
    return Finding("memory", f"{free_gib:.1f} of {total_gib:.1f} GiB free")


def _device() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("device", "CPU; no GPU that this build of torch can use")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        yield Finding("device", f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}")


def _precision() -> Iterator[Finding]:
    import torch

    if torch.accelerator.is_available():
        return
    cost = bfloat16_cost()
    if cost <= 1.0:
        yield Finding("precision", f"bf16 bases train fast: a product takes {cost:.1f} times as long as in float32")
        return
    yield Finding(
        "precision",
        f"bf16 takes {cost:.1f} times as long as float32 on this CPU: take dtype float32, and bf16 = false",
        "note" if cost > 2 else "good",
    )


def _threads(cores: int) -> Finding:
    import torch

    threads, set_to = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    text = f"torch uses {threads}" + (f", OMP_NUM_THREADS={set_to}" if set_to else "")
    if threads > cores:
        return Finding("threads", f"{text}, more than there are cores; set OMP_NUM_THREADS={cores}", "note")
    if threads < cores and not torch.cuda.is_available():
        # torch counts physical cores; a person who set fewer knows why.
        return Finding("threads", f"{text} of {cores} cores" + ("; unset it to use all" if set_to else ""))
    return Finding("threads", text)


def _joint_passes() -> Finding:
    """Have the executor check its seams on a model of a few thousand random weights."""
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from rapidfire_automl.executor.base import Base

        with torch.random.fork_rng(devices=[]):
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=64,
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                )
            )
        notes = Base(model, 2).notes
    except Exception as error:  # a report must not break off
        return Finding("joint pass", f"cannot be checked: {type(error).__name__}: {error}", "bad")
    if notes:
        return Finding("joint pass", "; ".join(notes), "note")
    return Finding("joint pass", "agrees with PEFT's own forward: trials train together")


def _show(findings: list[Finding], console: Console) -> None:
    for finding in findings:
        mark, style = _MARK[finding.grade]
        console.print(
            Text.assemble((f"{mark:<5}", style), (f"{finding.name:<12}", "dim"), finding.text), soft_wrap=True
        )
