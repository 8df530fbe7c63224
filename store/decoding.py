"""Make sure that what is read from a shard is what was written, and take it apart."""

from __future__ import annotations

import struct
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc

from pnlac_fast.store.errors import ShardError
from pnlac_fast.store.files import Bytes
from pnlac_fast.store.sharding import Sharding
from pnlac_fast.store.shards import CRC_BYTES, LEFT_OUT, stored_dtype

_BLOSC_HEADER = struct.Struct("<4xI4xI")  # bytes before and after compression


def read_index(tail: Bytes, sharding: Sharding, array: str, key: str) -> npt.NDArray[np.uint64]:
    """Return offset and length of each chunk, (*grid, 2), from the last bytes of a shard.

    Raises
    ------
    ShardError
        The index is cut off or damaged, or a chunk has a length that none can have.
    """
    if tail.size != sharding.index_bytes:
        raise ShardError(array, key, "it is shorter than its index")
    if not _is_signed(tail):
        raise ShardError(array, key, "it is cut off, or its index is damaged")
    index = tail[:-CRC_BYTES].copy().view("<u8").reshape(*sharding.grid, 2)
    length = index[..., 1]
    most = sharding.chunk_bytes + CRC_BYTES + (blosc.MAX_OVERHEAD if sharding.compressed else 0)
    least = CRC_BYTES + _BLOSC_HEADER.size if sharding.compressed else most
    if not (((length >= least) & (length <= most)) | (index == LEFT_OUT).all(-1)).all():
        raise ShardError(array, key, "its index gives a chunk a length that it cannot have")
    return index


def decode_chunk(content: Bytes, sharding: Sharding, array: str, key: str, where: str) -> npt.NDArray[Any]:
    """Check a chunk and return its numbers, which may lie in `content`.

    Raises
    ------
    ShardError
        The checksum is wrong, or Blosc cannot make a chunk of it.
    """
    if not _is_signed(content):
        raise ShardError(array, key, f"the checksum of {where} is wrong")
    content = content[:-CRC_BYTES]
    if sharding.compressed:
        # Blosc would believe the header: what it says of sizes must be so before anything is written by it.
        if _BLOSC_HEADER.unpack_from(content.data) != (sharding.chunk_bytes, content.size):
            raise ShardError(array, key, f"{where} does not say of itself how large it is")
        packed, content = content, np.empty(sharding.chunk_bytes, np.uint8)
        try:
            blosc.decompress(packed, content)
        except RuntimeError as error:
            raise ShardError(array, key, f"{where} cannot be decompressed") from error
    return content.view(stored_dtype(sharding.dtype)).reshape(sharding.chunk)


def _is_signed(content: Bytes) -> bool:
    """Whether the last four bytes are the CRC-32C of the others."""
    return bool(google_crc32c.value(content[:-CRC_BYTES]) == int.from_bytes(content[-CRC_BYTES:].tobytes(), "little"))
