"""From scores to sets: top sets, the general and the topic-specific neurons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from pnlac_fast.errors import UserError, unknown
from pnlac_fast.neurons import NeuronSet, jaccard
from pnlac_fast.scores import scores

SPECIFIC = ("strict", "paper")
PART = "part"  # the score by which specific sets of a given share are quiet elsewhere


@dataclass(frozen=True, eq=False)
class Localization:
    """What :func:`find` found for one tuned model.

    Attributes
    ----------
    general, specific, top
        The sets; specific and top by probe topic.
    mean
        As many neurons as are general, with the highest mean score over the topics: no intersection.
    contrasted
        Where the tuned topic is known, "off_minus_on" and "on_minus_off": as many neurons as are general, with the
        highest mean score of the other topics minus that of the tuned one, or the reverse.
    score
        float [topic, layer, neuron], the score that ranked them, in its own unit (see
        :func:`pnlac_fast.scores.scores`; attribution is in nats).
    overlap
        float [topic, topic]: Jaccard index of the top sets.
    chance
        What independent top sets would give: the share of all neurons of each kind of set, and ``jaccard``, the
        Jaccard index of two top sets.
    """

    general: NeuronSet
    specific: dict[str, NeuronSet]
    top: dict[str, NeuronSet]
    mean: NeuronSet
    score: xr.DataArray
    overlap: np.ndarray
    chance: dict[str, float]
    contrasted: dict[str, NeuronSet] = field(default_factory=dict)

    @property
    def sets(self) -> list[NeuronSet]:
        """All sets: general, then specific, those without intersection, and top by topic."""
        return [self.general, *self.specific.values(), self.mean, *self.contrasted.values(), *self.top.values()]


def ranks(score: np.ndarray) -> np.ndarray:
    """Rank of each neuron, 0 the highest, of ``score`` [layer, neuron]; equal scores in order of (layer, neuron)."""
    order = np.argsort(-score, axis=None, kind="stable")
    rank = np.empty(score.size, np.int64)
    rank[order] = np.arange(score.size)
    return rank.reshape(score.shape)


def top_set(score: np.ndarray, fraction: float, *, per_layer: bool = False) -> np.ndarray:
    """The highest-scoring fraction of neurons, bool [layer, neuron], as PNLAC takes them (arXiv 2508.02360).

    ``score`` is [layer, neuron]; over all layers together, or the same fraction of each layer. Equal scores go in order
    of (layer, neuron), NaN last.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"A top share of {fraction:g} is not between 0 and 100 %: give for instance --top 5%.")
    if per_layer:
        return np.stack([top_set(layer[None], fraction)[0] for layer in score])
    count = max(1, round(score.size * fraction))
    flat = np.where(np.isnan(score), -np.inf, score).ravel()
    least = np.partition(flat, flat.size - count)[flat.size - count]  # cheaper than ranking all
    member = flat > least
    member[(flat == least).nonzero()[0][: count - int(member.sum())]] = True
    return member.reshape(score.shape)


def grow(score: np.ndarray, share: float) -> np.ndarray:
    """The general set grown or shrunk to exactly ``share`` of all neurons, bool [layer, neuron] (ours).

    A neuron enters the intersection of the top sets when k reaches its worst rank over the topics of ``score``
    [topic, layer, neuron]; the neurons with the best worst rank are what the intersection holds at that size.
    """
    worst = np.stack([ranks(s) for s in score]).max(0)
    return top_set(-worst.astype(float), share)


def quietest(top: np.ndarray, part: np.ndarray, share: float) -> np.ndarray:
    """Of a top set, the neurons that take least part in the other topics: ``share`` of all, bool [layer, neuron]. Ours.

    ``top`` is bool [layer, neuron]; a neuron stands as high as the best of its ranks in ``part`` [other topic, layer,
    neuron].

    Raises
    ------
    UserError
        The top set has fewer neurons.
    """
    if round(top.size * share) > top.sum():
        raise UserError(
            f"A specific share of {share:.3g} does not fit into a top set of {top.mean():.3g}: raise --top."
        )
    best = np.stack([ranks(p) for p in part]).min(0)
    return top_set(np.where(top, best, -1.0), share)


def find(
    contrast: xr.Dataset,
    model: str,
    *,
    site: str = "mlp_mid",
    tokens: str = "last",
    score: str = "rms",
    **options: Any,
) -> Localization:
    """General and topic-specific neurons of one tuned model, from the moments of a contrast; see :func:`intersect`.

    Parameters
    ----------
    contrast
        What :func:`pnlac_fast.store.open_contrast` returns.
    score
        One of :data:`pnlac_fast.scores.SCORES`.
    options
        ``top``, ``specific``, ``specific_share``, ``general_share``, ``per_layer``, ``tuned_topic`` and ``base`` of
        :func:`intersect`.

    Raises
    ------
    UserError
        A name is not in the store, or there are fewer than two topics to intersect.
    """
    for dim, name in (("model", model), ("site", site), ("tokens", tokens)):
        if name not in contrast[dim].values:
            raise unknown(dim, name, map(str, contrast[dim].values))
    selected = contrast.sel(model=model, site=site, tokens=tokens)
    selected = selected.isel(neuron=slice(0, int(selected["width"])))
    if options.get("specific_share") is not None:
        options["part"] = scores(selected, PART)
    return intersect(scores(selected, score), model, site=site, tokens=tokens, score=score, **options)


