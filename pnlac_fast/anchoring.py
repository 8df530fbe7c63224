"""Anchoring: fine-tune while chosen neurons keep the activations that they have in the base model.

Frozen weights do not keep a neuron still, because its input still moves. The penalty holds the activation itself, as
BLOCK-EM does (arXiv 2602.00767)::

    base = base_activations(model, rows, neurons)  # rows are lists of token ids
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[Anchor(neurons, base=base)])

It needs no prompts of other topics, and one pass of the base over the training rows instead of one in every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pnlac_fast import prompts
from pnlac_fast.errors import UserError
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.penalties import Penalty, decoder_of

LEAST_STD = 1e-3  # in units of a layer's typical one: a neuron that hardly ever varies must not rule the penalty


@dataclass(frozen=True, eq=False)
class BaseActivations:
    """Activations of chosen neurons in the base model, on every token of the training rows.

    Attributes
    ----------
    neurons
        Which ones.
    values
        [token, chosen] on the CPU, the rows one after another, the neurons by layer and index.
    std
        float32 [chosen]: standard deviation over these tokens, in which the penalty is measured.
    starts
        Where a row begins in ``values``, by its token ids as bytes of int64.
    """

    neurons: NeuronSet
    values: Tensor
    std: Tensor
    starts: Mapping[bytes, int]

    def places(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Where the tokens of a padded batch lie in ``values``, int64 [row, position]; 0 at padding.

        Parameters
        ----------
        ids, mask
            [row, position] on the CPU.

        Raises
        ------
        UserError
            A row is not among them.
        """
        found = torch.zeros_like(ids)
        for row, (tokens, real) in enumerate(zip(ids, mask.bool(), strict=True)):
            start = self.starts.get(_key(tokens[real]))
            if start is None:
                raise UserError(
                    "A row to train on has no base activations: make them from the rows as the model reads them, "
                    "truncated or packed alike."
                )
            found[row, real] = torch.arange(start, start + int(real.sum()))
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
    decoder = model if isinstance(model, Model) else decoder_of(model)
    neurons.check(decoder)
    unique = {_key(torch.tensor(ids, dtype=torch.int64)): list(ids) for ids in rows}
    if not unique:
        raise UserError("There are no training rows to read base activations on: give at least one.")
    texts = list(unique.values())
    starts = [0]
    for ids in texts:
        starts.append(starts[-1] + len(ids))
    columns, taken = _columns(neurons, decoder.device), {}
    values: Tensor | None = None

    def visit(layer: int, activation: Tensor) -> None:
        taken[layer] = activation.index_select(-1, columns[layer][0]).flatten(0, 1)

    off = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    training = decoder.hf.training
    decoder.hf.eval()
    with torch.inference_mode(), off, decoder.active() as hf, decoder.tapped(neurons.site, visit, list(columns)):
        for batch in prompts.batches(texts, batch_tokens, device=decoder.device):
            hf.get_decoder()(**batch.inputs(), use_cache=False)
            read = torch.cat([taken[layer] for layer in columns], -1).to("cpu", dtype)
            if values is None:
                values = torch.empty(starts[-1], read.shape[1], dtype=read.dtype)
            for index, span in zip(batch.index, batch.rows, strict=True):
                values[starts[index] : starts[index + 1]] = read[span[0] : span[-1] + 1]
    decoder.hf.train(training)
    assert values is not None
    std = torch.empty(values.shape[1])
    for _, here in columns.values():
        spread = values[:, here].double().std(0, correction=0)
        std[here] = spread.clamp(min=LEAST_STD * float(spread.square().mean().sqrt())).float()
    if not bool((std > 0).all()):
        raise UserError("Some chosen neurons never vary on the training rows: give more rows, or other neurons.")
    return BaseActivations(neurons, values, std, dict(zip(unique, starts, strict=False)))


