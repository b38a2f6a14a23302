"""`figure.png` from `results.json`: decoding against its roofline, the speed-up of whole steps, and where a step goes.

python experiments/rollouts/figure.py [results.json] [figure.png]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.throughput.figure import RAMP, machine_of, plain, size_of  # noqa: E402
from rapidfire_automl.drawing import INK, MUTED  # noqa: E402

# What a trial-step consists of, from the bottom of a bar: generation in blues, training in greens, the rest in grey.
PARTS = {
    "generate": ("generate", "#1659a8"),
    "prepare": ("its preparation", "#0b2f66"),
    "prefill": ("prompts", "#1659a8"),
    "decode": ("decoding", "#1c7ed6"),
    "choose": ("drawing tokens", "#8ec9ea"),
    "forward": ("decoder forward", "#8fd3a8"),
    "head": ("LM head", "#d6efdc"),
    "backward": ("backward", "#3f9d63"),
    "rest": ("all else", "#adb5bd"),
}


def rows(results: Mapping[str, Any], base: str) -> list[str]:
    """A base's cells as rows of a Markdown table.

    | trials | generations | tokens/s, serial TRL | joint | decoding | step of a trial, ms, serial TRL | joint | step |
    """
    lines = []
    for cell in sorted(results["cells"], key=lambda cell: (cell["trials"], cell["generations"])):
        if cell["base"] != base or cell["step_speedup"] is None:
            continue
        columns = [str(cell["trials"]), str(cell["generations"])]
        columns += [f"{cell[way]['tokens_per_s']['median']:.0f}" for way in ("serial", "joint")]
        columns.append(_ratio(cell["decode_speedup"]))
        columns += [f"{1e3 * cell[way]['step_s']['median']:.0f}" for way in ("serial", "joint")]
        columns.append(_ratio(cell["step_speedup"]))
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def _ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.1f}x ({ratio['low']:.1f} to {ratio['high']:.1f})"


def draw(results: Mapping[str, Any], path: Path) -> Path | None:
    """Draw a row of panels per base; None if no cell was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = [cell for cell in results["cells"] if cell["step_speedup"] is not None]
    if not cells:
        return None
    bases = sorted({cell["base"] for cell in cells}, key=lambda name: results["bases"][name]["parameters"])
    generations = sorted({cell["generations"] for cell in cells})
    shades = RAMP[2:][-len(generations) :] if len(generations) <= 4 else RAMP
    colours = {n: shades[min(i, len(shades) - 1)] for i, n in enumerate(generations)}
    widths, gap, left, panel, between = (3.9, 3.2, 3.7), 0.75, 0.8, 2.7, 1.0
    width = left + sum(widths) + 2 * gap + 1.45
    height = 1.35 + (panel + between) * len(bases)
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    for place, base in enumerate(bases):
        bottom = height - 1.35 - (panel + between) * place - panel
        starts = [left + sum(widths[:i]) + gap * i for i in range(3)]
        decoding, steps, parts = (
            figure.add_axes((start / width, bottom / height, w / width, panel / height))
            for start, w in zip(starts, widths, strict=True)
        )
        mine = [cell for cell in cells if cell["base"] == base]
        _decoding(decoding, mine, colours)
        _steps(steps, mine, colours)
        _parts(parts, mine, generations[0])
        size = size_of(results["bases"][base]["parameters"])
        decoding.set_title(f"{base}, {size}: tokens a second", loc="left", fontsize=10, color=INK, pad=8)
        steps.set_title("speed-up of a GRPO step", loc="left", fontsize=10, color=INK, pad=8)
        title = f"where a trial's step goes, {generations[0]} generations, ms"
        parts.set_title(title, loc="left", fontsize=10, color=INK, pad=8)
    _heading(figure, results, cells, colours)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _trials_axis(axes: Any, cells: Sequence[Any]) -> None:
    counts = sorted({cell["trials"] for cell in cells})
    axes.set_xscale("log", base=2)
    axes.set_xlim(counts[0] / 1.25, max(counts[-1] * 1.25, counts[0] * 2))
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("trials")
    plain(axes)


def _lines(cells: Sequence[Any], colours: Mapping[int, str]) -> list[tuple[str, list[Any]]]:
    return [
        (colour, sorted((cell for cell in cells if cell["generations"] == n), key=lambda cell: cell["trials"]))
        for n, colour in colours.items()
    ]


def _decoding(axes: Any, cells: Sequence[Any], colours: Mapping[int, str]) -> None:
    """Joint: solid; serial: dashed; the roofline of the joint batch: dotted."""
    for colour, line in _lines(cells, colours):
        x = [cell["trials"] for cell in line]
        joint, serial = ([cell[way]["tokens_per_s"]["median"] for cell in line] for way in ("joint", "serial"))
        most = [cell["roofline"]["joint"]["rows"] / cell["roofline"]["joint"]["bound_s"] for cell in line]
        axes.plot(x, most, color=colour, linewidth=1.2, linestyle=(0, (1, 2)))
        axes.plot(x, serial, color=colour, linewidth=1.4, linestyle=(0, (4, 3)))
        axes.plot(x, joint, color=colour, linewidth=2, marker="o", markersize=4.5, markeredgecolor="white", zorder=3)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _trials_axis(axes, cells)


