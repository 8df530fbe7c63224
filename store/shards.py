"""Encode raw activations as Zarr v3 shards, byte for byte what ``sharding_indexed`` asks for.

A shard is its inner chunks one after another and an index at the end: for each chunk, in C order, offset and length as
little-endian uint64, both 2**64 - 1 where the chunk is left out because it would hold nothing but the fill value. Every
chunk, and the index, ends in its own CRC-32C. zarr-python writes the same layout in several passes over the data;
here each chunk is copied to its place once, and checked while it is still in the cache.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc
from zarr.codecs import BloscCodec, Crc32cCodec

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
DTYPE_ATTRIBUTE = "pnlac_dtype"  # an array of bfloat16 says so, since Zarr sees uint16

LEFT_OUT = 2**64 - 1
CRC_BYTES = 4


class _Stored(NamedTuple):
    """How a dtype lies in a file: NumPy's dtype, the unsigned integer of that size, and the bits of NaN, the fill."""

    numpy: np.dtype[Any]
    bits: np.dtype[Any]
    nan: int
    compressed: bool


# zarr-python has no bfloat16, and a type of our own would make every other reader refuse the whole store: so its bits
# are uint16. Of the three only bfloat16 gains from a codec (ratio 1.3): an exponent is half of its bits, and repeats.
_STORED: dict[Dtype, _Stored] = {
    "float32": _Stored(np.dtype("<f4"), np.dtype("<u4"), 0x7FC00000, False),
    "float16": _Stored(np.dtype("<f2"), np.dtype("<u2"), 0x7E00, False),
    "bfloat16": _Stored(np.dtype("<u2"), np.dtype("<u2"), 0x7FC0, True),
}
_COMPRESSOR: Literal["lz4"] = "lz4"
_LEVEL = 5


def stored_dtype(dtype: Dtype) -> np.dtype[Any]:
    """The NumPy dtype in which activations of `dtype` are stored: uint16 for bfloat16."""
    return _STORED[dtype].numpy


def array_options(dtype: Dtype) -> dict[str, Any]:
    """What `zarr.create_array` needs so that the array's metadata and `encode_shard` agree.

    Returns
    -------
    dict
        ``dtype``, ``fill_value``, ``filters``, ``compressors`` and ``attributes``.
    """
    stored = _STORED[dtype]
    lz4 = BloscCodec(cname=_COMPRESSOR, clevel=_LEVEL, shuffle="bitshuffle", typesize=stored.numpy.itemsize)
    return {
        "dtype": stored.numpy,
        "fill_value": stored.nan if stored.numpy.kind == "u" else math.nan,
        "filters": None,
        "compressors": (lz4, Crc32cCodec()) if stored.compressed else (Crc32cCodec(),),
        "attributes": {DTYPE_ATTRIBUTE: dtype} if stored.numpy.kind == "u" else {},
    }


def to_stored(values: npt.NDArray[Any], dtype: Dtype) -> npt.NDArray[Any]:
    """Round activations to `dtype`.

    Parameters
    ----------
    values : float32, float16 or uint16 array
        Activations; uint16 are the bits of bfloat16.
    dtype : {"float32", "float16", "bfloat16"}
        What to store; rounding is to the nearest, ties to even, and NaN stays NaN.

    Returns
    -------
    array
        Of `stored_dtype`; `values` itself where nothing has to be done.

    Raises
    ------
    ValueError
        A finite value is beyond the range of `dtype`.
    """
    given = np.dtype(values.dtype)
    if given not in (np.float32, np.float16, np.uint16):
        raise ValueError(f"activations are float32, float16 or the bits of bfloat16 (uint16), not {given}")
    stored = _STORED[dtype].numpy
    if given == stored:
        return values
    exact = from_stored(values)
    if dtype == "float32":
        return exact.astype(np.float32, copy=False)
    if dtype == "bfloat16":
        rounded = _bfloat16(np.ascontiguousarray(exact, np.float32))
        infinite = (rounded & 0x7FFF) == 0x7F80
    else:
        with np.errstate(over="ignore"):
            rounded = exact.astype(stored)
        infinite = np.isinf(rounded)
    if infinite.any() and not np.isinf(exact[infinite]).all():
        largest = np.abs(exact[np.isfinite(exact)]).max()
        raise ValueError(f"the activation {largest:g} is beyond the range of {dtype}")
    return rounded


