"""One optimizer step on parameters of which some rows or columns must not move, or move less: AdamW and SGD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pnlac_fast.ops import reference
from pnlac_fast.ops.dispatch import define

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def masked_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    keeps: Sequence[Tensor],
    dims: Sequence[int],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    engine: str = "auto",
    checked: bool = False,
) -> None:
    """AdamW's step, in place, on several parameters at once, each with a share of it for every row or column.

    Where ``keep`` is 1 the step is that of ``torch.optim.AdamW``, to rounding. Where it is 0 the parameter and both
    moments keep their bits, whatever the gradient is. In between the moments are AdamW's and the change of the
    parameter, weight decay included, is multiplied by ``keep``. AdamW is arXiv 1711.05101; skipping rows is ours, for
    InhibitFT (arXiv 2508.02360).

    Parameters
    ----------
    params, grads
        Contiguous [row, column] or [row]; float32, bfloat16 or float16; gradients have their parameter's dtype.
    exp_avgs, exp_avg_sqs
        The moments, in the shape of the parameter, in its dtype or float32.
    keeps
        float32, in [0, 1], with one entry for each row (dim 0) or column (dim 1) of the parameter. Values are checked
        on the CPU only.
    dims
        For each parameter, the dimension of its ``keep``: 0 or 1.
    lr, beta1, beta2, eps, weight_decay
        As in ``torch.optim.AdamW``: about how far an entry moves per step; the shares of the two moments that are kept;
        what is added to the root of the second, in units of the gradient; and, times ``lr``, the share of a parameter
        that is taken off, decoupled from the gradient.
    step
        How many steps the moments have seen, this one included: 1 or more.
    engine
        "auto": the fastest on the device of the parameters. "torch": plain torch in float64, on any device. "cpp": the
        compiled library, on the CPU, in float32; its bits do not depend on the number of threads. "triton": on CUDA.
    checked
        Whether these tensors are known to fit each other, which is not looked at then: with 192 small parameters the
        look takes as long as torch's own step.

    Raises
    ------
    UserError
        The engine is unknown, not available, or does not run on the device of the parameters.
    RuntimeError
        Shapes, dtypes or devices do not fit, something is not contiguous, or a value is out of range.

    Examples
    --------
    >>> weight, moments = torch.ones(2, 2), [torch.zeros(2, 2), torch.zeros(2, 2)]
    >>> settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    >>> gradient, keep = torch.tensor([[5.0, 5.0], [torch.nan, 5.0]]), torch.tensor([1.0, 0.0])
    >>> masked_adamw([weight], [gradient], moments[:1], moments[1:], [keep], [0], **settings)
    >>> weight.tolist()[1]
    [1.0, 1.0]
    >>> round(weight[0, 0].item(), 6)
    0.9
    """
    if not params:
        return
    if checked:
        _check_numbers(beta1, beta2, step)
    else:
        _check_adamw(params, grads, exp_avgs, exp_avg_sqs, keeps, dims, lr, beta1, beta2, eps, weight_decay, step)
    _ADAMW.on(params[0].device, engine)(
        params, grads, exp_avgs, exp_avg_sqs, keeps, dims, lr, beta1, beta2, eps, weight_decay, step
    )


def masked_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    keeps: Sequence[Tensor],
    dims: Sequence[int],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    first: bool,
    engine: str = "auto",
) -> None:
    """SGD's step, in place, on several parameters at once, each with a share of it for every row or column.

    As :func:`masked_adamw`, with the step of ``torch.optim.SGD``.

    Parameters
    ----------
    params, grads, keeps, dims, engine
        As those of :func:`masked_adamw`: [row, column] or [row], and the share of each row or column.
    momenta
        The momentum buffers, in the shape of the parameter, in its dtype or float32; none where ``momentum`` is 0.
    lr, momentum, dampening, weight_decay, nesterov
        As those of ``torch.optim.SGD``: what the gradient is multiplied by per step; the shares of the momentum that is
        kept and of the gradient that is left out of it; the share of the parameter that is added to its gradient; and
        whether to look ahead.
    first
        Whether this is the first step of these parameters, at which the gradient replaces the momentum.

    Raises
    ------
    RuntimeError
        "masked_sgd: ...", where a tensor does not fit the others, or has a dtype that it does not know.
    """
    if not params:
        return
    _check_sgd(params, grads, momenta, keeps, dims, lr, momentum, dampening, weight_decay, nesterov, first)
    _SGD.on(params[0].device, engine)(
        params, grads, momenta, keeps, dims, lr, momentum, dampening, weight_decay, nesterov, first
    )


def _check_adamw(
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
    moments = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _check("masked_adamw", params, grads, moments, keeps, dims)
    for i, (one, other) in enumerate(zip(exp_avgs, exp_avg_sqs, strict=True)):
        if one.dtype != other.dtype:
            raise RuntimeError(f"masked_adamw: exp_avg_sqs[{i}] must be {one.dtype} like exp_avgs[{i}].")
    _check_numbers(beta1, beta2, step)


def _check_numbers(beta1: float, beta2: float, step: int) -> None:
    if step < 1:
        raise RuntimeError(f"masked_adamw: step must be 1 or more, not {step}.")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise RuntimeError(f"masked_adamw: beta1 and beta2 must be in [0, 1), not {beta1} and {beta2}.")


def _check_sgd(
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
    if momentum == 0 and momenta:
        raise RuntimeError("masked_sgd: momenta must be empty where momentum is 0.")
    _check("masked_sgd", params, grads, {"momenta": momenta} if momentum else {}, keeps, dims)


def _check(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: dict[str, Sequence[Tensor]],
    keeps: Sequence[Tensor],
    dims: Sequence[int],
) -> None:
    counts = {"grads": len(grads), **{k: len(v) for k, v in moments.items()}, "keeps": len(keeps), "dims": len(dims)}
    for what, count in counts.items():
        if count != len(params):
            raise RuntimeError(f"{name}: {count} {what} for {len(params)} params.")
    for i, (param, keep, dim) in enumerate(zip(params, keeps, dims, strict=True)):
        if param.dim() not in (1, 2) or param.dtype not in DTYPES:
            raise RuntimeError(
                f"{name}: params[{i}] must be [row, column] or [row] in float32, bfloat16 or float16, not "
                f"{list(param.shape)} {param.dtype}."
            )
        if dim < 0 or dim >= param.dim():
            raise RuntimeError(f"{name}: dims[{i}] is {dim}, but params[{i}] has {param.dim()} dimensions.")
        if keep.dtype != torch.float32 or keep.shape != (param.shape[dim],):
            raise RuntimeError(
                f"{name}: keeps[{i}] must be float32 [{param.shape[dim]}], not {keep.dtype} {list(keep.shape)}."
            )
        if grads[i].dtype != param.dtype:
            raise RuntimeError(f"{name}: grads[{i}] must be {param.dtype} like params[{i}], not {grads[i].dtype}.")
        for what, tensors in {"grads": grads, **moments}.items():
            if tensors[i].shape != param.shape:
                raise RuntimeError(
                    f"{name}: {what}[{i}] must be {list(param.shape)} like params[{i}], not {list(tensors[i].shape)}."
                )
            if tensors[i].dtype not in (param.dtype, torch.float32):
                raise RuntimeError(f"{name}: {what}[{i}] must be {param.dtype} or float32, not {tensors[i].dtype}.")
        for what, tensors in {"params": params, "grads": grads, **moments, "keeps": keeps}.items():
            if not tensors[i].is_contiguous():
                raise RuntimeError(f"{name}: {what}[{i}] must be contiguous.")
            if tensors[i].device != params[0].device:
                raise RuntimeError(
                    f"{name}: {what}[{i}] must be on {params[0].device} like params[0], not on {tensors[i].device}."
                )


_ADAMW = define(
    "masked_adamw",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor[] keeps, "
    "int[] dims, float lr, float beta1, float beta2, float eps, float weight_decay, int step) -> ()",
    reference=reference.masked_adamw,
    check=_check_adamw,
)
_SGD = define(
    "masked_sgd",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor[] keeps, int[] dims, float lr, "
    "float momentum, float dampening, float weight_decay, bool nesterov, bool first) -> ()",
    reference=reference.masked_sgd,
    check=_check_sgd,
)
