"""The contrast sums as Triton kernels: partial sums of chunks of rows, then the chunks added in order.

``rows`` is cut into chunks of equal length, whatever the groups are, so that the work is even when the groups are not.
A chunk leaves one *piece* of sums for every group it meets. Groups are ordered, so from piece to piece either the chunk
or the group grows and neither falls: ``chunk + group`` is a number that no two pieces share. A second kernel adds the
pieces of each group in order. Nothing is atomic and every length follows from shapes, so an input gives the same bits
every time.

Rows and offsets stay on the device and nothing here waits for it, so that their values cannot be refused as elsewhere.
A row that does not exist is not read and counts as NaN; offsets that do not cover ``rows`` in order give NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows by neurons that a program holds in registers: a thread reads 16 bytes of two rows (one for float16, whose sums
# take twice the room). With 168 registers nothing spills on sm_80 or sm_90, and three programs share a multiprocessor,
# which then has up to 24 KiB of reads under way. With 128, for four programs, Triton 3.6 spills.
TILES = {torch.bfloat16: (8, 256), torch.float16: (4, 256), torch.float32: (8, 128), torch.float64: (8, 64)}
WARPS = 4
REGISTERS = 168
# bfloat16 is added in float32 over at most this many rows, as csrc/README.md promises. Everything else is added in
# float64: data centre GPUs add doubles at half the rate of floats, and reading the rows takes longer than that.
SHORT_SUM = 64
SHORTEST_CHUNK = 64
# Programs to aim for before chunks grow, about four for each of 132 multiprocessors. A constant rather than a property
# of the device at hand, so that the bits do not depend on it.
PROGRAMS = 512
MERGE_BLOCK = 256


def contrast(base: Tensor, tuned: Tensor, rows: Tensor, base_rows: Tensor, offsets: Tensor, sums: Tensor) -> None:
    """See :func:`pnlac_fast.ops.contrast`, and the top of this file for rows and offsets that do not fit."""
    neurons, selected = base.shape[1], rows.shape[0]
    groups, kinds = sums.shape[:2]
    if not neurons or not groups:
        return
    block_rows, block_neurons = TILES[base.dtype]
    column_blocks = triton.cdiv(neurons, block_neurons)
    chunk = chunk_length(selected, column_blocks)
    chunks = triton.cdiv(selected, chunk)
    pieces = sums.new_empty((chunks + groups, kinds, neurons))
    with torch.cuda.device_of(base):
        if chunks:
            sums_kernel[(chunks * column_blocks,)](
                base,
                tuned,
                base_rows,
                rows,
                offsets,
                pieces,
                base.stride(0),
                tuned.stride(0),
                base.shape[0],
                tuned.shape[0],
                selected,
                groups,
                neurons,
                chunk,
                column_blocks,
                PAIR=kinds == 5,
                SUM=tl.float32 if base.dtype == torch.bfloat16 else tl.float64,
                SPAN=SHORT_SUM * block_rows,
                BLOCK_M=block_rows,
                BLOCK_N=block_neurons,
                num_warps=WARPS,
                maxnreg=REGISTERS,
                enable_fp_fusion=True,
            )
        # Without a chunk this still looks at the offsets.
        merge_kernel[(groups * triton.cdiv(kinds * neurons, MERGE_BLOCK),)](
            pieces,
            offsets,
            sums,
            selected,
            groups,
            kinds * neurons,
            chunk,
            BLOCK=MERGE_BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def moments(x: Tensor, rows: Tensor, offsets: Tensor, sums: Tensor) -> None:
    """See :func:`pnlac_fast.ops.moments`, and the top of this file for rows and offsets that do not fit."""
    contrast(x, x, rows, rows, offsets, sums)


def chunk_length(rows: int, column_blocks: int) -> int:
    """Rows in a chunk: the power of two that gives ``PROGRAMS`` to twice as many programs, where there are as many."""
    return max(SHORTEST_CHUNK, 1 << max(0, (rows * column_blocks // PROGRAMS).bit_length() - 1))


@triton.jit
def meet(offsets, groups, start, stop):
    """The first group that ends after ``start``, and how many begin before ``stop``."""
    first = 0
    last = 0
    for g in range(0, groups, 128):
        group = g + tl.arange(0, 128)
        begin = tl.load(offsets + group, mask=group < groups, other=0x7FFFFFFFFFFFFFFF)
        end = tl.load(offsets + group + 1, mask=group < groups, other=0x7FFFFFFFFFFFFFFF)
        first += tl.sum((end <= start).to(tl.int32), 0)
        last += tl.sum((begin < stop).to(tl.int32), 0)
    return first, last


@triton.jit
def read(values, rows, place, live, stride, count, cols, inside, SUM: tl.constexpr):
    """[place, column] values of the listed rows; 0 where not live, NaN where the row does not exist."""
    row = tl.load(rows + place, mask=live, other=0)
    exists = (row >= 0) & (row < count)
    mask = (live & exists)[:, None] & inside[None, :]
    x = tl.load(values + row[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(SUM)
    return tl.where((live & ~exists)[:, None], float("nan"), x)


@triton.jit
def put(place, inside, terms, again):
    """Store the sums over the rows of a tile, or add them to what this program stored before."""
    # Else the compiler does this for all five sums at once, which takes more registers than there are.
    tl.debug_barrier()
    total = tl.sum(terms.to(tl.float64), 0)
    if again:
        total += tl.load(place, mask=inside, other=0.0)
    tl.store(place, total, mask=inside)


@triton.jit
def sums_kernel(
    base,
    tuned,
    base_rows,
    rows,
    offsets,
    pieces,
    base_stride,
    tuned_stride,
    base_count,
    tuned_count,
    selected,
    groups,
    neurons,
    chunk,
    column_blocks,
    PAIR: tl.constexpr,
    SUM: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The pieces of one chunk and one block of neurons."""
    KINDS: tl.constexpr = 5 if PAIR else 2
    index = (tl.program_id(0) // column_blocks).to(tl.int64)
    cols = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < neurons
    start = index * chunk
    stop = tl.minimum(start + chunk, selected)
    first, last = meet(offsets, groups, start, stop)
    for group in range(first, last):
        begin = tl.maximum(tl.load(offsets + group), start)
        end = tl.minimum(tl.load(offsets + group + 1), stop)
        piece = pieces + (index + group) * KINDS * neurons + cols
        for span in range(begin, end, SPAN):
            span_end = tl.minimum(span + SPAN, end)
            a1 = tl.zeros((BLOCK_M, BLOCK_N), SUM)
            b1 = tl.zeros((BLOCK_M, BLOCK_N), SUM)
            a2 = tl.zeros((BLOCK_M, BLOCK_N), SUM)
            b2 = tl.zeros((BLOCK_M, BLOCK_N), SUM)
            d2 = tl.zeros((BLOCK_M, BLOCK_N), SUM)
            for at in range(span, span_end, BLOCK_M):
                place = at + tl.arange(0, BLOCK_M)
                live = place < span_end
                a = read(base, base_rows, place, live, base_stride, base_count, cols, inside, SUM)
                a1 += a
                a2 += a * a
                if PAIR:
                    b = read(tuned, rows, place, live, tuned_stride, tuned_count, cols, inside, SUM)
                    d = b - a
                    b1 += b
                    b2 += b * b
                    d2 += d * d
            again = span > begin
            put(piece, inside, a1, again)
            if PAIR:
                put(piece + neurons, inside, b1, again)
                put(piece + 2 * neurons, inside, a2, again)
                put(piece + 3 * neurons, inside, b2, again)
                put(piece + 4 * neurons, inside, d2, again)
            else:
                put(piece + neurons, inside, a2, again)


@triton.jit
def merge_kernel(pieces, offsets, sums, selected, groups, width, chunk, BLOCK: tl.constexpr):
    """Add the pieces of one group, in order of the chunks."""
    blocks = tl.cdiv(width, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    begin = tl.load(offsets + group)
    end = tl.load(offsets + group + 1)
    covers = (tl.load(offsets) == 0) & (tl.load(offsets + groups) == selected) & (begin <= end)
    begin = tl.minimum(tl.maximum(begin, 0), selected)
    end = tl.minimum(tl.maximum(end, 0), selected)
    place = sums + group * width + cols
    total = tl.load(place, mask=inside, other=0.0)
    first = begin // chunk
    last = tl.where(begin < end, (end - 1) // chunk + 1, first)
    for index in range(first, last):
        total += tl.load(pieces + (index + group) * width + cols, mask=inside, other=0.0)
    tl.store(place, tl.where(covers, total, float("nan")), mask=inside)
