"""How far located sets can be trusted: halves of the questions, shuffled topics, tests, noise, other seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from pnlac_fast.reporting import style, wording
from pnlac_fast.reporting.contents import Contents
from pnlac_fast.reporting.forest import Mark, Panel, draw_forest
from pnlac_fast.reporting.rows import MISSING, Estimate
from pnlac_fast.reporting.sections import Section, Shown, Table, absent

NULL = "halves of two topics, or topics dealt at random"
COMMAND = "pnlac-fast locate --evidence"


@dataclass(frozen=True)
class StabilityRow:
    """Sets of one tuned model beside their nulls; ranges are those of the middle 95 % of random draws."""

    model: str
    same_topic: Estimate
    other_topic: Estimate
    difference: Estimate
    halves_general: Estimate
    general: float
    null_general: Estimate
    specific: float
    null_specific: Estimate
    significant: float
    significant_top: float
    significant_general: float
    above_floor: float
    seeds_general: float
    seeds_chance: float


def stability(contents: Contents, boots: int, seed: int) -> Section:
    """Overlap of the sets of two halves, and sizes of the sets beside those of topics dealt at random."""
    key, title = "stability", "How far the sets can be trusted"
    evidence = contents.results.get("evidence")
    if evidence is None:
        return absent(key, title, COMMAND)
    rows = stability_rows(evidence)
    sentences = stability_sentences(rows)
    figure = Shown(
        "stability",
        f"{sentences[0]} Overlap is the Jaccard index of top sets found in two random halves of the questions; grey "
        "shares are those with the questions dealt to topics at random. Bars span the middle 95 % of "
        f"{evidence.sizes['draw']} draws.",
        "Overlap of halves by tuned model: "
        + "; ".join(f"{style.pretty(r.model)} {wording.estimate(r.same_topic)}" for r in rows)
        + ".",
        lambda width: draw_forest(_panels(rows), width),
    )
    return Section(key, title, sentences, [figure], [_table(rows)])


def stability_rows(evidence: xr.Dataset) -> list[StabilityRow]:
    """One row a tuned model of what :func:`pnlac_fast.evidence.evidence` found."""
    rows = []
    tuned = [str(t) for t in evidence["tuned_topic"].values] if "tuned_topic" in evidence.coords else []
    names = [str(name) for name in evidence["model"].values]
    for i, name in enumerate(names):
        own = evidence.isel(model=i)
        halves = own["half_overlap"].transpose("draw", "topic", "other").values
        same = np.eye(halves.shape[1], dtype=bool)
        equal, different = halves[:, same].mean(1), halves[:, ~same].mean(1)
        seeds = [j for j in range(len(names)) if j != i and tuned and tuned[i] and tuned[j] == tuned[i]]
        models = own["model_overlap"].isel(other_model=seeds)
        rows.append(
            StabilityRow(
                model=name,
                same_topic=spread(equal),
                other_topic=spread(different),
                difference=spread(equal - different),
                halves_general=spread(own["half_general"].values),
                general=float(own["general"]),
                null_general=spread(own["null_general"].values),
                specific=float(own["specific"].mean()),
                null_specific=spread(own["null_specific"].mean("topic").values),
                **{n: float(own[n].mean()) for n in ("significant", "significant_top", "significant_general")},
                above_floor=float(own["above_floor"].sel(quantile=0).min()) if "above_floor" in own else np.nan,
                seeds_general=float(models.sel(figure="jaccard").mean()) if seeds else np.nan,
                seeds_chance=float(models.sel(figure="expected").mean()) if seeds else np.nan,
            )
        )
    return rows


def spread(draws: np.ndarray) -> Estimate:
    """Mean and the middle 95 % of random draws."""
    known = draws[np.isfinite(draws)]
    return Estimate(float(known.mean()), *map(float, np.quantile(known, (0.025, 0.975)))) if known.size else MISSING


def stability_sentences(rows: list[StabilityRow]) -> list[str]:
    """What halves, shuffled topics, tests and noise say, over all tuned models."""
    same, other = (np.mean([getattr(r, name).value for r in rows]) for name in ("same_topic", "other_topic"))
    text = [
        f"Top sets found in two halves of one topic\u2019s questions overlap by {same:.2f}, those of two topics by "
        f"{other:.2f}; topics differ by more than halves do {_in(sum(r.difference.low > 0 for r in rows), rows)}."
    ]
    specific, general = ([r.specific for r in rows], [r.general for r in rows])
    dealt = ([r.null_specific.value for r in rows], [r.null_general.value for r in rows])
    more = sum(r.specific > r.null_specific.high for r in rows)
    text.append(
        f"{style.percent(float(np.mean(specific)))} of all neurons are specific to a topic; with the questions dealt "
        f"to topics at random {style.percent(float(np.mean(dealt[0])))} would be, which is fewer {_in(more, rows)}."
    )
    alike = sum(r.general >= r.null_general.low for r in rows)
    text.append(
        f"{style.percent(float(np.mean(general)))} are general; topics that do not differ at all would share "
        f"{style.percent(float(np.mean(dealt[1])))}, and the set is as large as that {_in(alike, rows)}."
    )
    significant, top = (np.mean([getattr(r, n) for r in rows]) for n in ("significant", "significant_top"))
    text.append(
        f"At a false discovery rate of 5 %, {style.percent(float(top))} of the top neurons changed, and "
        f"{style.percent(float(significant))} of all."
    )
    floors = [r.above_floor for r in rows if not np.isnan(r.above_floor)]
    if floors:
        text.append(_floor(min(floors)))
    seeds = [(r.seeds_general, r.seeds_chance) for r in rows if np.isfinite(r.seeds_general)]
    if seeds:
        overlap, chance = np.mean(seeds, axis=0)
        text.append(
            f"General sets of models tuned on one topic with other seeds overlap by {overlap:.2f}, random ones by "
            f"{chance:.2f}."
        )
    return text


def _in(some: int, rows: list[StabilityRow]) -> str:
    if some == len(rows) > 1:
        return f"in all {len(rows)} tuned models"
    return f"in {wording.count(some) if some else 'none'} of {len(rows)} tuned models"


def _floor(least: float) -> str:
    if least > 1:
        size = "over 1000" if least > 1000 else wording.number(least, 1)
        return f"The least change of a top neuron is {size} times what rounding alone does to base."
    return f"Some top neurons change no more than rounding moves base ({wording.number(least, 2)} times as much)."


def _panels(rows: list[StabilityRow]) -> list[Panel]:
    halves: list[Mark] = []
    general: list[Mark] = []
    specific: list[Mark] = []
    for r in rows:
        halves += [
            Mark(r.model, r.same_topic, style.GENERAL, "halves of one topic"),
            Mark(r.model, r.other_topic, style.RANDOM, NULL),
        ]
        for marks, name in ((general, "general"), (specific, "specific")):
            value = getattr(r, name)
            marks += [
                Mark(r.model, Estimate(value, value, value), style.PLAIN, "as found"),
                Mark(r.model, getattr(r, f"null_{name}"), style.RANDOM, NULL),
            ]
    return [
        Panel("Halves of the questions", "Jaccard overlap of top sets", halves),
        Panel("General", "share of all neurons", general, shares=True),
        Panel("Specific", "share of all neurons", specific, shares=True),
    ]


def _table(rows: list[StabilityRow]) -> Table:
    header = ["Tuned model", "Halves, one topic", "Halves, two topics", "General, halves", "General", "dealt at random"]
    header += ["Specific", "dealt at random", "Changed (5 % false)", "of the top set", "of the general"]
    cells = [
        [style.pretty(r.model), *(wording.estimate(e) for e in (r.same_topic, r.other_topic, r.halves_general))]
        + [style.percent(r.general), style.percent(r.null_general.value), style.percent(r.specific)]
        + [style.percent(v) for v in (r.null_specific.value, r.significant, r.significant_top, r.significant_general)]
        for r in rows
    ]
    caption = (
        "Overlaps are Jaccard indices with the middle 95 % of random halves. \u201cChanged\u201d: paired t test over "
        "questions, Benjamini and Hochberg\u2019s false discovery rate under 5 %; general neurons on every topic."
    )
    return Table("stability", caption, header, cells, rows)
