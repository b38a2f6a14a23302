"""Two pictures of a search: how every trial learned, and who trained when.

Both use matplotlib's objects without its global state, so they can be drawn from any thread and beside a user's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from rapidfire_automl.drawing import (
    BEST,
    FAILED,
    FAINT,
    INK,
    MUTED,
    clock,
    colours_of,
    frame,
    rank_key,
    save,
    short_param,
    time_ticks,
    title,
)
from rapidfire_automl.events import ENDED_WITH_SEARCH
from rapidfire_automl.rankings import has_failed
from rapidfire_policies.base import TrialState
from rapidfire_policies.wording import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rapidfire_automl.records import TrialRecord

_MOST_LABELS = 6


def draw_curves(
    path: Path,
    records: Mapping[int, TrialRecord],
    *,
    chunks: int,
    best: int | None,
    base_value: float | None,
    maximize: bool = False,
    metric: str = "value on held-out examples",
) -> Path:
    """Draw one line a trial: survivors in colour with their number, stopped ones thin and grey up to a cross.

    Values far from where trials end up (diverged ones) are left outside the picture and marked with an arrow at its
    edge; NaN ends a line.

    Args:
        path: Where the PNG goes.
        records: The trials.
        chunks: Chunks of a whole trial.
        best: The best trial, drawn on top.
        base_value: The untrained base's value: the dashed line, and every curve's start.
        maximize: Whether higher is better.
        metric: The vertical axis's title.

    Returns:
        `path`.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    shown = {n: r for n, r in sorted(records.items()) if r.values}
    if base_value is not None and not math.isfinite(base_value):
        base_value = None
    figure, axes = frame(8.6, 4.9)
    low, high, log = limits(shown, base_value, maximize)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(low, high)
    axes.set_xlim(0, chunks)
    colours = colours_of(shown, best, maximize=maximize)
    ends: list[tuple[float, str, str, bool]] = []
    for number in sorted(shown, key=lambda n: (n == best, shown[n].state is TrialState.COMPLETE)):
        record, colour = shown[number], colours[number]
        kept = record.state is not TrialState.STOPPED and record.state is not TrialState.FAILED
        xs, ys = _points(record.values, base_value)
        width = 2.8 if number == best else 1.8 if kept else 1.0
        axes.plot(xs, ys, color=colour, linewidth=width, zorder=4 if number == best else 3 if kept else 2,
                  solid_capstyle="round", solid_joinstyle="round")  # fmt: skip
        mark_end(axes, xs, ys, (low, high), record, colour, best=number == best)
        if kept and xs and math.isfinite(ys[-1]) and low <= ys[-1] <= high and xs[-1] == chunks:
            ends.append((ys[-1], trial_name(number, record, shown), colour, number == best))
    if base_value is not None:
        axes.axhline(base_value, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=2.5)
        axes.annotate("untrained base", (chunks, base_value), xytext=(16, 0), textcoords="offset points",
                      va="center", color=INK, fontsize=9, annotation_clip=False)  # fmt: skip
    _label_ends(axes, ends, chunks, base_value, maximize=maximize)
    axes.set_xticks(range(0, chunks + 1, max(1, math.ceil(chunks / 16))))
    axes.set_xlabel("chunks trained")
    axes.set_ylabel(f"{metric}, {'higher' if maximize else 'lower'} is better" + (" (log)" if log else ""))
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    title(figure, _curves_title(shown, best, base_value), _legend_line(shown))
    return save(figure, path)


