"""Activations of chosen neurons in the base model on every training row, read once, from the model or from a store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pnlac_fast import prompts
from pnlac_fast import store as stores
from pnlac_fast.architecture import backbone
from pnlac_fast.errors import UserError
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.penalties import adapter_off, decoder_of
from pnlac_fast.raw import NONE

LEAST_STD = 1e-3  # in units of a layer's typical one: a neuron that hardly ever varies must not rule the penalty


@dataclass(frozen=True, eq=False)
class BaseActivations:
    """Activations of chosen neurons in the base model, on the tokens of the training rows.

    All but the last token of each row, whose activations decide nothing that is trained on.

    Attributes
    ----------
    neurons
        Which ones.
    values
        [token, chosen] on the CPU, the rows one after another, the neurons by layer and index.
    std
        float32 [chosen]: standard deviation over these tokens, in which the penalty is measured.
    starts
        Where a row begins in ``values``, by its token ids without the last, as bytes of int64.
    """

    neurons: NeuronSet
    values: Tensor
    std: Tensor
    starts: Mapping[bytes, int]

    def places(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Where the tokens of a padded batch lie in ``values``, int64 [row, position]; -1 at others.

        Parameters
        ----------
        ids, mask
            [row, position] on the CPU.

        Raises
        ------
        UserError
            A row is not among them.
        """
        found = torch.full_like(ids, -1)
        for row, (tokens, real) in enumerate(zip(ids, mask.bool(), strict=True)):
            at = real.nonzero()[:-1, 0]
            start = self.starts.get(_key(tokens[at]))
            if start is None:
                raise UserError(
                    "A row to train on has no base activations: make them from the rows as the model reads them, "
                    "truncated or packed alike."
                )
            found[row, at] = torch.arange(start, start + len(at))
        return found


def base_activations(
    model: Model | nn.Module,
    rows: Iterable[Sequence[int]],
    neurons: NeuronSet,
    *,
    batch_tokens: int = 4096,
    dtype: torch.dtype | None = None,
) -> BaseActivations:
    """Read the activations of chosen neurons on training rows, before anything is trained.

    Parameters
    ----------
    model
        The base. Adapters of a PEFT model are off meanwhile.
    rows
        Token ids of each training row, as it will be fed to the model, without padding.
    batch_tokens
        Padded tokens of one forward pass.
    dtype
        What to keep them in: tokens x neurons x bytes of it stay in memory. Default: that of the activations.

    Raises
    ------
    UserError
        The neurons are of another model, or there are no rows.
    """
    decoder = model if isinstance(model, Model) else decoder_of(model, neurons.last_projection)
    neurons.check(decoder)
    unique = {_key(torch.tensor(ids[:-1], dtype=torch.int64)): list(ids[:-1]) for ids in rows if len(ids) > 1}
    if not unique:
        raise UserError("There are no training rows to read base activations on: give at least one, of two tokens.")
    texts = list(unique.values())
    starts = [0]
    for ids in texts:
        starts.append(starts[-1] + len(ids))
    columns, taken = columns_of(neurons, decoder.device), {}
    values: Tensor | None = None

    def visit(layer: int, activation: Tensor) -> None:
        taken[layer] = activation.index_select(-1, columns[layer][0]).flatten(0, 1)

    training = decoder.hf.training
    decoder.hf.eval()
    with (
        torch.inference_mode(),
        adapter_off(model),
        decoder.active() as hf,
        decoder.tapped(neurons.site, visit, list(columns)),
    ):
        for batch in prompts.batches(texts, batch_tokens, device=decoder.device):
            backbone(hf)(**batch.inputs(), use_cache=False)
            read = torch.cat([taken[layer] for layer in columns], -1).to("cpu", dtype)
            if values is None:
                values = torch.empty(starts[-1], read.shape[1], dtype=read.dtype)
            for index, span in zip(batch.index, batch.rows, strict=True):
                values[starts[index] : starts[index + 1]] = read[span[0] : span[-1] + 1]
    decoder.hf.train(training)
    assert values is not None
    return BaseActivations(neurons, values, _deviation(values, columns), dict(zip(unique, starts, strict=False)))


