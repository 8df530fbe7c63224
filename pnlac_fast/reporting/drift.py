"""Whether held neurons stay where they were, and whether the change takes other neurons instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from pnlac_fast.chance import overlap
from pnlac_fast.reporting import neurons, style, wording
from pnlac_fast.reporting.contents import Contents
from pnlac_fast.reporting.forest import Mark, Panel, draw_forest
from pnlac_fast.reporting.rows import Estimate
from pnlac_fast.reporting.sections import Section, Shown, Table, absent

HARDLY = 0.5  # three quarters of the neurons changed less than half as much
NAMED = 4  # a sentence that lists more is not read
COMMAND = "pnlac-fast cache --tuned PLAIN --tuned INHIBITED, then pnlac-fast locate"


@dataclass(frozen=True)
class DriftRow:
    """One inhibited model beside the plain one of its topic, at the neurons that are general in the plain one.

    `drift` is a neuron's change of activation over that of the same neuron in the plain model, both root mean squares
    over the probe topics: median and quartiles over the neurons. `overlap` is the Jaccard index of the general sets of
    the two models, beside that of random sets with the same counts in every layer, mean and 97.5 % quantile.
    """

    model: str
    method: str
    tuned_topic: str
    plain: str
    drift: Estimate
    general: int
    overlap: float
    chance: float
    chance_high: float


def drift(contents: Contents) -> Section:
    """Activation drift and re-routing of every inhibited model of a store that holds the plain one too."""
    key, title = "drift", "Whether held neurons stay, and what moves instead"
    rows = drift_rows(contents)
    if not rows:
        return absent(key, title, COMMAND)
    sentences = drift_sentences(rows)
    figure = Shown(
        "drift",
        f"{sentences[0]} Dots are the median neuron, bars the middle half of them. The overlap with plain "
        "tuning\u2019s general neurons is that of random ones where the change took another way.",
        "Drift by model: " + "; ".join(f"{r.model} {wording.percentage(r.drift)}" for r in rows) + ".",
        lambda width: draw_forest(_panels(rows), width),
    )
    header = ["Model", "Method", "Tuned on", "Drift", "General neurons", "Overlap with plain\u2019s", "Random"]
    cells = [
        [*map(style.pretty, (r.model, style.method_label(r.method), r.tuned_topic)), wording.percentage(r.drift)]
        + [str(v) for v in (r.general, f"{r.overlap:.2f}", f"{r.chance:.2f}")]
        for r in rows
    ]
    caption = (
        "Drift: change of a general neuron\u2019s activation (root mean square, all probe topics) over that of the "
        "same neuron in the plain model; median, in brackets the quartiles."
    )
    return Section(key, title, sentences, [figure], [Table("drift", caption, header, cells, rows, words=3)])


def drift_rows(contents: Contents) -> list[DriftRow]:
    """One row an inhibited model whose topic was also tuned plainly, as the provenance of the capture says."""
    if contents.contrast is None or contents.sets is None:
        return []
    tuned: Mapping[str, Any] = contents.info.get("provenance", {}).get("tuned", {})
    known = {name: (str(m.get("method", "")), str(m.get("tuned_topic", ""))) for name, m in tuned.items()}
    plain = {topic: name for name, (method, topic) in reversed(known.items()) if method == "plain" and topic}
    general = {model: m for (model, kind, _), m in neurons.set_members(contents.sets).items() if kind == "general"}
    rows = []
    for name, (method, topic) in known.items():
        reference = plain.get(topic, "")
        if method in ("", "plain") or name not in general or reference not in general:
            continue
        held = general[reference]
        plainly = _moved(contents, reference, held)
        ratio = (_moved(contents, name, held) / np.where(plainly > 0, plainly, np.nan))[plainly > 0]
        if not ratio.size:
            continue
        shared = overlap(general[name], held)
        found = Estimate(*map(float, np.quantile(ratio, (0.5, 0.25, 0.75))))
        count = int(general[name].sum())
        rows.append(
            DriftRow(name, method, topic, reference, found, count, shared.jaccard, shared.expected, shared.high)
        )
    return rows


def _moved(contents: Contents, model: str, held: np.ndarray) -> np.ndarray:
    """[neuron], root mean square change of each held neuron over all probe topics.

    In units of the activation: each neuron is compared with itself. Sums over neurons in units of base's standard
    deviation are ruled by the few that hardly vary.
    """
    assert contents.contrast is not None  # the caller has looked
    one: xr.Dataset = neurons.selected(contents.contrast, contents.sets).sel(model=model)[["rms", "n"]].load()
    rms = one["rms"].isel(topic=(one["n"] > 0).values).transpose("topic", "layer", "neuron").values
    return np.asarray(np.sqrt(np.mean(rms[:, held].astype("f8") ** 2, axis=0)))


def drift_sentences(rows: Sequence[DriftRow]) -> list[str]:
    """In which models the general neurons of plain tuning stayed, in which not, and whether others took their place."""
    told = []
    for act, own in (
        ("hardly moved", [r for r in rows if r.drift.high < HARDLY]),
        ("still moved", [r for r in rows if r.drift.high >= HARDLY]),
    ):
        if own:
            median = [r.drift.value for r in own]
            told.append(
                f"The general neurons of plain tuning {act} in {_names(own)}: the median one changed "
                f"{_span([100 * v for v in median], 0)}\u00a0% as much as there."
            )
    others = [r for r in rows if r.overlap <= r.chance_high]
    same = [r for r in rows if r.overlap > r.chance_high]
    if others:
        told.append(
            f"Other neurons are general now in {_names(others)}: they overlap with those of plain tuning no more than "
            f"random ones do ({_span([r.overlap for r in others], 2)})."
        )
    if same:
        told.append(
            f"The general neurons are partly the same in {_names(same)}: they overlap by "
            f"{_span([r.overlap for r in same], 2)}, random ones by {_span([r.chance for r in same], 2)}."
        )
    return told


def _names(rows: Sequence[DriftRow]) -> str:
    names = [f"\u201c{style.pretty(r.model)}\u201d" for r in rows]
    return wording.listed(names) if len(names) <= NAMED else f"{wording.count(len(names))} models"


def _span(values: Sequence[float], digits: int) -> str:
    low, high = (wording.number(v, digits) for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _panels(rows: list[DriftRow]) -> list[Panel]:
    moved = [Mark(r.model, r.drift, style.colour(r.method)) for r in rows]
    shared = [Mark(r.model, Estimate(*[r.overlap] * 3), style.colour(r.method), "") for r in rows]
    shared += [Mark(r.model, Estimate(r.chance, 0, r.chance_high), style.RANDOM) for r in rows]
    return [
        Panel("Drift of the general neurons", "of their change in plain tuning", moved, (1.0, "as plain"), shares=True),
        Panel("Overlap of the general sets", "Jaccard index, random ones in grey", shared),
    ]
