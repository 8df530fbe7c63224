"""AdamW and SGD with a share for every row or column, as Triton kernels: one launch for all tensors of one kind.

A table on the device has a column for each tensor: the addresses of parameter, gradient, two moments and shares, the
number of values, that in a row, whether shares go by column, and the first program. There a program finds its part. So
448 small matrices of adapters cost one launch, where 448 launches would take longer than the step. Rows whose share is
0 are neither read nor written. Of columns every value is read, since a column is as wide as one value, and the old bits
are written back where the share is 0.

Shares outside [0, 1] are not refused, which would mean to wait for the device; NaN counts as 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values of a program, 8 a thread in 16-byte pieces. Nothing spills on sm_80 or sm_90.
BLOCK = 1024
WARPS = 4
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# The last tables by the numbers in them: parameters and moments stay where they are from step to step, and gradients
# mostly return to the same place. A key holds every number, so that a table is right even for other tensors.
_tables: dict[tuple[object, ...], tuple[Tensor, int]] = {}
_KEPT_TABLES = 16


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
    """See :func:`pnlac_fast.ops.masked_adamw`."""
    for launch, count, table, settings in _kinds(params, grads, exp_avgs, exp_avg_sqs, keeps, dims):
        adamw_kernel[(launch,)](
            table,
            count,
            1 - lr * weight_decay,
            lr / (1 - beta1**step),
            1 - beta1,
            beta2,
            1 - beta2,
            (1 - beta2**step) ** 0.5,
            eps,
            **settings,
        )


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
    """See :func:`pnlac_fast.ops.masked_sgd`."""
    buffers = momenta if momentum else params
    for launch, count, table, settings in _kinds(params, grads, buffers, buffers, keeps, dims):
        del settings["SECOND"]
        sgd_kernel[(launch,)](
            table,
            count,
            lr,
            momentum,
            1 - dampening,
            weight_decay,
            MOMENTUM=momentum != 0,
            FIRST=first,
            NESTEROV=nesterov,
            **settings,
        )


def _kinds(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    keeps: Sequence[Tensor],
    dims: Sequence[int],
) -> Iterator[tuple[int, int, Tensor, dict[str, object]]]:
    """Per kind of tensor: programs, tensors, table and constants of the launch, with the device made current."""
    kinds: dict[tuple[torch.dtype, torch.dtype, torch.dtype, bool], list[list[int]]] = {}
    for param, grad, first, second, keep, dim in zip(params, grads, firsts, seconds, keeps, dims, strict=True):
        if not param.numel():
            continue
        addresses = [x.data_ptr() for x in (param, grad, first, second)]
        width = param.shape[-1]
        # A vector is one row whose columns have shares.
        by_column = int(dim == param.dim() - 1)
        aligned = width % 8 == 0 and not any(address % 16 for address in addresses)
        column = [*addresses, keep.data_ptr(), param.numel(), width, by_column]
        kinds.setdefault((param.dtype, first.dtype, second.dtype, aligned), []).append(column)
    for (dtype, first_type, second_type, aligned), columns in kinds.items():
        table, programs = _table(columns, params[0].device)
        with torch.cuda.device_of(params[0]):
            yield (
                programs,
                len(columns),
                table,
                {
                    "PARAM": TYPES[dtype],
                    "FIRST_MOMENT": TYPES[first_type],
                    "SECOND": TYPES[second_type],
                    "ALIGNED": aligned,
                    "BLOCK": BLOCK,
                    "num_warps": WARPS,
                    "enable_fp_fusion": False,
                },
            )


def _table(columns: list[list[int]], device: torch.device) -> tuple[Tensor, int]:
    key = (device, *map(tuple, columns))
    if key not in _tables:
        starts, programs = [], 0
        for column in columns:
            starts.append(programs)
            programs += triton.cdiv(column[5], BLOCK)
        table = torch.tensor([*zip(*columns, strict=True), starts], dtype=torch.int64)
        if device.type == "cuda":
            # From pinned memory the copy queues behind the work of the device instead of waiting for it.
            table = table.pin_memory().to(device, non_blocking=True)
        while len(_tables) >= _KEPT_TABLES:
            del _tables[next(iter(_tables))]
        _tables[key] = table, programs
    return _tables[key]


@triton.jit
def find(table, count, BLOCK: tl.constexpr):
    """The column of the table for this program, the last tensor that starts at or before it, and its first value."""
    before = 0
    for first in range(0, count, 512):
        tensor = first + tl.arange(0, 512)
        start = tl.load(table + 8 * count + tensor, mask=tensor < count, other=0x7FFFFFFFFFFFFFFF)
        before += tl.sum((start <= tl.program_id(0)).to(tl.int32), 0)
    column = table + before - 1
    return column, (tl.program_id(0) - tl.load(column + 8 * count)) * BLOCK


@triton.jit
def address(column, count, field, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(column + field * count).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def part(column, count, begin, ALIGNED: tl.constexpr, BY_COLUMN: tl.constexpr, BLOCK: tl.constexpr):
    """Places of the values in their tensor, their shares, and which to read and write."""
    size = tl.load(column + 5 * count)
    width = tl.load(column + 6 * count)
    if ALIGNED:
        # So that a piece of 16 bytes lies in one row, and either all of it exists or nothing.
        size = tl.multiple_of(size, 8)
        width = tl.multiple_of(width, 8)
    at = begin + tl.arange(0, BLOCK)
    live = at < size
    # One division in 64 bits for the program; in 32 bits, those for every value are several times faster.
    row = begin // width
    within = (begin - row * width).to(tl.int32) + tl.arange(0, BLOCK)
    share = within % width.to(tl.int32) if BY_COLUMN else row + within // width.to(tl.int32)
    # Compared as bits, which order as the shares do; 0x7F800000 is infinite and NaN is above. The compiler sees that
    # the comparison of integers holds for a whole piece of 16 bytes; of floats it does not, and would split the piece.
    bits = tl.load(address(column, count, 4, tl.int32, False) + share, mask=live, other=0)
    positive = (bits > 0) & (bits <= 0x7F800000)
    touched = live if BY_COLUMN else live & positive
    return at, bits.to(tl.float32, bitcast=True), touched


@triton.jit
def put(pointer, old, new, keep, touched):
    """Store what is new, but the very old bits where the share is 0."""
    tl.store(pointer, tl.where(keep > 0, new.to(old.dtype), old), mask=touched)


@triton.jit
def share_of(old, new, keep):
    # old + (new - old) is not always new.
    return tl.where(keep == 1, new, old + keep * (new - old))


@triton.jit
def adamw_part(
    column,
    count,
    begin,
    decay,
    rate,
    beta1_rest,
    beta2,
    beta2_rest,
    correction,
    eps,
    PARAM: tl.constexpr,
    FIRST_MOMENT: tl.constexpr,
    SECOND: tl.constexpr,
    ALIGNED: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, keep, touched = part(column, count, begin, ALIGNED, BY_COLUMN, BLOCK)
    p_at = address(column, count, 0, PARAM, ALIGNED) + at
    g_at = address(column, count, 1, PARAM, ALIGNED) + at
    m_at = address(column, count, 2, FIRST_MOMENT, ALIGNED) + at
    v_at = address(column, count, 3, SECOND, ALIGNED) + at
    old_p = tl.load(p_at, mask=touched, other=0.0)
    g = tl.load(g_at, mask=touched, other=0.0).to(tl.float32)
    old_m = tl.load(m_at, mask=touched, other=0.0)
    old_v = tl.load(v_at, mask=touched, other=0.0)
    p = old_p.to(tl.float32)
    m = old_m.to(tl.float32)
    m = m + beta1_rest * (g - m)
    v = beta2 * old_v.to(tl.float32) + beta2_rest * g * g
    new = p * decay - rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), correction) + eps)
    put(p_at, old_p, share_of(p, new, keep), keep, touched)
    put(m_at, old_m, m, keep, touched)
    put(v_at, old_v, v, keep, touched)


@triton.jit
def adamw_kernel(
    table,
    count,
    decay,
    rate,
    beta1_rest,
    beta2,
    beta2_rest,
    correction,
    eps,
    PARAM: tl.constexpr,
    FIRST_MOMENT: tl.constexpr,
    SECOND: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column, begin = find(table, count, BLOCK)
    if tl.load(column + 7 * count) != 0:
        adamw_part(
            column, count, begin, decay, rate, beta1_rest, beta2, beta2_rest, correction, eps,
            PARAM, FIRST_MOMENT, SECOND, ALIGNED, True, BLOCK,
        )  # fmt: skip
    else:
        adamw_part(
            column, count, begin, decay, rate, beta1_rest, beta2, beta2_rest, correction, eps,
            PARAM, FIRST_MOMENT, SECOND, ALIGNED, False, BLOCK,
        )  # fmt: skip


@triton.jit
def sgd_part(
    column,
    count,
    begin,
    lr,
    momentum,
    dampening_rest,
    weight_decay,
    PARAM: tl.constexpr,
    FIRST_MOMENT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FIRST: tl.constexpr,
    NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, keep, touched = part(column, count, begin, ALIGNED, BY_COLUMN, BLOCK)
    p_at = address(column, count, 0, PARAM, ALIGNED) + at
    g_at = address(column, count, 1, PARAM, ALIGNED) + at
    old_p = tl.load(p_at, mask=touched, other=0.0)
    p = old_p.to(tl.float32)
    change = tl.load(g_at, mask=touched, other=0.0).to(tl.float32) + weight_decay * p
    if MOMENTUM:
        m_at = address(column, count, 2, FIRST_MOMENT, ALIGNED) + at
        old_m = tl.load(m_at, mask=touched, other=0.0)
        # At first whatever is in there is replaced, even NaN.
        m = change if FIRST else momentum * old_m.to(tl.float32) + dampening_rest * change
        put(m_at, old_m, m, keep, touched)
        change = change + momentum * m if NESTEROV else m
    put(p_at, old_p, p - keep * lr * change, keep, touched)


@triton.jit
def sgd_kernel(
    table,
    count,
    lr,
    momentum,
    dampening_rest,
    weight_decay,
    PARAM: tl.constexpr,
    FIRST_MOMENT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FIRST: tl.constexpr,
    NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column, begin = find(table, count, BLOCK)
    if tl.load(column + 7 * count) != 0:
        sgd_part(
            column, count, begin, lr, momentum, dampening_rest, weight_decay,
            PARAM, FIRST_MOMENT, MOMENTUM, FIRST, NESTEROV, ALIGNED, True, BLOCK,
        )  # fmt: skip
    else:
        sgd_part(
            column, count, begin, lr, momentum, dampening_rest, weight_decay,
            PARAM, FIRST_MOMENT, MOMENTUM, FIRST, NESTEROV, ALIGNED, False, BLOCK,
        )  # fmt: skip
