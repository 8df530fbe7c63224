"""Heat maps of topics by topics: the shift of each probe topic, and the overlap of the top sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator

from pnlac_fast.reporting import style, wording
from pnlac_fast.reporting.rows import GeneralRow, OverlapCell, ShiftCell


def _unique(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def draw_shift(cells: Sequence[ShiftCell], width: float, unit: str) -> Figure:
    """Shift by tuned topic (rows) and probe topic (columns), with intervals where there is room for them."""
    tuned = _unique([c.tuned_topic for c in cells])
    probes = _unique([c.probe_topic for c in cells])
    wide = style.is_wide(width)
    beside = wide and len(tuned) > 3  # where the colour bar has room for its label
    figure = style.new_figure(width, (0.62 if wide else 0.46) * len(tuned) + (1.5 if beside else 2.2))
    axes = figure.add_subplot()
    grid = np.full((len(tuned), len(probes)), np.nan)
    for c in cells:
        grid[tuned.index(c.tuned_topic), probes.index(c.probe_topic)] = c.shift.value
    limit = float(np.nanmax(np.abs(grid))) or 1.0
    image = axes.imshow(grid, cmap=style.DIVERGING, norm=TwoSlopeNorm(0.0, -limit, limit), aspect="auto")
    small = 7.2 if len(probes) <= 8 else 5.5
    intervals = wide and len(probes) <= 10
    for c in cells:
        x, y = probes.index(c.probe_topic), tuned.index(c.tuned_topic)
        ink = "white" if abs(c.shift.value) > 0.62 * limit else style.INK
        value = wording.number(c.shift.value, 2 if len(probes) <= 8 or wide else 1, signed=True)
        size = 10 if wide else 8 if len(probes) <= 7 else 5.5
        axes.text(x, y - (0.13 if intervals else 0), value, ha="center", va="center", color=ink, fontsize=size)
        if intervals:
            text = f"[{wording.number(c.shift.low)}, {wording.number(c.shift.high)}]"
            axes.text(x, y + 0.22, text, ha="center", va="center", color=ink, fontsize=small)
        if c.tuned_topic == c.probe_topic:
            axes.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, edgecolor=style.INK, linewidth=1.6))
    _topic_axes(axes, probes, tuned, wide)
    axes.set_xlabel("probe topic")
    axes.set_ylabel("tuned on")
    bar = figure.colorbar(image, ax=axes, location="right" if beside else "bottom", aspect=30, pad=0.02, shrink=0.9)
    bar.outline.set_visible(False)
    bar.set_label(f"shift of stance, right is positive [{unit}]")
    return figure


def draw_overlap(cells: Sequence[OverlapCell], general: Sequence[GeneralRow], width: float) -> Figure:
    """Jaccard overlap of the topics' top sets, and the general share of every tuned model beside chance."""
    topics = _unique([c.topic for c in cells])
    wide = style.is_wide(width)
    tall = 0.5 * len(topics) + 1.3
    low = 0.3 * len(general) + 1.2
    if wide:
        figure = style.new_figure(width, max(tall, low, 2.6))
        axes, beside = figure.subplots(1, 2, width_ratios=[1.35, 1])
    else:
        figure = style.new_figure(width, tall + low + 0.6)
        axes, beside = figure.subplots(2, 1, height_ratios=[tall, low])
    grid = np.full((len(topics), len(topics)), np.nan)
    for c in cells:
        if topics.index(c.other_topic) < topics.index(c.topic):
            grid[topics.index(c.topic), topics.index(c.other_topic)] = c.jaccard
    grid = grid[1:, :-1]
    axes.imshow(grid, cmap=style.SEQUENTIAL, norm=Normalize(0, 1), aspect="auto")
    for (y, x), value in np.ndenumerate(grid):
        if not np.isnan(value):
            ink = "white" if value > 0.55 else style.INK
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9 if wide else 8)
    _topic_axes(axes, topics[:-1], topics[1:], wide)
    axes.tick_params(axis="x", rotation=90)
    axes.set_title(f"Overlap of top sets (Jaccard){', ' if wide else chr(10)}chance {cells[0].chance:.3f}")
    chance = float(np.mean([g.chance_general for g in general]))
    for y, row in enumerate(general):
        if row.general > 0:
            beside.plot(row.general, y, "o", color=style.GENERAL, markersize=6)
        place, left = max(row.general, chance), row.general <= chance
        beside.annotate(
            style.percent(row.general), (place, y), (7 if left else -7, 0), textcoords="offset points",
            ha="left" if left else "right", va="center", fontsize=8.5,
        )  # fmt: skip
    beside.axvline(chance, color=style.INK, linewidth=1, linestyle=(0, (4, 3)))
    beside.annotate(
        f"chance\n{style.percent(chance)}",
        (chance, 0.5),
        (5, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
    )
    beside.set_xscale("log")
    beside.set_xlim(chance / 3, 1.0)
    beside.minorticks_off()
    beside.xaxis.set_major_formatter(lambda share, _: style.percent(share))
    beside.xaxis.set_major_locator(LogLocator(numticks=4))
    beside.set_yticks(range(len(general)), [style.wrapped(g.model, 30) for g in general])
    beside.set_ylim(len(general) - 0.5, -0.5)
    beside.tick_params(axis="y", length=0)
    beside.spines["left"].set_visible(False)
    beside.grid(axis="x")
    beside.set_title("General share by tuned model", color=style.GENERAL)
    beside.set_xlabel("share of all neurons")
    return figure


def _topic_axes(axes: Axes, columns: list[str], rows: list[str], wide: bool) -> None:
    axes.set_xticks(range(len(columns)), [style.wrapped(t, 12 if wide else 24) for t in columns])
    axes.set_yticks(range(len(rows)), [style.wrapped(t, 16 if wide else 11) for t in rows])
    if not wide or len(columns) > 8:
        axes.tick_params(axis="x", rotation=90)
    style.bare(axes)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
