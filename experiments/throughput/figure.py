"""`figure.png` from `results.json`: speed-up over serial TRL against tokens per trial, a line per number of trials.

python experiments/throughput/figure.py [results.json] [figure.png]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from rapidfire_automl.drawing import FAINT, INK, MUTED  # noqa: E402

# Light to dark with the number of trials, in the order of the legend.
RAMP = ("#adb5bd", "#8ec9ea", "#4dabe0", "#1c7ed6", "#1659a8", "#0b2f66")


def draw(results: Mapping[str, Any], path: Path) -> Path | None:
    """Draw a panel per base; None if no cell was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = [cell for cell in results["cells"] if cell["speedup"] is not None]
    if not cells:
        return None
    bases = sorted({cell["base"] for cell in cells}, key=lambda name: -results["bases"][name]["parameters"])
    counts = sorted({cell["trials"] for cell in cells})
    shades = RAMP[-len(counts) :] if len(counts) <= len(RAMP) else RAMP
    colours = {n: shades[min(i, len(shades) - 1)] for i, n in enumerate(counts)}
    panel = 3.75 if len(bases) > 1 else 5.6
    width, height = 0.97 + (panel + 0.65) * len(bases) - 0.65, 4.6
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    top = max(cell["speedup"]["high"] for cell in cells)
    for place, base in enumerate(bases):
        left = 0.72 + (panel + 0.65) * place
        axes = figure.add_axes((left / width, 0.62 / height, panel / width, (height - 1.85) / height))
        _panel(axes, [cell for cell in cells if cell["base"] == base], colours, top)
        size = size_of(results["bases"][base]["parameters"])
        axes.set_title(f"{base}, {size} parameters", loc="left", fontsize=10, color=INK, pad=8)
        axes.set_xlabel("tokens of a trial's step")
        if place == 0:
            axes.set_ylabel("speed-up over serial TRL")
    _heading(figure, results, cells, counts, colours)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _panel(axes: Any, cells: list[Any], colours: Mapping[int, str], top: float) -> None:
    tokens = sorted({cell["tokens"] for cell in cells})
    axes.set_xscale("log", base=2)
    axes.set_xlim(tokens[0] / 1.25, max(tokens[-1] * 1.25, tokens[0] * 2))
    axes.set_xticks(tokens, [str(value) for value in tokens])
    axes.minorticks_off()
    axes.set_ylim(0, 1.08 * max(top, 1.0))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    plain(axes)
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    for n, colour in colours.items():
        line = sorted((cell for cell in cells if cell["trials"] == n), key=lambda cell: cell["tokens"])
        x = [cell["tokens"] for cell in line]
        low, middle, high = ([cell["speedup"][name] for cell in line] for name in ("low", "median", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, middle, color=colour, linewidth=2, marker="o", markersize=4.5, markeredgecolor="white", zorder=3)


def plain(axes: Any) -> None:
    """A panel's axes: a line below, faint lines across."""
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#cbd2d9")
    axes.tick_params(colors=INK, labelsize=9, color="#cbd2d9", length=3)
    axes.tick_params(axis="y", length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=MUTED, fontsize=9.5)


def size_of(parameters: float) -> str:
    """`135M`, `8.0B`."""
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def machine_of(results: Mapping[str, Any]) -> str:
    """What it was measured on, in short."""
    if results["config"]["device"] != "cpu":
        return str(results["hardware"]["gpu"])
    cpus = results["hardware"]["cpus"]
    return "1 CPU" if cpus == 1 else f"{cpus} CPUs"


def _heading(figure: Any, results: Mapping[str, Any], cells: list[Any], counts: list[int], colours: Any) -> None:
    """What the picture shows, how to read it, and the legend in one line."""
    from matplotlib.lines import Line2D

    best = max(cells, key=lambda cell: cell["speedup"]["median"])
    ratio = best["speedup"]["median"]
    inch, left = 1 / figure.get_figheight(), 0.2 / figure.get_figwidth()
    many = "1 trial" if best["trials"] == 1 else f"{best['trials']} trials"
    figure.text(
        left, 1 - 0.17 * inch, f"Up to {ratio:.1f}× serial TRL: {many}, {best['tokens']} tokens a step",
        va="top", fontsize=13, weight="bold", color=INK,
    )  # fmt: skip
    rounds = min(len(cell["rounds"]) for cell in cells)
    figure.text(
        left, 1 - 0.48 * inch,
        f"Medians of {rounds} or more interleaved rounds, bands: 95% interval; "
        f"{results['config']['dtype']}, LoRA r={results['config']['lora']['r']}, {machine_of(results)}",
        va="top", fontsize=9, color=MUTED,
    )  # fmt: skip
    handles = [Line2D([], [], color=colours[n], linewidth=2, marker="o", markersize=4.5) for n in counts]
    labels = [f"{n} trial" if n == 1 else (f"{n} trials" if n == counts[-1] else str(n)) for n in counts]
    figure.legend(
        handles, labels, ncols=len(counts), loc="upper left", bbox_to_anchor=(left, 1 - 0.66 * inch), frameon=False,
        fontsize=9, labelcolor=INK, handlelength=1.4, columnspacing=1.2, borderpad=0, borderaxespad=0,
    )  # fmt: skip


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results.json"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_name("figure.png")
    drawn = draw(json.loads(source.read_text(encoding="utf-8")), target)
    print(drawn or "No cell was measured: there is nothing to draw.")


if __name__ == "__main__":
    main()