def intersect(
    value: xr.DataArray,
    model: str,
    *,
    site: str,
    tokens: str,
    score: str,
    top: float = 0.05,
    specific: str = "strict",
    general_share: float | None = None,
    specific_share: float | None = None,
    part: xr.DataArray | None = None,
    per_layer: bool = False,
    tuned_topic: str = "",
    base: Mapping[str, Any] | None = None,
) -> Localization:
    """General and topic-specific neurons from a score of every neuron on every topic.

    A topic's top set holds its highest-scoring neurons. General neurons are in every topic's top set. Specific ones
    are in their own topic's and in no other's ("strict"), or in their own topic's and not general ("paper", as in
    the code released with arXiv 2508.02360).

    Parameters
    ----------
    value
        float (topic, layer, neuron), higher for neurons that matter more.
    model, site, tokens, score
        Where the score comes from; recorded in the sets.
    top
        Fraction of all neurons in each top set.
    general_share
        Grow or shrink the general set to exactly this share of all neurons (see :func:`grow`).
    specific_share, part
        Make the specific sets exactly this share of all neurons, those of the top set that take least part in the other
        topics (see :func:`quietest`); ``part`` float (topic, layer, neuron) is that score of every neuron.
    tuned_topic
        What the model was tuned on; with it the sets of on-topic against off-topic scores are made too.

    Raises
    ------
    UserError
        There are fewer than two topics to intersect.
    """
    if specific not in SPECIFIC:
        raise unknown("kind of specificity", specific, SPECIFIC)
    topics = [str(t) for t in value["topic"].values]
    if len(topics) < 2:
        raise UserError("General neurons need the top sets of two topics or more: cache more topics.")
    value = value.transpose("topic", "layer", "neuron").compute()
    tops = np.stack([top_set(v, top, per_layer=per_layer) for v in value.values])
    shared = np.asarray(tops.all(axis=0)) if general_share is None else grow(value.values, general_share)
    if specific_share is None:
        own = [member & (tops.sum(0) == 1 if specific == "strict" else ~shared) for member in tops]
    else:
        assert part is not None
        parts = part.transpose("topic", "layer", "neuron").values
        own = [quietest(member, np.delete(parts, i, 0), specific_share) for i, member in enumerate(tops)]
    found = {"score": score, "top": top, "tokens": tokens, "specific": specific, "per_layer": per_layer}
    shares = {"general_share": general_share, "specific_share": specific_share}
    found |= {name: share for name, share in shares.items() if share is not None}
    found |= {"tuned_topic": tuned_topic} if tuned_topic else {}

    def named(kind: str, member: np.ndarray, topic: str = "") -> NeuronSet:
        name = "/".join(part for part in (model, kind, topic) if part)
        return NeuronSet(name, kind, member, site=site, model=model, topic=topic, base=dict(base or {}), found=found)

    k, n, size = top, len(topics), max(1, int(shared.sum())) / shared.size
    free = _without_intersection(value.values, size, topics.index(tuned_topic) if tuned_topic in topics else None)
    return Localization(
        general=named("general", shared),
        specific={t: named("specific", member, t) for t, member in zip(topics, own, strict=True)},
        top={t: named("top", member, t) for t, member in zip(topics, tops, strict=True)},
        mean=named("mean", free.pop("mean")),
        contrasted={kind: named(kind, member) for kind, member in free.items()},
        score=value,
        overlap=np.array([[jaccard(a, b) for b in tops] for a in tops]),
        chance={
            "general": k**n,
            "specific": _chance_of_specific(k, n, specific) if specific_share is None else specific_share,
            "top": k,
            "jaccard": k / (2 - k),
            **dict.fromkeys(("mean", *free), size),
        },
    )


def _chance_of_specific(k: float, topics: int, specific: str) -> float:
    return k * (1 - k) ** (topics - 1) if specific == "strict" else k * (1 - k ** (topics - 1))


def _without_intersection(value: np.ndarray, share: float, tuned: int | None) -> dict[str, np.ndarray]:
    """Sets of one size ranked by a single score each, bool [layer, neuron], by kind."""
    found = {"mean": top_set(value.mean(0), share)}
    if tuned is not None:
        with np.errstate(invalid="ignore"):  # infinity on both sides says nothing: NaN ranks last
            more = np.delete(value, tuned, axis=0).mean(0) - value[tuned]
        found |= {"off_minus_on": top_set(more, share), "on_minus_off": top_set(-more, share)}
    return found


def records(found: Mapping[str, Localization]) -> list[dict[str, Any]]:
    """Every set in a line: tuned model, name, number and share of all neurons, what chance gives, number by layer."""
    return [
        {
            "model": name,
            "set": s.name.removeprefix(f"{name}/"),
            "neurons": len(s),
            "share": s.share,
            "chance": f.chance[s.kind],
            "per_layer": s.per_layer,
        }
        for name, f in found.items()
        for s in f.sets
    ]
