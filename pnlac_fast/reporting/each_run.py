"""Every run of a comparison by itself: a mean over runs can hide the one on which a method fails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from pnlac_fast import coupling
from pnlac_fast.reporting import style, wording
from pnlac_fast.reporting.rows import MISSING, Estimate
from pnlac_fast.reporting.runs import EQUAL_SHIFT, Compared
from pnlac_fast.reporting.sections import Shown, Table

FIRST, *_ = EQUAL_SHIFT


@dataclass(frozen=True)
class RunRow:
    """One method on one tuned topic and seed, at equal on-topic shifts, beside the draws of random neurons there.

    Reductions by random neurons are the means of the draws that reached the shift, NaN without any.
    """

    method: str
    tuned_topic: str
    seed: int
    reduction: Estimate
    random: float
    random_draws: tuple[float, ...]
    reduction_60: Estimate
    random_60: float
    retention: Estimate


def run_rows(found: Sequence[Compared]) -> list[RunRow]:
    """One row for every method but plain tuning, tuned topic and seed."""
    groups: dict[tuple[str, str, int], dict[str, list[Compared]]] = {}
    for one in found:
        groups.setdefault((one.method, one.tuned_topic, one.seed), {}).setdefault(one.comparison, []).append(one)
    rows = []
    for (method, topic, seed), by in groups.items():
        if method == "plain" or style.is_control(method):
            continue
        figures: list[tuple[Estimate, tuple[float, ...]]] = []
        for comparison in EQUAL_SHIFT:
            drawn = [
                float(one.reduction[0])
                for one in found
                if (one.comparison, one.tuned_topic, one.seed) == (comparison, topic, seed)
                and style.is_control(one.method)
                and style.controlled(one.method) == method
                and one.reached
            ]
            reached = [one.reduction for one in by[comparison] if one.reached]
            figures.append((_estimate(np.mean(reached, axis=0)) if reached else MISSING, tuple(drawn)))
        (first, draws), (second, others) = figures
        kept = _estimate(np.mean([one.retention for one in by[FIRST]], axis=0))
        rows.append(RunRow(method, topic, seed, first, _mean(draws), draws, second, _mean(others), kept))
    return rows


def each_run(found: Sequence[Compared]) -> tuple[list[str], Shown, Table] | None:
    """What holds on every run, as sentences, a figure and a table; None where no method has more than one run."""
    rows = run_rows(found)
    names = [m for m in dict.fromkeys(r.method for r in rows) if sum(r.method == m for r in rows) > 1]
    rows = [r for r in rows if r.method in names]
    if not rows:
        return None
    told = {name: run_sentence([r for r in rows if r.method == name]) for name in names}
    controlled = {r.method for r in rows if math.isfinite(r.random)}  # of the others the figure says enough
    sentences = [sentence for name, sentence in told.items() if name in controlled]
    goal = style.percent(EQUAL_SHIFT[FIRST])
    several = len({r.seed for r in rows}) > 1
    figure = Shown(
        "each_run",
        f"Reduction of coupling at {goal} of plain tuning\u2019s on-topic shift, a dot for every tuned topic"
        f"{' and seed' if several else ''}; grey below it, the means over random draws of the same runs.",
        "Dots of the reduction by run. " + " ".join(told.values()),
        lambda width: draw_runs(rows, width),
    )
    header = ["Method", "Tuned on", "Seed", f"Reduction at {goal}", "random"]
    header += [f"Reduction at {style.percent(EQUAL_SHIFT['equal shift 60 %'])}", "random", "Retention"]
    cells = [
        [
            wording.sentence_case(style.method_label(r.method)),
            style.pretty(r.tuned_topic),
            str(r.seed),
            wording.percentage(r.reduction),
            _share(r.random),
            wording.percentage(r.reduction_60),
            _share(r.random_60),
            wording.percentage(r.retention),
        ]
        for r in rows
    ]
    caption = "Every run by itself; intervals resample its questions, random neurons are means over their draws"
    return sentences, figure, Table("each_run", caption, header, cells, rows, words=2, folded=True)


def run_sentence(rows: Sequence[RunRow]) -> str:
    """The least and the most a method did, and on how many runs it was above the mean of its random draws."""
    name = f"\u201c{style.method_label(rows[0].method)}\u201d"
    known = [r for r in rows if math.isfinite(r.reduction.value)]
    goal = f"{style.percent(EQUAL_SHIFT[FIRST])} of plain\u2019s on-topic shift"
    if not known:
        return f"Run by run, {name} never reached {goal}."
    least, most = (f(known, key=lambda r: r.reduction.value) for f in (min, max))
    several = len({r.seed for r in rows}) > 1
    where = style.pretty(least.tuned_topic) + (f", seed {least.seed}" if several else "")
    text = (
        f"Run by run, the reduction by {name} at {goal} is {_share(least.reduction.value)} ({where}) to "
        f"{_share(most.reduction.value)}"
    )
    if len(known) < len(rows):
        text += f", on {len(known)} of {len(rows)} runs that reached it"
    beside = [r for r in known if math.isfinite(r.random)]
    if beside:
        better = sum(r.reduction.value > r.random for r in beside)
        text += f"; above the mean of its random draws on {better} of {len(beside)}"
    return f"{text}."


def draw_runs(rows: Sequence[RunRow], width: float) -> Figure:
    """A strip of dots a method, those of its random neurons on the line below."""
    wide = style.is_wide(width)
    names = list(dict.fromkeys(r.method for r in rows))
    labels = [style.method_lines(name, 36 if wide else 18) for name in names]
    height = (0.4 if wide else 0.5) * len(names) + 0.9
    figure = style.new_figure(width, height)
    axes = figure.add_subplot()
    for y, name in enumerate(names):
        own = [r for r in rows if r.method == name]
        for values, below, tint, size in (
            ([r.random for r in own], 0.28, style.RANDOM, 3.5),
            ([r.reduction.value for r in own], 0.0, style.colour(name), 5.5),
        ):
            drawn = [v for v in values if math.isfinite(v)]
            axes.plot(drawn, [y + below] * len(drawn), "o", color=tint, markersize=size, alpha=0.65, markeredgewidth=0)
        if not any(math.isfinite(r.reduction.value) for r in own):
            axes.annotate(
                "no run reached the shift", (0, y), (4, 0), textcoords="offset points", va="center", fontsize=8,
                color=style.FAINT,
            )  # fmt: skip
    axes.axvline(0, color=style.INK, linewidth=0.8)
    axes.set_yticks(range(len(names)), labels)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(names) - 0.35, -0.5)
    axes.grid(axis="x")
    axes.xaxis.set_major_formatter(lambda share, _: style.percent(share))
    axes.margins(x=0.04)
    axes.set_xlabel("reduction of coupling, a dot a run")
    return figure


def _share(value: float) -> str:
    return f"{wording.number(100 * value, 0)}\u00a0%" if math.isfinite(value) else "\u2013"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _estimate(draws: np.ndarray) -> Estimate:
    return Estimate(*map(float, coupling.interval(draws)))
