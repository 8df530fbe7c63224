"""Whether other seeds find the same neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from pnlac_fast.reporting import style, wording
from pnlac_fast.reporting.contents import Contents
from pnlac_fast.reporting.forest import Mark, Panel, draw_forest
from pnlac_fast.reporting.rows import Estimate
from pnlac_fast.reporting.sections import Section, Shown, Table

KINDS = {"general": "General", "specific": "Specific to the tuned topic", "top": "Top set of the tuned topic"}


@dataclass(frozen=True)
class SeedRow:
    """Jaccard index of one kind of set, located after tuning on one topic, over all pairs of seeds.

    `overlap`: mean, least and most of the pairs; `chance`: that of random sets with the same counts in every layer,
    mean, and 0 to the highest 97.5 % quantile. In `above` of the `pairs` the index is higher than its quantile.
    """

    kind: str
    tuned_topic: str
    overlap: Estimate
    chance: Estimate
    above: int
    pairs: int


def seeds(contents: Contents) -> Section:
    """Overlap of the sets over seeds; nothing where the store knows of no seeds."""
    key, title = "seeds", "Whether other seeds find the same neurons"
    result = contents.results.get("seed_overlap")
    if result is None or result.sizes["base_seed"] < 2:
        return Section(key, title)
    if "overlap" not in result:
        return Section(
            key,
            title,
            [
                "Every seed has a base model of its own, trained from other random weights. Neuron 7 of one is not "
                "neuron 7 of another, so that the sets of two seeds cannot be compared neuron by neuron."
            ],
        )
    rows = seed_rows(result)
    sentences = [seed_sentence([r for r in rows if r.kind == kind]) for kind in dict.fromkeys(r.kind for r in rows)]
    figure = Shown(
        "seeds",
        f"{sentences[0]} Seeds share base and questions; the order of training differs and the start of LoRA. "
        "Dots are means over pairs of seeds, bars the least and the most; grey is chance, up to 97.5 % of random sets.",
        "Overlap over seeds. " + " ".join(sentences),
        lambda width: draw_forest(_panels(rows), width),
    )
    header = ["Tuned on", "Set", "Overlap, mean [least, most]", "Random", "Above chance"]
    cells = []
    for r in rows:
        figures = (wording.estimate(r.overlap), f"{r.chance.value:.2f}", f"{r.above} of {r.pairs}")
        cells.append([style.pretty(r.tuned_topic), KINDS[r.kind], *figures])
    caption = "Jaccard index of the sets of two seeds, beside random sets with the same counts in every layer."
    return Section(key, title, sentences, [figure], [Table("seeds", caption, header, cells, rows, words=2)])


def seed_rows(result: xr.Dataset) -> list[SeedRow]:
    """One row a kind and tuned topic, of what :func:`pnlac_fast.seed_overlap.seed_overlap` returns."""
    labels = list(zip(*(map(str, result[name].values) for name in ("kind", "tuned_topic")), strict=True))
    jaccard, expected, high = (result["overlap"].sel(figure=f).values for f in ("jaccard", "expected", "high"))
    rows = []
    for kind in KINDS:
        for topic in dict.fromkeys(t for k, t in labels if k == kind):
            own = [i for i, label in enumerate(labels) if label == (kind, topic)]
            found, chance, most = jaccard[own], expected[own], high[own]
            spread = Estimate(float(found.mean()), float(found.min()), float(found.max()))
            null = Estimate(float(chance.mean()), 0.0, float(most.max()))
            rows.append(SeedRow(kind, topic, spread, null, int((found > most).sum()), len(own)))
    return rows


def seed_sentence(rows: Sequence[SeedRow]) -> str:
    """How far the seeds agree on one kind of set, over all tuned topics."""
    mean, chance = (float(np.mean([getattr(r, name).value for r in rows])) for name in ("overlap", "chance"))
    least, most = min(r.overlap.low for r in rows), max(r.overlap.high for r in rows)
    above, pairs = sum(r.above for r in rows), sum(r.pairs for r in rows)
    kind = {"general": "general sets", "specific": "sets specific to the tuned topic", "top": "top sets"}[rows[0].kind]
    return (
        f"The {kind} that two seeds find overlap by {mean:.2f} (Jaccard, {least:.2f} to {most:.2f}), random ones by "
        f"{chance:.2f}; more than chance in {above} of {pairs} pairs."
    )


def _panels(rows: Sequence[SeedRow]) -> list[Panel]:
    panels = []
    for kind in dict.fromkeys(r.kind for r in rows):
        own = [r for r in rows if r.kind == kind]
        marks = [Mark(r.tuned_topic, r.overlap, style.PLAIN, "two seeds") for r in own]
        marks += [Mark(r.tuned_topic, r.chance, style.RANDOM, "random sets") for r in own]
        panels.append(Panel(KINDS[kind].partition(" to ")[0].partition(" of ")[0], "Jaccard index", marks))
    return panels
