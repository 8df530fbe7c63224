"""The middle of a gated MLP as Triton kernels: forward, backward, and forward with the contrast sums on the way.

The same rules as in ``sums.py``: no atomics, no waiting for the device, lengths from shapes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pnlac_fast.ops.triton.sums import chunk_length, put

# Neurons of one row that a program computes: 8 a thread in 16-byte pieces, which hides the latency of a read by the
# number of warps and needs few registers.
BLOCK = 1024
WARPS = 4
# Rows by neurons of a tile of swiglu_contrast, a thread reading 16 bytes of a row, and the registers of a thread: as
# many as let 4 (float16: 3) programs share a multiprocessor, at which nothing spills on sm_80 or sm_90. Tiles are
# narrower than in sums.py, so that a span of rows, below, is still in the nearest cache when it is read again.
TILES = {
    torch.bfloat16: (16, 64, 128),
    torch.float16: (16, 64, 168),
    torch.float32: (16, 32, 128),
    torch.float64: (16, 16, 128),
}
# Rows between the computation of the results and that of the sums over them. Accumulating straight from registers
# would need the sums of every group at once, or an addition through memory every few rows.
SPAN = 256
MERGE_BLOCK = 256


def swiglu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See :func:`pnlac_fast.ops.swiglu`."""
    rows, neurons = gate.shape
    mid = gate.new_empty((rows, neurons))
    if mid.numel():
        with torch.cuda.device_of(gate):
            forward_kernel[(rows * triton.cdiv(neurons, BLOCK),)](
                gate,
                up,
                mid,
                gate.stride(0),
                up.stride(0),
                neurons,
                **_settings(gate, activation),
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return mid


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """See :func:`pnlac_fast.ops.swiglu_backward`."""
    rows, neurons = gate.shape
    by_gate, by_up = gate.new_empty((rows, neurons)), gate.new_empty((rows, neurons))
    if by_gate.numel():
        with torch.cuda.device_of(gate):
            backward_kernel[(rows * triton.cdiv(neurons, BLOCK),)](
                grad,
                gate,
                up,
                by_gate,
                by_up,
                grad.stride(0),
                gate.stride(0),
                up.stride(0),
                neurons,
                **_settings(gate, activation),
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return by_gate, by_up


def swiglu_contrast(
    gate: Tensor, up: Tensor, base: Tensor, base_rows: Tensor, counts: Tensor, sums: Tensor, activation: str
) -> Tensor:
    """See :func:`pnlac_fast.ops.swiglu_contrast`.

    A row of ``base`` that a group counts and that does not exist is not read and counts as NaN, and so does a negative
    count: refusing them would mean to wait for the device.
    """
    rows, neurons = gate.shape
    groups = counts.shape[0]
    mid = gate.new_empty((rows, neurons))
    if not mid.numel():
        return mid
    block_rows, block_neurons, registers = TILES[gate.dtype]
    column_blocks = triton.cdiv(neurons, block_neurons)
    chunk = chunk_length(rows, column_blocks)
    chunks = triton.cdiv(rows, chunk)
    pieces = sums.new_empty((chunks, groups, 5, neurons))
    # Whether a program counts a row for a group; its other pieces are neither written nor read.
    met = torch.zeros((chunks, groups, column_blocks), dtype=torch.int32, device=gate.device)
    with torch.cuda.device_of(gate):
        contrast_kernel[(chunks * column_blocks,)](
            gate,
            up,
            base,
            base_rows,
            counts,
            mid,
            pieces,
            met,
            gate.stride(0),
            up.stride(0),
            base.stride(0),
            base.shape[0],
            rows,
            groups,
            neurons,
            chunk,
            column_blocks,
            **_settings(gate, activation),
            SUM=tl.float32 if gate.dtype == torch.bfloat16 else tl.float64,
            SPAN=SPAN,
            BLOCK_M=block_rows,
            BLOCK_N=block_neurons,
            num_warps=WARPS,
            maxnreg=registers,
            enable_fp_fusion=False,
        )
        if groups:
            merge_kernel[(groups * triton.cdiv(5 * neurons, MERGE_BLOCK),)](
                pieces,
                met,
                sums,
                chunks,
                groups,
                5 * neurons,
                column_blocks,
                BLOCK=MERGE_BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return mid


def _settings(gate: Tensor, activation: str) -> dict[str, object]:
    return {"GELU": activation == "gelu_tanh", "REAL": tl.float64 if gate.dtype == torch.float64 else tl.float32}


@triton.jit
def sigmoid(z):
    if z.dtype == tl.float64:
        return 1.0 / (1.0 + tl.exp(-z))
    else:
        # A GPU has 2**power. The power -z * log2(e) is rounded, by more the larger z is; what that lost is put back.
        power = -z * 1.4426950216293335
        lost = tl.fma(-z, 1.4426950216293335, -power) - z * 1.925963033500011519e-8
        e = tl.exp2(power)
        # Where e is infinite, the correction would be NaN.
        e = tl.where(power < 128.0, tl.fma(e, lost * 0.6931471805599453, e), e)
        return tl.div_rn(1.0, 1.0 + e)


@triton.jit
def inner(x, GELU: tl.constexpr):
    """What the sigmoid is taken of, such that the activation is ``x * sigmoid(inner(x))``, and its derivative."""
    if GELU:
        cube = x * x * 0.044715
        return 1.5957691216057308 * (x + x * cube), 1.5957691216057308 * (1.0 + 3.0 * cube)
    else:
        return x, x * 0.0 + 1.0


@triton.jit
def activate(gate, GELU: tl.constexpr, REAL: tl.constexpr):
    x = gate.to(REAL)
    z, _ = inner(x, GELU)
    return (x * sigmoid(z)).to(gate.dtype).to(REAL)


@triton.jit
def columns(neurons, BLOCK: tl.constexpr):
    blocks = tl.cdiv(neurons, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return row, cols, cols < neurons


@triton.jit
def forward_kernel(
    gate,
    up,
    mid,
    gate_stride,
    up_stride,
    neurons,
    GELU: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, cols, inside = columns(neurons, BLOCK)
    g = tl.load(gate + row * gate_stride + cols, mask=inside, other=0.0)
    u = tl.load(up + row * up_stride + cols, mask=inside, other=0.0).to(REAL)
    tl.store(mid + row * neurons + cols, (activate(g, GELU, REAL) * u).to(g.dtype), mask=inside)


@triton.jit
def backward_kernel(
    grad,
    gate,
    up,
    by_gate,
    by_up,
    grad_stride,
    gate_stride,
    up_stride,
    neurons,
    GELU: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, cols, inside = columns(neurons, BLOCK)
    g = tl.load(gate + row * gate_stride + cols, mask=inside, other=0.0)
    u = tl.load(up + row * up_stride + cols, mask=inside, other=0.0).to(REAL)
    d = tl.load(grad + row * grad_stride + cols, mask=inside, other=0.0).to(REAL)
    x = g.to(REAL)
    z, slope = inner(x, GELU)
    s = sigmoid(z)
    by_activated = (d * u).to(g.dtype).to(REAL)
    derivative = s * (1.0 + x * (1.0 - s) * slope)
    tl.store(by_gate + row * neurons + cols, (by_activated * derivative).to(g.dtype), mask=inside)
    tl.store(by_up + row * neurons + cols, (d * (x * s).to(g.dtype).to(REAL)).to(g.dtype), mask=inside)


@triton.jit
def contrast_kernel(
    gate,
    up,
    base,
    base_rows,
    counts,
    mid,
    pieces,
    met,
    gate_stride,
    up_stride,
    base_stride,
    base_count,
    rows,
    groups,
    neurons,
    chunk,
    column_blocks,
    GELU: tl.constexpr,
    REAL: tl.constexpr,
    SUM: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The results of one chunk of rows and one block of neurons, and the pieces of the groups that it meets."""
    index = (tl.program_id(0) // column_blocks).to(tl.int64)
    block = tl.program_id(0) % column_blocks
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < neurons
    start = index * chunk
    stop = tl.minimum(start + chunk, rows)
    for span in range(start, stop, SPAN):
        span_stop = tl.minimum(span + SPAN, stop)
        for at in range(span, span_stop, BLOCK_M):
            row = at + tl.arange(0, BLOCK_M)
            mask = (row < span_stop)[:, None] & inside[None, :]
            g = tl.load(gate + row[:, None] * gate_stride + cols[None, :], mask=mask, other=0.0)
            u = tl.load(up + row[:, None] * up_stride + cols[None, :], mask=mask, other=0.0).to(REAL)
            b = (activate(g, GELU, REAL) * u).to(g.dtype)
            tl.store(mid + row[:, None] * neurons + cols[None, :], b, mask=mask)
        # What one thread stored, another may load.
        tl.debug_barrier()
        weights = counts
        flag = met + index * groups * column_blocks + block
        piece = pieces + index * groups * 5 * neurons + cols
        for _ in range(0, groups):
            scan = span + tl.arange(0, SPAN)
            weight = tl.load(weights + scan, mask=scan < span_stop, other=0.0)
            if tl.sum((weight != 0).to(tl.int32), 0) > 0:
                a1 = tl.zeros((BLOCK_M, BLOCK_N), SUM)
                b1 = tl.zeros((BLOCK_M, BLOCK_N), SUM)
                a2 = tl.zeros((BLOCK_M, BLOCK_N), SUM)
                b2 = tl.zeros((BLOCK_M, BLOCK_N), SUM)
                d2 = tl.zeros((BLOCK_M, BLOCK_N), SUM)
                for at in range(span, span_stop, BLOCK_M):
                    row = at + tl.arange(0, BLOCK_M)
                    w = tl.load(weights + row, mask=row < span_stop, other=0.0).to(SUM)
                    counted = w != 0
                    base_row = tl.load(base_rows + row, mask=counted, other=0)
                    fits = (base_row >= 0) & (base_row < base_count) & (w > 0)
                    mask = fits[:, None] & inside[None, :]
                    a = tl.load(base + base_row[:, None] * base_stride + cols[None, :], mask=mask, other=0.0).to(SUM)
                    b = tl.load(mid + row[:, None] * neurons + cols[None, :], mask=mask, other=0.0).to(SUM)
                    a = tl.where((counted & ~fits)[:, None], float("nan"), a)
                    d = b - a
                    a1 += w[:, None] * a
                    b1 += w[:, None] * b
                    a2 += w[:, None] * (a * a)
                    b2 += w[:, None] * (b * b)
                    d2 += w[:, None] * (d * d)
                again = tl.load(flag) != 0
                put(piece, inside, a1, again)
                put(piece + neurons, inside, b1, again)
                put(piece + 2 * neurons, inside, a2, again)
                put(piece + 3 * neurons, inside, b2, again)
                put(piece + 4 * neurons, inside, d2, again)
                tl.store(flag, 1)
            weights += rows
            flag += column_blocks
            piece += 5 * neurons


@triton.jit
def merge_kernel(pieces, met, sums, chunks, groups, width, column_blocks, BLOCK: tl.constexpr):
    """Add the pieces of one group, in order of the chunks."""
    blocks = tl.cdiv(width, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    place = sums + group * width + cols
    total = tl.load(place, mask=inside, other=0.0)
    piece = group
    for _ in range(0, chunks):
        # Every block of neurons meets the same groups.
        if tl.load(met + piece * column_blocks) != 0:
            total += tl.load(pieces + piece * width + cols, mask=inside, other=0.0)
        piece += groups
    tl.store(place, total, mask=inside)
