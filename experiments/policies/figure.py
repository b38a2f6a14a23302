"""`figure.png` from `results.json`: regret against speed-up, a panel per group of tables.

python experiments/policies/figure.py [results.json] [figure.png]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.policies.measure import front  # noqa: E402
from rapidfire_automl.drawing import BEST, FAINT, INK, MUTED  # noqa: E402

OURS, OURS_FRONT, RIVAL = "#a5cdea", "#1659a8", "#5c6670"
MARKERS = ("x", "+", "v", "^", "s", "D", "P", "<", ">")
# Regret below this is drawn on a linear scale: 0 has to have a place.
LINEAR_BELOW = 0.003
COLUMNS = 3
# Where a label may stand, in points from its point, the best first.
PLACES = tuple(
    (x, y)
    for r in (7, 14, 24, 36, 50)
    for x, y in ((r, 0), (-r, 0), (r, -r / 2), (-r, -r / 2), (r, r / 2), (-r, r / 2))
)


@dataclass(frozen=True)
class Point:
    """A setting's means over a group."""

    name: str
    kind: str
    speedup: float
    regret: float


def points_of(results: Mapping[str, Any], group: Mapping[str, Any]) -> list[Point]:
    """The settings that have numbers in a group."""
    made = []
    for setting in results["settings"]:
        means = group["settings"].get(setting["label"])
        if means is not None:
            kind = "auto" if setting["name"] == results["config"]["auto"] else setting["kind"]
            made.append(Point(setting["name"], kind, means["speedup"], means["regret"]))
    return made


