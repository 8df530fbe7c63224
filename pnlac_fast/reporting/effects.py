"""What interventions do: patching, inhibited fine-tuning at equal steps and at equal shifts, trajectories, scorers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter

from pnlac_fast.reporting import style, wording
from pnlac_fast.reporting.rows import Estimate, MethodRow, PatchRow, PathPoint, ScoreRow
from pnlac_fast.reporting.runs import EQUAL_SHIFT

DIRECTIONS = {"tuned_into_base": "tuned into base", "base_into_tuned": "base into tuned"}
COMPARISONS = {
    "equal steps": "At equal steps",
    **{name: f"At {style.percent(share)} of plain\u2019s shift" for name, share in reversed(EQUAL_SHIFT.items())},
}


def _labelled(name: str, below: str) -> str:
    return f"{name}\n{below}" if below else name


def draw_patching(rows: Sequence[PatchRow], width: float) -> Figure:
    """Recovered fraction on the tuned topic and on the others, one bar a set of neurons, all draws as ticks."""
    wide = style.is_wide(width)
    directions = [d for d in DIRECTIONS if any(r.direction == d for r in rows)]
    most = max(sum(r.direction == d for r in rows) for d in directions)
    height = (0.6 * most + 0.85) * len(directions) * (1 if wide else 2) + 0.2
    figure = style.new_figure(width, height)
    shape = (len(directions), 2) if wide else (2 * len(directions), 1)
    panels = figure.subplots(*shape, squeeze=False, sharex=True).reshape(len(directions), 2)
    for line, direction in zip(panels, directions, strict=True):
        chosen = [r for r in rows if r.direction == direction]
        where = f", {DIRECTIONS[direction]}" if len(directions) > 1 else ""
        for axes, field, title, tint in (
            (line[0], "on_topic", "On the tuned topic", style.ON_TOPIC),
            (line[1], "off_topic", "On the other topics", style.OFF_TOPIC),
        ):
            for y, row in enumerate(chosen):
                _bar(axes, y, getattr(row, field), getattr(row, f"{field}_draws"), style.colour(row.neurons))
            labels = [_labelled(style.wrapped(style.set_label(r.neurons), 21), style.percent(r.share)) for r in chosen]
            if wide and field == "off_topic":
                labels = [""] * len(labels)
            axes.set_yticks(range(len(chosen)), labels)
            axes.set_ylim(len(chosen) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
            axes.axvline(0, color=style.INK, linewidth=0.9)
            axes.axvline(1, color=style.FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.grid(axis="x")
            axes.spines["left"].set_visible(False)
            axes.set_title(title + where, color=tint)
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    for axes in panels[-1] if wide else [panels[-1][-1]]:
        axes.set_xlabel("share of the fine-tuning shift recovered")
    drawn = [v for r in rows for v in (*r.on_topic, *r.off_topic, *r.on_topic_draws, *r.off_topic_draws)]
    left, right = min([0.0, *filter(math.isfinite, drawn)]), max([1.0, *filter(math.isfinite, drawn)])
    panels[0][0].set_xlim(left - 0.03, right + 0.2)
    step = 0.25 if right - left <= 1.6 else 0.5
    panels[0][0].set_xticks(np.arange(np.ceil(left / step), right / step + 0.01) * step + 0.0)
    return figure


def _bar(axes: Axes, y: float, estimate: Estimate, draws: Sequence[float], tint: str) -> None:
    if not math.isfinite(estimate.value):
        axes.text(0.02, y, "no shift to recover", va="center", color=style.FAINT, fontsize=8)
        return
    axes.barh(y, estimate.value, height=0.52, color=tint)
    end = estimate.high
    if len(draws) > 1:
        axes.barh(y, max(draws) - min(draws), left=min(draws), height=0.26, color="#5A5A5A", alpha=0.45)
        axes.plot(draws, np.full(len(draws), y), "|", color=style.INK, markersize=8, markeredgewidth=1)
        end = max(draws)
    else:
        axes.plot([estimate.low, estimate.high], [y, y], color=style.INK, linewidth=1.2, solid_capstyle="butt")
        for edge in (estimate.low, estimate.high):
            axes.plot([edge, edge], [y - 0.1, y + 0.1], color=style.INK, linewidth=1.2)
    axes.annotate(
        f"{wording.number(100 * estimate.value, 0)} %",
        (max(end, 0), y),
        (5, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
    )


def draw_methods(rows: Sequence[MethodRow], width: float, unit: str) -> Figure:
    """Coupling left by each method, its random control on the line below, in every comparison."""
    wide = style.is_wide(width)
    names = list(dict.fromkeys(style.controlled(r.method) for r in rows))
    names.sort(key=lambda n: n != "plain")
    controls = {style.controlled(r.method) for r in rows if style.is_control(r.method)}
    columns = 27 if wide else 18
    half = {name: 0.16 * (style.method_lines(name, columns).count("\n") + 1) for name in names}  # of a label's height
    below = {name: max(0.5 if wide else 0.65, half[name] + 0.2) for name in controls}  # where the random neurons are
    places: dict[str, float] = {}
    y = lower = 0.0
    for name in names:
        y += max(lower + half[name] + 0.12 if places else 0.0, 0.8 if places else 0.0)
        places[name] = y
        lower = below[name] + 0.4 if name in controls else half[name]
    y += max(lower, 0.5) + 0.3
    height = 0.46 * y + 0.9
    n = len(COMPARISONS)
    figure = style.new_figure(width, height if wide else n * height + 0.1)
    panels = figure.subplots(1, n, sharex=True) if wide else figure.subplots(n, 1, sharex=True)
    ceiling = max([r.coupling.high for r in rows if math.isfinite(r.coupling.high)] + [1e-9])
    ceiling = max([ceiling] + [c for r in rows for c in r.coupling_draws if math.isfinite(c)])
    edge = ceiling * (1.5 if wide else 1.4)
    for axes, comparison in zip(panels, COMPARISONS, strict=True):
        ticks: dict[float, str] = {}
        for row in (r for r in rows if r.comparison == comparison):
            control = style.is_control(row.method)
            at = places[style.controlled(row.method)] + (below[style.controlled(row.method)] if control else 0)
            ticks[at] = "random neurons" if control else style.method_lines(row.method, columns)
            _dot(axes, at, row, control)
            if row.method == "plain" and math.isfinite(row.coupling.value):
                axes.axvline(row.coupling.value, color=style.PLAIN, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
            _reduction(axes, at, row, edge, control)
        shown = wide and axes is not panels[0]
        axes.set_yticks(list(ticks), [""] * len(ticks) if shown else list(ticks.values()))
        for label, at in zip(axes.get_yticklabels(), ticks, strict=True):
            grey = ticks[at] == "random neurons"
            label.set_color(style.FAINT if grey else style.INK)
            label.set_fontsize(7.8 if grey else 8.8)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(y - 0.25, -0.6)
        axes.grid(axis="x")
        axes.set_title(COMPARISONS[comparison])
        axes.text(
            edge,
            places.get("plain", 0),
            "change",
            ha="right",
            va="center",
            fontsize=8,
            color=style.FAINT,
        )
        if axes is panels[n // 2 if wide else -1]:
            axes.set_xlabel(f"coupling to the other topics [{unit}]")
    panels[0].set_xlim(-0.03 * edge, edge * 1.01)  # a dot at zero is a whole one
    panels[0].set_xticks([t for t in MaxNLocator(4).tick_values(0, ceiling) if t <= ceiling * 1.05])
    return figure


def _dot(axes: Axes, y: float, row: MethodRow, control: bool) -> None:
    if not math.isfinite(row.coupling.value):
        axes.annotate(
            "never reached the shift" if row.reached == 0 else "not defined", (0, y), (4, 0),
            textcoords="offset points", va="center", fontsize=8, color=style.FAINT,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
        return
    tint = style.colour(row.method)
    draws = [d for d in row.coupling_draws if math.isfinite(d)]
    if control and len(draws) > 1:
        axes.plot([min(draws), max(draws)], [y, y], color="#CFCFCF", linewidth=7, solid_capstyle="butt", zorder=1)
        axes.plot(draws, np.full(len(draws), y), "|", color="#6B6B6B", markersize=7, markeredgewidth=1, zorder=2)
        axes.plot(row.coupling.value, y, "o", color=tint, markersize=5, zorder=3)
        return
    axes.plot([row.coupling.low, row.coupling.high], [y, y], color=tint, linewidth=2, solid_capstyle="butt")
    axes.plot(row.coupling.value, y, "o", color=tint, markersize=5 if control else 7.5, zorder=3)


def _reduction(axes: Axes, y: float, row: MethodRow, edge: float, control: bool) -> None:
    if row.method == "plain" or not math.isfinite(row.reduction.value):
        return
    text = f"{wording.number(-100 * row.reduction.value, 0, signed=True)} %"
    axes.text(
        edge, y, text, ha="right", va="center", fontsize=8 if control else 9.5,
        color=style.FAINT if control else style.INK, fontweight="normal" if control else "bold",
    )  # fmt: skip


def draw_paths(points: Sequence[PathPoint], width: float, unit: str) -> Figure:
    """Coupling against on-topic shift along training: lower and further right is better."""
    wide = style.is_wide(width)
    figure = style.new_figure(width, 4.3 if wide else 4.9)
    axes = figure.add_subplot()
    lines: dict[tuple[str, int], list[PathPoint]] = {}
    dashes: dict[str, list[str]] = {}
    for point in points:
        strengths = dashes.setdefault(style.family(point.method), [])
        if point.method not in strengths and not style.is_control(point.method):
            strengths.append(point.method)
        lines.setdefault((point.method, point.draw), []).append(point)
    ends: dict[str, tuple[float, float]] = {}

    def dash(method: str) -> str:
        return ("-", "--", ":", "-.")[dashes[style.family(method)].index(method) % 4]

    reach = max(p.on_topic for p in points)
    top = max(p.coupling for p in points)
    for (method, _), line in lines.items():
        x, y = [p.on_topic for p in line], [p.coupling for p in line]
        if style.is_control(method):
            axes.plot(x, y, color="#BDBDBD", linewidth=0.7, zorder=1)
            continue
        tint = style.colour(method)
        weight = 2.4 if method == "plain" else 1.6
        axes.plot(x, y, color=tint, linewidth=weight, linestyle=dash(method), marker="o", markersize=3, zorder=3)
        ends[method] = (x[-1], y[-1])
    axes.set_xlim(min(0.0, min(p.on_topic for p in points)) - 0.01 * reach, reach * 1.03)
    axes.set_ylim(0, top * 1.06)
    if wide:
        beside = reach * 1.07
        # Ordered as the lines would reach the labels, so that the leaders do not cross.
        aims = {m: min(y * beside / x, top * 1.05) if x > 0.1 * reach else y for m, (x, y) in ends.items()}
        placed = style.spread_labels(list(aims.values()), top * 0.062, top * 0.02, top * 1.04)
        for name, at in zip(aims, placed, strict=True):
            tint = style.colour(name)
            axes.plot(
                [ends[name][0], beside],
                [ends[name][1], at],
                color=tint,
                linewidth=0.8,
                linestyle=(0, (1, 2)),
                clip_on=False,
            )
            axes.text(beside * 1.01, at, wording.sentence_case(style.method_label(name)), va="center", color=tint)
    else:
        handles = [axes.plot([], [], color=style.colour(m), linestyle=dash(m), linewidth=2)[0] for m in ends]
        names = [wording.sentence_case(style.method_label(m)) for m in ends]
        figure.legend(handles, names, loc="outside lower left", frameon=False, fontsize=8, labelspacing=0.2)
    if any(style.is_control(m) for m, _ in lines):
        axes.text(
            0.02, 0.98, "grey: random neurons, one line a draw", transform=axes.transAxes, va="top",
            color=style.FAINT, fontsize=8,
        )  # fmt: skip
    axes.grid()
    axes.set_xlabel(f"on-topic shift in the direction tuned [{unit}]")
    axes.set_ylabel(f"coupling to the other topics [{unit}]")
    return figure


def draw_scorers(rows: Sequence[ScoreRow], width: float) -> Figure:
    """Stance S of every probe topic before and after tuning, one panel a scorer."""
    wide = style.is_wide(width)
    scorers = list(dict.fromkeys(r.scorer for r in rows))
    topics = list(dict.fromkeys(r.topic for r in rows))
    marks = {
        "base": ("base model", style.PLAIN, "o", -0.24),
        "this topic": ("tuned on this topic", style.ON_TOPIC, "D", 0.0),
        "another topic": ("tuned on another topic", style.OFF_TOPIC, "s", 0.24),
    }
    height = 0.52 * len(topics) + 1.2
    figure = style.new_figure(width, height if wide else height * len(scorers))
    shape = (1, len(scorers)) if wide else (len(scorers), 1)
    panels = figure.subplots(*shape, squeeze=False, sharex=True).ravel()
    for axes, scorer in zip(panels, scorers, strict=True):
        for row in (r for r in rows if r.scorer == scorer):
            _, tint, marker, offset = marks[row.after]
            y = topics.index(row.topic) + offset
            axes.plot([row.stance.low, row.stance.high], [y, y], color=tint, linewidth=1.6)
            axes.plot(row.stance.value, y, marker, color=tint, markersize=5)
        axes.axvline(0, color=style.INK, linewidth=0.8)
        blank = wide and axes is not panels[0]
        axes.set_yticks(range(len(topics)), [""] * len(topics) if blank else [style.wrapped(t, 16) for t in topics])
        axes.set_ylim(len(topics) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_title(wording.sentence_case(scorer))
        axes.set_xlim(-1.05, 1.05)
        axes.xaxis.set_major_locator(MultipleLocator(0.5))
        if wide or axes is panels[-1]:
            axes.set_xlabel("stance S (\u22121 all left, +1 all right)")
    present = {r.after for r in rows}
    handles = [
        axes.plot([], [], m, color=tint, markersize=5, label=name)[0]
        for key, (name, tint, m, _) in marks.items()
        if key in present
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if wide else 1, frameon=False, fontsize=8.5)
    return figure
