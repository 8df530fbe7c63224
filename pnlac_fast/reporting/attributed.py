"""What attribution ascribes to the sets of neurons, beside what patching them brought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from pnlac_fast.reporting import style, tables, wording
from pnlac_fast.reporting.contents import Contents
from pnlac_fast.reporting.forest import Mark, Panel, draw_forest
from pnlac_fast.reporting.rows import MISSING, Estimate, PatchRow
from pnlac_fast.reporting.sections import Section, Shown, Table, absent
from pnlac_fast.scores import ATTRIBUTION

COMMAND = "pnlac-fast locate --evidence --model --tuned --data --probe"
KINDS = ("general", "specific", "top", ATTRIBUTION, "random")


@dataclass(frozen=True)
class AttributedRow:
    """A set of neurons: shares of the shift that attribution ascribes to it, and that patching it recovered.

    Of random sets, the interval of a share is the least and the most of the draws. `overlap` is the Jaccard index with
    the general set, mean over tuned models, `chance` that of random sets with the same counts in every layer; in
    `above` of the `models` it is higher than 97.5 % of those.
    """

    neurons: str
    share: float
    draws: int
    off_topic: Estimate
    on_topic: Estimate
    patched_off_topic: Estimate
    patched_on_topic: Estimate
    overlap: float
    chance: float
    above: int
    models: int


def attribution(contents: Contents, boots: int, seed: int) -> Section:
    """Shares of the shift by attribution, beside the fractions that patching recovered."""
    key, title = "attribution", "What attribution ascribes to them"
    result = contents.results.get("set_attribution")
    if result is None:
        return absent(key, title, COMMAND)
    rows = attributed_rows(result, contents.results.get("patching"), boots, seed)
    sentences = attributed_sentences(rows)
    figure = Shown(
        "attribution",
        f"{sentences[0]} Attribution is the change of a neuron\u2019s activation times the gradient of the margin, "
        "summed over a set: what patching it would move, to first order. Bars are 95 % intervals, of random neurons "
        "the least and the most of their draws.",
        "Shares of the off-topic and the on-topic shift by set of neurons. "
        + "; ".join(
            f"{style.set_label(r.neurons)}: {wording.percentage(r.off_topic)}, {wording.percentage(r.on_topic)}"
            for r in rows
        )
        + ".",
        lambda width: draw_forest(_panels(rows), width),
    )
    return Section(key, title, sentences, [figure], [_table(rows)])


def attributed_rows(result: xr.Dataset, patching: xr.Dataset | None, boots: int, seed: int) -> list[AttributedRow]:
    """One row a kind of set, in the order of :data:`KINDS`.

    ``result`` is what :func:`pnlac_fast.set_attribution.attribute_sets` returns, ``patching`` what
    :func:`pnlac_fast.patch` does.
    """
    found = {r.neurons: r for r in tables.patch_rows(result, boots, seed)}
    measured = tables.patch_rows(patching, boots, seed) if patching is not None else []
    patched = {r.neurons: r for r in measured if (r.direction, r.kind) == ("tuned_into_base", "tuned")}
    names, overlap = result["neurons"].values, result["overlap"].transpose("run", "figure")
    rows = []
    for kind in (name for name in KINDS if name in found):
        own, runs = found[kind], (names == kind).nonzero()[0]
        jaccard, expected, high = (overlap.sel(figure=f).values[runs] for f in ("jaccard", "expected", "high"))
        rows.append(
            AttributedRow(
                neurons=kind,
                share=own.share,
                draws=own.draws,
                off_topic=_spanned(own, "off_topic"),
                on_topic=_spanned(own, "on_topic"),
                patched_off_topic=_spanned(patched.get(kind), "off_topic"),
                patched_on_topic=_spanned(patched.get(kind), "on_topic"),
                overlap=float(np.mean(jaccard)),
                chance=float(np.mean(expected)),
                above=int((jaccard > high).sum()),
                models=len(runs),
            )
        )
    return rows


def _spanned(row: PatchRow | None, part: str) -> Estimate:
    """The share of a set; of random ones from the least to the most of their draws."""
    if row is None:
        return MISSING
    value, draws = getattr(row, part), getattr(row, f"{part}_draws")
    return Estimate(value.value, min(draws), max(draws)) if draws else value


def attributed_sentences(rows: Sequence[AttributedRow]) -> list[str]:
    """What the general neurons account for beside random ones, and whether attribution itself chooses the same ones."""
    found = {r.neurons: r for r in rows}
    general = found["general"]
    text = (
        f"Attribution ascribes {wording.percentage(general.off_topic)} of the off-topic and "
        f"{wording.percentage(general.on_topic)} of the on-topic shift to the general neurons "
        f"({style.percent(general.share)} of all)"
    )
    if random := found.get("random"):
        low, high = (wording.number(100 * v, 0) for v in random.off_topic[1:])
        span = f" ({low}\u00a0to\u00a0{high} over {random.draws} draws)" if random.draws > 1 else ""
        mean = wording.number(100 * random.off_topic.value, 0)
        text += f"; to as many random ones in every layer {mean}\u00a0%{span} of the off-topic shift"
        if general.off_topic.low <= random.off_topic.high:
            text += ", so the general neurons are not shown to carry more than random ones"
    if np.isfinite(general.patched_off_topic.value):
        text += f". Patching them recovered {wording.percentage(general.patched_off_topic)} of the off-topic shift"
    sentences = [f"{text}."]
    if own := found.get(ATTRIBUTION):
        sentences.append(
            f"The neurons that attribution itself ranks highest off minus on topic, as many as are general, carry "
            f"{wording.percentage(own.off_topic)} of the off-topic and {wording.percentage(own.on_topic)} of the "
            f"on-topic shift. They overlap with the general ones by {own.overlap:.2f} (Jaccard), random ones with the "
            f"same counts in every layer by {own.chance:.2f}; more than chance in {own.above} of {own.models} tuned "
            "models."
        )
    return sentences


def _panels(rows: Sequence[AttributedRow]) -> list[Panel]:
    panels = []
    for part, title in (("off_topic", "Of the off-topic shift"), ("on_topic", "Of the on-topic shift")):
        marks = [Mark(style.set_label(r.neurons), getattr(r, part), style.GENERAL, "by attribution") for r in rows]
        marks += [
            Mark(style.set_label(r.neurons), getattr(r, f"patched_{part}"), style.RANDOM, "by patching") for r in rows
        ]
        panels.append(Panel(title, "share of it", marks, shares=True))
    return panels


def _table(rows: Sequence[AttributedRow]) -> Table:
    header = ["Neurons", "Share of all", "Off-topic", "by patching", "On-topic", "by patching"]
    header += ["Overlap with general", "by chance"]
    cells = []
    for r in rows:
        shares = (r.off_topic, r.patched_off_topic, r.on_topic, r.patched_on_topic)
        cells.append([style.set_label(r.neurons), style.percent(r.share), *map(wording.percentage, shares)])
        cells[-1] += [f"{r.overlap:.2f}", f"{r.chance:.2f}"] if r.neurons == ATTRIBUTION else ["", ""]
    caption = (
        "Shares of the shift on held-out questions, pooled over tuned topics. In brackets 95 % intervals; of random "
        "neurons the least and the most of the draws. Overlap: Jaccard index with the general set, beside that of "
        "random sets with the same counts in every layer."
    )
    return Table("attribution", caption, header, cells, rows)
