"""Whether held neurons stay where they were, and whether the change takes other neurons instead."""

from __future__ import annotations

from collections.abc import Mapping
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
from pnlac_fast.scores import scores

COMMAND = "pnlac-fast cache --tuned PLAIN --tuned INHIBITED, then pnlac-fast locate"


@dataclass(frozen=True)
class DriftRow:
    """One inhibited model beside the plain one of its topic, at the neurons that are general in the plain one.

    `drift` is their change of activation over that in the plain model, both in units of base's standard deviation:
    mean, least and most over probe topics. `overlap` is the Jaccard index of the general sets of the two models, beside
    that of random sets with the same counts in every layer, mean and 97.5 % quantile.
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
    sentences = [drift_sentence(r) for r in rows]
    figure = Shown(
        "drift",
        f"{sentences[0]} Bars span the probe topics. The overlap with plain tuning\u2019s general neurons is that of "
        "random ones where the change took another way.",
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
        "Drift: change of the general neurons\u2019 activation over that in the plain model, in units of base\u2019s "
        "standard deviation; brackets span the probe topics."
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
        ratio = _moved(contents, name, held) / _moved(contents, reference, held)
        shared = overlap(general[name], held)
        found = Estimate(float(ratio.mean()), float(ratio.min()), float(ratio.max()))
        count = int(general[name].sum())
        rows.append(
            DriftRow(name, method, topic, reference, found, count, shared.jaccard, shared.expected, shared.high)
        )
    return rows


def _moved(contents: Contents, model: str, held: np.ndarray) -> np.ndarray:
    """[topic], root mean square change of the held neurons in units of base's standard deviation."""
    assert contents.contrast is not None  # the caller has looked
    one: xr.Dataset = neurons.selected(contents.contrast, contents.sets).sel(model=model)
    one = one[["rms", "std_base", "n"]].load()
    value = scores(one.isel(topic=(one["n"] > 0).values), "std_rms").transpose("topic", "layer", "neuron").values
    own = value[:, held]
    return np.sqrt(np.mean(np.where(np.isfinite(own), own, 0) ** 2, axis=1))


def drift_sentence(row: DriftRow) -> str:
    """What became of the general neurons of plain tuning under one method."""
    stayed = row.drift.high < 0.5
    text = (
        f"With {style.method_label(row.method)} ({style.pretty(row.model)}) the general neurons of plain tuning "
        f"{'hardly moved' if stayed else 'still moved'}: {wording.percentage(row.drift)} of their change there"
    )
    if row.overlap > row.chance_high:
        again = f"the neurons that are general now are partly the same (overlap {row.overlap:.2f}, random "
        return f"{text}; {again}{row.chance:.2f})."
    return f"{text}; other neurons are general now (overlap {row.overlap:.2f}, random {row.chance:.2f})."


def _panels(rows: list[DriftRow]) -> list[Panel]:
    moved = [Mark(r.model, r.drift, style.colour(r.method)) for r in rows]
    shared = [Mark(r.model, Estimate(*[r.overlap] * 3), style.colour(r.method), "") for r in rows]
    shared += [Mark(r.model, Estimate(r.chance, 0, r.chance_high), style.RANDOM) for r in rows]
    return [
        Panel("Drift of the general neurons", "of their change in plain tuning", moved, (1.0, "as plain"), shares=True),
        Panel("Overlap of the general sets", "Jaccard index, random ones in grey", shared),
    ]
