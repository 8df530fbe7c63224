"""What a method keeps of the on-topic shift against what it leaves of the coupling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pnlac_fast.reporting import style, wording
from pnlac_fast.reporting.rows import Estimate, MethodRow, PathPoint
from pnlac_fast.reporting.sections import Shown


def pareto(rows: Sequence[MethodRow], paths: Sequence[PathPoint]) -> tuple[str, Shown] | None:
    """The front of all methods as trained, in a sentence and a figure; None where plain tuning stands alone."""
    ends = [r for r in rows if r.comparison == "as trained" and math.isfinite(r.reduction.value)]
    ends = [r for r in ends if math.isfinite(r.retention.value)]
    if len({r.method for r in ends}) < 2:
        return None
    sentence = front_sentence(ends)
    figure = Shown(
        "pareto",
        f"{sentence} Each method at the end of its training, with 95 % intervals; the line is plain tuning as it goes. "
        "Below the line a method beats stopping plain tuning earlier; filled marks are on the front.",
        "Retention and coupling left: "
        + "; ".join(
            f"{style.method_label(r.method)} {wording.percentage(r.retention)}, {wording.percentage(left(r))}"
            for r in ends
            if not style.is_control(r.method)
        )
        + ".",
        lambda width: draw_pareto(ends, paths, width),
    )
    return sentence, figure


def left(row: MethodRow) -> Estimate:
    """Coupling that is left, as a share of plain tuning's."""
    return Estimate(*(1 - v for v in (row.reduction.value, row.reduction.high, row.reduction.low)))


def front(rows: Sequence[MethodRow]) -> list[MethodRow]:
    """Methods, controls aside, that no other beats in both retention and coupling, most retention first."""
    own = [r for r in rows if not style.is_control(r.method)]
    kept = [
        r
        for r in own
        if not any(
            o.retention.value >= r.retention.value and o.reduction.value >= r.reduction.value
            for o in own
            if o is not r and (o.retention.value, o.reduction.value) != (r.retention.value, r.reduction.value)
        )
    ]
    return sorted(kept, key=lambda r: -r.retention.value)


def front_sentence(rows: Sequence[MethodRow]) -> str:
    """The methods on the front, with what each keeps and leaves."""
    named = [r for r in front(rows) if r.method != "plain"]
    if not named:
        return "No method beats plain tuning in retention or in coupling: it is the front alone."
    told = "; ".join(
        f"{style.method_label(r.method)} keeps {wording.percentage(r.retention)} of the on-topic shift with "
        f"{wording.percentage(left(r))} of the coupling"
        for r in named[:4]
    )
    more = f"; and {len(named) - 4} more" if len(named) > 4 else ""
    text = f"No method does better in both than these: {told}{more}."
    better = {
        style.method_label(style.controlled(c.method))
        for c in rows
        if style.is_control(c.method)
        and any(c.retention.value > r.retention.value and c.reduction.value > r.reduction.value for r in named)
    }
    return text + (
        f" But random neurons in place of the chosen ones ({', '.join(sorted(better))}) beat one of them in both."
        if better
        else ""
    )


def draw_pareto(rows: Sequence[MethodRow], paths: Sequence[PathPoint], width: float) -> Figure:
    """Retention against coupling left, one cross a method, plain tuning's path as a line, numbers in a legend."""
    wide = style.is_wide(width)
    best = {r.method for r in front(rows)}
    named = [r for r in rows if not style.is_control(r.method) and r.method != "plain"]
    figure = style.new_figure(width, 4.2 if wide else 4.0 + 0.2 * len(named))
    axes = figure.add_subplot()
    path = [p for p in paths if p.method == "plain"]
    end = max(path, key=lambda p: p.step)
    x, y = [p.on_topic / end.on_topic for p in path], [p.coupling / end.coupling for p in path]
    axes.plot(x, y, color=style.PLAIN, linewidth=1.6, zorder=1)
    for r in (r for r in rows if style.is_control(r.method)):
        axes.plot(r.retention.value, left(r).value, "o", color="#BDBDBD", markersize=4, zorder=1)
    handles, labels = [], []
    for number, r in enumerate(named, 1):
        tint, remains = style.colour(r.method), left(r)
        axes.plot([r.retention.low, r.retention.high], [remains.value] * 2, color=tint, linewidth=1, zorder=2)
        axes.plot([r.retention.value] * 2, [remains.low, remains.high], color=tint, linewidth=1, zorder=2)
        inside = tint if r.method in best else "white"
        (mark,) = axes.plot(
            r.retention.value, remains.value, "o", color=tint, markersize=8, zorder=3, markerfacecolor=inside
        )
        axes.annotate(str(number), (r.retention.value, remains.value), (6, 5), textcoords="offset points", fontsize=8)
        handles.append(mark)
        labels.append(f"{number}  {style.method_label(r.method)}")
    axes.set_xlim(0, max([1.05, *(r.retention.high for r in rows if math.isfinite(r.retention.high))]) * 1.03)
    axes.set_ylim(0, max([1.05, *(left(r).high for r in rows if math.isfinite(r.reduction.low))]) * 1.03)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol="\u00a0%"))
    axes.grid()
    axes.set_xlabel("on-topic shift kept, of plain tuning\u2019s")
    axes.set_ylabel("coupling left, of plain tuning\u2019s")
    if any(style.is_control(r.method) for r in rows):
        axes.text(0.02, 0.98, "grey: random neurons", transform=axes.transAxes, va="top", color=style.FAINT, fontsize=8)
    look: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelspacing": 0.4}
    figure.legend(handles, labels, loc="outside right upper" if wide else "outside lower left", **look)
    return figure
