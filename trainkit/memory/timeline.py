"""The memory over one training step, drawn: parts stacked, phases marked, capacity as a line. Torch-free."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from trainkit.memory.estimate import PARTS
from trainkit.memory.sizes import GIB

if TYPE_CHECKING:
    from trainkit.memory.estimate import Estimate
    from trainkit.memory.verdict import Capacity

# One colour a part, told apart by lightness as well as by hue (after Okabe and Ito's palette).
COLOURS = {
    "weights": "#4d4d4d",
    "adapters": "#0072b2",
    "gradients": "#56b4e9",
    "optimizer state": "#9ecae1",
    "activations": "#e69f00",
    "logits and loss": "#d55e00",
    "temporary buffers": "#cc79a7",
    "library workspaces": "#f0e442",
    "sharding buffers": "#009e73",
    "allocator rounding": "#bbbbbb",
}


def draw_timeline(figure: Any, found: Estimate, title: str, capacity: Capacity | None) -> None:
    """Fill an empty figure of matplotlib's with an estimate's timeline; only parts that are ever there are named."""
    axes = figure.add_subplot()
    points = found.timeline
    moments = range(len(points) + 1)  # each lasts up to the next, the last one too
    there = [part for part in PARTS if any(point.parts.get(part) for point in points)]
    axes.stackplot(
        moments,
        [[point.parts.get(part, 0) / GIB for point in (*points, points[-1])] for part in there],
        labels=there,
        colors=[COLOURS[part] for part in there],
        step="post",
        linewidth=0,
    )
    _mark_phases(axes, found)
    peak = max(range(len(points)), key=lambda moment: points[moment].total_bytes)
    height = points[peak].total_bytes / GIB
    axes.annotate(
        f"peak {height:,.2f} GiB\n{found.peak_phase}: {found.peak_place}",
        (peak + 0.5, height),
        xytext=(0, 14),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        arrowprops={"arrowstyle": "-"},
    )
    top = height * 1.25
    if capacity is not None:
        limit = capacity.size_bytes / GIB
        if limit < 2 * height:  # a line far above would flatten the picture
            axes.axhline(limit, color="black", linestyle="--", linewidth=1, label=f"{capacity.name}: {limit:,.2f} GiB")
            top = max(top, limit * 1.1)
    axes.set(xlim=(0, len(points)), ylim=(0, top), ylabel="allocated, GiB", title=title, xticks=[])
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8, reverse=True)


def _mark_phases(axes: Any, found: Estimate) -> None:
    start = 0
    for index, (phase, points) in enumerate(groupby(found.timeline, key=lambda point: point.phase)):
        end = start + len(list(points))
        if index:
            axes.axvline(start, color="white", linewidth=1)
        axes.text(
            (start + end) / 2, -0.02, phase, ha="center", va="top", fontsize=8, transform=axes.get_xaxis_transform()
        )
        start = end