def _steps(axes: Any, cells: Sequence[Any], colours: Mapping[int, str]) -> None:
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    for colour, line in _lines(cells, colours):
        x = [cell["trials"] for cell in line]
        low, middle, high = ([cell["step_speedup"][name] for cell in line] for name in ("low", "median", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, middle, color=colour, linewidth=2, marker="o", markersize=4.5, markeredgecolor="white", zorder=3)
    axes.set_ylim(0, 1.08 * max(1.0, *(cell["step_speedup"]["high"] for cell in cells)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    _trials_axis(axes, cells)


def _parts(axes: Any, cells: Sequence[Any], generations: int) -> None:
    line = sorted((cell for cell in cells if cell["generations"] == generations), key=lambda cell: cell["trials"])
    bars = [(f"joint\n{cell['trials']}", cell["joint"]["parts"]) for cell in line]
    if line:
        bars.insert(0, ("serial", line[-1]["serial"]["parts"]))
    for place, (_, parts) in enumerate(bars):
        bottom = 0.0
        for name, (_, colour) in PARTS.items():
            ms = 1e3 * max(0.0, parts.get(name, 0.0))
            axes.bar(place, ms, bottom=bottom, width=0.72, color=colour, edgecolor="white", linewidth=0.4)
            if "generate" in parts and ms:  # serial TRL has but these two
                label, ink = ("generate", "white") if name == "generate" else ("training,\nall else", INK)
                axes.text(place, bottom + ms / 2, label, ha="center", va="center", fontsize=8, color=ink)
            bottom += ms
    axes.set_xticks(range(len(bars)), [name for name, _ in bars])
    plain(axes)
    handles = [(colour, label) for name, (label, colour) in PARTS.items() if name != "generate"]
    for place, (colour, label) in enumerate(reversed(handles)):
        y = 0.97 - 0.115 * place
        axes.text(1.02, y, "■", transform=axes.transAxes, color=colour, fontsize=10, va="center")
        axes.text(1.075, y, label, transform=axes.transAxes, color=INK, fontsize=8.5, va="center")


def _heading(figure: Any, results: Mapping[str, Any], cells: Sequence[Any], colours: Mapping[int, str]) -> None:
    """What the picture shows, how to read it, and the legend in one line."""
    from matplotlib.lines import Line2D

    step = max(cells, key=lambda cell: cell["step_speedup"]["median"])
    decoding = max(cell["decode_speedup"]["median"] for cell in cells)
    inch, left = 1 / figure.get_figheight(), 0.2 / figure.get_figwidth()
    many = "1 trial" if step["trials"] == 1 else f"{step['trials']} trials"
    figure.text(
        left, 1 - 0.17 * inch,
        f"GRPO steps up to {step['step_speedup']['median']:.1f}× serial TRL ({many}, {step['generations']} "
        f"generations), decoding up to {decoding:.1f}×",
        va="top", fontsize=13, weight="bold", color=INK,
    )  # fmt: skip
    config = results["config"]
    rounds = min(len(cell["rounds"]) for cell in cells)
    figure.text(
        left, 1 - 0.48 * inch,
        f"Medians of {rounds} or more interleaved rounds, bands: 95% interval; prompts of {config['prompt_tokens']} "
        f"and answers of {config['new_tokens']} tokens, {config['dtype']}, LoRA r={config['lora']['r']}, "
        f"{machine_of(results)}",
        va="top", fontsize=9, color=MUTED,
    )  # fmt: skip
    handles = [Line2D([], [], color=colour, linewidth=2, marker="o", markersize=4.5) for colour in colours.values()]
    labels = [f"{n} generations" if n == max(colours) else str(n) for n in colours]
    for style, label in (((0, (4, 3)), "serial TRL"), ((0, (1, 2)), "roofline of the joint batch")):
        handles.append(Line2D([], [], color=MUTED, linewidth=1.4, linestyle=style))
        labels.append(label)
    figure.legend(
        handles, labels, ncols=len(labels), loc="upper left", bbox_to_anchor=(left, 1 - 0.66 * inch), frameon=False,
        fontsize=9, labelcolor=INK, handlelength=1.6, columnspacing=1.2, borderpad=0, borderaxespad=0,
    )  # fmt: skip


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results.json"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_name("figure.png")
    results = json.loads(source.read_text(encoding="utf-8"))
    for base in results["bases"]:
        print(*rows(results, base), sep="\n")
    print(draw(results, target) or "No cell was measured: there is nothing to draw.")


if __name__ == "__main__":
    main()
