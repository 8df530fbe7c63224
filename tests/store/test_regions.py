"""Reading parts of arrays in shards, through xarray too; and shards and metadata that are not what they should be."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import pytest
import tensorstore
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from xarray.core.indexing import LazilyIndexedArray
from zarr.storage import LocalStore

from pnlac_fast.store.backend_array import ShardedArray
from pnlac_fast.store.errors import ShardError, StoreError
from pnlac_fast.store.files import LocalFiles, Part, StoreFiles
from pnlac_fast.store.local import LocalPlace
from pnlac_fast.store.places import sum_of
from pnlac_fast.store.regions import read_region
from pnlac_fast.store.sharding import Sharding, parse_sharding
from pnlac_fast.store.shards import DTYPES, array_options, encode_shard, from_stored, shard_pieces, to_stored

SHAPE, CHUNK, SHARD = (3, 23, 17), (1, 4, 5), (2, 8, 10)  # ragged along every dimension


class Sample(NamedTuple):
    """An array on disk, and what is in it."""

    path: Path
    sharding: Sharding
    values: np.ndarray


def sample(path: Path, dtype: Any, shape: Any = SHAPE, chunk: Any = CHUNK, shard: Any = SHARD) -> Sample:
    """An array that zarr-python has written."""
    values = to_stored(np.random.default_rng(0).normal(size=shape).astype(np.float32), dtype)
    keys = {"name": "default", "configuration": {"separator": "."}}
    zarr.create_array(path, shape=shape, chunks=chunk, shards=shard, chunk_key_encoding=keys, **array_options(dtype))[
        ...
    ] = values
    metadata = json.loads((path / "zarr.json").read_text())
    return Sample(path, parse_sharding(metadata, "activation"), from_stored(values))


@pytest.fixture(scope="module", params=DTYPES)
def array(request, tmp_path_factory) -> Sample:
    return sample(tmp_path_factory.mktemp("array"), request.param)


def read(sample: Sample, *selection: Any, **options: Any) -> np.ndarray:
    return read_region(LocalFiles(sample.path), sample.sharding, selection, array="activation", **options)


EVERYTHING = (slice(None),) * 3


def test_all_that_zarr_python_wrote(array):
    found = read(array, *EVERYTHING)
    assert found.dtype == array.values.dtype
    np.testing.assert_array_equal(found, array.values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_that_tensorstore_wrote(tmp_path, dtype):
    array = sample(tmp_path, dtype)
    for file in tmp_path.glob("c.*"):
        file.unlink()
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path)}}
    with np.errstate(over="ignore"):
        tensorstore.open(spec, open=True).result().write(to_stored(array.values, dtype)).result()
    np.testing.assert_array_equal(read(array, *EVERYTHING), array.values)


def selections(size: int) -> st.SearchStrategy[Any]:
    places = st.integers(-size, size - 1)
    steps = st.sampled_from([1, 2, 7, 50, -1, -3])
    edges = st.none() | st.integers(-size - 3, size + 3)
    return (
        places
        | st.builds(slice, edges, edges, steps)
        | st.lists(places, max_size=6).map(lambda chosen: np.array(chosen, np.int64))
    )


@settings(max_examples=60, deadline=None)
@given(selection=st.tuples(*map(selections, SHAPE)), remote=st.booleans())
def test_any_selection(array, selection, remote):
    expected = array.values
    for axis, chosen in enumerate(selection):
        whole = [chosen] if isinstance(chosen, int) else chosen
        expected = expected[(slice(None),) * axis + (whole,)]
    dropped = tuple(axis for axis, chosen in enumerate(selection) if isinstance(chosen, int))
    files = StoreFiles(LocalStore(array.path.parent), array.path.name) if remote else LocalFiles(array.path)
    found = read_region(files, array.sharding, selection, array="activation")
    np.testing.assert_array_equal(found, expected.squeeze(dropped))


def test_positions_outside_of_the_array(array):
    for wrong in (23, -24, np.array([0, 23]), np.array([-24]), np.array([0.5]), np.array([[0]])):
        with pytest.raises(IndexError, match="position"):
            read(array, 0, wrong, 0)


def test_only_what_is_needed_is_read(array):
    class Counting(NamedTuple):
        files: LocalFiles
        parts: list[Part]

        def read(self, parts: Iterable[Part]) -> Iterator[np.ndarray | None]:
            def noted() -> Iterator[Part]:
                for part in parts:
                    self.parts.append(part)
                    yield part

            return self.files.read(noted())

    def chunks(*selection: Any) -> int:
        counting = Counting(LocalFiles(array.path), [])
        read_region(counting, array.sharding, selection, array="activation")
        return sum(part.start is not None for part in counting.parts)

    assert chunks(0, 3, slice(None)) == 4  # one token over all neurons
    assert chunks(0, slice(None), 3) == 6  # one neuron over all tokens
    assert chunks(0, np.array([22, 0, 1]), 3) == 2
    assert chunks(slice(None), slice(0, 0), slice(None)) == 0
    assert chunks(0, slice(0, None, 9), 3) == 3


def lazily(array: Sample) -> xr.Variable:
    backend = ShardedArray(LocalFiles(array.path), array.sharding, "activation")
    return xr.Variable(("layer", "token", "neuron"), LazilyIndexedArray(backend))


def test_xarray_reads_it_as_it_reads_numpy(array):
    ours, numpy = lazily(array), xr.Variable(("layer", "token", "neuron"), array.values)
    token, neuron = xr.Variable("point", [5, 1, 22, 5]), xr.Variable("point", [0, 16, 3, 0])
    for selection in (
        {},
        {"layer": 1, "token": 7},
        {"layer": -1, "neuron": 3},
        {"token": np.array([5, 1, 22, 5]), "neuron": slice(None, None, -2)},
        {"layer": slice(1, 1)},
        {"token": token, "neuron": neuron},
        {"token": xr.Variable(("a", "b"), [[3, 4], [22, 0]])},
    ):
        xr.testing.assert_identical(ours.isel(selection).load(), numpy.isel(selection))
    xr.testing.assert_identical(ours[1][3:].isel(neuron=[2, 1]).load(), numpy[1][3:].isel(neuron=[2, 1]))
    copied = pickle.loads(pickle.dumps(ours.isel(layer=2)))
    xr.testing.assert_identical(copied.load(), numpy.isel(layer=2))


def damaged(array: Sample, content: bytes) -> None:
    """Reading an array whose only shard has this content must fail."""
    (array.path / "c.0.0").write_bytes(content)
    with pytest.raises(ShardError, match=r"shard c\.0\.0") as caught:
        read(array, slice(None), slice(None))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.fixture(params=DTYPES)
def single(request, tmp_path) -> Sample:
    """An array of one shard, the last chunks of it incomplete."""
    return sample(tmp_path, request.param, (7, 5), (4, 3), (8, 6))


def test_every_flipped_bit_is_found(single):
    sound = (single.path / "c.0.0").read_bytes()
    for byte in range(len(sound)):
        flipped = bytearray(sound)
        flipped[byte] ^= 1 << byte % 8
        damaged(single, flipped)


def test_every_truncation_is_found_and_so_is_an_addition(single):
    sound = (single.path / "c.0.0").read_bytes()
    for length in range(len(sound)):
        damaged(single, sound[:length])
    damaged(single, sound + b"\0")
    damaged(single, b"\0" + sound)


def signed(content: bytes) -> bytes:
    return content + google_crc32c.value(content).to_bytes(4, "little")


def test_an_index_that_is_signed_and_wrong_all_the_same(single):
    sound = (single.path / "c.0.0").read_bytes()
    size = single.sharding.index_bytes
    index = np.frombuffer(sound[-size:-4], "<u8")
    for entry, value in ((0, len(sound)), (0, 2**64 - 1), (0, 2**63), (1, 2**64 - 1), (1, 2**40), (1, 3)):
        changed = index.copy()
        changed[entry] = value
        damaged(single, sound[:-size] + signed(changed.tobytes()))


def test_a_blosc_frame_that_lies_about_its_size(tmp_path):
    array = sample(tmp_path, "bfloat16", (4, 5), (4, 5), (4, 5))
    sound = (tmp_path / "c.0.0").read_bytes()
    frame = sound[: -array.sharding.index_bytes - 4]
    for place, value in ((4, 2**31), (4, 0), (12, 2**31), (12, 16), (8, 0), (8, 2**31)):
        lying = bytearray(frame)
        struct.pack_into("<I", lying, place, value)
        damaged(array, signed(bytes(lying)) + sound[-array.sharding.index_bytes :])


def test_missing_shards(array, tmp_path):
    missing = array._replace(path=tmp_path)
    with pytest.raises(ShardError, match=r"shard c\.0\.0\.0: it is missing"):
        read(missing, 0, 0, 0)
    found = read(missing, *EVERYTHING, missing_as_fill=True)
    assert found.shape == SHAPE
    assert np.isnan(found).all()


def test_pieces_are_the_shard(tmp_path, single):
    values = to_stored(single.values, single.sharding.dtype)
    arguments = (values, single.sharding.shard, single.sharding.chunk, single.sharding.dtype)
    place = LocalPlace(single.path)
    written = place.write("c.0.0", shard_pieces(*arguments))
    content = (single.path / "c.0.0").read_bytes()
    assert content == encode_shard(*arguments)
    assert written == sum_of(content)
    np.testing.assert_array_equal(read(single, slice(None), slice(None)), single.values)

    def breaks_off() -> Iterator[np.ndarray]:
        yield next(shard_pieces(*arguments))
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        place.write("c.0.0", breaks_off())
    np.testing.assert_array_equal(read(single, slice(None), slice(None)), single.values)


def test_metadata_of_something_else_is_refused(single):
    sound = json.loads((single.path / "zarr.json").read_text())
    inner = ("codecs", 0, "configuration")
    for path, value in [
        (("zarr_format",), 2),
        (("node_type",), "group"),
        (("data_type",), "float64"),
        (("data_type",), ["uint16"]),
        (("attributes",), {"pnlac_dtype": "float8"}),
        (("fill_value",), 0),
        (("shape",), [7]),
        (("shape",), [7, -1]),
        (("shape",), [7, 2**70]),
        (("shape",), "75"),
        (("shape",), [7, 5.0]),
        (("chunk_grid", "name"), "rectilinear"),
        (("chunk_grid", "configuration", "chunk_shape"), [8, 5]),
        (("chunk_grid", "configuration", "chunk_shape"), [0, 6]),
        ((*inner, "chunk_shape"), [0, 3]),
        ((*inner, "chunk_shape"), [4, 3, 1]),
        ((*inner, "codecs"), []),
        ((*inner, "codecs", 0, "configuration", "endian"), "big"),
        ((*inner, "codecs", -1, "name"), "zstd"),
        ((*inner, "index_codecs"), [{"name": "bytes", "configuration": {"endian": "little"}}]),
        ((*inner, "index_location"), "start"),
        (("codecs", 0, "name"), "bytes"),
        (("codecs",), []),
        (("chunk_key_encoding", "name"), "v2"),
        (("chunk_key_encoding", "configuration", "separator"), "/../"),
    ]:
        changed = copy.deepcopy(sound)
        place = changed
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        with pytest.raises(StoreError, match="activation is not an array of activations that can be read"):
            parse_sharding(changed, "activation")
    huge = copy.deepcopy(sound)
    huge["chunk_grid"]["configuration"]["chunk_shape"] = [2**40, 2**40]
    huge["codecs"][0]["configuration"]["chunk_shape"] = [2**20, 2**20]
    with pytest.raises(StoreError, match="larger than 1 GiB"):
        parse_sharding(huge, "activation")
    huge["codecs"][0]["configuration"]["chunk_shape"] = [1, 1]
    with pytest.raises(ShardError, match="shorter than its index"):
        read(single._replace(sharding=parse_sharding(huge, "activation")), 0, 0)


def test_a_disk_that_cannot_read_says_which_file(array, monkeypatch):
    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(OSError, match=r"Input/output error: .*c\.0\.0\.0"):
        read(array, 0, 0, 0)


def test_a_disk_that_gives_less_at_once_is_asked_again(array, monkeypatch):
    preadv, write = os.preadv, os.write
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    np.testing.assert_array_equal(read(array, *EVERYTHING), array.values)
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    values = to_stored(array.values[:2, :8, :10], array.sharding.dtype)
    LocalPlace(array.path).write("other", shard_pieces(values, SHARD, CHUNK, array.sharding.dtype))
    assert (array.path / "other").read_bytes() == encode_shard(values, SHARD, CHUNK, array.sharding.dtype)
