"""Neuron slices: MLP projections of which nothing trains but the rows and columns of chosen neurons.

The forward pass costs what the plain one costs. In the backward pass only the slices get a gradient, and so an
optimizer keeps state for them alone. A model with slices saves and loads ordinary checkpoints.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pnlac_fast.errors import UserError
from pnlac_fast.models import Model, Weights
from pnlac_fast.neurons import NeuronSet

PARTS = {"mlp_mid": {"gate_proj": 0, "up_proj": 0, "down_proj": 1}, "mlp_out": {"down_proj": 0}}  # dim of the neurons


class SlicedLinear(nn.Linear):
    """A linear layer that is frozen but for some rows or columns, which are parameters of their own.

    A plain ``nn.Linear`` becomes one by :meth:`slice`, keeping its hooks, and is plain again after :meth:`restore`.
    ``weight`` and ``bias`` hold the current values of the slice from each forward pass and each ``state_dict`` on;
    a state dict has the entries of the plain layer and no others, and loading one fills the slice. ``torch.compile``
    breaks its graph here.

    Attributes
    ----------
    dim
        0 where the neurons are rows of the weight, 1 where they are columns.
    index
        int64 [slice], ascending.
    slice_weight
        [slice, input] or [output, slice], of the dtype of the weight.
    slice_bias
        [slice]; None for columns and for a layer without bias.
    """

    dim: int
    index: Tensor
    slice_weight: nn.Parameter
    slice_bias: nn.Parameter | None

    def forward(self, input: Tensor) -> Tensor:
        """The plain layer's output."""
        self.write()
        if not torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        return _Sliced.apply(input, self.slice_weight, self.slice_bias, self.weight, self.bias, self.index, self.dim)

    @torch.compiler.disable
    def write(self) -> None:
        """Write the slice into the weight and bias.

        Whether it has changed cannot be known: torch's fused optimizers leave ``_version`` as it is. The ``data`` of
        the weight has a version of its own, so that tensors saved for a backward pass stay valid.
        """
        self.weight.data.index_copy_(self.dim, self.index, self.slice_weight.data)
        if self.slice_bias is not None:
            self.bias.data.index_copy_(0, self.index, self.slice_bias.data)

    def read(self) -> None:
        """Fill the slice from the weight and bias."""
        self.slice_weight.data = self.weight.data.index_select(self.dim, self.index)
        if self.slice_bias is not None:
            self.slice_bias.data = self.bias.data.index_select(0, self.index)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.write()
        for name in ("weight", "bias"):
            if (parameter := getattr(self, name)) is not None:
                destination[prefix + name] = parameter if keep_vars else parameter.detach()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        for name, dim in (("weight", self.dim), ("bias", 0)):
            mine, theirs = getattr(self, name), state_dict.get(prefix + name)
            if mine is None or theirs is None or mine.shape != theirs.shape:
                continue
            differs = mine.data != theirs.to(mine)
            if name == "weight" or self.slice_bias is not None:
                differs.index_fill_(dim, self.index, False)
            if differs.any():
                raise UserError(
                    f"The checkpoint to load was made without these neuron slices ({prefix}{name} differs elsewhere): "
                    f"resume with the same neurons and mode, or start anew."
                )
        known = len(missing)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        missing[known:] = [name for name in missing[known:] if not name.startswith(f"{prefix}slice_")]
        self.read()


