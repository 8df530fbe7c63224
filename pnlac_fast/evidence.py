"""How much of a localization is more than chance: halves of the questions, shuffled topics, tests, noise, layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from pnlac_fast import store as stores
from pnlac_fast.chance import Overlap, overlap
from pnlac_fast.errors import UserError
from pnlac_fast.neurons import jaccard
from pnlac_fast.scores import scores
from pnlac_fast.store.contrast import statistics
from pnlac_fast.top_sets import PART, Localization, intersect, top_set

RATE = 0.05  # false discoveries among the neurons called significant
LAYER_SCORES = ("rms", "std_rms")  # raw, and not favouring layers with large activations


def evidence(
    found: Mapping[str, Localization],
    contrast: xr.Dataset,
    partials: xr.Dataset,
    *,
    floor: xr.Dataset | None = None,
    draws: int = 20,
    seed: int = 0,
) -> xr.Dataset:
    """Nulls and stability of the sets that were located in a store.

    Parameters
    ----------
    found
        What :func:`pnlac_fast.locate` found by a score of moments, by tuned model.
    contrast, partials
        What :func:`pnlac_fast.store.open_contrast` and :func:`pnlac_fast.store.open_partials` (of the sets' site) give.
    floor
        What :func:`pnlac_fast.noise.noise_floor` gives.
    draws
        Random halves, and random assignments of topics.

    Returns
    -------
    xarray.Dataset
        Coordinate ``tuned_topic`` on model, "" where it is not known, and:

        ``half_overlap`` (model, draw, topic, other)
            Jaccard index of the top set of a topic in one half of its questions and that of ``other`` in the other
            half. Topics differ where it is higher for a topic with itself: this comparison has equal sizes.
        ``half_general`` (model, draw), ``half_specific`` (model, draw, topic)
            Jaccard index of the general, and of the specific sets, of the two halves.
        ``null_general`` (model, draw), ``null_specific`` (model, draw, topic)
            Shares of all neurons that come out general and specific when units are dealt to topics at random, as many
            to each as it has. A specific set no larger than that is noise; a general set as large says that the topics
            hardly differ.
        ``general`` (model), ``specific`` (model, topic)
            The shares that were found, for comparison; the general one as it is without ``general_share``.
        ``p_change``, ``q_change`` float32 (model, topic, layer, neuron)
            Paired t test of the change of each neuron, over questions, and Benjamini and Hochberg's false discovery
            rate (1995, doi 10.1111/j.2517-6161.1995.tb02031.x). ``q_everywhere`` (model, layer, neuron): that it
            changed on every topic (the largest p of the topics).
        ``significant`` (model, topic), ``significant_top`` (model, topic), ``significant_general`` (model)
            Shares with a rate under 5 %: of all neurons, of the top set, and of the general set (on every topic).
        ``topic_overlap`` (model, topic, other, figure), ``model_overlap`` (model, other_model, figure)
            Overlap of top sets, and of the general sets of two tuned models (of two seeds, where their tuned topic is
            the same): figures "jaccard", "expected", "high" and "p" of :func:`pnlac_fast.chance.overlap`, by layer.
        ``layer_share`` (model, layer_score, kind, layer)
            Share of each layer's neurons that are in a top set (mean over topics) and general, when ranked by rms and
            by rms in units of base's standard deviation.
        ``above_floor`` (model, topic, quantile)
            Score rms over the noise floor, quantiles over the top set; only with ``floor``. Infinite where it is 0.

    Raises
    ------
    UserError
        A topic has fewer than two units to halve.
    """
    first = next(iter(found.values())).general
    units = [str(t) for t in partials["topic"].values]
    topics = [str(t) for t in contrast["topic"].values]
    for topic in topics:
        if units.count(topic) < 2:
            raise UserError(
                f"The store holds '{topic}' as one unit, which cannot be halved: cache it with fewer --unit-tokens."
            )
    tokens = str(first.found["tokens"])
    at: dict[str, Any] = {"site": first.site, "tokens": tokens}
    names = list(found)
    sums = partials.sel(tokens=tokens)
    questions = partials["count"].groupby(partials["topic"]).sum().sel(topic=topics).values
    parts = []
    for name, localization in found.items():
        mine = sums.sel(model=[name]).transpose("unit", "model", ..., "layer", "neuron").load()
        one = contrast.sel(model=name, **at).isel(neuron=slice(0, first.member.shape[1])).load()
        parts.append(
            xr.merge(
                [
                    _halves(mine, units, topics, localization, draws, seed),
                    _tests(one, questions, localization),
                    _layers(one, localization),
                    *([_above(one, floor, localization)] if floor is not None else []),
                ],
                compat="equals",
                join="exact",
            )
        )
    result = xr.concat(parts, dim=xr.Variable("model", np.array(names, object)), coords="minimal", join="exact")
    tuned = [str(f.general.found.get("tuned_topic", "")) for f in found.values()]
    how = {key: value for key, value in first.found.items() if key != "tuned_topic"}
    result = result.assign(_overlaps(found, topics)).assign_coords(tuned_topic=("model", np.array(tuned, object)))
    return result.assign_attrs(draws=draws, seed=seed, rate=RATE, **how)


def _halves(
    sums: xr.Dataset, units: Sequence[str], topics: Sequence[str], found: Localization, draws: int, seed: int
) -> xr.Dataset:
    """Sets of random halves, and of units dealt to topics at random."""
    generator = np.random.default_rng(seed)
    labels = np.array(units, object)
    k = len(topics)
    overlaps = np.zeros((draws, k, k))
    stable = np.zeros((draws, k + 1))
    null = np.zeros((draws, k + 1))
    for draw in range(draws):
        half = np.zeros(len(labels), bool)
        for topic in topics:
            own = generator.permutation((labels == topic).nonzero()[0])
            half[own[: len(own) // 2 + (len(own) % 2) * int(generator.integers(2))]] = True
        a, b = (_again(sums, np.where(chosen, labels, ""), topics, found) for chosen in (half, ~half))
        tops = [[each.top[topic].member for topic in topics] for each in (a, b)]
        overlaps[draw] = [[jaccard(x, y) for y in tops[1]] for x in tops[0]]
        stable[draw, k] = jaccard(a.general.member, b.general.member)
        stable[draw, :k] = [jaccard(a.specific[t].member, b.specific[t].member) for t in topics]
        dealt = _again(sums, generator.permutation(labels), topics, found)
        null[draw, k] = _shared(dealt)
        null[draw, :k] = [dealt.specific[t].share for t in topics]
    return xr.Dataset(
        {
            "half_overlap": (("draw", "topic", "other"), overlaps),
            "half_general": ("draw", stable[:, k]),
            "half_specific": (("draw", "topic"), stable[:, :k]),
            "null_general": ("draw", null[:, k]),
            "null_specific": (("draw", "topic"), null[:, :k]),
            "general": _shared(found),
            "specific": ("topic", [found.specific[t].share for t in topics]),
        },
        coords={"topic": np.array(topics, object), "other": np.array(topics, object)},
    )


def _shared(found: Localization) -> float:
    """Share of all neurons in every topic's top set, whatever size the general set was brought to."""
    return float(np.all([each.member for each in found.top.values()], axis=0).mean())


def _again(sums: xr.Dataset, labels: np.ndarray, topics: Sequence[str], found: Localization) -> Localization:
    """Locate as before, from the units of each label; units with the label "" are left out."""
    how = found.general.found
    among = (np.array(topics, object)[:, None] == labels).astype(float)  # [topic, unit]
    n = (among @ sums["n"].values).astype(np.int64)
    base, tuned = (np.tensordot(among, sums[name].values, 1) for name in ("base", "tuned"))
    dims = ("topic", "layer", "neuron")
    # A topic is to the statistics what a token selector is: one more set of tokens.
    moments = statistics(n, base, np.moveaxis(tuned, 1, 0))
    contrast = xr.Dataset({name: (dims, value.reshape(-1, *value.shape[-2:])) for name, value in moments.items()})
    contrast = contrast.assign(n=("topic", n)).assign_coords(topic=np.array(topics, object))
    names = ("top", "specific", "specific_share", "general_share", "per_layer")
    options = {name: how[name] for name in names if name in how}
    if "specific_share" in options:
        options["part"] = scores(contrast, PART)
    value = scores(contrast, how["score"])
    return intersect(value, "", site=found.general.site, tokens=how["tokens"], score=how["score"], **options)


def _tests(contrast: xr.Dataset, questions: np.ndarray, found: Localization) -> xr.Dataset:
    """Paired t test of each neuron's mean change.

    Positions of one question are not independent, so questions are counted rather than tokens: exact for "last",
    and too careful for the others.
    """
    n = np.minimum(contrast["n"].values, questions)
    t = scores(contrast.assign(n=("topic", n)), "paired_t").transpose("topic", "layer", "neuron").values
    p = 2 * stats.t.sf(t, np.maximum(n - 1, 1)[:, None, None])
    p = np.where(np.isnan(p), 1.0, p)
    q = np.stack([_rates(each) for each in p])
    everywhere = _rates(p.max(0))
    top = np.stack([found.top[str(topic)].member for topic in contrast["topic"].values])
    general = found.general.member
    return xr.Dataset(
        {
            "p_change": (("topic", "layer", "neuron"), p.astype("f4")),
            "q_change": (("topic", "layer", "neuron"), q.astype("f4")),
            "q_everywhere": (("layer", "neuron"), everywhere.astype("f4")),
            "significant": ("topic", (q < RATE).mean((1, 2))),
            "significant_top": ("topic", (q < RATE).mean((1, 2), where=top)),
            "significant_general": float((everywhere[general] < RATE).mean()) if general.any() else np.nan,
        },
        coords={"topic": contrast["topic"].values},
    )


def _rates(p: np.ndarray) -> np.ndarray:
    return stats.false_discovery_control(p, axis=None, method="bh").reshape(p.shape)


def _layers(contrast: xr.Dataset, found: Localization) -> xr.Dataset:
    """Where top and general neurons are, ranked raw and in units of base's standard deviation."""
    shares = []
    for score in LAYER_SCORES:
        value = scores(contrast, score).transpose("topic", "layer", "neuron").values
        tops = np.stack([top_set(each, float(found.general.found["top"])) for each in value])
        shares.append([tops.mean((0, 2)), tops.all(0).mean(1)])
    return xr.Dataset(
        {"layer_share": (("layer_score", "kind", "layer"), np.array(shares))},
        coords={"layer_score": np.array(LAYER_SCORES, object), "kind": np.array(["top", "general"], object)},
    )


def _above(contrast: xr.Dataset, floor: xr.Dataset, found: Localization) -> xr.Dataset:
    quantiles = (0.0, 0.05, 0.5)
    rows = []
    for topic in map(str, contrast["topic"].values):
        member = found.top[topic].member
        noise = floor["rms"].sel(topic=topic).values[member].astype("f8")
        change = contrast["rms"].sel(topic=topic).values[member].astype("f8")
        ratio = np.divide(change, noise, out=np.full(len(noise), np.inf), where=noise > 0)
        rows.append(np.quantile(ratio, quantiles, method="lower"))
    return xr.Dataset(
        {"above_floor": (("topic", "quantile"), np.array(rows))},
        coords={"topic": contrast["topic"].values, "quantile": list(quantiles)},
    )


def _overlaps(found: Mapping[str, Localization], topics: Sequence[str]) -> xr.Dataset:
    """Overlaps of the top sets of two topics, and of the general sets of two models, against chance."""
    tops = [[[overlap(f.top[a].member, f.top[b].member) for b in topics] for a in topics] for f in found.values()]
    general = [[overlap(a.general.member, b.general.member) for b in found.values()] for a in found.values()]
    names = np.array(list(found), object)
    return xr.Dataset(
        {
            "topic_overlap": (("model", "topic", "other", "figure"), np.array(tops)),
            "model_overlap": (("model", "other_model", "figure"), np.array(general)),
        },
        coords={"model": names, "other_model": names, "figure": np.array(Overlap._fields, object)},
    )


def summarise(result: xr.Dataset) -> list[dict[str, float | str | list[float]]]:
    """The main figures of :func:`evidence`, one record per tuned model.

    Shares of all neurons that are general and (mean over topics) specific; beside each, mean and range of the null.
    Jaccard overlap of the top sets of two halves of the questions, for a topic with itself and with another, and of the
    general sets of the halves. Shares of all and of top neurons whose change is significant, mean over topics; that of
    the general neurons on every topic. The lowest quotient of a top neuron's rms and the noise floor. Where other
    models were tuned on the same topic, the overlap of their general sets and this one's, and that of random sets.
    """
    records = []
    for name in result["model"].values:
        own = result.sel(model=name)
        halves = own["half_overlap"].mean("draw").values
        same = np.eye(len(halves), dtype=bool)
        record: dict[str, float | str | list[float]] = {"model": str(name)}
        for kind in ("general", "specific"):
            null = own[f"null_{kind}"].values.reshape(own.sizes["draw"], -1).mean(1)
            record[kind] = float(own[kind].mean())
            record[f"null_{kind}"] = [float(null.mean()), float(null.min()), float(null.max())]
        record["halves_same_topic"], record["halves_other_topic"] = halves[same].mean(), halves[~same].mean()
        record["halves_general"] = float(own["half_general"].mean())
        for kind in ("significant", "significant_top", "significant_general"):
            record[kind] = float(own[kind].mean())
        if "above_floor" in own:
            record["above_floor"] = float(own["above_floor"].sel(quantile=0).min())
        topic = str(own["tuned_topic"].values)
        seeds = (result["tuned_topic"] == topic).values & (result["model"] != name).values
        if topic and seeds.any():
            for figure, column in (("jaccard", "seeds_general"), ("expected", "seeds_chance")):
                record[column] = float(own["model_overlap"].sel(figure=figure).values[seeds].mean())
        records.append(record)
    return records


def open_summary(store: str | Path) -> list[dict[str, float | str | list[float]]]:
    """:func:`summarise` of the evidence in a store."""
    return summarise(stores.open_result(store, "evidence"))
