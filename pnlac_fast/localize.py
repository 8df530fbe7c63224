"""From statistics to neurons: scores, top sets, the general and the topic-specific ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pnlac_fast import store as stores
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.neurons import NeuronSet, jaccard, save_sets, to_dataset

SCORES = ("rms", "std_rms", "mean_diff", "cohens_d")
SPECIFIC = ("strict", "paper")


@dataclass(frozen=True, eq=False)
class Localization:
    """What :func:`find` found for one tuned model.

    Attributes
    ----------
    general, specific, top
        The sets; specific and top by probe topic.
    score
        float [topic, layer, neuron], the score that ranked them.
    overlap
        float [topic, topic]: Jaccard index of the top sets.
    chance
        What independent top sets would give: ``general``, ``specific`` and ``top`` as shares of all neurons,
        ``jaccard`` the overlap of two of them.
    """

    general: NeuronSet
    specific: dict[str, NeuronSet]
    top: dict[str, NeuronSet]
    score: xr.DataArray
    overlap: np.ndarray
    chance: dict[str, float]

    @property
    def sets(self) -> list[NeuronSet]:
        """All sets: general, then specific and top by topic."""
        return [self.general, *self.specific.values(), *self.top.values()]


def scores(contrast: xr.Dataset, score: str = "rms") -> xr.DataArray:
    """Score of every neuron, from the moments of a contrast.

    Parameters
    ----------
    contrast
        What :func:`pnlac_fast.store.open_contrast` returns, or a selection of it.
    score
        "rms": sqrt(mean (tuned - base)^2), the paper's (arXiv 2508.02360), in units of the activation; "std_rms": rms
        over the base's standard deviation, which does not favour layers with large activations; "mean_diff":
        absolute mean change; "cohens_d": absolute mean change over the pooled standard deviation.

    Returns
    -------
    xarray.DataArray
        float64, dims of ``contrast["rms"]``. A neuron that never varies in base (and tuned) scores 0 where the
        score divides by a standard deviation and it did not change, and infinity where it did.
    """
    if score not in SCORES:
        raise unknown("score", score, SCORES)
    if score == "rms":
        value = contrast["rms"]
    elif score == "std_rms":
        value = _ratio(contrast["rms"], contrast["std_base"])
    elif score == "mean_diff":
        value = abs(contrast["mean_diff"])
    else:
        pooled = ((contrast["std_base"].astype("f8") ** 2 + contrast["std_tuned"].astype("f8") ** 2) / 2) ** 0.5
        value = _ratio(abs(contrast["mean_diff"]), pooled)
    return value.astype("f8").transpose(*contrast["rms"].dims)


def _ratio(top: xr.DataArray, bottom: xr.DataArray) -> xr.DataArray:
    bottom = bottom.astype("f8")
    return xr.where(bottom > 0, top / bottom.where(bottom > 0, 1), xr.where(top > 0, np.inf, top * 0.0))


def ranks(score: np.ndarray) -> np.ndarray:
    """Rank of each neuron, 0 the highest, of ``score`` [layer, neuron]; equal scores in order of (layer, neuron)."""
    order = np.argsort(-score, axis=None, kind="stable")
    rank = np.empty(score.size, np.int64)
    rank[order] = np.arange(score.size)
    return rank.reshape(score.shape)


def top_set(score: np.ndarray, fraction: float, *, per_layer: bool = False) -> np.ndarray:
    """The highest-scoring fraction of neurons, bool [layer, neuron].

    ``score`` is [layer, neuron]; over all layers together, or the same fraction of each layer.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"A top share of {fraction:g} is not between 0 and 100 %: give for instance --top 5%.")
    if per_layer:
        return np.stack([top_set(layer[None], fraction)[0] for layer in score])
    return ranks(score) < max(1, round(score.size * fraction))