class _Sliced(torch.autograd.Function):
    """``F.linear`` with a gradient for its input and for a slice of its weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, own: Tensor, own_bias: Tensor | None, weight: Tensor, bias: Tensor, index: Tensor, dim: int
    ) -> Tensor:
        passes, trains = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        ctx.dim = dim
        seen = x.index_select(-1, index) if dim else x
        ctx.save_for_backward(index, weight if passes else None, seen if trains else None)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, weight, seen = ctx.saved_tensors
        # Under autocast the output, and so its gradient, has another dtype than the input and the weight.
        passed = None if weight is None else grad @ weight.to(grad.dtype)
        if seen is None:
            return passed, *[None] * 6
        rows, seen = grad.flatten(0, -2), seen.flatten(0, -2).to(grad.dtype)
        if ctx.dim == 0:
            rows = rows.index_select(1, index)
        bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return passed, rows.T @ seen, bias, *[None] * 4


@dataclass(frozen=True, eq=False)
class Slice:
    """The slice of one projection: where it is, and its parameters, which are filled when it is installed."""

    layer: int
    part: str
    name: str
    linear: Any
    dim: int
    index: Tensor
    weight: nn.Parameter
    bias: nn.Parameter | None

    def install(self) -> None:
        """Make the linear layer a sliced one."""
        sliced = self.linear
        sliced.__class__ = SlicedLinear
        sliced.dim = self.dim
        sliced.register_buffer("index", self.index.to(sliced.weight.device), persistent=False)
        sliced.register_parameter("slice_weight", self.weight)
        sliced.register_parameter("slice_bias", self.bias)
        sliced.read()

    def restore(self) -> None:
        """Make it plain again, with the slice written into it."""
        sliced = self.linear
        sliced.write()
        for name in ("dim", "index", "slice_weight", "slice_bias"):
            delattr(sliced, name)
        sliced.__class__ = nn.Linear


class Slices:
    """The neuron slices of a model: its only parameters that train, while they are installed.

    Attributes
    ----------
    model
        The Hugging Face model.
    neurons
        Whose rows and columns they are.
    parts
        One slice for each projection, by layer.
    covered
        In how many layers each projection has a slice, such as ``{"down_proj": 32}``.
    installed
        Whether the model has them now.
    base_sha256
        Fingerprint of the values that they had at first; see :func:`fingerprint`.
    """

    def __init__(self, model: nn.Module, neurons: NeuronSet, parts: Sequence[Slice]) -> None:
        self.model, self.neurons, self.parts = model, neurons, tuple(parts)
        self.covered = dict(Counter(part.part for part in parts))
        self.installed = False
        self.base_sha256 = ""
        self._trained: list[nn.Parameter] = []

    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        return [p for part in self.parts for p in (part.weight, part.bias) if p is not None]

    def tensors(self) -> dict[str, Tensor]:
        """Their values by name, such as "layers.0.gate_proj.weight" [slice, input]; they stay after a merge."""
        return {
            f"layers.{part.layer}.{part.part}.{kind}": parameter.detach()
            for part in self.parts
            for kind, parameter in (("weight", part.weight), ("bias", part.bias))
            if parameter is not None
        }

    def install(self) -> None:
        """Put them into the model with its present weights, and freeze everything else."""
        if not self.installed:
            self._trained = [p for p in self.model.parameters() if p.requires_grad]
            self.model.requires_grad_(False)
            for part in self.parts:
                part.install()
            self.installed = True

    def merge(self) -> None:
        """Write them into the weights and make the model plain again, with the flags that it had."""
        if self.installed:
            for part in self.parts:
                part.restore()
            for parameter in self._trained:
                parameter.requires_grad_(True)
            self.installed = False


def slice_neurons(model: Model | nn.Module, neurons: NeuronSet) -> Slices:
    """Make the rows and columns of chosen neurons a model's only trainable parameters.

    Neuron j of ``mlp_mid`` is row j of gate and up, weights and biases, and column j of down; coordinate i of
    ``mlp_out`` is row i of down and its bias. Projections that are frozen already stay so. Make the optimizer
    afterwards, from ``Slices.parameters()`` or from the parameters of the model that require a gradient, and call
    ``Slices.merge()`` at the end.

    Parameters
    ----------
    model
        A Hugging Face decoder with gated MLPs, without adapters. It is changed in place.
    neurons
        Neurons of site ``mlp_mid`` or ``mlp_out``.

    Raises
    ------
    UserError
        The neurons are of another model or site, or their weights are frozen, shared or of another kind than
        ``nn.Linear``.

    Examples
    --------
    >>> slices = slice_neurons(model, neurons)  # doctest: +SKIP
    >>> optimizer = torch.optim.AdamW(slices.parameters(), fused=True)  # doctest: +SKIP
    >>> slices.merge()  # doctest: +SKIP
    """
    decoder = model if isinstance(model, Model) else Model(Weights(model), None, "given", {})
    if neurons.site not in PARTS:
        raise UserError(
            f"Neurons of site '{neurons.site}' have no weights of their own to train: locate neurons of "
            f"{' or '.join(PARTS)}."
        )
    neurons.check(decoder)
    names: dict[int, list[str]] = {}
    for name, parameter in decoder.hf.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parts: list[Slice] = []
    for layer in range(len(decoder.blocks)):
        if not neurons.member[layer].any():
            continue
        index, before = torch.tensor(neurons.layer(layer)), len(parts)
        for part, dim in PARTS[neurons.site].items():
            linear = decoder.projection(layer, part)
            if type(linear) is not nn.Linear:
                raise UserError(
                    f"{part} of layer {layer} is {type(linear).__name__}, not a plain linear layer: give a model "
                    f"without adapters, quantisation or slices."
                )
            if not linear.weight.requires_grad:
                continue
            known = names[id(linear.weight)]
            if len(known) > 1:
                raise UserError(
                    f"{' and '.join(known)} are one shared parameter, of which no neuron can train alone: "
                    f"choose neurons of other layers."
                )
            weight = nn.Parameter(linear.weight.new_empty(0))
            bias = nn.Parameter(linear.bias.new_empty(0)) if dim == 0 and linear.bias is not None else None
            parts.append(Slice(layer, part, known[0].removesuffix(".weight"), linear, dim, index, weight, bias))
        if len(parts) == before:
            raise UserError(
                f"Nothing trains in the MLP of layer {layer}, which has chosen neurons: set requires_grad on "
                f"{', '.join(PARTS[neurons.site])}."
            )
    slices = Slices(decoder.hf, neurons, parts)
    slices.install()
    slices.base_sha256 = fingerprint(slices.tensors())
    return slices


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over slices by name, in float32: that of a half-precision model and of its float32 copy are the same."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
