"""What a fine-tune costs elsewhere: perplexity on neutral text, length and refusals of answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import xarray as xr

from pnlac_fast.reporting import style, wording
from pnlac_fast.reporting.contents import Contents
from pnlac_fast.reporting.forest import Mark, Panel, draw_forest
from pnlac_fast.reporting.rows import MISSING, Estimate
from pnlac_fast.reporting.sections import Section, Shown, Table, absent

COMMAND = "pnlac-fast utility --store"
BASE = "base"


@dataclass(frozen=True)
class UtilityRow:
    """One model: perplexity, its ratio to base's, words of an answer, shares of empty answers and of refusals."""

    model: str
    perplexity: Estimate
    over_base: Estimate
    words: Estimate
    empty: Estimate
    refusals: Estimate


def utility(contents: Contents, boots: int, seed: int) -> Section:
    """Perplexity over base, words and refusals of every model."""
    key, title = "utility", "What it costs elsewhere"
    result = contents.results.get("utility")
    if result is None:
        return absent(key, title, COMMAND)
    rows = utility_rows(result, boots, seed)
    sentences = utility_sentences(rows)
    figure = Shown(
        "utility",
        f"{' '.join(sentences)} 95 % intervals resample passages, or questions.",
        "Utility by model. "
        + "; ".join(f"{style.pretty(r.model)}: perplexity {wording.estimate(r.perplexity)}" for r in rows)
        + ".",
        lambda width: draw_forest(_panels(rows), width),
    )
    header = ["Model", "Perplexity", "over base\u2019s", "Words an answer", "Empty", "Refusals"]
    cells = [
        [style.pretty(r.model), *map(wording.estimate, (r.perplexity, r.over_base)), wording.estimate(r.words, 1)]
        + [wording.percentage(e) for e in (r.empty, r.refusals)]
        for r in rows
    ]
    caption = "Perplexity on neutral text; length and refusals of free answers. Refusals are found by their phrases."
    return Section(key, title, sentences, [figure], [Table("utility", caption, header, cells, rows)])


def utility_rows(result: xr.Dataset, boots: int, seed: int) -> list[UtilityRow]:
    """One row a model of what :func:`pnlac_fast.utility` found; what was not measured is missing."""
    from pnlac_fast import side_effects

    names = ("perplexity", "over_base", "words", "empty", "refusals")
    return [
        UtilityRow(str(row["model"]), *(Estimate(*row[name]) if name in row else MISSING for name in names))
        for row in side_effects.utility_rows(result, boots=boots, seed=seed)
    ]


def utility_sentences(rows: Sequence[UtilityRow]) -> list[str]:
    """How many tuned models read neutral text worse than base, answer at another length, or refuse more."""
    tuned = [r for r in rows if r.model != BASE]
    base = next((r for r in rows if r.model == BASE), None)
    text = []
    read = [r for r in tuned if math.isfinite(r.over_base.value)]
    if read:
        worse = sum(r.over_base.low > 1 for r in read)
        most = max(read, key=lambda r: r.over_base.value)
        text.append(
            f"{worse} of {len(read)} tuned models read neutral text worse than base with their whole interval; the "
            f"highest perplexity is {wording.estimate(most.over_base)} times base\u2019s ({style.pretty(most.model)})."
        )
    answered = [r for r in tuned if math.isfinite(r.words.value)]
    if answered and base is not None:
        other = sum(r.words.low > base.words.high or r.words.high < base.words.low for r in answered)
        refusing = sum(r.refusals.low > base.refusals.high for r in answered)
        text.append(
            f"{other} of {len(answered)} answer at another length than base ({wording.estimate(base.words, 1)} words), "
            f"and {refusing} refuse more often, by intervals that do not meet."
        )
    return text


def _panels(rows: Sequence[UtilityRow]) -> list[Panel]:
    def marks(name: str) -> list[Mark]:
        return [Mark(r.model, getattr(r, name), style.PLAIN if r.model == BASE else style.GENERAL) for r in rows]

    panels = []
    if any(math.isfinite(r.over_base.value) for r in rows):
        axis = "perplexity over base\u2019s"
        panels.append(Panel("Neutral text", axis, marks("over_base"), reference=(1.0, "as base")))
    if any(math.isfinite(r.words.value) for r in rows):
        panels.append(Panel("Length", "words an answer", marks("words")))
        panels.append(Panel("Refusals", "share of answers", marks("refusals"), shares=True))
    return panels