def stored_activations(store: str | Path, neurons: NeuronSet) -> BaseActivations:
    """The same from a store, on the completions that it was made with; ``std`` is over all of these.

    Parameters
    ----------
    store
        From ``pnlac-fast cache --raw full --tokens all --side SIDE`` with the template of the fine-tune; with
        ``--raw-neurons`` it holds no more than is needed.

    Raises
    ------
    UserError
        The store is of another base, or keeps no full texts or not all of these neurons.
    """
    mine, theirs = neurons.base.get("sha256"), stores.info(store)["provenance"].get("base", {}).get("sha256")
    if mine and theirs and mine != theirs:
        raise UserError(f"'{store}' is of another base model than '{neurons.name}': cache with the base of these.")
    found = stores.open_activations(store, "base", neurons.site)
    wanted = np.argwhere(neurons.member)
    if "selected" in found.dims:
        kept = {pair: i for i, pair in enumerate(zip(found["layer"].values, found["neuron"].values, strict=True))}
        at = [kept.get((layer, neuron), -1) for layer, neuron in wanted]
        if min(at) < 0:
            raise UserError(
                f"'{store}' keeps not all neurons of '{neurons.name}': cache again with --raw-neurons, or without."
            )
        values = found["activation"].isel(selected=at).values
    else:
        layers, width = found["layer"].values.tolist(), found.sizes["neuron"]
        if neurons.member.shape[1] != width or set(wanted[:, 0].tolist()) - set(layers):
            raise UserError(f"'{store}' is not of the layers and neurons of '{neurons.name}': cache them anew.")
        columns = [found["activation"].sel(layer=i).isel(neuron=neurons.layer(i)) for i in sorted({*wanted[:, 0]})]
        values = np.concatenate([column.values for column in columns], axis=1)
    starts, order = _texts_of(found, store)
    own = torch.from_numpy(np.ascontiguousarray(values[order]))
    return BaseActivations(neurons, own, _deviation(own, columns_of(neurons, own.device)), starts)


def _texts_of(found: Any, store: str | Path) -> tuple[dict[bytes, int], np.ndarray]:
    """Where each text with its completion begins in the rows of a store, put in the order given with it."""
    names = ("example", "side", "completion", "position", "token_id")
    example, side, completion, position, token = (found[name].values for name in names)
    texts: dict[tuple[int, int, int], list[int]] = {}
    for row in range(len(position)):
        texts.setdefault((int(example[row]), int(side[row]), int(completion[row])), []).append(row)
    starts: dict[bytes, int] = {}
    order: list[int] = []
    for (question, leaning, _), rows in texts.items():
        if leaning < 0:
            continue
        whole = [*texts.get((question, NONE, NONE), []), *rows]
        if position[whole].tolist() != list(range(len(whole))):
            raise UserError(f"'{store}' keeps not every token of its texts: cache again with --raw full.")
        starts.setdefault(_key(torch.from_numpy(token[whole].astype(np.int64))), len(order))
        order += whole
    if not starts:
        raise UserError(f"'{store}' holds no completions: cache again with --raw full --tokens all.")
    return starts, np.array(order)


def _deviation(values: Tensor, columns: Mapping[int, tuple[Tensor, slice]]) -> Tensor:
    std = torch.empty(values.shape[1])
    for _, here in columns.values():
        spread = values[:, here].double().std(0, correction=0)
        std[here] = spread.clamp(min=LEAST_STD * float(spread.square().mean().sqrt())).float()
    if not bool((std > 0).all()):
        raise UserError("Some chosen neurons never vary on the training rows: give more rows, or other neurons.")
    return std


def columns_of(neurons: NeuronSet, device: torch.device) -> dict[int, tuple[Tensor, slice]]:
    """For each layer with chosen neurons: their indices, int64, and where they are among all chosen ones."""
    found, start = {}, 0
    for layer, count in enumerate(neurons.per_layer):
        if count:
            found[layer] = (torch.tensor(neurons.layer(layer), device=device), slice(start, start + count))
            start += count
    return found


def _key(ids: Tensor) -> bytes:
    return ids.to(torch.int64).numpy().tobytes()
