"""How much of a stance each neuron's change carries, to first order, by one backward pass of the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pnlac_fast import prompts
from pnlac_fast import store as stores
from pnlac_fast.cost import Meter
from pnlac_fast.datasets import Question, as_questions, by_topic, fingerprint, paired
from pnlac_fast.errors import UserError
from pnlac_fast.loading import open_models, topic_of
from pnlac_fast.models import Model
from pnlac_fast.prompts import DEFAULT_TEMPLATE, Batch
from pnlac_fast.provenance import provenance
from pnlac_fast.scores import ATTRIBUTION
from pnlac_fast.stance import log_probabilities, paired_weights


def attribute(
    model: Model | str | Path,
    tuned: Mapping[str, Model | str | Path],
    data: str | Path | Sequence[Question],
    *,
    store: str | Path | None = None,
    site: str = "mlp_mid",
    template: str = DEFAULT_TEMPLATE,
    normalise: str = "token",
    batch_tokens: int = 4096,
) -> xr.Dataset:
    """First-order estimate of what patching each neuron alone would move, all neurons at once.

    For a question with margin m = log P(right) - log P(left), in nats, a neuron's attribution is the sum over all
    positions of its right and left texts of (b - a) dm/da: a is the base model's activation, b the tuned model's on the
    same token, and the gradient is that of the base model through everything behind the neuron. It is attribution
    patching (arXiv 2310.10348) of tuned into base; summed over all neurons of a layer it estimates patching the layer.

    Parameters
    ----------
    model, tuned
        The base model, and tuned ones by name. Base runs once for all of them, forward and backward.
    data
        Questions with pairs of completions.
    store
        Where the result is written, as ``/results/attribution``.
    site
        Whose neurons.
    template
        What the model is asked: a text with ``{instruction}``.
    normalise
        "token" or "sum": see :func:`pnlac_fast.stance.margins`.
    batch_tokens
        Padded tokens of one pass; a pass keeps its graph, so it takes several times a forward pass's memory.

    Returns
    -------
    xarray.Dataset
        ``attribution`` float32 (model, topic, layer, neuron) and ``shift`` float64 (model, topic), what tuning did to
        the mean margin; both nats. Coordinate ``tuned_topic`` on model, "" where it is not known.

    Raises
    ------
    UserError
        A question lacks pairs, a text is longer than the model's context, or an activation is not finite.
    RuntimeError
        A layer was not visited once in every pass.
    """
    questions = paired(as_questions(data))
    base, models = open_models(model, tuned)
    if not models:
        raise UserError("There is no tuned model to attribute a change to: give at least one --tuned.")
    if base.part.ranks > 1:
        raise UserError(f"The neurons of '{base.name}' lie in several processes: load it without tp.")
    meter = Meter(base.device)
    groups = by_topic(questions)
    topics = list(groups)
    total = np.zeros((len(models), len(topics), len(base.blocks), base.width(site)))
    shift = np.zeros((len(models), len(topics)))
    for t, group in enumerate(groups.values()):
        texts = prompts.encode(base.tokenizer, group, template, side="both", context=base.context)
        weights = paired_weights(group, texts, normalise) / len(group)
        ids = [text.ids for text in texts]
        for batch in prompts.batches(ids, batch_tokens, padding_side="left", device=base.device):
            index = list(batch.index)
            lengths = [len(texts[i].ids) - texts[i].prompt for i in index]
            weight = torch.tensor(weights[index])
            stance, seen, gradient = _gradients(base, batch, lengths, weight, site)
            for m, other in enumerate(models.values()):
                change, moved = _products(other, batch, lengths, weight, site, seen, gradient)
                total[m, t] += change
                shift[m, t] += moved - stance
    if not np.isfinite(total).all():
        raise UserError("An attribution is not finite: try --dtype float32, or check the weights of the models.")
    tuned_topics = [topic_of(m, name, topics) for name, m in models.items()]
    result = xr.Dataset(
        {
            "attribution": (("model", "topic", "layer", "neuron"), total.astype("f4")),
            "shift": (("model", "topic"), shift),
        },
        coords={
            "model": np.array(list(models), object),
            "topic": np.array(topics, object),
            "layer": np.arange(len(base.blocks), dtype=np.int32),
            "tuned_topic": ("model", np.array(tuned_topics, object)),
        },
        attrs={
            "site": site,
            "normalise": normalise,
            "provenance": provenance(base=base.origin, data=fingerprint(questions), template=template),
            "cost": meter.record(),
        },
    )
    if store is not None:
        stores.create_results(store, provenance=result.attrs["provenance"])
        stores.write_result(store, ATTRIBUTION, result)
    return result


def _gradients(
    model: Model, batch: Batch, lengths: Sequence[int], weight: Tensor, site: str
) -> tuple[float, dict[int, Tensor], dict[int, Tensor]]:
    """Weighted stance of a batch, its activations and its gradients, both by layer [sequence, position, neuron]."""
    seen: dict[int, Tensor] = {}
    added: dict[int, Tensor] = {}

    def visit(layer: int, activation: Tensor) -> Tensor:
        seen[layer] = activation.detach()
        added[layer] = torch.zeros_like(activation, requires_grad=True)
        return activation + added[layer]

    with torch.enable_grad(), model.tapped(site, visit):
        found = log_probabilities(model, batch, lengths)
        stance = (weight.to(found.device) * found).sum()
        _check_visits(model, added)
        gradients = torch.autograd.grad(stance, list(added.values()))
    return stance.item(), seen, dict(zip(added, gradients, strict=True))


def _products(
    model: Model,
    batch: Batch,
    lengths: Sequence[int],
    weight: Tensor,
    site: str,
    reference: Mapping[int, Tensor],
    gradient: Mapping[int, Tensor],
) -> tuple[np.ndarray, float]:
    """Sums of (b - a) dm/da, float64 [layer, neuron], and the weighted stance of a tuned model on a batch."""
    sums: dict[int, np.ndarray] = {}
    real = batch.mask.bool()[..., None]

    def visit(layer: int, activation: Tensor) -> None:
        wide = activation.to(torch.promote_types(activation.dtype, torch.float32))
        product = (wide - reference[layer].to(wide)) * gradient[layer].to(wide)
        # Nothing attends to padding, so its gradient is 0; but what stands there need not be finite.
        sums[layer] = torch.where(real.to(wide.device), product, 0).sum((0, 1), dtype=torch.float64).cpu().numpy()

    with torch.inference_mode(), ExitStack() as stack:
        stack.enter_context(model.tapped(site, visit))
        stance = weight @ log_probabilities(model, batch, lengths).cpu()
    _check_visits(model, sums)
    return np.stack([sums[layer] for layer in range(len(model.blocks))]), float(stance)


def _check_visits(model: Model, by_layer: Mapping[int, Any]) -> None:
    if len(by_layer) != len(model.blocks):
        raise RuntimeError(f"{len(by_layer)} layers of '{model.name}' were visited, of {len(model.blocks)}")
