"""What every `results.json` says about where its numbers come from; null where it is unknown."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rapidfire_automl.versions import installed

ROOT = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, Any]:
    """Commit, dirty flag, versions, hardware and the time of the start."""
    status = _git("status", "--porcelain")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "versions": installed(),
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    """The machine, by what its numbers depend on."""
    import torch

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory_bytes("MemTotal"),
        "gpu": gpu.name if gpu else None,
        "gpu_memory_bytes": gpu.total_memory if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def load() -> list[float] | None:
    """Load averages over 1, 5 and 15 minutes: above what the run itself needs, others were at work."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def memory_bytes(field: str) -> int | None:
    """A field of /proc/meminfo."""
    return _proc_kib(Path("/proc/meminfo"), field)


def peak_rss_bytes() -> int | None:
    """The most memory this process has held."""
    return _proc_kib(Path("/proc/self/status"), "VmHWM")


def sha256(path: Path) -> str | None:
    """A file's hash, or that of a folder's weights."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def sha256_of(value: object) -> str:
    """The hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def _git(*words: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _proc_kib(path: Path, field: str) -> int | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)
