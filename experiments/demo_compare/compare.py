"""When each side had a trial as good as the best of plain TRL, and a picture of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TOLERANCES = (0.0, 0.01, 0.05)
"""Of what the best gained over the untrained base."""


def compare(ours: Mapping[str, Any], serial: Mapping[str, Any]) -> dict[str, Any]:
    """When each side had a trial as good as the best of plain TRL; null where it never had, or is not known."""
    sign = -1.0 if ours["direction"] == "maximize" else 1.0
    values = [sign * trial["value"] for trial in serial["trials"] if trial["value"] is not None]
    found: dict[str, Any] = {"wall_ratio": _ratio(serial["wall_s"], ours["wall_s"]), "as_good": []}
    base = ours["base_value"]
    if not values or base is None or not math.isfinite(base):
        return found
    best, untrained = min(values), sign * base

    def first(points: Sequence[Mapping[str, Any]], target: float, key: str) -> Mapping[str, Any]:
        good = [p for p in points if _is_number(p["value"]) and sign * p["value"] <= target]
        return min(good, key=lambda p: p[key], default={key: None, "trial": None, "chunk": None})

    serial_points = [{**point, "trial": t["number"]} for t in serial["trials"] for point in t["values"]]
    for tolerance in TOLERANCES:
        target = best + tolerance * max(untrained - best, 0.0)
        reached, finished = first(ours["reached"], target, "time_s"), first(ours["finished"], target, "time_s")
        plain = first(serial_points, target, "time_s")
        found["as_good"].append(
            {
                "tolerance": tolerance,
                "target": sign * target,
                "ours_reached_s": reached["time_s"],
                "ours_trial": reached["trial"],
                "ours_chunk": reached["chunk"],
                "ours_finished_s": finished["time_s"],
                "serial_reached_s": plain["time_s"],
                "serial_trial": plain["trial"],
                "full_serial_over_reached": _ratio(serial["wall_s"], reached["time_s"]),
                "full_serial_over_finished": _ratio(serial["wall_s"], finished["time_s"]),
                "serial_reached_over_reached": _ratio(plain["time_s"], reached["time_s"]),
            }
        )
    finals = {t["number"]: t["value"] for t in serial["trials"] if t["value"] is not None}
    both = [abs(p["value"] / finals[p["trial"]] - 1) for p in ours["finished"] if finals.get(p["trial"])]
    found["final_values_differ_by"] = max(both, default=None) if serial["configurations"] == "same" else None
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def draw(results: Mapping[str, Any], path: Path) -> Path | None:
    """The best value so far over time, ours at chunks' ends and plain TRL's where it evaluated."""
    from rapidfire_automl.drawing import BEST, FAINT, INK, MUTED, frame, save, title

    ours, serial = results["ours"], results["serial"]
    if not ours or not serial or not ours["reached"] or not serial["trials"]:
        return None
    maximize = ours["direction"] == "maximize"
    figure, axes = frame(8.4, 4.4)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    points = [point for trial in serial["trials"] for point in trial["values"]]
    ends = []
    for label, series, end_s, colour in (
        ("joint, with verdicts", ours["reached"], ours["wall_s"], BEST),
        ("plain TRL, serial", points, serial["trials"][-1]["end_s"], "#1c7ed6"),
    ):
        times, values = _best_so_far(series, maximize)
        if not times:
            return None
        axes.step([*times, end_s], [*values, values[-1]], where="post", color=colour, linewidth=2.2, label=label)
        axes.plot(end_s, values[-1], "o", color=colour, markersize=6, markeredgecolor="white")
        ends.append(end_s)
    if _is_number(ours["base_value"]):
        axes.axhline(ours["base_value"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="untrained base")
    shown = [value for line in axes.get_lines() for value in line.get_ydata()]
    if min(shown) > 0 and max(shown) > 20 * min(shown):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")
    axes.set_xlabel("wall time")
    axes.set_ylabel("best held-out value so far")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")
    finding = f"Joint search over after {ends[0]:.0f} s, plain TRL after {ends[1]:.0f} s"
    wording = "the same trials" if serial["configurations"] == "same" else "its own trials"
    title(
        figure, finding, f"{len(serial['trials'])} trials; plain TRL trains {wording}, one after the other, to the end"
    )
    return save(figure, path)


def _best_so_far(points: Sequence[Mapping[str, Any]], maximize: bool) -> tuple[list[float], list[float]]:
    times: list[float] = []
    values: list[float] = []
    for point in sorted(points, key=lambda point: point["time_s"]):
        value = point["value"]
        if _is_number(value) and (not values or (value > values[-1] if maximize else value < values[-1])):
            times.append(point["time_s"])
            values.append(value)
    return times, values
