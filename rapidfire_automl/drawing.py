"""What both pictures share: the frame, the colours, short names and times."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rapidfire_policies.base import TrialState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rapidfire_automl.records import TrialRecord

INK, MUTED, FAINT = "#1f2933", "#7b8794", "#e4e7eb"
STOPPED, FAILED, BEST = "#b3bcc7", "#c81e1e", "#d9480f"
# Distinct for colour-blind readers, none near the best trial's orange or the grey of the stopped.
_SURVIVORS = ("#1c7ed6", "#2b8a3e", "#6741d9", "#a61e4d", "#0b7285")
_CROWD = "#8fb3d4"


def frame(width: float, height: float, *, top_in: float = 0.88) -> tuple[Figure, Axes]:
    """A figure with room on top for two lines of title and on the right for labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    left, right, bottom = 0.82, 1.75, 0.62
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top_in) / height))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#cbd2d9")
    axes.tick_params(colors=INK, labelsize=9, color="#cbd2d9")
    axes.xaxis.label.set(color=MUTED, fontsize=9.5)
    axes.yaxis.label.set(color=MUTED, fontsize=9.5)
    return figure, axes


def title(figure: Figure, finding: str, subtitle: str) -> None:
    """Write what the picture shows above it, and how to read it below that."""
    inch = 1 / figure.get_figheight()
    left = 0.2 / figure.get_figwidth()
    figure.text(left, 1 - 0.17 * inch, finding, va="top", fontsize=13, weight="bold", color=INK)
    figure.text(left, 1 - 0.48 * inch, subtitle, va="top", fontsize=9.5, color=MUTED)


def save(figure: Figure, path: Path) -> Path:
    """Write the file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", bbox_inches="tight", pad_inches=0.15)  # labels may be long
    partial.replace(path)
    return path


def colours_of(shown: Mapping[int, TrialRecord], best: int | None, *, maximize: bool) -> dict[int, str]:
    """Orange for the best, its own colour for each next best survivor, one colour for the crowd behind, grey for the
    stopped; the same in both pictures.
    """
    kept = [n for n, r in shown.items() if r.state not in (TrialState.STOPPED, TrialState.FAILED) and n != best]
    kept.sort(key=lambda n: (len(shown[n].values) == 0, rank_key(shown[n], maximize), n))
    colours = dict.fromkeys(shown, STOPPED)
    for place, number in enumerate(kept):
        colours[number] = _SURVIVORS[place] if place < len(_SURVIVORS) else _CROWD
    if best is not None:
        colours[best] = BEST
    return colours


def rank_key(record: TrialRecord, maximize: bool) -> float:
    """Last value, lower is better, not finite last."""
    if not record.values or not math.isfinite(record.values[-1]):
        return math.inf
    return -record.values[-1] if maximize else record.values[-1]


_SHORT = {
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "accum",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "num_generations": "gens",
    "num_train_epochs": "epochs",
    "weight_decay": "decay",
    "lr_scheduler_type": "",
    "warmup_steps": "warmup",
    "target_modules": "on",
    "optim": "",
}


def short_param(name: str, value: Any) -> str:
    """A parameter in a few letters: `lr 2.1e-03`, `r 16`, `cosine`."""
    label = _SHORT.get(name, name.removeprefix("lora.").removeprefix("args."))
    if isinstance(value, float) and value:
        text = f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e") if abs(value) < 0.01 else f"{value:.3g}"
    elif isinstance(value, str):
        text = value if len(value) <= 14 else value[:13] + "…"
    else:
        text = str(value)
    return f"{label} {text}".strip()


def amount(count: int) -> str:
    """A number of tokens in three digits: 12345 -> "12.3k"."""
    for unit, size in (("M", 1_000_000), ("k", 1000)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def megabytes(count: int) -> str:
    """Bytes in three digits: 12345678 -> "12.3 MB"."""
    return f"{count / 1e6:.3g} MB"


def time_ticks(start_s: float, end_s: float, most: int = 8) -> list[float]:
    """Round times within a stretch, at most `most` of them."""
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 86400)
    step = next((s for s in steps if (end_s - start_s) / s <= most), (end_s - start_s) / most)
    return [k * step for k in range(math.ceil(start_s / step), math.floor(end_s / step) + 1)]


def clock(seconds: float) -> str:
    """90.0 -> `1:30`; parts of a second are written out: 1.5 -> `1.5 s`."""
    if abs(seconds - round(seconds)) > 1e-6:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