def draw(results: Mapping[str, Any], path: Path) -> Path | None:
    """Draw every group at the configuration's `readable_slots`; None if there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    slots = results["config"]["readable_slots"]
    groups = [group for group in results["groups"] if group["slots"] == slots]
    groups = [group for group in groups if points_of(results, group)]
    if not groups:
        return None
    columns = min(COLUMNS, len(groups))
    lines = -(-len(groups) // columns)
    width, height = 0.75 + 4.35 * columns, 1.3 + 3.55 * lines
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    rivals = [s["name"] for s in results["settings"] if s["kind"] != "ours"]
    markers = dict(zip(dict.fromkeys(rivals), MARKERS * 3))
    for place, group in enumerate(groups):
        line, column = divmod(place, columns)
        left, bottom = 0.72 + 4.35 * column, height - 1.3 - 3.55 * (line + 1) + 0.58
        axes = figure.add_axes((left / width, bottom / height, 3.85 / width, 2.7 / height))
        tables = f"{group['tables']} tables" if group["tables"] > 1 else "1 table"
        axes.set_title(f"{group['group']}, {tables}", loc="left", fontsize=10, color=INK, pad=6)
        _panel(axes, points_of(results, group), markers)
        if column == 0:
            axes.set_ylabel("normalised regret")
        axes.set_xlabel("speed-up: all chunks / chunks used")
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=MUTED, fontsize=9)
    _heading(figure, results, slots, markers)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _panel(axes: Any, points: Sequence[Point], markers: Mapping[str, str]) -> None:
    top = max(1.3 * max(point.regret for point in points), 0.1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.93, 1.35 * max(2.0, *(point.speedup for point in points)))
    ticks = [x for x in (1, 2, 4, 8, 16, 32) if x <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{x}×" for x in ticks])
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW, linscale=0.5)
    axes.set_ylim(-0.25 * LINEAR_BELOW, top)
    axes.set_yticks([y for y in (0, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3) if y <= top])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#cbd2d9")
    axes.tick_params(colors=INK, labelsize=8.5, color="#cbd2d9", length=3)
    axes.tick_params(axis="y", length=0)

    ours = [point for point in points if point.kind == "ours"]
    others = [point for point in points if point.kind in ("rival", "baseline")]
    for name in dict.fromkeys(point.name for point in points):
        line = sorted((p for p in points if p.name == name), key=lambda p: (p.speedup, p.regret))
        shade = OURS if line[0].kind == "ours" else "#c9ced4"
        axes.plot([p.speedup for p in line], [p.regret for p in line], color=shade, linewidth=0.9, zorder=2)
    _scatter(axes, ours, color=OURS, marker="o", s=17, zorder=3)
    for name, marker in markers.items():
        _scatter(
            axes, [p for p in others if p.name == name], color=RIVAL, marker=marker, s=26, zorder=4, linewidths=1.2
        )
    if others:
        edge = [others[i] for i in front([(p.speedup, p.regret) for p in others])]
        edge = [*edge, Point("", "", edge[-1].speedup, top)]
        axes.step([p.speedup for p in edge], [p.regret for p in edge], where="pre", color=RIVAL, linewidth=0.8,
                  linestyle=(0, (3, 2)), zorder=1)  # fmt: skip
    best = [points[i] for i in front([(p.speedup, p.regret) for p in points])]
    _scatter(axes, [p for p in best if p.kind == "ours"], color=OURS_FRONT, marker="o", s=24, zorder=5)
    auto = [point for point in points if point.kind == "auto"]
    _scatter(axes, auto, color=BEST, marker="*", s=130, zorder=6)
    named: dict[str, Point] = {p.name: p for p in reversed([*auto, *best]) if p.kind in ("ours", "auto")}
    _label(axes, [named[name] for name in reversed(named)], points)


def _scatter(axes: Any, points: Sequence[Point], **style: Any) -> None:
    if points:
        axes.scatter([p.speedup for p in points], [p.regret for p in points], clip_on=False, **style)


def _label(axes: Any, labelled: Sequence[Point], points: Sequence[Point]) -> None:
    """Names beside their points, where they hide neither each other nor a point; without such a place, no name."""
    from matplotlib.text import Text

    renderer = axes.figure.canvas.get_renderer()
    taken = [axes.transData.transform((p.speedup, p.regret)) for p in points]
    inside = axes.get_window_extent(renderer)
    boxes: list[Any] = []
    for point in labelled:
        for x, y in PLACES:
            text = axes.annotate(
                point.name, (point.speedup, point.regret), (x, y), textcoords="offset points", fontsize=8,
                ha="left" if x > 0 else "right" if x < 0 else "center", va="center", zorder=7,
                color=BEST if point.kind == "auto" else OURS_FRONT,
                arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3},
            )  # fmt: skip
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # an annotation's own holds the line too
            fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 + 20 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if fits and not any(box.overlaps(other) for other in boxes) and not any(box.contains(*xy) for xy in taken):
                boxes.append(box)
                break
            text.remove()


def _heading(figure: Any, results: Mapping[str, Any], slots: int, markers: Mapping[str, str]) -> None:
    """What the picture shows, how to read it, and the legend."""
    from matplotlib.lines import Line2D

    inch, left = 1 / figure.get_figheight(), 0.2 / figure.get_figwidth()
    auto = results["auto"]
    finding = "Regret against cost on recorded curves: lower right is better"
    if auto is not None:
        kept = round(auto["share"] * auto["cells"])
        finding = f"No rival beats {auto['setting']}, beyond the noise, in {kept} of {auto['cells']} comparisons"
    many = f"{slots} slots" if slots else "all trials together"
    figure.text(left, 1 - 0.17 * inch, finding, va="top", fontsize=13, weight="bold", color=INK)
    figure.text(
        left, 1 - 0.48 * inch,
        f"Means over {results['config']['seeds']} draws of trials and over a group's tables, {many}; lines join the "
        "settings of a policy; dashed: the front of baselines and rivals",
        va="top", fontsize=9, color=MUTED,
    )  # fmt: skip
    style: dict[str, Any] = {"linestyle": "none", "markersize": 5.5}
    handles = [
        *([Line2D([], [], color=BEST, marker="*", **(style | {"markersize": 11}))] if auto is not None else []),
        Line2D([], [], color=OURS_FRONT, marker="o", **style),
        Line2D([], [], color=OURS, marker="o", **style),
        *(Line2D([], [], color=RIVAL, marker=marker, **style) for marker in markers.values()),
    ]
    labels = [*([auto["setting"]] if auto is not None else []), "ours, on the front", "ours", *markers]
    figure.legend(
        handles, labels, ncols=-(-len(labels) // 2), loc="upper left", bbox_to_anchor=(left, 1 - 0.68 * inch),
        frameon=False, fontsize=8.5, labelcolor=INK, handlelength=1.2, handletextpad=0.4, columnspacing=1.4,
        borderpad=0, borderaxespad=0,
    )  # fmt: skip


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results.json"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_name("figure.png")
    drawn = draw(json.loads(source.read_text(encoding="utf-8")), target)
    print(drawn or "Nothing was played back: there is nothing to draw.")


if __name__ == "__main__":
    main()