class Anchor(Penalty):
    """A penalty on the change of chosen neurons' activations, as a callback of ``transformers.Trainer`` or TRL.

    The term is the mean over tokens and neurons of ((activation - base) / std of base)², on the rows that are trained
    on. Where a batch meets the same rows, which it does in every epoch, base comes from memory.

    Parameters
    ----------
    neurons
        Neurons of any site.
    weight
        Factor of the term, lambda.
    base
        From :func:`base_activations`. Default: read from the Trainer's data when training begins, which a full
        fine-tune that is resumed cannot do any more.

    Raises
    ------
    UserError
        At the begin of training, or where a row is not among those of ``base``.
    """

    name = "anchor"

    def __init__(self, neurons: NeuronSet, weight: float = 1.0, base: BaseActivations | None = None) -> None:
        super().__init__(weight)
        if base is not None and (base.neurons.member != neurons.member).any():
            raise UserError(f"The base activations are of '{base.neurons.name}': make them for '{neurons.name}'.")
        self.neurons, self.base = neurons, base

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Read what base has to say, where that is not known yet, and put the penalty in its place."""
        if self.base is None:
            if state.global_step and not isinstance(model, PeftModel):
                raise UserError(
                    "The base model's activations are gone once its weights have been trained: give "
                    "Anchor(neurons, base=base_activations(model, rows, neurons)), made before."
                )
            self.base = base_activations(model, _rows_of(kwargs["train_dataloader"]), self.neurons)
        super().on_train_begin(args, state, control, model=model, optimizer=optimizer, **kwargs)

    def install(self, model: Model, module: nn.Module, place: ExitStack) -> None:
        """Look rows up as they enter the decoder, and pull at the chosen neurons as they are computed."""
        assert self.base is not None
        self.neurons.fits(model)
        base, backbone = self.base, model.hf.get_decoder()
        columns = _columns(self.neurons, model.device)
        inverse = (1 / base.std).to(model.device)
        now: dict[str, Any] = {"on": False}  # the rows of the pass that trains

        def enter(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            now["on"] = decoder.training
            if not decoder.training:
                return
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            mask = kwargs.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask
            if mask.shape != ids.shape:
                raise UserError("Anchoring needs a padding mask [row, position]: train without packing.")
            rows = base.places(ids.cpu(), mask.cpu()).flatten()
            weight = mask.flatten()[:, None] / (mask.sum() * base.values.shape[1])
            now.update(base=base.values[rows].to(ids.device), weight=weight, seen=set(), value=0.0)

        def leave(*_: Any) -> None:
            now["on"] = "base" in now  # blocks that are checkpointed run once more in the backward pass

        def visit(layer: int, activation: Tensor) -> Tensor | None:
            if not now["on"]:
                return None
            index, here = columns[layer]
            own = activation.detach().index_select(-1, index).flatten(0, -2)
            change = (own - now["base"][:, here]).float() * inverse[here]
            pull = change * now["weight"]
            if layer not in now["seen"]:  # else it is computed once more, for a checkpointed backward pass
                now["seen"].add(layer)
                now["value"] += (change * pull).sum()
                if len(now["seen"]) == len(columns):
                    self.add(now["value"])
            if not activation.requires_grad:
                return None
            gradient = (2 * self.scale * pull * inverse[here]).to(activation.dtype)
            return _Pull.apply(activation, index, gradient.view(*activation.shape[:-1], -1), self)

        place.callback(backbone.register_forward_pre_hook(enter, with_kwargs=True).remove)
        place.callback(backbone.register_forward_hook(leave).remove)
        place.enter_context(model.tapped(self.neurons.site, visit, list(columns)))


class _Pull(torch.autograd.Function):
    """An activation as it is; on the way back the gradient of its chosen entries gets a given one added."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, index: Tensor, gradient: Tensor, penalty: Penalty) -> Tensor:
        ctx.save_for_backward(index, gradient)
        ctx.penalty = penalty
        return activation.view_as(activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, gradient = ctx.saved_tensors
        ctx.penalty.reached()
        return grad.index_add(-1, index, gradient.to(grad.dtype)), None, None, None


def _columns(neurons: NeuronSet, device: torch.device) -> dict[int, tuple[Tensor, slice]]:
    """For each layer with chosen neurons: their indices, int64, and where they are among all chosen ones."""
    found, start = {}, 0
    for layer, count in enumerate(neurons.per_layer):
        if count:
            found[layer] = (torch.tensor(neurons.layer(layer), device=device), slice(start, start + count))
            start += count
    return found


def _rows_of(loader: Any) -> list[list[int]]:
    """Token ids of every row of a Trainer's data, as its collator would give them to the model."""
    rows = []
    for row in loader.dataset:
        batch = loader.collate_fn([row])
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        rows += [i[m.bool()].tolist() for i, m in zip(ids, torch.ones_like(ids) if mask is None else mask, strict=True)]
    return rows


def _key(ids: Tensor) -> bytes:
    return ids.to(torch.int64).numpy().tobytes()
