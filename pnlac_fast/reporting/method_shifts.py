"""Shift of every topic by every method, and its difference from plain tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pnlac_fast import coupling
from pnlac_fast.reporting import style, wording
from pnlac_fast.reporting.rows import MISSING, Estimate
from pnlac_fast.reporting.runs import over_runs, per_run
from pnlac_fast.reporting.sections import Shown, Table

MOST = 10  # methods in the figure; the table has all


@dataclass(frozen=True)
class MethodShift:
    """Shift of one probe topic at the end of training by one method, mean over seeds and draws, and minus plain's."""

    method: str
    tuned_topic: str
    probe_topic: str
    shift: Estimate
    difference: Estimate


def method_shifts(training: xr.Dataset, boots: int, seed: int) -> list[MethodShift]:
    """Every method by tuned and probe topic, on topics that another method than plain was tried on too."""
    topics = [str(t) for t in training["topic"].values]
    order = list(dict.fromkeys(topics))
    methods, tuned = ([str(v) for v in training[name].values] for name in ("method", "tuned_topic"))
    seeds = [int(s) for s in per_run(training, "seed", 0)]
    weights = coupling.resamples(topics, boots, seed)
    margin = training["margin"].transpose("run", "point", "question").values
    step = training["step"].transpose("run", "point").values
    ends = margin[np.arange(len(step)), step.argmax(1)] - margin[:, 0]
    shift = coupling.stances(ends, topics, order, weights=weights)
    cells = []
    for topic in (t for t in order if any(m != "plain" for m, t_ in zip(methods, tuned, strict=True) if t_ == t)):
        groups: dict[str, list[int]] = {}
        for i, method in enumerate(methods):
            if tuned[i] == topic:
                groups.setdefault(method, []).append(i)
        means = {
            m: over_runs([shift[:, i] for i in runs], [seeds[i] for i in runs], seed) for m, runs in groups.items()
        }
        for method, own in means.items():
            for at, probe in enumerate(order):
                apart = _estimate(own[:, at] - means["plain"][:, at]) if "plain" in means else MISSING
                cells.append(MethodShift(method, topic, probe, _estimate(own[:, at]), apart))
    return cells


def shown_shifts(cells: Sequence[MethodShift], unit: str) -> tuple[Shown, Table]:
    """Heat maps one under the other, and every cell in a table."""
    names = [m for m in dict.fromkeys(c.method for c in cells) if not style.is_control(m)]
    names.sort(key=lambda name: name != "plain")
    drawn = names[:MOST]
    off = {m: [c.shift.value for c in cells if c.method == m and c.probe_topic != c.tuned_topic] for m in drawn}
    some = f" The first {MOST} of {len(names)} methods." if len(names) > MOST else ""
    figure = Shown(
        "method_shifts",
        f"Shift of every topic at the end of training, and its difference from plain tuning.{some} Rows are topics "
        "tuned on, columns topics asked about; the tuned topic is outlined.",
        "Mean off-topic shift: "
        + "; ".join(f"{style.method_label(m)} {wording.number(float(np.mean(v)), signed=True)}" for m, v in off.items())
        + ".",
        lambda width: draw_method_shifts([c for c in cells if c.method in drawn], drawn, width, unit),
    )
    header = ["Method", "Tuned on", "Probe topic", f"Shift [{unit}]", "minus plain"]
    text = [
        [style.method_label(c.method), style.pretty(c.tuned_topic), style.pretty(c.probe_topic)]
        + [wording.estimate(e, signed=True) for e in (c.shift, c.difference)]
        for c in cells
    ]
    return figure, Table("method_shifts", "Every method, tuned and probe topic", header, text, cells, 3, folded=True)


def draw_method_shifts(cells: Sequence[MethodShift], names: Sequence[str], width: float, unit: str) -> Figure:
    """A row of two heat maps for each method: the shift, and the shift minus plain tuning's."""
    wide = style.is_wide(width)
    tuned, probes = (list(dict.fromkeys(getattr(c, n) for c in cells)) for n in ("tuned_topic", "probe_topic"))
    each = 0.3 * len(tuned) + 0.42
    figure = style.new_figure(width, each * len(names) + (2.2 if wide else 2.7))
    grid = figure.subplots(len(names), 2, squeeze=False, sharex=True, sharey=True)
    limit = max(abs(e.value) for c in cells for e in (c.shift, c.difference) if np.isfinite(e.value)) or 1.0
    norm = TwoSlopeNorm(0.0, -limit, limit)
    for line, name in zip(grid, names, strict=True):
        for axes, field in zip(line, ("shift", "difference"), strict=True):
            if name == "plain" and field == "difference":
                axes.set_axis_off()
                continue
            values = np.full((len(tuned), len(probes)), np.nan)
            for c in (c for c in cells if c.method == name):
                y, x = tuned.index(c.tuned_topic), probes.index(c.probe_topic)
                values[y, x] = getattr(c, field).value
                if wide and np.isfinite(values[y, x]):
                    ink = "white" if abs(values[y, x]) > 0.62 * limit else style.INK
                    bold = "bold" if c.tuned_topic == c.probe_topic else "normal"
                    text = wording.number(values[y, x], 1, signed=True)
                    axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color=ink, fontweight=bold)
            style.bare(axes)
            image = axes.imshow(values, cmap=style.DIVERGING, norm=norm, aspect="auto")
            for topic in set(tuned) & set(probes):
                x, y = probes.index(topic), tuned.index(topic)
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=style.INK, linewidth=1.2))
            label = style.method_label(name) if field == "shift" else "minus plain"
            axes.set_title(style.wrapped(label, 44 if wide else 22), fontsize=8.5 if wide else 7.5, pad=4)
            axes.set_xticks(range(len(probes)), [style.pretty(p) for p in probes], rotation=90, fontsize=8)
            axes.set_yticks(range(len(tuned)), [style.wrapped(t, 22 if wide else 12) for t in tuned], fontsize=8)
    bar = figure.colorbar(image, ax=grid, location="bottom", aspect=40, pad=0.01, shrink=0.7)
    bar.outline.set_visible(False)
    bar.set_label(f"shift of stance, right is positive [{unit}]")
    return figure


def _estimate(draws: np.ndarray) -> Estimate:
    return Estimate(*map(float, coupling.interval(draws)))
