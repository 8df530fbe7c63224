"""Values with their intervals, one under the other, in one panel or several: the figure for most small results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pnlac_fast.reporting import style
from pnlac_fast.reporting.rows import Estimate


@dataclass(frozen=True)
class Mark:
    """One value: its line, its interval, and its name in the legend where a line has several."""

    line: str
    value: Estimate
    tint: str = style.INK
    name: str = ""


@dataclass(frozen=True)
class Panel:
    """Values that share an axis; `reference` is a dashed line with its meaning."""

    title: str
    axis: str
    marks: Sequence[Mark]
    reference: tuple[float, str] | None = None
    shares: bool = False


def draw_forest(panels: Sequence[Panel], width: float) -> Figure:
    """Panels side by side, or one under the other on a telephone; lines that a panel lacks are left out of it."""
    wide = style.is_wide(width)
    lines = [list(dict.fromkeys(m.line for m in panel.marks)) for panel in panels]
    names = {m.name: m.tint for panel in panels for m in panel.marks if m.name}
    together = wide and all(own == lines[0] for own in lines)
    tall = [0.24 * max(1, len({m.name for m in p.marks})) + 0.16 for p in panels]
    heights = [max(1.6, each * len(own) + 0.95) for each, own in zip(tall, lines, strict=True)]
    below = 0.3 + (0 if wide else 0.22 * len(names)) if names else 0
    figure = style.new_figure(width, (max(heights) if wide else sum(heights)) + below)
    shape: tuple[int, int] = (1, len(panels)) if wide else (len(panels), 1)
    ratios = None if wide else heights
    grid = figure.subplots(*shape, squeeze=False, height_ratios=ratios).ravel()
    for axes, panel, own in zip(grid, panels, lines, strict=True):
        _panel(axes, panel, own, wide, 4 if len(panels) < 3 or not wide else 3)
        axes.set_ylim(len(own) - 0.4, -0.85 if any(p.reference for p in (panels if together else [panel])) else -0.6)
        if together and axes is not grid[0]:
            axes.set_yticklabels([])
    if names:
        handles = [grid[0].plot([], [], "o", color=tint, label=name)[0] for name, tint in names.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3 if wide else 1, frameon=False, fontsize=8.5)
    return figure


def _panel(axes: Axes, panel: Panel, lines: Sequence[str], wide: bool, ticks: int) -> None:
    names = list(dict.fromkeys(m.name for m in panel.marks))
    offsets = (np.arange(len(names)) - (len(names) - 1) / 2) * 0.24
    for mark in panel.marks:
        if not math.isfinite(mark.value.value):
            continue
        y = lines.index(mark.line) + float(offsets[names.index(mark.name)])
        axes.plot([mark.value.low, mark.value.high], [y, y], color=mark.tint, linewidth=1.8, solid_capstyle="butt")
        axes.plot(mark.value.value, y, "o", color=mark.tint, markersize=5)
    if panel.reference is not None:
        at, meaning = panel.reference
        axes.axvline(at, color=style.INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate(
            meaning, (at, 1), (3, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
            va="top", fontsize=8, color=style.FAINT,
        )  # fmt: skip
    axes.set_yticks(range(len(lines)), [style.wrapped(line, 24 if wide else 17) for line in lines])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(ticks))
    axes.margins(x=0.08)
    if panel.shares:
        left, right = axes.get_xlim()
        if not any(mark.value.low < 0 for mark in panel.marks):
            axes.set_xlim(left if left > 0 else -0.03 * right, right)
        axes.xaxis.set_major_formatter(lambda share, _: style.percent(share))
    axes.set_title(panel.title)
    axes.set_xlabel(panel.axis)
