"""The shard encoder: what others read from what it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pnlac_fast.store.shards import (
    DTYPES,
    array_options,
    encode_chunk,
    encode_shard,
    from_stored,
    stored_dtype,
    to_stored,
)

FLAT_KEYS = {"name": "default", "configuration": {"separator": "."}}


def activations(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
    """Random activations as they are stored, some of them special."""
    rng = np.random.default_rng(seed)
    special = np.array([np.inf, -np.inf, 0.0, -0.0, 1e-7, 60000.0], np.float32)
    values = np.where(rng.random(shape) < 0.2, rng.choice(special, shape), rng.normal(size=shape))
    return to_stored(values.astype(np.float32), dtype)


def create(path: Path, shape: Any, chunks: Any, shards: Any, dtype: Any) -> zarr.Array:
    return zarr.create_array(
        path, shape=shape, chunks=chunks, shards=shards, chunk_key_encoding=FLAT_KEYS, **array_options(dtype)
    )


def key(place: tuple[int, ...]) -> str:
    return ".".join(["c", *map(str, place)])


def bits(values: np.ndarray) -> np.ndarray:
    """So that NaN equals NaN and -0.0 does not equal 0.0."""
    return values.view(f"u{values.dtype.itemsize}")


def write(array: zarr.Array, values: np.ndarray, dtype: Any) -> None:
    """Encode each shard of the array, as ragged as it comes."""
    assert array.shards is not None
    grid = [-(-size // length) for size, length in zip(array.shape, array.shards, strict=True)]
    for place in np.ndindex(*grid):
        at = tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, array.shards, strict=True))
        content = encode_shard(values[at], array.shards, array.chunks, dtype)
        (Path(str(array.store_path.store.root)) / key(place)).write_bytes(content)


def with_tensorstore(path: Path) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, open=True).result().read().result()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "chunks", "shards"),
    [
        ((10, 12), (5, 4), (10, 12)),
        ((13, 9), (4, 3), (8, 6)),  # ragged: the last shards reach beyond the array
        ((3, 11, 7), (1, 4, 3), (2, 8, 9)),
    ],
)
def test_zarr_python_and_tensorstore_read_what_is_encode_shard(tmp_path, shape, chunks, shards, dtype):
    array = create(tmp_path, shape, chunks, shards, dtype)
    values = activations(shape, dtype)
    write(array, values, dtype)
    np.testing.assert_array_equal(bits(zarr.open_array(tmp_path, mode="r")[:]), bits(values))
    np.testing.assert_array_equal(bits(with_tensorstore(tmp_path)), bits(values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_beyond_the_block_everything_is_fill_and_takes_no_room(tmp_path, dtype):
    array = create(tmp_path, (2, 8, 6), (1, 4, 3), (2, 8, 6), dtype)
    block = activations((1, 5, 6), dtype)
    content = encode_shard(block, (2, 8, 6), (1, 4, 3), dtype)
    (tmp_path / key((0, 0, 0))).write_bytes(content)
    expected = np.full((2, 8, 6), np.nan, np.float32)
    expected[:1, :5] = from_stored(block)
    np.testing.assert_array_equal(from_stored(array[:]), expected)
    np.testing.assert_array_equal(from_stored(with_tensorstore(tmp_path)), expected)
    index = np.frombuffer(content[-8 * 16 - 4 : -4], "<u8").reshape(2, 2, 2, 2)
    assert (index[1] == 2**64 - 1).all()
    assert (index[0] != 2**64 - 1).all()
    nothing = encode_shard(block[:, :0], (2, 8, 6), (1, 4, 3), dtype)
    assert len(nothing) == 8 * 16 + 4


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_block_of_any_strides(tmp_path_factory, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=2, max_size=3))
    chunk = tuple(length for length, _ in sizes)
    shard = tuple(length * count for length, count in sizes)
    shape = tuple(data.draw(st.integers(0, size)) for size in shard)
    block = activations(shape[::-1], dtype, seed=data.draw(st.integers(0, 99))).transpose()
    path = tmp_path_factory.mktemp("shard")
    array = create(path, shard, chunk, shard, dtype)
    (path / key((0,) * len(shard))).write_bytes(encode_shard(block, shard, chunk, dtype))
    found = array[:]
    np.testing.assert_array_equal(bits(found[tuple(map(slice, shape))]), bits(block))
    assert np.isnan(from_stored(found)).sum() == found.size - block.size


def test_the_same_block_gives_the_same_bytes():
    block = activations((40, 64), "bfloat16")
    first = encode_shard(block, (64, 64), (32, 32), "bfloat16")
    assert encode_shard(np.asfortranarray(block), (64, 64), (32, 32), "bfloat16") == first


def test_blocks_that_do_not_fit():
    block = np.zeros((4, 4), np.float32)
    for shard, chunk in (((4, 4), (3, 4)), ((4, 4), (0, 4)), ((4, 4), (4,)), ((4, 3), (4, 3)), ((4, 4, 4), (4, 4, 4))):
        with pytest.raises(ValueError, match="shape"):
            encode_shard(block, shard, chunk, "float32")
    with pytest.raises(ValueError, match="bfloat16 is stored as uint16, and the block is float32"):
        encode_shard(block, (4, 4), (4, 4), "bfloat16")


def test_a_plain_chunk(tmp_path):
    values = np.random.default_rng(0).normal(size=(1, 3, 5))
    zarr.create_array(
        tmp_path,
        shape=(2, 3, 5),
        chunks=(1, 3, 5),
        dtype="float64",
        fill_value=np.nan,
        compressors=(zarr.codecs.Crc32cCodec(),),
        chunk_key_encoding=FLAT_KEYS,
    )
    (tmp_path / key((1, 0, 0))).write_bytes(encode_chunk(values))
    np.testing.assert_array_equal(zarr.open_array(tmp_path)[1:], values)
    np.testing.assert_array_equal(with_tensorstore(tmp_path)[1:], values)


def test_metadata_says_bfloat16(tmp_path):
    create(tmp_path, (4, 4), (4, 4), (4, 4), "bfloat16")
    metadata = json.loads((tmp_path / "zarr.json").read_text())
    assert metadata["attributes"] == {"pnlac_dtype": "bfloat16"}
    assert metadata["data_type"] == "uint16"
    assert np.isnan(from_stored(np.array([metadata["fill_value"]], np.uint16)))


def test_bfloat16_is_that_of_torch():
    every = np.arange(2**16, dtype=np.uint16)
    wide = from_stored(every)
    torch.testing.assert_close(
        torch.from_numpy(wide),
        torch.from_numpy(every.view(np.int16)).view(torch.bfloat16).float(),
        rtol=0,
        atol=0,
        equal_nan=True,
    )
    number = ~np.isnan(wide)
    np.testing.assert_array_equal(to_stored(wide, "bfloat16")[number], every[number])
    assert np.isnan(from_stored(to_stored(wide, "bfloat16")[~number])).all()

    rng = np.random.default_rng(0)
    below = rng.integers(0, 0x7F7F0000, 100_000, np.uint32)  # larger ones round to infinity
    halfway = (below & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    values = np.concatenate([below, halfway, below | np.uint32(0x80000000)]).view(np.float32)
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_stored(values, "bfloat16"), expected)


def test_float16_is_that_of_torch():
    values = np.random.default_rng(0).normal(0, 1000, 10_000).astype(np.float32)
    np.testing.assert_array_equal(to_stored(values, "float16"), torch.from_numpy(values).half().numpy())


@pytest.mark.parametrize(("dtype", "value"), [("float16", 70000.0), ("float16", -65520.0), ("bfloat16", 3.4e38)])
def test_overflow_is_refused_and_names_the_value(dtype, value):
    values = np.array([1.0, value, np.inf, np.nan], np.float32)
    with pytest.raises(ValueError, match=re.escape(f"activation {abs(value):g} is beyond the range of {dtype}")):
        to_stored(values, dtype)
    values[1] = np.inf
    np.testing.assert_array_equal(from_stored(to_stored(values, dtype)), values)


def test_values_of_the_stored_dtype_are_taken_as_they_are():
    for dtype in DTYPES:
        values = activations((3, 4), dtype)
        assert to_stored(values, dtype) is values
        assert values.dtype == stored_dtype(dtype)
    with pytest.raises(ValueError, match="not float64"):
        to_stored(np.zeros(3), "float32")
