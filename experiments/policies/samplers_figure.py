"""`samplers.png` from `samplers.json`: mean normalised regret against what was spent, a line per sampler.

python experiments/policies/samplers_figure.py [samplers.json] [samplers.png]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from rapidfire_automl.drawing import BEST, FAINT, INK, MUTED  # noqa: E402

LINES = {
    "random": ("RandomSampler", "#9aa5b1"),
    "tpe": ("TPESampler (with constant_liar)", "#1c7ed6"),
    "tpe-no-liar": ("TPESampler, constant_liar=False", "#0b7285"),
    "gp": ("GPSampler", "#6741d9"),
    "chunk": ("ChunkSampler (ours)", BEST),
}
POLICIES = {"asha": "ASHA stops trials", "nop": "every trial runs to its end"}


def draw(results: Mapping[str, Any], path: Path) -> Path | None:
    """Draw a panel for each group and policy; None if nothing was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in results["compared"] if row["part"] == "all" and row["tables"]]
    panels = list(dict.fromkeys((row["group"], row["policy"]) for row in rows))
    if not panels:
        return None
    width, height = 0.75 + 3.1 * len(panels), 4.3
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    names = [name for name in LINES if any(row["sampler"] == name for row in rows)]
    for place, (group, policy) in enumerate(panels):
        axes = figure.add_axes(((0.7 + 3.1 * place) / width, 0.6 / height, 2.55 / width, (height - 1.95) / height))
        _frame(axes)
        here = {row["sampler"]: row for row in rows if (row["group"], row["policy"]) == (group, policy)}
        for name in (name for name in names if name in here):
            row, (_, colour) = here[name], LINES[name]
            thick = 2.4 if name == "chunk" else 1.6
            axes.plot(row["budgets"], row["regret"], color=colour, linewidth=thick, marker="o", markersize=4)
        ticks = next(iter(here.values()))["budgets"]
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_title(f"{group}: {POLICIES[policy]}", loc="left", fontsize=9.5, color=INK, pad=7)
        axes.set_xlabel("budget, whole trainings", color=MUTED, fontsize=9.5)
        if place == 0:
            axes.set_ylabel("normalised regret", color=MUTED, fontsize=9.5)
    _heading(figure, results, rows, names)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _frame(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#cbd2d9")
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, color="#cbd2d9", length=3)
    axes.tick_params(axis="y", length=0)


def _heading(figure: Any, results: Mapping[str, Any], rows: list[Any], names: list[str]) -> None:
    """What is shown, how to read it, and the legend in one line."""
    from matplotlib.lines import Line2D

    inch, left = 1 / figure.get_figheight(), 0.2 / figure.get_figwidth()
    seeds = {name: min(row["seeds"] for row in rows if row["sampler"] == name) for name in names}
    most = max(seeds.values())
    fewer = [f"{LINES[name][0]}: {count}" for name, count in seeds.items() if count < most]
    figure.text(
        left, 1 - 0.17 * inch, "What a sampler is worth at equal cost", va="top", fontsize=13, weight="bold", color=INK
    )
    figure.text(
        left, 1 - 0.48 * inch,
        f"Mean normalised regret of the best value within the budget, {results['config']['slots']} slots, {most} seeds"
        + (f" ({', '.join(fewer)})" if fewer else ""),
        va="top", fontsize=9, color=MUTED,
    )  # fmt: skip
    handles = [Line2D([], [], color=LINES[name][1], linewidth=2, marker="o", markersize=4) for name in names]
    figure.legend(
        handles, [LINES[name][0] for name in names], ncols=len(names), loc="upper left",
        bbox_to_anchor=(left, 1 - 0.68 * inch), frameon=False, fontsize=9, labelcolor=INK, handlelength=1.4,
        columnspacing=1.2, borderpad=0, borderaxespad=0,
    )  # fmt: skip


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "samplers.json"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".png")
    drawn = draw(json.loads(source.read_text(encoding="utf-8")), target)
    print(drawn or "Nothing was measured: there is nothing to draw.")


if __name__ == "__main__":
    main()
