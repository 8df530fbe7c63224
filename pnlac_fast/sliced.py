"""Projections of which only some rows or columns train: linear layers, Conv1D, and experts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pnlac_fast import mixtures
from pnlac_fast.errors import UserError

if TYPE_CHECKING:
    from pnlac_fast.places import Place

    Module = nn.Module
else:
    Module = object


class Sliced(Module):
    """What a module is beside its own class while some entries of its tensors are parameters of their own.

    The entries of the tensor ``weight`` are the parameter ``slice_weight``, and so on. The tensors hold the current
    values of the slices from each forward pass and each ``state_dict`` on; a state dict has the entries of the plain
    module and no others, and loading one fills the slices. ``torch.compile`` breaks its graph here.

    Attributes
    ----------
    places
        Where the slices are, by the name of their tensor.
    """

    places: dict[str, Place]

    @torch.compiler.disable
    def write(self) -> None:
        """Write the slices into the tensors.

        Whether they have changed cannot be known: torch's fused optimizers leave ``_version`` as it is. The ``data`` of
        a tensor has a version of its own, so that tensors saved for a backward pass stay valid.
        """
        for name, place in self.places.items():
            place.put(getattr(self, name).data, getattr(self, f"slice_{name}").data)

    def read(self) -> None:
        """Fill the slices from the tensors."""
        for name, place in self.places.items():
            getattr(self, f"slice_{name}").data = place.take(getattr(self, name).data)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.write()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.places:
            del destination[f"{prefix}slice_{name}"]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        for name, mine in self._parameters.items():
            theirs = state_dict.get(prefix + name)
            if name.startswith("slice_") or mine is None or theirs is None or mine.shape != theirs.shape:
                continue
            differs = mine.data != theirs.to(mine)
            if name in self.places:
                self.places[name].put(differs, False)
            if differs.any():
                raise UserError(
                    f"The checkpoint to load was made without these neuron slices ({prefix}{name} differs elsewhere): "
                    f"resume with the same neurons and mode, or start anew."
                )
        known = len(missing)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        missing[known:] = [name for name in missing[known:] if not name.startswith(f"{prefix}slice_")]
        self.read()


class SlicedLinear(Sliced, nn.Linear):
    """A linear layer that is frozen but for some rows or columns of its weight and bias."""

    def forward(self, input: Tensor) -> Tensor:
        """The plain layer's output."""
        return _linear(self, input, transposed=False)


class SlicedConv1D(Sliced, Conv1D):
    """The same of transformers' Conv1D, whose weight is [input, output]."""

    def forward(self, x: Tensor) -> Tensor:
        """The plain layer's output."""
        return _linear(self, x, transposed=True)


class SlicedExperts(Sliced):
    """Experts that are frozen but for some neurons, computed one after another."""

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The plain module's output: hidden [token, width], index and weights [token, choice]."""
        self.write()
        this: Any = self
        product: mixtures.Product = mixtures.product
        bias, count = getattr(this, "down_proj_bias", None), this.num_experts
        if torch.is_grad_enabled():
            # By expert, at once: a selection for each would wait for the GPU, and have a gradient as large as them all.
            own = {
                name: (place.split(getattr(this, f"slice_{name}"), count), place.indices(count))
                for name, place in self.places.items()
            }
            product = partial(_product_of_slices, own)
            if (place := self.places.get("down_proj_bias")) is not None:
                bias = _Written.apply(this.slice_down_proj_bias, bias, place)
        return mixtures.compute(self, hidden, index, weights, product, bias)


