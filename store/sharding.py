"""What an array's metadata says of its shards: checked before anything is read or allocated by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.shards import CRC_BYTES, DTYPE_ATTRIBUTE, DTYPES, Dtype, array_options, chunk_grid, stored_dtype

_LARGEST_CHUNK = 1 << 30  # bytes


class Sharding(NamedTuple):
    """An array of activations in shards.

    Attributes
    ----------
    shape, shard, chunk : tuple of int
        Shapes of the array, of its shards and of their inner chunks.
    dtype : {"float32", "float16", "bfloat16"}
        What is stored.
    compressed : bool
        Whether the chunks are Blosc frames.
    separator : str
        What separates the numbers in a shard's key.
    """

    shape: tuple[int, ...]
    shard: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: Dtype
    compressed: bool
    separator: str

    @property
    def grid(self) -> tuple[int, ...]:
        """How many chunks a shard has along each dimension."""
        return chunk_grid(self.shard, self.chunk)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one decoded chunk."""
        return math.prod(self.chunk) * stored_dtype(self.dtype).itemsize

    @property
    def index_bytes(self) -> int:
        """Bytes of a shard's index with its checksum."""
        return 16 * math.prod(self.grid) + CRC_BYTES

    @property
    def read_dtype(self) -> np.dtype[Any]:
        """The dtype of what is read: float16 where that is stored, float32 otherwise."""
        return np.dtype(np.float16 if self.dtype == "float16" else np.float32)

    def key(self, shard: tuple[int, ...]) -> str:
        """The key of a shard by its place in the grid, relative to the array."""
        return self.separator.join(("c", *map(str, shard)))


def parse_sharding(metadata: Mapping[str, Any], name: str) -> Sharding:
    """Read the metadata of an array, the JSON object in its ``zarr.json``.

    Parameters
    ----------
    metadata : dict
        Anything; it is not trusted.
    name : str
        What to call the array in errors.

    Raises
    ------
    StoreError
        It is not an array of activations as `array_options` describes it, compressed by Blosc or not.
    """
    try:
        return _parse(metadata)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StoreError(
            f"{name} is not an array of activations that can be read ({error}); open it with zarr-python instead."
        ) from error


def _parse(metadata: Mapping[str, Any]) -> Sharding:
    _expect(metadata["zarr_format"] == 3 and metadata["node_type"] == "array", "not a Zarr version 3 array")
    attributes = metadata.get("attributes", {})
    dtype = attributes.get(DTYPE_ATTRIBUTE, metadata["data_type"])
    _expect(dtype in DTYPES and metadata["data_type"] == stored_dtype(dtype).name, f"its data type is {dtype!r}")
    fill = metadata["fill_value"]
    expected = array_options(dtype)["fill_value"]
    _expect(fill == (expected if isinstance(expected, int) else "NaN"), f"its fill value is {fill!r}, not NaN")

    outer = metadata["chunk_grid"]
    _expect(outer["name"] == "regular", "its chunk grid is not regular")
    (codec,) = metadata["codecs"]
    _expect(codec["name"] == "sharding_indexed", "it has no shards")
    inner = codec["configuration"]
    _expect(inner.get("index_location", "end") == "end", "the index is not at the end of the shards")
    _expect(_names(inner["index_codecs"]) == ["bytes", "crc32c"], "the shards' index has other codecs")
    names = _names(inner["codecs"])
    _expect(names in (["bytes", "crc32c"], ["bytes", "blosc", "crc32c"]), f"its codecs are {', '.join(names)}")

    keys = metadata["chunk_key_encoding"]
    separator = keys.get("configuration", {}).get("separator", "/")
    _expect(keys["name"] == "default" and separator in ("/", "."), "its chunks have other names")

    shape = _sizes(metadata["shape"], 0)
    shard, chunk = _sizes(outer["configuration"]["chunk_shape"], 1), _sizes(inner["chunk_shape"], 1)
    _expect(len(shape) == len(shard) > 0, f"shards of shape {shard} do not fit an array of shape {shape}")
    chunk_grid(shard, chunk)
    sharding = Sharding(shape, shard, chunk, dtype, "blosc" in names, separator)
    _expect(sharding.chunk_bytes <= _LARGEST_CHUNK, f"chunks of shape {chunk} are larger than 1 GiB")
    return sharding


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _names(codecs: list[Mapping[str, Any]]) -> list[str]:
    """The names of codecs of which the first is bytes in little-endian order."""
    endian = codecs[0]["configuration"]["endian"]
    _expect(endian == "little", f"its byte order is {endian!r}")
    return [str(codec["name"]) for codec in codecs]


def _sizes(values: list[int], least: int) -> tuple[int, ...]:
    sizes = tuple(values)
    for size in sizes:
        _expect(type(size) is int and least <= size <= np.iinfo(np.int64).max, f"{size!r} is not a size")
    return sizes