def find(
    contrast: xr.Dataset,
    model: str,
    *,
    site: str = "mlp_mid",
    tokens: str = "last",
    score: str = "rms",
    top: float = 0.05,
    specific: str = "strict",
    general_share: float | None = None,
    per_layer: bool = False,
    base: Mapping[str, Any] | None = None,
) -> Localization:
    """General and topic-specific neurons of one tuned model.

    A topic's top set holds its highest-scoring neurons. General neurons are in every topic's top set. Specific ones
    are in their own topic's and in no other's ("strict"), or in their own topic's and not general ("paper", as in
    the code released with arXiv 2508.02360).

    Parameters
    ----------
    top
        Fraction of all neurons in each top set.
    general_share
        Grow or shrink the general set to exactly this share of all neurons (see :func:`grow`).

    Raises
    ------
    UserError
        A name is not in the store, or there are fewer than two topics to intersect.
    """
    if specific not in SPECIFIC:
        raise unknown("kind of specificity", specific, SPECIFIC)
    for dim, name in (("model", model), ("site", site), ("tokens", tokens)):
        if name not in contrast[dim].values:
            raise unknown(dim, name, map(str, contrast[dim].values))
    selected = contrast.sel(model=model, site=site, tokens=tokens)
    topics = [str(t) for t in contrast["topic"].values]
    if len(topics) < 2:
        raise UserError("General neurons need the top sets of two topics or more: cache more topics.")
    value = scores(selected, score).isel(neuron=slice(0, int(selected["width"])))
    value = value.transpose("topic", "layer", "neuron").compute()
    tops = np.stack([top_set(v, top, per_layer=per_layer) for v in value.values])
    shared = np.asarray(tops.all(axis=0)) if general_share is None else grow(value.values, general_share)
    alone = tops.sum(0) == 1
    found = {"score": score, "top": top, "tokens": tokens, "specific": specific, "per_layer": per_layer}
    found |= {} if general_share is None else {"general_share": general_share}
    common: dict[str, Any] = {"site": site, "model": model, "base": dict(base or {}), "found": found}
    k, n = top, len(topics)
    return Localization(
        general=NeuronSet(f"{model}/general", "general", shared, **common),
        specific={
            t: NeuronSet(
                f"{model}/specific/{t}",
                "specific",
                own & (alone if specific == "strict" else ~shared),
                topic=t,
                **common,
            )
            for t, own in zip(topics, tops, strict=True)
        },
        top={
            t: NeuronSet(f"{model}/top/{t}", "top", own, topic=t, **common) for t, own in zip(topics, tops, strict=True)
        },
        score=value,
        overlap=np.array([[jaccard(a, b) for b in tops] for a in tops]),
        chance={
            "general": k**n,
            "specific": k * (1 - k) ** (n - 1) if specific == "strict" else k * (1 - k ** (n - 1)),
            "top": k,
            "jaccard": k / (2 - k),
        },
    )


def grow(score: np.ndarray, share: float) -> np.ndarray:
    """The general set grown or shrunk to exactly ``share`` of all neurons, bool [layer, neuron].

    A neuron enters the intersection of the top sets when k reaches its worst rank over the topics of ``score``
    [topic, layer, neuron]; the neurons with the best worst rank are what the intersection holds at that size.
    """
    worst = np.stack([ranks(s) for s in score]).max(0)
    return top_set(-worst.astype(float), share)


def locate(
    store: str | Path,
    *,
    top: float = 0.05,
    score: str = "rms",
    specific: str = "strict",
    general_share: float | None = None,
    site: str | None = None,
    tokens: str | None = None,
    per_layer: bool = False,
    out: str | Path | None = None,
) -> dict[str, Localization]:
    """Locate neurons for every tuned model of a store; write them into the store and, where asked, to a JSON file.

    ``site`` and ``tokens`` default to the first of the store. See :func:`find` for the rest.
    """
    contrast = stores.open_contrast(store)
    site = site or str(contrast["site"].values[0])
    tokens = tokens or str(contrast["tokens"].values[0])
    origin = stores.info(store)["provenance"].get("base", {})
    found = {
        name: find(
            contrast,
            name,
            site=site,
            tokens=tokens,
            score=score,
            top=top,
            specific=specific,
            general_share=general_share,
            per_layer=per_layer,
            base=origin,
        )
        for name in map(str, contrast["model"].values)
    }
    sets = [s for f in found.values() for s in f.sets]
    stores.write_sets(store, to_dataset(sets))
    if out is not None:
        save_sets(sets, out)
    return found
