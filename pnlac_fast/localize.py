"""From a store to neurons: rank them by a score, and keep the sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from pnlac_fast import store as stores
from pnlac_fast.datasets import Question, following
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.neurons import SIDES, NeuronSet, save_sets, to_dataset
from pnlac_fast.prompts import DEFAULT_TEMPLATE
from pnlac_fast.scores import ATTRIBUTION, SCORES, score_table, toward_tuning
from pnlac_fast.top_sets import Localization, find, intersect

if TYPE_CHECKING:  # statistics alone need no torch
    from pnlac_fast.models import Model

CONTRASTS = ("tuned", SIDES)
NOISE_FLOOR = "noise_floor"


def locate(
    store: str | Path,
    *,
    top: float = 0.05,
    score: str = "rms",
    specific: str = "strict",
    general_share: float | None = None,
    specific_share: float | None = None,
    hold_out: int = 0,
    site: str | None = None,
    tokens: str | None = None,
    per_layer: bool = False,
    contrast: str = "tuned",
    keep_scores: Sequence[str] = (),
    model: Model | str | Path | None = None,
    tuned: Mapping[str, Model | str | Path] | None = None,
    data: str | Path | Sequence[Question] | None = None,
    probe: str | Path | Sequence[Question] | None = None,
    template: str = DEFAULT_TEMPLATE,
    normalise: str = "token",
    batch_tokens: int = 4096,
    evidence: bool = False,
    draws: int = 20,
    seed: int = 0,
    out: str | Path | None = None,
) -> dict[str, Localization]:
    """Locate neurons for every tuned model of a store; write them into the store and, where asked, to a JSON file.

    Parameters
    ----------
    store
        What :func:`pnlac_fast.cache` wrote. For attribution, and for the contrast of sides, any store, or none yet.
    top
        Share of all neurons in each topic's top set, in (0, 1]; with ``per_layer`` of each layer's.
    specific
        Topic-specific neurons are in their own topic's top set, and in no other ("strict") or not general ("paper", as
        in the code released with the paper).
    general_share
        Grow or shrink the general set to exactly this share of all neurons (see :func:`pnlac_fast.top_sets.grow`).
    specific_share
        Make the specific sets exactly this share of all neurons: those of the topic's top set that take least part in
        the other topics, by the score "part" (see :func:`pnlac_fast.top_sets.quietest`). ``specific`` does not count.
    hold_out
        Leave out so many topics, those that follow the tuned one in the store: so that a fine-tune with these neurons
        can be judged on a topic of which nothing was known, as with ``hold_out`` of
        :func:`pnlac_fast.sweeping.plan_runs`.
    per_layer
        Take the top of each layer by itself instead of all layers together.
    score
        One of :data:`pnlac_fast.scores.SCORES`, or "attribution": the change times the gradient of the margin, signed
        so that the tuning counts as positive (see :func:`pnlac_fast.attribution.attribute`).
    site, tokens
        Default: the first of the store.
    contrast
        "tuned": tuned against base, from the store. "sides": right against left completions of one model, without any
        fine-tune (see :func:`pnlac_fast.sides.contrast_sides`); the sets are called "sides/general" and so on.
    keep_scores
        Names of scores that are written into the store too, as ``/results/scores``: ``value`` float32 (score, model,
        topic, site, layer, neuron), at ``site`` and ``tokens``.
    model, tuned, data, template, normalise, batch_tokens
        What attribution and sides, and the noise floor of the evidence, are computed from. Without ``model``, what an
        earlier call left in the store.
    out
        JSON file for all sets, see :func:`pnlac_fast.neurons.save_sets`.
    evidence, draws, seed
        Also write nulls and stability of the sets, as ``/results/evidence``: see
        :func:`pnlac_fast.evidence.evidence`. With a model and data, with the noise floor too.
    probe
        With the evidence, a model, tuned models and data: held-out questions on which the share of the shift is
        computed that attribution ascribes to the sets, see :func:`pnlac_fast.set_attribution.attribute_sets`.

    Returns
    -------
    dict of str to Localization
        By tuned model, or "sides".

    Raises
    ------
    UserError, StoreError
        A name does not exist, or what is asked for is not in the store and cannot be computed from what is given.

    Notes
    -----
    PNLAC, arXiv 2508.02360: general neurons are in the top set of every topic, specific ones in that of one.
    """
    if contrast not in CONTRASTS:
        raise unknown("contrast", contrast, CONTRASTS)
    methods = (score, *keep_scores)
    for name in methods:
        if name not in (*SCORES, ATTRIBUTION):
            raise unknown("score", name, (*SCORES, ATTRIBUTION))
    if contrast == SIDES and ATTRIBUTION in methods:
        raise UserError("Attribution needs a tuned model: leave out --contrast sides.")
    if evidence and hold_out:
        raise UserError("Evidence looks at every topic: locate once more without --hold-out for it.")
    if specific_share is not None and score == ATTRIBUTION:
        raise UserError("A specific share needs a score of moments: leave out --score attribution.")
    if evidence and (contrast == SIDES or score == ATTRIBUTION):
        raise UserError("Evidence comes from the sums of a store's units: give a score of moments, --contrast tuned.")
    if probe is not None and not (evidence and model is not None and tuned and data is not None):
        raise UserError("Held-out questions are for attribution in the evidence: give --model, --tuned and --data too.")
    reading: dict[str, Any] = {"template": template, "batch_tokens": batch_tokens}
    if model is not None:
        from pnlac_fast.loading import open_models

        if data is None:
            raise UserError("A model is there to read questions: give --data too, or leave out --model.")
        if contrast != SIDES:
            if ATTRIBUTION not in methods and not evidence:
                raise UserError("Scores of moments need no model: leave out --model, or give --score attribution.")
            stores.list_results(store)  # a store that cannot be read is better known before a model is loaded
        model, tuned = open_models(model, tuned or {})  # once for all that reads them
        _compute(store, contrast, methods, model, tuned, data, evidence, site, tokens, normalise, reading)
    moments = attributed = None
    if contrast == SIDES:
        moments = _result(store, SIDES)
    elif set(methods) & set(SCORES):
        moments = stores.open_contrast(store)
    if ATTRIBUTION in methods:
        attributed = _result(store, ATTRIBUTION)
    ranked = moments if score != ATTRIBUTION else attributed
    assert ranked is not None  # every score has one of the two
    if moments is not None:
        site, tokens = site or str(moments["site"].values[0]), tokens or str(moments["tokens"].values[0])
    else:
        site, tokens = str(ranked.attrs["site"]), "all"
    origin = stores.info(store)["provenance"]
    topics = [str(t) for t in ranked["topic"].values]
    found = {}
    for name in map(str, ranked["model"].values):
        recorded = origin.get("tuned", {}).get(name, {}).get("tuned_topic") or ""
        options: dict[str, Any] = {
            "site": site,
            "tokens": tokens,
            "score": score,
            "top": top,
            "specific": specific,
            "general_share": general_share,
            "specific_share": specific_share,
            "per_layer": per_layer,
            "tuned_topic": recorded or (name if name in topics else ""),
            "base": origin.get("base", {}),
        }
        held = following(topics, options["tuned_topic"], hold_out) if hold_out else []
        known = ranked.sel(topic=[topic for topic in topics if topic not in held])
        if score == ATTRIBUTION:
            found[name] = intersect(toward_tuning(known, name), name, **options)
        else:
            found[name] = find(known, name, **options)
    sets = [s for f in found.values() for s in f.sets]
    stores.write_sets(store, to_dataset(sets))
    if keep_scores:
        stores.write_result(store, "scores", score_table(keep_scores, moments, attributed, site=site, tokens=tokens))
    if evidence:
        _weigh(store, found, draws, seed)
    if probe is not None:
        from pnlac_fast.set_attribution import attribute_sets

        assert model is not None
        assert data is not None
        given: dict[str, Any] = {"store": store, "draws": draws, "seed": seed, "normalise": normalise, **reading}
        attribute_sets(model, tuned or {}, found, data, probe, **given)
    if out is not None:
        save_sets(sets, out)
    return found


def _weigh(store: str | Path, found: Mapping[str, Localization], draws: int, seed: int) -> None:
    """Write /results/evidence."""
    from pnlac_fast.evidence import evidence

    contrast = stores.open_contrast(store)
    general = next(iter(found.values())).general
    floor = None
    if NOISE_FLOOR in stores.list_results(store):
        floor = stores.open_result(store, NOISE_FLOOR)
        if (floor.attrs["site"], floor.attrs["tokens"]) != (general.site, general.found["tokens"]):
            floor = None
    partials = stores.open_partials(store, general.site)
    stores.write_result(store, "evidence", evidence(found, contrast, partials, floor=floor, draws=draws, seed=seed))


def resize(store: str | Path, neurons: NeuronSet, general_share: float) -> Localization:
    """Locate once more as ``neurons`` were, the general set being ``general_share`` of all neurons.

    Raises
    ------
    UserError, StoreError
        The store lacks what the neurons were located from.
    """
    names = ("score", "top", "tokens", "specific", "specific_share", "per_layer", "tuned_topic")
    options: dict[str, Any] = {name: neurons.found[name] for name in names if name in neurons.found}
    options |= {"site": neurons.site, "base": neurons.base, "general_share": general_share}
    if options["score"] == ATTRIBUTION:
        attributed = _result(store, ATTRIBUTION)
        return intersect(toward_tuning(attributed, neurons.model), neurons.model, **options)
    return find(
        _result(store, SIDES) if neurons.model == SIDES else stores.open_contrast(store), neurons.model, **options
    )


def _compute(
    store: str | Path,
    contrast: str,
    methods: Sequence[str],
    model: Model | str | Path,
    tuned: Mapping[str, Model | str | Path] | None,
    data: str | Path | Sequence[Question],
    evidence: bool,
    site: str | None,
    tokens: str | None,
    normalise: str,
    reading: Mapping[str, Any],
) -> None:
    """Write what :func:`locate` needs of a model into the store: /results/sides, attribution or noise_floor."""
    from pnlac_fast.attribution import attribute
    from pnlac_fast.noise import noise_floor
    from pnlac_fast.sides import contrast_sides

    if contrast == SIDES:
        contrast_sides(model, data, store=store, sites=(site or "mlp_mid",), **reading)
        return
    if evidence:
        moments = stores.open_contrast(store)
        site, tokens = site or str(moments["site"].values[0]), tokens or str(moments["tokens"].values[0])
        noise_floor(model, data, store=store, site=site, tokens=tokens, **reading)
    if ATTRIBUTION in methods:
        options: dict[str, Any] = {"site": site or "mlp_mid", "normalise": normalise}
        attribute(model, tuned or {}, data, store=store, **options, **reading)


def _result(store: str | Path, name: str) -> xr.Dataset:
    if name not in stores.list_results(store):
        more = " and --tuned" if name == ATTRIBUTION else ""
        raise UserError(f"'{store}' holds no {name} yet: give --model, --data{more} to compute it.")
    return stores.open_result(store, name)
