"""Rows about the located neurons: where they are, how high they score, and how far the topics agree on them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from pnlac_fast.chance import overlap
from pnlac_fast.neurons import jaccard
from pnlac_fast.reporting.rows import GeneralRow, LayerRow, ModelPair, OverlapCell
from pnlac_fast.scores import scores

QUANTILES = (0.5, 0.95)
SCORES = ("rms", "std_rms")


def how_found(sets: xr.Dataset | None) -> Mapping[str, Any]:
    """How the sets were located (score, top share, tokens), as far as the store says."""
    found = sets.attrs.get("found", {}) if sets is not None else {}
    return json.loads(found) if isinstance(found, str) else found


def set_members(sets: xr.Dataset) -> dict[tuple[str, str, str], np.ndarray]:
    """bool [layer, neuron] by model, kind and topic, of the first site."""
    site = str(sets["site"].values[0])
    names = ("model", "kind", "topic", "site")
    labels = [tuple(map(str, row)) for row in zip(*(sets[n].values for n in names), strict=True)]
    member = sets["member"].transpose("neuron_set", "layer", "neuron").values.astype(bool)
    return {label[:3]: member[i] for i, label in enumerate(labels) if label[3] == site}  # type: ignore[misc]


def general_rows(sets: xr.Dataset, width: int | None = None) -> list[GeneralRow]:
    """Shares of all neurons that are general and specific, per tuned model, beside what chance would give."""
    members = set_members(sets)
    rows = []
    for model in dict.fromkeys(m for m, _, _ in members):
        total = next(iter(members.values())).shape[0] * (width or next(iter(members.values())).shape[1])
        own = {(kind, topic): member for (m, kind, topic), member in members.items() if m == model}
        tops = [member for (kind, _), member in own.items() if kind == "top"]
        k, n = float(np.mean([t.sum() for t in tops])) / total if tops else np.nan, len(tops)
        strict = how_found(sets).get("specific", "strict") == "strict"
        rows.append(
            GeneralRow(
                model=model,
                topics=n,
                top=k,
                general=float(_union(own, "general").sum()) / total,
                specific=float(_union(own, "specific").sum()) / total,
                chance_general=k**n,
                chance_specific=n * k * (1 - k) ** (n - 1) if strict else 1 - (1 - k) ** n - k**n,
            )
        )
    return rows


def _union(members: Mapping[tuple[str, str], np.ndarray], kind: str) -> np.ndarray:
    chosen = [member for (name, _), member in members.items() if name == kind]
    return np.any(chosen, axis=0) if chosen else np.zeros_like(next(iter(members.values())))


def overlap_cells(sets: xr.Dataset) -> list[OverlapCell]:
    """Jaccard overlap of every pair of topics' top sets, averaged over tuned models; chance is k / (2 - k)."""
    tops = {(model, topic): member for (model, kind, topic), member in set_members(sets).items() if kind == "top"}
    topics = list(dict.fromkeys(topic for _, topic in tops))
    models = list(dict.fromkeys(model for model, _ in tops))
    cells = []
    for a in topics:
        for b in topics:
            pairs = [(tops[m, a], tops[m, b]) for m in models if (m, a) in tops and (m, b) in tops]
            k = float(np.mean([x.mean() for pair in pairs for x in pair]))
            cells.append(OverlapCell(a, b, float(np.mean([jaccard(*pair) for pair in pairs])), k / (2 - k)))
    return cells


def model_cells(sets: xr.Dataset) -> list[ModelPair]:
    """Overlap of the general sets of every pair of tuned models."""
    general = {model: member for (model, kind, _), member in set_members(sets).items() if kind == "general"}
    pairs = itertools.combinations(general, 2)
    return [ModelPair(a, b, *overlap(general[a], general[b])[:3]) for a, b in pairs]


def layer_rows(sets: xr.Dataset | None, contrast: xr.Dataset | None) -> list[LayerRow]:
    """Shares of each layer and quantiles of the score in it; NaN for the half of the store that is missing."""
    share: dict[str, np.ndarray] = {}
    if sets is not None:
        members = set_members(sets)
        models = list(dict.fromkeys(m for m, _, _ in members))
        for kind in ("general", "specific"):
            per_model = [
                _union({(k, t): v for (m, k, t), v in members.items() if m == model}, kind).mean(1) for model in models
            ]
            share[kind] = np.stack(per_model)
    quantile = _score_quantiles(contrast, sets) if contrast is not None else {}
    layers = next(iter([*(s.shape[1] for s in share.values()), *(q.shape[1] for q in quantile.values())]))
    missing = np.full((2, layers), np.nan)
    rows = []
    for layer in range(layers):
        cell = {kind: share.get(kind, missing)[:, layer] for kind in ("general", "specific")}
        high = {name: quantile.get(name, missing)[:, layer] for name in SCORES}
        parts = [(f"{name}_{part}", high[name][i]) for name in SCORES for i, part in enumerate(("median", "top"))]
        rows.append(
            LayerRow(
                layer=layer,
                **{kind: float(v.mean()) for kind, v in cell.items()},
                **{f"{kind}_least": float(v.min()) for kind, v in cell.items()},
                **{f"{kind}_most": float(v.max()) for kind, v in cell.items()},
                **{name: float(v) for name, v in parts},
            )
        )
    return rows


def selected(contrast: xr.Dataset, sets: xr.Dataset | None) -> xr.Dataset:
    """The statistics at the site and tokens of the sets, or at the first ones."""
    site = str(sets["site"].values[0]) if sets is not None else str(contrast["site"].values[0])
    tokens = str(how_found(sets).get("tokens", contrast["tokens"].values[0]))
    chosen = contrast.sel(site=site, tokens=tokens)
    return chosen.isel(neuron=slice(0, int(chosen["width"]))) if "width" in chosen.coords else chosen


def _score_quantiles(contrast: xr.Dataset, sets: xr.Dataset | None) -> dict[str, np.ndarray]:
    """[quantile, layer] of each score over the neurons of a layer, averaged over tuned models and probe topics."""
    chosen = selected(contrast, sets)
    sums: dict[str, list[np.ndarray]] = {name: [] for name in SCORES}
    for model in chosen["model"].values:  # one model at a time bounds the memory
        one = chosen.sel(model=model)[["rms", "std_base", "n"]].load()
        one = one.isel(topic=(one["n"] > 0).values)
        for name in SCORES:
            value = scores(one, name).transpose("topic", "layer", "neuron").values
            value = np.where(np.isfinite(value), value, np.nan)
            sums[name].append(np.nanquantile(value, QUANTILES, axis=2).mean(1))
    return {name: np.mean(values, axis=0) for name, values in sums.items()}