def draw_timeline(
    path: Path,
    records: Mapping[int, TrialRecord],
    *,
    chunks: int,
    slots: int,
    best: int | None,
    maximize: bool = False,
    chunk_ends_s: Mapping[int, Sequence[float]] | None = None,
) -> Path:
    """Draw who trained when: a row a trial, a bar a chunk, and above them how many slots were busy.

    Args:
        path: Where the PNG goes.
        records: The trials; `spans` are the times in which they held a slot, in seconds.
        chunks: Chunks of a whole trial.
        slots: Trials that train at a time.
        best: The best trial.
        maximize: Whether higher is better.
        chunk_ends_s: Trial number -> the times at which its chunks ended, on the clock of `spans`; without it a span
            is one bar.

    Returns:
        `path`.
    """
    shown = {n: r for n, r in sorted(records.items()) if r.spans}
    rows = max(len(shown), 1)
    height = min(1.9 + 0.27 * rows, 14.0)
    figure, axes = frame(8.6, height, top_in=1.28)
    colours = colours_of(shown, best, maximize=maximize)
    end_s = max((end for r in shown.values() for _, end in r.spans), default=1.0)
    start_s = min((start for r in shown.values() for start, _ in r.spans), default=0.0)
    gap_s = (end_s - start_s) * 0.0022
    for row, (number, record) in enumerate(shown.items()):
        spans = sorted(record.spans)
        for (_, left_s), (back_s, _) in pairwise(spans):
            if back_s - left_s > 4 * gap_s:
                axes.plot([left_s, back_s], [row, row], color=colours[number], linewidth=1.2,
                          linestyle=(0, (1, 2)), zorder=1)  # fmt: skip
        for start, end in _bars(spans, (chunk_ends_s or {}).get(number, ())):
            axes.barh(row, max(end - start - gap_s, gap_s), left=start, height=0.68, color=colours[number],
                      linewidth=0, zorder=2)  # fmt: skip
        text, colour = _ending(record, chunks, best=number == best)
        axes.annotate(text, (spans[-1][1], row), xytext=(6, 0), textcoords="offset points", va="center",
                      color=colour, fontsize=8.5, weight="bold" if number == best else "normal",
                      annotation_clip=False)  # fmt: skip
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xlim(start_s, end_s + (end_s - start_s) * 0.02)
    axes.set_yticks(range(len(shown)), [f"trial {number}" for number in shown])
    for label, number in zip(axes.get_yticklabels(), shown):
        label.set_color(colours[number] if number == best else INK)
        label.set_fontweight("bold" if number == best else "normal")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xticks(ticks := time_ticks(start_s, end_s), [clock(tick) for tick in ticks])
    axes.set_xlabel("time since the start")
    _busy_strip(figure, axes, shown, slots)
    used = sum(len(r.values) for r in records.values())
    full = chunks * len(records)
    is_cut_short = any(record.error == ENDED_WITH_SEARCH for record in records.values())
    saved = f", {1 - used / full:.0%} saved" if full and used < full and not is_cut_short else ""
    title(
        figure,
        f"Who trained when: {used} of {counted(full, 'chunk')}{saved}",
        "One bar a chunk; × stopped by the policy, ● trained to the end.",
    )
    return save(figure, path)


def _bars(spans: Sequence[tuple[float, float]], chunk_ends_s: Sequence[float]) -> list[tuple[float, float]]:
    """The spans, cut where chunks ended within them."""
    bars = []
    for start, end in spans:
        cuts = [start, *(t for t in chunk_ends_s if start < t < end), end]
        bars += list(pairwise(cuts))
    # Between a chunk's end and the slot's release lies the verdict: a sliver that is no chunk.
    return [bar for bar in bars if bar[1] - bar[0] > 0.02 * max(b - a for a, b in bars)]


def _busy_strip(figure: Figure, axes: Axes, shown: Mapping[int, TrialRecord], slots: int) -> None:
    """The busy slots over time, as a thin strip that shares the rows' time axis."""
    box = axes.get_position()
    inch = 1 / figure.get_figheight()
    strip = figure.add_axes((box.x0, box.y1 + 0.06 * inch, box.width, 0.3 * inch), sharex=axes)
    changes = sorted((time, step) for r in shown.values() for s, e in r.spans for time, step in ((s, 1), (e, -1)))
    times: list[float] = []
    busy: list[int] = []
    now = 0
    for time, step in changes:
        now += step
        if times and times[-1] == time:
            busy[-1] = now
        else:
            times.append(time)
            busy.append(now)
    strip.fill_between(times, busy, step="post", color="#cbd2d9", linewidth=0)
    strip.set_ylim(0, slots)
    strip.set_yticks([0, slots], ["", str(slots)])
    strip.set_ylabel("slots\nbusy", rotation=0, ha="right", va="center", fontsize=8.5, color=MUTED)
    strip.yaxis.set_label_coords(-0.035, 0.45)
    strip.tick_params(length=0, labelsize=8, labelbottom=False, colors=MUTED)
    for side in strip.spines.values():
        side.set_visible(False)


