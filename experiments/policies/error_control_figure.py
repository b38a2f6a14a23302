"""`error_control.png` from `error_control.json`: rates of false elimination over alpha, and power by examples.

python experiments/policies/error_control_figure.py [error_control.json] [error_control.png]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "policies")) if path not in sys.path]

from rapidfire_automl.drawing import FAINT, INK, MUTED  # noqa: E402

COLOURS = {"PairedRace": "#1c7ed6", "BettingRace": "#2b8a3e", "Wilcoxon": "#c2410c"}
FLOOR = 0.003
"""Where rates over alpha of 0, or nearly, are drawn."""


def draw_figure(results: Mapping[str, Any], path: Path) -> Path:
    """Draw both panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.9), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    left = figure.add_axes((0.075, 0.125, 0.40, 0.66))
    right = figure.add_axes((0.555, 0.125, 0.33, 0.66))
    _rates(left, results)
    _power(right, results)
    for axes in (left, right):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color("#cbd2d9")
        axes.tick_params(colors=INK, labelsize=9, color="#cbd2d9")
        axes.set_axisbelow(True)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=MUTED, fontsize=9.5)
    hold = ", ".join(f"{name} {s['hold']} of {s['cells']}" for name, s in results["summary"].items())
    config = results["config"]
    figure.text(
        0.02,
        0.965,
        "Do races keep their alpha, and what does it cost?",
        va="top",
        fontsize=13,
        weight="bold",
        color=INK,
    )
    figure.text(0.02, 0.9, f"Cells whose 99% lower bound is at most alpha: {hold}", va="top", fontsize=9.5, color=MUTED)
    left.set_title(
        f"False eliminations, {config['searches']} null searches a point", loc="left", fontsize=10, color=INK
    )
    effect = f"Stopping a trial worse by {config['effect_sd']:g} SD, alpha {config['power_alpha']:g}"
    right.set_title(effect, loc="left", fontsize=10, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _rates(axes: Any, results: Mapping[str, Any]) -> None:
    rng = np.random.default_rng(0)
    alphas = results["config"]["alphas"]
    ticks, labels = [], []
    for place, policy in enumerate(COLOURS):
        for group, alpha in enumerate(alphas):
            x = place * (len(alphas) + 1) + group
            cells = [c for c in results["cells"] if c["policy"] == policy and c["alpha"] == alpha]
            ticks.append(x)
            labels.append(f"{alpha:g}".removeprefix("0"))
            for trials, marker in zip(results["config"]["trials"], ("o", "^"), strict=False):
                y = [max(FLOOR, c["rate"] / alpha) for c in cells if c["trials"] == trials]
                spread = x + rng.uniform(-0.28, 0.28, len(y))
                axes.scatter(spread, y, s=13, marker=marker, color=COLOURS[policy], alpha=0.55, linewidths=0)
        middle = place * (len(alphas) + 1) + (len(alphas) - 1) / 2
        axes.text(middle, 160, policy, ha="center", fontsize=9.5, weight="bold", color=COLOURS[policy])
    axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yscale("log")
    axes.set_ylim(FLOOR / 1.6, 260)
    axes.set_yticks([FLOOR, 0.01, 0.1, 1, 10, 100], ["none", "0.01", "0.1", "1", "10", "100"])
    axes.minorticks_off()
    axes.set_xticks(ticks, labels)
    axes.set_xlabel("alpha  (circles: 2 trials, triangles: 16)")
    axes.set_ylabel("rate / alpha")
    axes.grid(axis="y", color=FAINT, linewidth=0.8)


def _power(axes: Any, results: Mapping[str, Any]) -> None:
    ends = []
    for curve in results["power"]:
        # One kind a policy, so that lines can be told apart: the one it can be used on.
        if curve["kind"] != "binary" or curve["policy"] == "Wilcoxon":
            continue
        few = curve["trials"] == min(results["config"]["trials"])
        colour = COLOURS[curve["policy"]]
        axes.plot(curve["examples"], curve["stopped"], color=colour, linewidth=2, linestyle="-" if few else (0, (4, 2)))
        ends.append((curve["examples_50"], f"{curve['policy']}, {curve['trials']} trials", colour, few))
    axes.set_ylim(0, 1.03)
    axes.set_xlim(0, max(results["config"]["power_examples"]))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("examples (binary scores)")
    axes.set_ylabel("stopped at one look")
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, linewidth=2, linestyle="-" if few else (0, (4, 2))) for _, _, c, few in ends]
    names = [f"{name}: half by {half:.0f}" if half else name for half, name, _, _ in ends]
    axes.legend(handles, names, loc="lower right", frameon=False, fontsize=8.5, labelcolor=INK, handlelength=2)


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "error_control.json"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".png")
    print(draw_figure(json.loads(source.read_text(encoding="utf-8")), target))


if __name__ == "__main__":
    main()