def _product_of_slices(
    own: dict[str, tuple[Sequence[Tensor], Sequence[Tensor]]], module: Any, name: str, expert: int, x: Tensor
) -> Tensor:
    """As :func:`pnlac_fast.mixtures.product`, with a gradient for the expert's slices.

    ``own`` has those of every expert, and where they are, by the name of their tensor.
    """
    place: Place | None = module.places.get(name)
    if place is None:
        return mixtures.product(module, name, expert, x)
    weight, bias = getattr(module, name)[expert], None
    slice_bias = None
    if name != "down_proj" and (biases := getattr(module, f"{name}_bias", None)) is not None:
        bias = biases[expert]
        slice_bias = own[f"{name}_bias"][0][expert] if f"{name}_bias" in own else None
    entries, index = (of[expert] for of in own[name])
    entries = entries if place.first is None or place.dim == 1 else entries.T
    return _Sliced.apply(x, entries, slice_bias, weight, bias, index.to(x.device), place.dim - 1, module.is_transposed)


def class_of(module: Any) -> type[Sliced]:
    """What becomes of a plain module when it is sliced."""
    if isinstance(module, nn.Linear):
        return SlicedLinear
    plain: type = type(module)
    return SlicedConv1D if plain is Conv1D else _experts(plain)


@cache
def _experts(plain: type) -> type[Sliced]:
    return type(f"Sliced{plain.__name__}", (SlicedExperts, plain), {})


def computes_plainly(module: Any) -> bool:
    """Whether a module computes x W + b of plain tensors, or experts do, so that it can be sliced."""
    if isinstance(module, Sliced):
        return False
    if not all(type(p) is nn.Parameter and p.is_floating_point() for p in module.parameters(recurse=False)):
        return False
    if type(module) in (nn.Linear, Conv1D) or hasattr(module, "is_transposed"):
        return True
    if not isinstance(module, nn.Linear):
        return False
    with torch.no_grad():  # a class of its own, as Falcon's
        x = torch.linspace(-1, 1, 2 * module.in_features).view(2, -1).to(module.weight)
        found, wanted = type(module).forward(module, x), F.linear(x, module.weight, module.bias)
        return bool((found - wanted).abs().max() <= 1e-2 * wanted.abs().max())


def _linear(layer: Any, x: Tensor, transposed: bool) -> Tensor:
    layer.write()
    if not torch.is_grad_enabled():
        return _apply(x, layer.weight, layer.bias, transposed)
    place, own_bias = layer.places["weight"], getattr(layer, "slice_bias", None)
    index = place.index.to(x.device)
    return _Sliced.apply(x, layer.slice_weight, own_bias, layer.weight, layer.bias, index, place.dim, transposed)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return F.linear(x, weight, bias)
    if bias is None:
        return x @ weight
    return torch.addmm(bias, x.flatten(0, -2), weight).view(*x.shape[:-1], weight.shape[1])


class _Written(torch.autograd.Function):
    """A tensor into which a slice has been written, with a gradient for the slice."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, tensor: Tensor, place: Place) -> Tensor:
        ctx.place = place
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.place.take(grad), None, None


class _Sliced(torch.autograd.Function):
    """A linear layer with a gradient for its input and for a slice of its weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        own: Tensor,
        own_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        dim: int,
        transposed: bool,
    ) -> Tensor:
        passes, trains = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        ctx.outputs, ctx.transposed = dim == int(transposed), transposed  # whether the slice is of what comes out
        seen = x if ctx.outputs else x.index_select(-1, index)
        ctx.save_for_backward(index, weight if passes else None, seen if trains else None)
        out = _apply(x, weight, bias, transposed)
        # Autograd forbids to change a view in place that comes from here, which Falcon does to what its MLP gives.
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, weight, seen = ctx.saved_tensors
        # Under autocast the output, and so its gradient, has another dtype than the input and the weight.
        passed = None if weight is None else grad @ (weight.T if ctx.transposed else weight).to(grad.dtype)
        if seen is None:
            return passed, *[None] * 7
        rows, seen = grad.flatten(0, -2), seen.flatten(0, -2).to(grad.dtype)
        if ctx.outputs:
            rows = rows.index_select(1, index)
        bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return passed, seen.T @ rows if ctx.transposed else rows.T @ seen, bias, *[None] * 5
