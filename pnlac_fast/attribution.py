"""How much of a stance each neuron's change carries, to first order, by one backward pass of the base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pnlac_fast import store as stores
from pnlac_fast.cost import Meter
from pnlac_fast.datasets import Question, as_questions, by_topic, fingerprint, paired
from pnlac_fast.errors import UserError
from pnlac_fast.loading import open_models, topic_of
from pnlac_fast.models import Model
from pnlac_fast.prompts import DEFAULT_TEMPLATE
from pnlac_fast.provenance import provenance
from pnlac_fast.scores import ATTRIBUTION
from pnlac_fast.stance import ScoredBatch, log_probabilities, scored_batches


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
    meter = Meter(base.device)
    topics = list(by_topic(questions))
    total = np.zeros((len(models), len(topics), len(base.blocks), base.width(site)))

    def fold(m: int, topic: str, _: np.ndarray, layer: int, product: Tensor) -> None:
        total[m, topics.index(topic), layer] += product.sum(0).cpu().numpy()

    options: dict[str, Any] = {"template": template, "normalise": normalise, "batch_tokens": batch_tokens}
    margin = attributed(base, models, questions, fold, site=site, **options)
    own = np.array([[q.topic == topic for q in questions] for topic in topics])
    total /= own.sum(1)[:, None, None]
    shift = (margin[1:] - margin[0]) @ own.T / own.sum(1)
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


def attributed(
    base: Model,
    models: Mapping[str, Model],
    questions: Sequence[Question],
    fold: Callable[[int, str, np.ndarray, int, Tensor], None],
    *,
    site: str = "mlp_mid",
    template: str = DEFAULT_TEMPLATE,
    normalise: str = "token",
    batch_tokens: int = 4096,
) -> np.ndarray:
    """Give every neuron's attribution on every text, see :func:`attribute`, to ``fold``; returns the margins.

    Parameters
    ----------
    fold
        Called with the number of the tuned model, a topic, the places among ``questions`` that some texts of it belong
        to, int64 [text], a layer, and the attributions of these texts, float64 [text, neuron] in nats. A question's is
        the sum of those of its texts.

    Returns
    -------
    numpy.ndarray
        float64 [1 + model, question]: margins of base and of every tuned model, in nats.

    Raises
    ------
    UserError
        There is no tuned model, the base lies in several processes, or a text is longer than its context.
    RuntimeError
        A layer was not visited once in every pass.
    """
    if not models:
        raise UserError("There is no tuned model to attribute a change to: give at least one --tuned.")
    if base.part.ranks > 1:
        raise UserError(f"The neurons of '{base.name}' lie in several processes: load it without tp.")
    margin = np.zeros((1 + len(models), len(questions)))
    for topic, group in by_topic(questions).items():
        rows = np.array([i for i, question in enumerate(questions) if question.topic == topic])
        for batch in scored_batches(base, group, template, normalise, batch_tokens):
            owner = rows[batch.owner]
            found, seen, gradient = _gradients(base, batch, site)
            np.add.at(margin[0], owner, found)
            for m, other in enumerate(models.values()):
                moved = _products(other, batch, site, seen, gradient, partial(fold, m, topic, owner))
                np.add.at(margin[1 + m], owner, moved)
    return margin


def _gradients(model: Model, batch: ScoredBatch, site: str) -> tuple[np.ndarray, dict[int, Tensor], dict[int, Tensor]]:
    """What each sequence adds to a margin, and by layer activations and gradients [sequence, position, neuron]."""
    seen: dict[int, Tensor] = {}
    added: dict[int, Tensor] = {}

    def visit(layer: int, activation: Tensor) -> Tensor:
        seen[layer] = activation.detach()
        added[layer] = torch.zeros_like(activation, requires_grad=True)
        return activation + added[layer]

    with torch.enable_grad(), model.tapped(site, visit):
        found = log_probabilities(model, *batch.read)
        stance = torch.tensor(batch.weight, device=found.device) * found
        _check_visits(model, added)
        gradients = torch.autograd.grad(stance.sum(), list(added.values()))  # no sequence reads another
    return stance.detach().cpu().numpy(), seen, dict(zip(added, gradients, strict=True))


def _products(
    model: Model,
    batch: ScoredBatch,
    site: str,
    reference: Mapping[int, Tensor],
    gradient: Mapping[int, Tensor],
    take: Callable[[int, Tensor], None],
) -> np.ndarray:
    """Give ``take`` each layer's sums of (b - a) dm/da over positions; returns what each sequence adds to a margin."""
    visited: dict[int, bool] = {}
    real = batch.read[0].mask.bool()[..., None]

    def visit(layer: int, activation: Tensor) -> None:
        wide = activation.to(torch.promote_types(activation.dtype, torch.float32))
        product = (wide - reference[layer].to(wide)) * gradient[layer].to(wide)
        # Nothing attends to padding, so its gradient is 0; but what stands there need not be finite.
        take(layer, torch.where(real.to(wide.device), product, 0).sum(1, dtype=torch.float64))
        visited[layer] = True

    with torch.inference_mode(), ExitStack() as stack:
        stack.enter_context(model.tapped(site, visit))
        stance = batch.weight * log_probabilities(model, *batch.read).cpu().numpy()
    _check_visits(model, visited)
    return stance


def _check_visits(model: Model, by_layer: Mapping[int, Any]) -> None:
    if len(by_layer) != len(model.blocks):
        raise RuntimeError(f"{len(by_layer)} layers of '{model.name}' were visited, of {len(model.blocks)}")