def from_stored(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Activations as floating-point numbers: the bits of bfloat16 (uint16) become float32, others stay as they are."""
    if values.dtype != np.uint16:
        return values
    wide = values.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def encode_shard(
    block: npt.NDArray[Any], shard_shape: Sequence[int], chunk_shape: Sequence[int], dtype: Dtype
) -> npt.NDArray[np.uint8]:
    """Return the bytes of one shard.

    Parameters
    ----------
    block : array
        What the shard's leading region holds, in `stored_dtype`; everything beyond it is the fill value. Any strides.
    shard_shape, chunk_shape : sequence of int
        Shapes of the shard and of its inner chunks, which divide it.
    dtype : {"float32", "float16", "bfloat16"}
        What `block` is.

    Returns
    -------
    uint8 array
        The shard, to be written as a file.

    Raises
    ------
    ValueError
        The shapes do not fit each other, or the block has another dtype.
    """
    stored = _STORED[dtype]
    shard, chunk = tuple(shard_shape), tuple(chunk_shape)
    grid = chunk_grid(shard, chunk)
    if block.ndim != len(shard) or any(size > limit for size, limit in zip(block.shape, shard, strict=True)):
        raise ValueError(f"a block of shape {block.shape} does not fit a shard of shape {shard}")
    if block.dtype != stored.numpy:
        raise ValueError(f"{dtype} is stored as {stored.numpy}, and the block is {block.dtype}")
    bits = block.view(stored.bits)
    within = tuple(-(-size // length) for size, length in zip(block.shape, chunk, strict=True))
    raw = math.prod(chunk) * stored.bits.itemsize
    room = raw + CRC_BYTES + (blosc.MAX_OVERHEAD if stored.compressed else 0)
    index = np.full((*grid, 2), LEFT_OUT, "<u8")
    out = np.empty(math.prod(within) * room + index.nbytes + CRC_BYTES, np.uint8)
    scratch = np.empty(chunk, stored.bits) if stored.compressed else None
    start = 0
    for place in itertools.product(*map(range, within)):
        part = bits[tuple(slice(i * length, (i + 1) * length) for i, length in zip(place, chunk, strict=True))]
        if part.flat[0] == stored.nan and (part == stored.nan).all():
            continue
        whole = scratch if scratch is not None else out[start : start + raw].view(stored.bits).reshape(chunk)
        if part.shape != chunk:
            whole[...] = stored.nan
        whole[tuple(map(slice, part.shape))] = part
        stop = start + raw
        if scratch is not None:
            packed = blosc.compress(scratch, _COMPRESSOR.encode(), _LEVEL, blosc.BITSHUFFLE)
            stop = start + len(packed)
            out[start:stop] = np.frombuffer(packed, np.uint8)
        _sign(out, start, stop)
        index[place] = start, stop + CRC_BYTES - start
        start = stop + CRC_BYTES
    out[start : start + index.nbytes] = index.reshape(-1).view(np.uint8)
    _sign(out, start, start + index.nbytes)
    return out[: start + index.nbytes + CRC_BYTES]


def encode_chunk(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return the bytes of one whole chunk of an array without shards: little-endian numbers and their CRC-32C."""
    plain = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    out = np.empty(plain.nbytes + CRC_BYTES, np.uint8)
    out[:-CRC_BYTES] = plain.reshape(-1).view(np.uint8)
    _sign(out, 0, plain.nbytes)
    return out


def chunk_grid(shard: tuple[int, ...], chunk: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many chunks a shard has along each dimension."""
    if len(shard) != len(chunk) or any(c < 1 or s < 1 or s % c for s, c in zip(shard, chunk, strict=False)):
        raise ValueError(f"chunks of shape {chunk} do not divide a shard of shape {shard}")
    return tuple(s // c for s, c in zip(shard, chunk, strict=True))


def _sign(out: npt.NDArray[np.uint8], start: int, stop: int) -> None:
    """Write the CRC-32C of ``out[start:stop]`` behind it."""
    crc = google_crc32c.value(out[start:stop])
    out[stop : stop + CRC_BYTES] = np.frombuffer(crc.to_bytes(CRC_BYTES, "little"), np.uint8)


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits  # wraps around for NaN only, which is put right below
    rounded >>= 16
    result = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        result[nan] = (bits[nan] >> 16) | 0x0040  # quiet, so that rounding cannot make it infinite
    return result
