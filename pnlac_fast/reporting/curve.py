"""Recovered fraction against the number of neurons that are patched."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from pnlac_fast.reporting import style, wording
from pnlac_fast.reporting.rows import Estimate, PatchRow
from pnlac_fast.reporting.sections import Shown, Table

HALF = 0.5
PARTS = (
    ("off_topic", "On the other topics", style.OFF_TOPIC),
    ("on_topic", "On the tuned topic", style.ON_TOPIC),
)


def curve(rows: Sequence[PatchRow]) -> tuple[list[str], Shown, Table]:
    """What the curve says, its figure and its table, of the first direction and kind of patch among ``rows``."""
    rows = [r for r in rows if (r.direction, r.kind) == (rows[0].direction, rows[0].kind)]
    sentences = curve_sentences(rows)
    finding = sentences[0] if sentences else "Recovered fraction of the shift by share of neurons patched."
    text = "; ".join(f"{r.neurons} {style.percent(r.share)}: {wording.percentage(r.off_topic)}" for r in rows)
    figure = Shown(
        "patching_curve",
        f"{finding} Bands are 95 % intervals; that of random neurons spans its draws.",
        f"Lines of the recovered fraction against the share of neurons patched. Off topic: {text}.",
        lambda width: draw_curve(rows, width),
    )
    header = ["Neurons", "Share of all", "Neurons", "On-topic", "Off-topic", "Draws"]
    cells = [
        [style.pretty(r.neurons), style.percent(r.share), str(r.count)]
        + [wording.percentage(e) for e in (r.on_topic, r.off_topic)]
        + [str(r.draws)]
        for r in rows
    ]
    return sentences, figure, Table("patching_curve", "Every point of the curve", header, cells, rows, folded=True)


def curve_sentences(rows: Sequence[PatchRow]) -> list[str]:
    """How many general neurons recover half of the off-topic shift, and random ones as many."""
    general = sorted((r for r in rows if r.neurons == "general"), key=lambda r: r.share)
    if len(general) < 2:
        return []
    enough = next((r for r in general if r.off_topic.low > HALF), None)
    if enough is None:
        most = max(general, key=lambda r: r.off_topic.value)
        return [
            f"No share of neurons that was tried, up to {style.percent(general[-1].share)} of all, is shown to recover "
            f"half of the off-topic shift; the most is {wording.percentage(most.off_topic)}."
        ]
    text = (
        f"{style.percent(enough.share)} of all neurons, the most general ones, recover more than half of the off-topic "
        f"shift: {wording.percentage(enough.off_topic)}"
    )
    random = next((r for r in rows if r.neurons == "random" and r.count == enough.count), None)
    if random is None:
        return [f"{text}."]
    draws = random.off_topic_draws
    told = wording.draws_range(draws) if len(draws) > 1 else wording.percentage(random.off_topic)
    return [f"{text}; as many random ones {told}."]


def draw_curve(rows: Sequence[PatchRow], width: float) -> Figure:
    """A line a set of neurons, recovered fraction against share patched on a logarithmic axis, two panels."""
    wide = style.is_wide(width)
    figure = style.new_figure(width, 3.5 if wide else 5.9)
    panels = figure.subplots(1, 2, sharey=True) if wide else figure.subplots(2, 1, sharex=True)
    names = list(dict.fromkeys(r.neurons for r in rows))
    for axes, (field, title, tint) in zip(panels, PARTS, strict=True):
        for name in names:
            _line(axes, sorted((r for r in rows if r.neurons == name), key=lambda r: r.share), field)
        axes.axhline(0, color=style.INK, linewidth=0.8)
        axes.axhline(1, color=style.FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
        shares = sorted({r.share for r in rows})
        axes.set_xscale("log")
        kept = [s for i, s in enumerate(shares) if i == 0 or i == len(shares) - 1 or s / shares[i - 1] > 1.6]
        axes.xaxis.set_major_locator(FixedLocator(kept))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda share, _: style.percent(share))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol="\u00a0%"))
        axes.grid()
        axes.set_title(title, color=tint)
    for axes in panels if wide else panels[1:]:
        axes.set_xlabel("share of all neurons patched")
    panels[0].set_ylabel("share of the shift recovered")
    handles = [panels[0].plot([], [], "o-", color=style.colour(n), label=style.pretty(n))[0] for n in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 3), frameon=False, fontsize=8.5)
    return figure


def _line(axes: Axes, line: Sequence[PatchRow], field: str) -> None:
    values: list[Estimate] = [getattr(r, field) for r in line]
    drawn = [getattr(r, f"{field}_draws") for r in line]
    tint, x = style.colour(line[0].neurons), [r.share for r in line]
    low = [min(d) if d else v.low for d, v in zip(drawn, values, strict=True)]
    high = [max(d) if d else v.high for d, v in zip(drawn, values, strict=True)]
    axes.fill_between(x, low, high, color=tint, alpha=0.2, linewidth=0)
    axes.plot(x, [v.value for v in values], "o-", color=tint, linewidth=1.8, markersize=4)
