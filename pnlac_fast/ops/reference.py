"""Each operation in plain torch: float64, slow, obvious. The others are tested against these."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


@torch.no_grad()
def contrast(base: Tensor, tuned: Tensor, rows: Tensor, offsets: Tensor, sums: Tensor) -> None:
    """Add the contrast sums of the selected rows to ``sums``, on any device.

    See :func:`pnlac_fast.ops.contrast` for the arguments.
    """
    _check_values(rows, offsets, len(base))
    for group, (start, stop) in enumerate(pairwise(offsets.tolist())):
        a = base[rows[start:stop]].double()
        b = tuned[rows[start:stop]].double()
        d = b - a
        sums[group] += torch.stack([a.sum(0), b.sum(0), a.square().sum(0), b.square().sum(0), d.square().sum(0)])


def _check_values(rows: Tensor, offsets: Tensor, row_count: int) -> None:
    # A negative row would otherwise count from the end.
    outside = torch.nonzero((rows < 0) | (rows >= row_count))
    if len(outside):
        place = int(outside[0])
        raise RuntimeError(f"contrast: rows[{place}] is {int(rows[place])}, but there are {row_count} rows.")
    if offsets[0] != 0 or offsets[-1] != len(rows):
        raise RuntimeError(f"contrast: offsets must start at 0 and end at {len(rows)}, the length of rows.")
    falling = torch.nonzero(offsets.diff() < 0)
    if len(falling):
        raise RuntimeError(f"contrast: offsets must not decrease (group {int(falling[0])}).")


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
