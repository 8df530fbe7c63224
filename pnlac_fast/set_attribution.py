"""What attribution ascribes to sets of neurons: their patch to first order, on questions held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from pnlac_fast import store as stores
from pnlac_fast.attribution import attribute, attributed
from pnlac_fast.chance import Overlap, overlap
from pnlac_fast.cost import Meter
from pnlac_fast.datasets import Question, as_questions, fingerprint, paired
from pnlac_fast.errors import UserError
from pnlac_fast.loading import open_models
from pnlac_fast.models import Model
from pnlac_fast.patch_sets import Chosen, choose_all
from pnlac_fast.patching import DIRECTIONS, SOURCE, UNPATCHED, Run, patched_runs
from pnlac_fast.prompts import DEFAULT_TEMPLATE
from pnlac_fast.provenance import provenance
from pnlac_fast.scores import ATTRIBUTION, toward_tuning
from pnlac_fast.top_sets import Localization, intersect

KINDS = ("general", "specific", "top", "random")
SET_ATTRIBUTION = "set_attribution"


def attribute_sets(
    model: Model | str | Path,
    tuned: Mapping[str, Model | str | Path],
    found: Mapping[str, Localization],
    data: str | Path | Sequence[Question],
    probe: str | Path | Sequence[Question],
    *,
    store: str | Path | None = None,
    draws: int = 20,
    seed: int = 0,
    boots: int = 2000,
    template: str = DEFAULT_TEMPLATE,
    normalise: str = "token",
    batch_tokens: int = 4096,
) -> xr.Dataset:
    """The share of a tuned model's shift that attribution ascribes to the located sets, and to random ones.

    A question's attribution (see :func:`pnlac_fast.attribution.attribute`) is summed over the neurons of a set: what
    patching the whole set would move, to first order. Beside the located sets stand as many neurons as are general that
    attribution itself ranks highest, off minus on topic.

    Parameters
    ----------
    model, tuned
        The base model, and the tuned ones that were located, by the same names.
    found
        What :func:`pnlac_fast.locate` found.
    data
        Questions that attribution ranks neurons on, by the first pair of completions of each: eleven pairs rank hardly
        otherwise, and take eleven times as long.
    probe
        Questions with pairs of completions for everything else, none of those that were tuned, located or ranked on.
    store
        Where the result is written, as ``/results/set_attribution``.
    draws, seed
        Random sets with the general one's count in every layer, and their first seed.
    boots
        Resamples of the questions behind the 95 % intervals.
    template, normalise, batch_tokens
        As for :func:`pnlac_fast.attribution.attribute`.

    Returns
    -------
    xarray.Dataset
        As of :func:`pnlac_fast.patch`, with kind "attribution": ``margin`` float64 (run, question) in nats, base's
        plus what is ascribed to the set; ``recovered`` (run, part, bound), the share of the shift. ``overlap`` (run,
        figure): of the set with the general one, see :func:`pnlac_fast.chance.overlap`; NaN where a run has no set.
        Sets are "general", "specific" and "top" (of the tuned topic), "attribution" and "random"; empty ones are left
        out.

    Raises
    ------
    UserError
        The tuned models are not those that were located, or what one was tuned on is not known or not among the topics.
    """
    questions = paired(as_questions(probe))
    base, models = open_models(model, tuned)
    if set(models) != set(found):
        raise UserError(
            f"Attribution needs the models that were located, {', '.join(found)}: give --tuned for each of them."
        )
    meter = Meter(base.device)
    options: dict[str, Any] = {"template": template, "normalise": normalise, "batch_tokens": batch_tokens}
    options["site"] = next(iter(found.values())).general.site
    first = [replace(q, right=q.right[:1], left=q.left[:1]) for q in paired(as_questions(data))]
    ranking = attribute(base, models, first, **options)
    chosen = {name: _chosen(name, found[name], ranking, draws, seed) for name in models}
    for own in chosen.values():
        own[0].neurons.check(base)
    members = [np.stack([one.neurons.member for one in own]).astype(float) for own in chosen.values()]
    ascribed = [np.zeros((len(own), len(questions))) for own in chosen.values()]

    def fold(m: int, _: str, owner: np.ndarray, layer: int, product: Tensor) -> None:
        np.add.at(ascribed[m].T, owner, product.cpu().numpy() @ members[m][:, layer].T)

    margin = attributed(base, models, questions, fold, **options)
    runs: list[Run] = []
    values: list[np.ndarray] = []
    shared: list[Sequence[float]] = []
    for m, (name, own) in enumerate(chosen.items()):
        of = (str(found[name].general.found["tuned_topic"]), name)
        for label, end in ((UNPATCHED, margin[0]), (SOURCE, margin[1 + m])):
            runs.append(Run(*of, label, DIRECTIONS[0]))
            values.append(end)
            shared.append([np.nan] * len(Overlap._fields))
        for one, moved in zip(own, ascribed[m], strict=True):
            size, share = len(one.neurons), one.neurons.share
            runs.append(Run(*of, one.kind, DIRECTIONS[0], ATTRIBUTION, one.draw, size, share))
            values.append(margin[0] + moved)
            shared.append(overlap(one.neurons.member, found[name].general.member))
    made = provenance(base=base.origin, data=fingerprint(questions), template=template, seed=seed)
    result = patched_runs(runs, np.stack(values), questions, boots, seed, normalise=normalise, provenance=made)
    result["overlap"] = (("run", "figure"), np.array(shared))
    result = result.assign_coords(figure=np.array(Overlap._fields, object)).assign_attrs(cost=meter.record())
    if store is not None:
        stores.write_result(store, SET_ATTRIBUTION, result)
    return result


def _chosen(name: str, found: Localization, ranking: xr.Dataset, draws: int, seed: int) -> list[Chosen]:
    """The sets of one tuned model that have any neurons, the general one first."""
    general = found.general
    topic = str(general.found.get("tuned_topic", ""))
    if topic not in found.specific:
        raise UserError(f"What '{name}' was tuned on is not known: name it by its topic, --tuned TOPIC=PATH.")
    if not len(general):
        raise UserError(f"'{name}' has no general neurons to attribute a shift to: raise --top.")
    located = choose_all({s.name: s for s in found.sets}, name, topic, KINDS, draws=draws, seed=seed)
    how: dict[str, Any] = {"site": general.site, "tokens": "all", "score": ATTRIBUTION, "tuned_topic": topic}
    ranked = intersect(toward_tuning(ranking, name), name, general_share=general.share, **how)
    own = Chosen(ATTRIBUTION, -1, ranked.contrasted["off_minus_on"])
    return [one for one in (*located, own) if len(one.neurons)]
