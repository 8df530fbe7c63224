"""Encode raw activations as Zarr v3 shards, byte for byte what ``sharding_indexed`` asks for.

A shard is its inner chunks one after another and an index at the end: for each chunk, in C order, offset and length as
little-endian uint64, both 2**64 - 1 where the chunk is left out because it would hold nothing but the fill value. Every
chunk, and the index, ends in its own CRC-32C. zarr-python writes the same layout in several passes over the data;
here each chunk is copied once, and checked and written while it is still in the cache.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
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
_UNSIGNED = np.zeros(CRC_BYTES, np.uint8)


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
_AT_ONCE = 1 << 16  # values rounded at once, so that the steps stay in the cache


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
    if dtype == "float32":
        return from_stored(values).astype(np.float32, copy=False)
    flat = np.ascontiguousarray(values).reshape(-1)
    rounded = np.empty(flat.size, stored)
    for start in range(0, flat.size, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        rounded[part] = _rounded(from_stored(flat[part]).astype(np.float32, copy=False), dtype)
    return rounded.reshape(values.shape)


def from_stored(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Activations as floating-point numbers: the bits of bfloat16 (uint16) become float32, others stay as they are."""
    if values.dtype != np.uint16:
        return values
    wide = values.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def encode_shard(
    block: npt.NDArray[Any], shard_shape: Sequence[int], chunk_shape: Sequence[int], dtype: Dtype
) -> bytearray:
    """Return the bytes of one shard; `shard_pieces` says of what, and does not hold them all at once."""
    content = bytearray()
    for piece in shard_pieces(block, shard_shape, chunk_shape, dtype):
        content += piece
    return content


def shard_pieces(
    block: npt.NDArray[Any], shard_shape: Sequence[int], chunk_shape: Sequence[int], dtype: Dtype
) -> Iterator[memoryview]:
    """Return the bytes of one shard, piece by piece: each inner chunk, then the index.

    Parameters
    ----------
    block : array
        What the shard's leading region holds, in `stored_dtype`; everything beyond it is the fill value. Any strides.
    shard_shape, chunk_shape : sequence of int
        Shapes of the shard and of its inner chunks, which divide it.
    dtype : {"float32", "float16", "bfloat16"}
        What `block` is.

    Yields
    ------
    memoryview of bytes
        A piece; the last four bytes of each are the CRC-32C of the others. **It is valid until the next one is asked
        for**, which takes its place in memory: what goes to the disk at once is then still in the cache.

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
    return _pieces(block.view(stored.bits), grid, chunk, stored)


def _pieces(
    bits: npt.NDArray[Any], grid: tuple[int, ...], chunk: tuple[int, ...], stored: _Stored
) -> Iterator[memoryview]:
    piece = np.empty(math.prod(chunk) * bits.itemsize + CRC_BYTES, np.uint8)
    content = piece[:-CRC_BYTES].view(bits.dtype).reshape(chunk)
    index = np.full((*grid, 2), LEFT_OUT, "<u8")
    start = 0
    for place in itertools.product(*(range(-(-size // n)) for size, n in zip(bits.shape, chunk, strict=True))):
        part = bits[tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, chunk, strict=True))]
        if part.flat[0] == stored.nan and (part == stored.nan).all():
            continue
        if part.shape != chunk:
            content[...] = stored.nan
        content[tuple(map(slice, part.shape))] = part
        if stored.compressed:
            packed = blosc.compress(content, _COMPRESSOR.encode(), _LEVEL, blosc.BITSHUFFLE)
            signed = _signed(np.append(np.frombuffer(packed, np.uint8), _UNSIGNED))
        else:
            signed = _signed(piece)
        index[place] = start, signed.size
        start += signed.size
        yield signed.data
    yield _signed(np.append(index.reshape(-1).view(np.uint8), _UNSIGNED)).data


def encode_chunk(values: npt.NDArray[Any]) -> memoryview:
    """Return the bytes of one whole chunk of an array without shards: little-endian numbers and their CRC-32C."""
    plain = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    piece = np.empty(plain.nbytes + CRC_BYTES, np.uint8)
    piece[:-CRC_BYTES] = plain.reshape(-1).view(np.uint8)
    return _signed(piece).data


def chunk_grid(shard: tuple[int, ...], chunk: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many chunks a shard has along each dimension."""
    if len(shard) != len(chunk) or any(c < 1 or s < 1 or s % c for s, c in zip(shard, chunk, strict=False)):
        raise ValueError(f"chunks of shape {chunk} do not divide a shard of shape {shard}")
    return tuple(s // c for s, c in zip(shard, chunk, strict=True))


def _signed(piece: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Put the CRC-32C of a piece into its last four bytes."""
    crc = google_crc32c.value(piece[:-CRC_BYTES])
    piece[-CRC_BYTES:] = np.frombuffer(crc.to_bytes(CRC_BYTES, "little"), np.uint8)
    return piece


def _rounded(values: npt.NDArray[np.float32], dtype: Dtype) -> npt.NDArray[Any]:
    if dtype == "float16":
        with np.errstate(over="ignore"):
            rounded: npt.NDArray[Any] = values.astype(np.float16)
        infinite = np.isinf(rounded)
    else:
        rounded = _bfloat16(values)
        infinite = (rounded & 0x7FFF) == 0x7F80
    if infinite.any() and not np.isinf(values[infinite]).all():
        largest = np.abs(values[np.isfinite(values)]).max()
        raise ValueError(f"the activation {largest:g} is beyond the range of {dtype}")
    return rounded


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
