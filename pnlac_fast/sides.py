"""Where one model tells right from left: a contrast of two sets of texts, without any fine-tune."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pnlac_fast import prompts
from pnlac_fast import store as stores
from pnlac_fast.activations import read
from pnlac_fast.architecture import SITES
from pnlac_fast.datasets import Question, as_questions, by_topic, fingerprint, paired
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.loading import opened
from pnlac_fast.models import Model
from pnlac_fast.neurons import SIDES
from pnlac_fast.passes import SHORTCUTS, usable
from pnlac_fast.prompts import DEFAULT_TEMPLATE
from pnlac_fast.provenance import provenance
from pnlac_fast.store.contrast import OF_BASE, OF_TUNED, statistics

QUESTIONS = 16  # read at once, so that memory does not grow with the data


def contrast_sides(
    model: Model | str | Path,
    data: str | Path | Sequence[Question],
    *,
    store: str | Path | None = None,
    sites: Sequence[str] = ("mlp_mid",),
    template: str = DEFAULT_TEMPLATE,
    batch_tokens: int = 2048,
) -> xr.Dataset:
    """Contrast a model's activations on right and on left completions, question by question.

    The two sides have no token in common, so the pair is the question: a is the mean activation over the tokens of its
    left completions, b over those of its right ones, and n counts questions. It finds neurons that tell the sides
    apart, whether or not a fine-tune would move them; difference of means of two prompt sets, after persona vectors
    (arXiv 2507.21509).

    Parameters
    ----------
    model
        The model, tuned or not.
    data
        Questions with completions of both sides.
    store
        Where the result is written, as ``/results/sides``; made where there is none.
    sites
        Which activations: "mlp_mid", "mlp_out", "resid".
    template, batch_tokens
        What the model is asked, and how many tokens one pass has.

    Returns
    -------
    xarray.Dataset
        (model, topic, site, tokens, layer, neuron), as :func:`pnlac_fast.store.open_contrast` gives it, in units of the
        activation, with one model, "sides", for right as tuned and left as base, and ``tokens`` "completion".

    Raises
    ------
    UserError
        A question lacks a side, a text is longer than the model's context, or an activation is not finite.
    """
    questions = paired(as_questions(data))
    for site in sites:
        if site not in SITES:
            raise unknown("site", site, SITES)
    base = opened(model)
    groups = by_topic(questions)
    layers, widest = len(base.blocks), max(base.width(site) for site in sites)
    values = {name: np.full((len(groups), len(sites), layers, widest), np.nan, "f4") for name in (*OF_BASE, *OF_TUNED)}
    shortcuts = usable(base, list(SHORTCUTS), longest=base.context)
    for t, group in enumerate(groups.values()):
        for s, site in enumerate(sites):
            sums = torch.zeros(5, layers, base.width(site), dtype=torch.float64)
            for start in range(0, len(group), QUESTIONS):
                block = group[start : start + QUESTIONS]
                left, right = (
                    _means(base, block, side, site, template, batch_tokens, shortcuts) for side in ("left", "right")
                )
                for i, part in enumerate((left, left**2, right, right**2, (right - left) ** 2)):
                    sums[i] += part.sum(1)
            n, sums_of = np.array([len(group)]), sums.numpy()
            moments = statistics(n, sums_of[None, :2], sums_of[None, None, 2:])
            if not np.isfinite(sums_of).all():
                raise UserError(f"Activations of '{base.name}' at {site} are not finite: try --dtype float32.")
            for name, moment in moments.items():
                values[name][t, s, :, : base.width(site)] = moment.reshape(layers, -1)
    dims = ("topic", "site", "tokens", "layer", "neuron")
    result = xr.Dataset(
        {
            name: (dims if name in OF_BASE else ("model", *dims), _with_axes(value, name))
            for name, value in values.items()
        },
        coords={
            "model": np.array([SIDES], object),
            "topic": np.array(list(groups), object),
            "site": np.array(list(sites), object),
            "tokens": np.array(["completion"], object),
            "layer": np.arange(layers, dtype=np.int32),
            "width": ("site", np.array([base.width(site) for site in sites], np.int32)),
        },
        attrs={"provenance": provenance(base=base.origin, data=fingerprint(questions), template=template)},
    )
    result["n"] = (("topic", "tokens"), np.array([[len(group)] for group in groups.values()], np.int64))
    if store is not None:
        stores.create_results(store, provenance=result.attrs["provenance"])
        stores.write_result(store, SIDES, result)
    return result


def _means(
    model: Model,
    questions: Sequence[Question],
    side: str,
    site: str,
    template: str,
    batch_tokens: int,
    shortcuts: Sequence[str],
) -> Tensor:
    """Mean activation over the completion tokens of one side, float64 [layer, question, neuron]."""
    texts = prompts.encode(model.tokenizer, questions, template, side=side, context=model.context)
    seen, owner = read(model, texts, "completion", site=site, batch_tokens=batch_tokens, shortcuts=shortcuts)
    question = torch.tensor([texts[i].question for i in owner])
    sums = torch.zeros(len(seen), len(questions), seen.shape[2], dtype=torch.float64)
    sums.index_add_(1, question, seen.double())
    return sums / question.bincount(minlength=len(questions))[None, :, None]


def _with_axes(value: np.ndarray, name: str) -> np.ndarray:
    """Add the axis of one token selector, and before it that of one model."""
    value = value[:, :, None]
    return value if name in OF_BASE else value[None]
