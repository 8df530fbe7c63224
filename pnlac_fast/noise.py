"""The noise floor: how far the base model's activations move when nothing changes but the arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from pnlac_fast import prompts
from pnlac_fast import store as stores
from pnlac_fast.activations import read
from pnlac_fast.adapters import Weights
from pnlac_fast.datasets import Question, as_questions, by_topic, fingerprint
from pnlac_fast.errors import UserError
from pnlac_fast.loading import opened
from pnlac_fast.localize import NOISE_FLOOR
from pnlac_fast.models import Model
from pnlac_fast.passes import SHORTCUTS, usable
from pnlac_fast.prompts import DEFAULT_TEMPLATE
from pnlac_fast.provenance import provenance

QUESTIONS = 16  # read at once, so that memory does not grow with the data


def noise_floor(
    model: Model | str | Path,
    data: str | Path | Sequence[Question],
    *,
    store: str | Path | None = None,
    site: str = "mlp_mid",
    tokens: str = "last",
    template: str = DEFAULT_TEMPLATE,
    batch_tokens: int = 2048,
) -> xr.Dataset:
    """Contrast base with base again, on the same tokens: read as ``cache`` reads it, and in the next wider dtype.

    Ours. The weights are the same numbers, so what differs is rounding, of which hardly any is left in float32 for half
    precision, or in float64 for float32. The wide pass also takes no shortcut, so that what packing and sharing do to
    rounding is in it. A change that does not stand out from this is no finding. (Two passes in one dtype often round
    alike to the bit, which says nothing of the digits that both lose.)

    Parameters
    ----------
    model
        The base model. A wider copy of its weights is held meanwhile.
    data
        Questions.
    store
        Where the result is written, as ``/results/noise_floor``.
    site, tokens
        Which activations, and at which positions; "last" and "prompt" need no completions.
    template, batch_tokens
        What the model is asked, and how many tokens one pass has.

    Returns
    -------
    xarray.Dataset
        ``rms`` float32 (topic, layer, neuron), in the units of the activation.

    Raises
    ------
    UserError
        The model is in float64 already, or an activation is not finite.
    """
    questions = as_questions(data)
    base = opened(model)
    wide = _widened(base)
    taken = usable(base, list(SHORTCUTS), longest=base.context)
    side = "both" if tokens in ("completion", "all") else "none"
    groups = by_topic(questions)
    rms = np.zeros((len(groups), len(base.blocks), base.width(site)), np.float32)
    for t, group in enumerate(groups.values()):
        squares = torch.zeros(rms.shape[1:], dtype=torch.float64)
        counted = 0
        for start in range(0, len(group), QUESTIONS):
            block = group[start : start + QUESTIONS]
            texts = prompts.encode(base.tokenizer, block, template, side=side, context=base.context)
            first, owner = read(base, texts, tokens, site=site, batch_tokens=batch_tokens, shortcuts=taken)
            again, _ = read(wide, texts, tokens, site=site, batch_tokens=batch_tokens, shortcuts=())
            squares += (again.double() - first.double()).square().sum(1)
            counted += len(owner)
        rms[t] = (squares / counted).sqrt()
    if not np.isfinite(rms).all():
        raise UserError(f"The activations of '{base.name}' at {site} are not finite: try --dtype float32.")
    result = xr.Dataset(
        {"rms": (("topic", "layer", "neuron"), rms)},
        coords={"topic": np.array(list(groups), object), "layer": np.arange(len(base.blocks), dtype=np.int32)},
        attrs={
            "site": site,
            "tokens": tokens,
            "dtype": str(base.hf.dtype).removeprefix("torch."),
            "provenance": provenance(base=base.origin, data=fingerprint(questions), template=template),
        },
    )
    if store is not None:
        stores.create_results(store, provenance=result.attrs["provenance"])
        stores.write_result(store, NOISE_FLOOR, result)
    return result


def _widened(base: Model) -> Model:
    """A copy of the base model in the next wider dtype."""
    if base.hf.dtype == torch.float64:
        raise UserError("Nothing wider than float64 is left to measure noise against: give --dtype float32.")
    dtype = torch.float64 if base.hf.dtype == torch.float32 else torch.float32
    with base.active() as hf:  # as it is without adapters, should any be attached
        copied = copy.deepcopy(hf).to(dtype)
    return Model(Weights(copied), base.tokenizer, base.name, base.origin)
