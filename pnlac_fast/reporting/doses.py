"""Dose response: reduction of coupling against the share of neurons that an intervention touches."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from pnlac_fast.reporting import style, wording
from pnlac_fast.reporting.rows import MethodRow
from pnlac_fast.reporting.sections import Shown


def doses(rows: Sequence[MethodRow]) -> tuple[list[str], Shown] | None:
    """Reduction at equal on-topic shift against the share of neurons; None where no method was given two shares."""
    groups = dose_groups(rows)
    if not groups:
        return None
    sentences = [dose_sentence(name, own) for name, own in groups.items()]
    figure = Shown(
        "doses",
        f"{' '.join(sentences)} At equal on-topic shift; bars are 95 % intervals, and grey spans the draws of random "
        "neurons with the same count in every layer.",
        "Reduction of coupling by share of neurons. "
        + "; ".join(
            f"{name} {style.percent(r.share)}: {wording.percentage(r.reduction)}"
            for name, own in groups.items()
            for r in own
        )
        + ".",
        lambda width: draw_doses(groups, rows, width),
    )
    return sentences, figure


def dose_groups(rows: Sequence[MethodRow]) -> dict[str, list[MethodRow]]:
    """Rows at equal shift of every family of methods that was tried with several shares of neurons."""
    found: dict[str, list[MethodRow]] = {}
    for r in rows:
        if r.comparison == "equal shift" and not style.is_control(r.method) and 0 < r.share < 1 and "+" not in r.method:
            found.setdefault(style.family(r.method.partition("@")[0]), []).append(r)
    sized = {name: sorted(own, key=lambda r: r.share) for name, own in found.items()}
    return {name: own for name, own in sized.items() if len({round(r.share, 4) for r in own}) > 1}


def dose_sentence(name: str, rows: Sequence[MethodRow]) -> str:
    """Whether more neurons do more, by intervals that do not meet."""
    known = [r for r in rows if math.isfinite(r.reduction.value)]
    what = {"freeze": "Freezing", "specific": "Training only", "anchor": "Anchoring"}.get(name, style.pretty(name))
    if len(known) < 2:
        return f"{what}: fewer than two shares of neurons reached the shift compared at."
    few, many = known[0], known[-1]
    verb = (
        "did more"
        if many.reduction.low > few.reduction.high
        else "did less"
        if many.reduction.high < few.reduction.low
        else "was not shown to do more or less"
    )
    return (
        f"{what} {style.percent(many.share)} of all neurons instead of {style.percent(few.share)} {verb}: "
        f"a reduction of {wording.percentage(few.reduction)}, then {wording.percentage(many.reduction)}."
    )


def draw_doses(groups: dict[str, list[MethodRow]], rows: Sequence[MethodRow], width: float) -> Figure:
    """One panel a family, reduction against share of neurons on a logarithmic axis, random draws in grey."""
    wide = style.is_wide(width)
    across = min(len(groups), 3) if wide else 1
    down = math.ceil(len(groups) / across)
    figure = style.new_figure(width, 2.9 * down)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    for axes, (name, own) in zip(panels, groups.items(), strict=False):
        random = [r for r in rows if r.comparison == "equal shift" and style.is_control(r.method)]
        shares = {r.method: r.share for r in own}
        random = [r for r in random if style.controlled(r.method) in shares and math.isfinite(r.reduction.value)]
        if random:
            random.sort(key=lambda r: r.share)
            spread = [r.reduction_draws or tuple(r.reduction) for r in random]
            x = [r.share for r in random]
            axes.fill_between(x, [min(d) for d in spread], [max(d) for d in spread], color=style.RANDOM, alpha=0.3)
            axes.plot(x, [r.reduction.value for r in random], "o-", color=style.RANDOM, linewidth=1, markersize=3)
        _doses(axes, [r for r in own if math.isfinite(r.reduction.value)], style.colour(name))
        axes.set_title(style.pretty(name), color=style.colour(name))
        axes.set_xlabel("share of all neurons")
        if axes is panels[0] or not wide:
            axes.set_ylabel("reduction of coupling")
    return figure


def _doses(axes: Axes, rows: Sequence[MethodRow], tint: str) -> None:
    for r in rows:
        axes.plot([r.share] * 2, [r.reduction.low, r.reduction.high], color=tint, linewidth=1.6)
    axes.plot([r.share for r in rows], [r.reduction.value for r in rows], "o-", color=tint, markersize=5)
    axes.axhline(0, color=style.INK, linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({r.share for r in rows})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda share, _: style.percent(share))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol="\u00a0%"))
    axes.margins(x=0.15)
    axes.grid()
