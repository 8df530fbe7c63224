"""A linear layer of which only some rows or columns train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pnlac_fast.errors import UserError


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