def limits(shown: Mapping[int, TrialRecord], base_value: float | None, maximize: bool) -> tuple[float, float, bool]:
    """The vertical range, and whether it is logarithmic.

    The bad end lies a little beyond the base and the better half of the trials that were kept: one that went further
    has diverged and would only flatten the others. A log axis helps where good values lie a factor of 8 under that.
    """
    values = [v for r in shown.values() for v in r.values if math.isfinite(v)]
    if not values:
        return (0.0, 1.0, False) if base_value is None else (base_value - 1, base_value + 1, False)
    complete = [r for r in shown.values() if r.state is TrialState.COMPLETE]
    complete.sort(key=lambda r: rank_key(r, maximize))
    kept = [v for r in complete[: (len(complete) + 1) // 2] for v in r.values if math.isfinite(v)]
    anchor = [*(kept or values), *([base_value] if base_value is not None else [])]
    span = max(anchor) - min(anchor) or abs(anchor[0]) * 0.1 or 1.0
    if maximize:
        low, high = max(min(values), min(anchor) - 0.35 * span), max([*values, *anchor])
    else:
        low, high = min([*values, *anchor]), min(max([*values, *anchor]), max(anchor) + 0.35 * span)
    if not maximize and low > 0 and high / low > 8:
        return low / 1.15, high * 1.1, True
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room, False


def _points(values: Sequence[float], base_value: float | None) -> tuple[list[float], list[float]]:
    """A curve from the base at chunk 0 to the trial's last finite value."""
    xs: list[float] = []
    ys: list[float] = []
    if base_value is not None:
        xs, ys = [0.0], [base_value]
    for k, value in enumerate(values, start=1):
        if not math.isfinite(value):
            break
        xs.append(float(k))
        ys.append(value)
    return xs, ys


def mark_end(
    axes: Axes,
    xs: Sequence[float],
    ys: Sequence[float],
    limits: tuple[float, float],
    record: TrialRecord,
    colour: str,
    *,
    best: bool,
) -> None:
    """A dot for a trial that was kept, a cross for a stopped one, an arrow where a curve leaves the picture."""
    if not xs:
        return
    low, high = limits
    outside = next((i for i, y in enumerate(ys) if not low <= y <= high), None)
    if outside is not None:
        edge = high if ys[outside] > high else low
        start = max(outside - 1, 0)
        share = (edge - ys[start]) / (ys[outside] - ys[start]) if ys[outside] != ys[start] else 0.0
        x = xs[start] + share * (xs[outside] - xs[start])
        axes.plot([x], [edge], marker="^" if edge == high else "v", color=MUTED, markersize=6, clip_on=False, zorder=5)
        return
    stopped = record.state is TrialState.STOPPED
    failed = has_failed(record) or len(xs) - (xs[0] == 0.0) < len(record.values)
    if failed:
        axes.plot(xs[-1], ys[-1], marker="x", color=FAILED, markersize=6, markeredgewidth=1.6, zorder=5, clip_on=False)
    elif stopped:
        axes.plot(xs[-1], ys[-1], marker="x", color=MUTED, markersize=5.5, markeredgewidth=1.4, zorder=5, clip_on=False)
    else:
        axes.plot(xs[-1], ys[-1], marker="o", color=colour, markersize=7 if best else 4.5, markeredgecolor="white",
                  markeredgewidth=1.0, zorder=6, clip_on=False)  # fmt: skip


def _label_ends(
    axes: Axes, ends: list[tuple[float, str, str, bool]], chunks: int, base_value: float | None, *, maximize: bool
) -> None:
    """Name the survivors beside their ends, best first when there are too many, pushed apart where they collide."""
    low, high = axes.get_ylim()
    log = axes.get_yscale() == "log"

    def to_unit(y: float) -> float:
        if log:
            return (math.log(y) - math.log(low)) / (math.log(high) - math.log(low))
        return (y - low) / (high - low)

    height = axes.get_position().height * axes.figure.get_figheight()  # type: ignore[union-attr]
    need = 0.165 / height
    ends = sorted(ends, key=lambda end: (not end[3], -end[0] if maximize else end[0]))[:_MOST_LABELS]
    ends.sort(key=lambda end: end[0])
    spots = [to_unit(end[0]) for end in ends]
    for i in range(1, len(spots)):
        spots[i] = max(spots[i], spots[i - 1] + need)
    ceiling = 1.02
    if base_value is not None and ends and to_unit(base_value) > to_unit(ends[-1][0]):
        ceiling = min(ceiling, to_unit(base_value) - need)
    for i in range(len(spots) - 1, -1, -1):
        spots[i] = min(spots[i], ceiling)
        ceiling = spots[i] - need
    for (y, name, colour, is_best), spot in zip(ends, spots):
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 4}
        moved = abs(spot - to_unit(y)) * height > 0.04
        axes.annotate(
            name, (chunks, y), xytext=(1 + 0.22 / _inches(axes), spot), textcoords="axes fraction", va="center",
            color=colour, fontsize=9, weight="bold" if is_best else "normal", annotation_clip=False,
            arrowprops=leader if moved else None,
        )  # fmt: skip


def _inches(axes: Axes) -> float:
    return axes.get_position().width * axes.figure.get_figwidth()  # type: ignore[union-attr]


def trial_name(number: int, record: TrialRecord, shown: Mapping[int, TrialRecord]) -> str:
    """The number and the first two parameters that differ between trials: `#7  lr 4.1e-4 · r 16`."""
    varied = [name for name in record.params if len({repr(r.params.get(name)) for r in shown.values()}) > 1]
    parts = [short_param(name, record.params[name]) for name in varied[:2]]
    return f"#{number}  " + " · ".join(parts) if parts else f"#{number}"


def _ending(record: TrialRecord, chunks: int, *, best: bool) -> tuple[str, str]:
    """How a trial ended, for the end of its row."""
    done = len(record.values)
    value = f"{record.values[-1]:.3g}" if record.values and math.isfinite(record.values[-1]) else "not finite"
    if best:
        return f"● {value}  best", BEST
    if record.state is TrialState.COMPLETE:
        return f"● {value}", INK
    if record.state is TrialState.STOPPED:
        return f"× {done}/{chunks}", MUTED
    if has_failed(record):
        return f"failed at {done}/{chunks}", FAILED
    if record.state is TrialState.PAUSED:
        return f"paused at {done}/{chunks}", MUTED
    return f"{done}/{chunks}", MUTED


def _curves_title(shown: Mapping[int, TrialRecord], best: int | None, base_value: float | None) -> str:
    if best is None:
        return f"{counted(len(shown), 'trial')}, none has completed"
    value = f"Best of {counted(len(shown), 'trial')}: #{best} at {shown[best].values[-1]:.3g}"
    return value + (f", against {base_value:.3g} untrained" if base_value is not None else "")


def _legend_line(shown: Mapping[int, TrialRecord]) -> str:
    cut_short = [record.error == ENDED_WITH_SEARCH for record in shown.values()]
    states = [TrialState.RUNNING if cut else r.state for cut, r in zip(cut_short, shown.values(), strict=True)]
    parts = []
    for state, text in (
        (TrialState.COMPLETE, "trained to the end"),
        (TrialState.STOPPED, "stopped early (×)"),
        (TrialState.PAUSED, "paused"),
        (TrialState.RUNNING, "cut short"),
        (TrialState.FAILED, "failed"),
    ):
        if count := states.count(state):
            parts.append(f"{count} {text}")
    return ", ".join(parts)
