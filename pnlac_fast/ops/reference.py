"""Each operation in plain torch: float64, slow, obvious. The others are tested against these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

GELU_SCALE, GELU_CUBE = (8 / math.pi) ** 0.5, 0.044715


@torch.no_grad()
def contrast(base: Tensor, tuned: Tensor, rows: Tensor, base_rows: Tensor, offsets: Tensor, sums: Tensor) -> None:
    """Add the contrast sums of the selected rows to ``sums``, on any device.

    See :func:`pnlac_fast.ops.contrast` for the arguments.
    """
    _check_index("contrast", "rows", rows, len(tuned), "rows")
    _check_index("contrast", "base_rows", base_rows, len(base), "rows")
    _check_offsets("contrast", offsets, len(rows))
    for group, (start, stop) in enumerate(pairwise(offsets.tolist())):
        a = base[base_rows[start:stop]].double()
        b = tuned[rows[start:stop]].double()
        sums[group] += torch.stack([term.sum(0) for term in contrast_terms(a, b)])


@torch.no_grad()
def moments(x: Tensor, rows: Tensor, offsets: Tensor, sums: Tensor) -> None:
    """Add the sums of the selected rows and of their squares to ``sums``. See :func:`pnlac_fast.ops.moments`."""
    _check_index("moments", "rows", rows, len(x), "rows")
    _check_offsets("moments", offsets, len(rows))
    for group, (start, stop) in enumerate(pairwise(offsets.tolist())):
        chosen = x[rows[start:stop]].double()
        sums[group] += torch.stack([chosen.sum(0), chosen.square().sum(0)])


@torch.no_grad()
def swiglu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up``. See :func:`pnlac_fast.ops.swiglu`."""
    return (_activated(gate, activation).double() * up.double()).to(gate.dtype)


@torch.no_grad()
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of ``swiglu`` by gate and up. See :func:`pnlac_fast.ops.swiglu_backward`."""
    by_activated = (grad.double() * up.double()).to(gate.dtype).double().contiguous()
    if activation == "silu":
        by_gate = torch.ops.aten.silu_backward(by_activated, gate.double().contiguous())
    else:
        x = gate.double()
        share, slope = torch.sigmoid(_gelu_exponent(x)), GELU_SCALE * (1 + 3 * GELU_CUBE * x.square())
        by_gate = by_activated * share * (1 + x * (1 - share) * slope)
    by_up = grad.double() * _activated(gate, activation).double()
    return by_gate.to(gate.dtype), by_up.to(gate.dtype)


@torch.no_grad()
def swiglu_contrast(
    gate: Tensor, up: Tensor, base: Tensor, base_rows: Tensor, counts: Tensor, sums: Tensor, activation: str
) -> Tensor:
    """``swiglu``, and the contrast sums of its result. See :func:`pnlac_fast.ops.swiglu_contrast`."""
    bad = torch.nonzero(~(counts.isfinite() & (counts >= 0) & (counts == counts.floor())))
    if len(bad):
        group, row = bad[0].tolist()
        value = float(counts[group, row])
        raise RuntimeError(f"swiglu_contrast: counts[{group}, {row}] is {value:g}, not a whole number from 0.")
    counted = (counts > 0).any(0)
    outside = torch.nonzero((base_rows < -1) | (base_rows >= len(base)) | (counted & (base_rows == -1)))
    if len(outside):
        row = int(outside[0])
        raise RuntimeError(
            f"swiglu_contrast: base_rows[{row}] is {int(base_rows[row])}, but there are {len(base)} rows of base"
            f"{' and a group counts the row' if counted[row] else ''}."
        )
    mid = swiglu(gate, up, activation)
    terms = torch.stack(contrast_terms(base[base_rows[counted]].double(), mid[counted].double()))
    for group, weight in enumerate(counts[:, counted].double()):
        # Not by a product of matrices: NaN in a row that this group does not count would show.
        has = weight > 0
        sums[group] += (terms[:, has] * weight[has, None]).sum(1)
    return mid


def contrast_terms(a: Tensor, b: Tensor) -> list[Tensor]:
    """What the five contrast sums add up."""
    return [a, b, a.square(), b.square(), (b - a).square()]


def _activated(gate: Tensor, activation: str) -> Tensor:
    # torch's exponential has other bits where neurons are not contiguous.
    x = gate.double().contiguous()
    return (functional.silu(x) if activation == "silu" else x * torch.sigmoid(_gelu_exponent(x))).to(gate.dtype)


def _gelu_exponent(x: Tensor) -> Tensor:
    """``x * sigmoid(this)`` is GELU by tanh. torch's own loses all digits in 1 + tanh where it is next to zero."""
    return GELU_SCALE * (x + GELU_CUBE * x.pow(3))


def _check_index(operation: str, name: str, index: Tensor, count: int, what: str) -> None:
    # A negative row would otherwise count from the end.
    outside = torch.nonzero((index < 0) | (index >= count))
    if len(outside):
        place = int(outside[0])
        raise RuntimeError(f"{operation}: {name}[{place}] is {int(index[place])}, but there are {count} {what}.")


def _check_offsets(operation: str, offsets: Tensor, selected: int) -> None:
    if offsets[0] != 0 or offsets[-1] != selected:
        raise RuntimeError(f"{operation}: offsets must start at 0 and end at {selected}, the length of rows.")
    falling = torch.nonzero(offsets.diff() < 0)
    if len(falling):
        raise RuntimeError(f"{operation}: offsets must not decrease (group {int(falling[0])}).")


@torch.no_grad()
def masked_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    keeps: Sequence[Tensor],
    dims: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """AdamW's step on the share of each row or column that ``keeps`` says; see :func:`pnlac_fast.ops.masked_adamw`."""
    for i, (param, keep) in enumerate(zip(params, _shares("masked_adamw", params, keeps, dims), strict=True)):
        old, grad, exp_avg, exp_avg_sq = (x[i].double() for x in (params, grads, exp_avgs, exp_avg_sqs))
        first = exp_avg + (1 - beta1) * (grad - exp_avg)
        second = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
        denominator = second.sqrt() / (1 - beta2**step) ** 0.5 + eps
        new = old * (1 - lr * weight_decay) - lr / (1 - beta1**step) * first / denominator
        for tensor, value in ((param, old + keep * (new - old)), (exp_avgs[i], first), (exp_avg_sqs[i], second)):
            tensor.copy_(torch.where(keep > 0, value.to(tensor.dtype), tensor))


@torch.no_grad()
def masked_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    keeps: Sequence[Tensor],
    dims: Sequence[int],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    first: bool,
) -> None:
    """SGD's step on the share of each row or column that ``keeps`` says; see :func:`pnlac_fast.ops.masked_sgd`."""
    for i, (param, keep) in enumerate(zip(params, _shares("masked_sgd", params, keeps, dims), strict=True)):
        change = grads[i].double() + weight_decay * param.double()
        if momentum:
            buffer = change if first else momentum * momenta[i].double() + (1 - dampening) * change
            momenta[i].copy_(torch.where(keep > 0, buffer.to(momenta[i].dtype), momenta[i]))
            change = change + momentum * buffer if nesterov else buffer
        param.copy_(torch.where(keep > 0, (param.double() - keep * lr * change).to(param.dtype), param))


def _shares(name: str, params: Sequence[Tensor], keeps: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """The keeps in float64, in a shape that broadcasts against their parameters."""
    for i, keep in enumerate(keeps):
        outside = torch.nonzero(~((keep >= 0) & (keep <= 1)))
        if len(outside):
            place = int(outside[0])
            raise RuntimeError(f"{name}: keeps[{i}][{place}] is {float(keep[place])}, which is not in [0, 1].")
    return [
        keep.double()[:, None] if param.dim() == 2 and dim == 0 else keep.double()
        for param, keep, dim in zip(params, keeps, dims, strict=True)
    ]
