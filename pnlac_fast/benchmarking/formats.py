"""Files of activations, each written and read as its own documentation does it; what is written is on the disk."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr
from xarray.core.indexing import LazilyIndexedArray

from pnlac_fast.store.backend_array import ShardedArray
from pnlac_fast.store.files import LocalFiles
from pnlac_fast.store.local import LocalPlace, sync_directory
from pnlac_fast.store.sharding import parse_sharding
from pnlac_fast.store.shards import Dtype, array_options, shard_pieces

Rows = npt.NDArray[Any]
_AT_ONCE = 1 << 20  # of a plain write: much larger ones may wait for memory in one piece
Select = Callable[[Any], Rows]  # of (token, neuron), each a number or a slice


@dataclass(frozen=True)
class Shape:
    """Batches of `rows` tokens x `width` neurons; where there are shards, each is one batch."""

    rows: int = 1024
    width: int = 14336
    chunk: tuple[int, int] = (256, 1024)

    @property
    def batch(self) -> tuple[int, int]:
        """Shape of one batch."""
        return self.rows, self.width


@dataclass(frozen=True)
class Format:
    """A way to keep activations: writes batches to a path, and opens what it has written."""

    write: Callable[[Path, Sequence[Rows], Shape], None]
    open: Callable[[Path], Select]


def write_plain(path: Path, batches: Sequence[Rows], shape: Shape) -> None:
    """The bytes one after another, and fdatasync: what the disk can do."""
    path.mkdir()
    with (path / "plain").open("wb", buffering=0) as file:
        for batch in batches:
            left = batch.data.cast("B")
            while left:
                left = left[file.write(left[:_AT_ONCE]) :]
        os.fdatasync(file.fileno())


def write_ours(path: Path, batches: Sequence[Rows], shape: Shape, dtype: Dtype = "float32") -> None:
    """Shards of this package."""
    _create_like_ours(path, batches, shape, dtype)
    place = LocalPlace(path)
    for i, batch in enumerate(batches):
        place.write(f"c.{i}.0", shard_pieces(batch, shape.batch, shape.chunk, dtype))
    place.sync()


def open_ours(path: Path) -> Select:
    """Through xarray, as a store is read."""
    sharding = parse_sharding(json.loads((path / "zarr.json").read_bytes()), path.name)
    lazy = LazilyIndexedArray(ShardedArray(LocalFiles(path), sharding, path.name))
    array = xr.DataArray(xr.Variable(("token", "neuron"), lazy))
    return lambda selection: array[selection].values


def write_zarr_sharded(path: Path, batches: Sequence[Rows], shape: Shape) -> None:
    """zarr-python, the same array as ours."""
    _write_zarr(_create_like_ours(path, batches, shape, "float32"), batches)
    _sync(path)


def write_zarr(path: Path, batches: Sequence[Rows], shape: Shape) -> None:
    """zarr-python with its own chunks and codec."""
    _write_zarr(zarr.create_array(path, shape=_total(batches), dtype="float32"), batches)
    _sync(path)


def open_zarr(path: Path) -> Select:
    """zarr-python."""
    array = zarr.open_array(path, mode="r")
    return lambda selection: np.asarray(array[selection])


def write_tensorstore(path: Path, batches: Sequence[Rows], shape: Shape) -> None:
    """tensorstore, the same array as ours; it calls fsync by itself."""
    _create_like_ours(path, batches, shape, "float32")
    array = _tensorstore(path)
    for at, batch in _places(batches):
        array[at].write(batch).result()


def open_tensorstore(path: Path) -> Select:
    """tensorstore, without a cache of its own, which is its default."""
    array = _tensorstore(path)
    return lambda selection: np.asarray(array[selection].read().result())


def write_safetensors(path: Path, batches: Sequence[Rows], shape: Shape) -> None:
    """One safetensors file a batch."""
    from safetensors.numpy import save_file

    path.mkdir()
    for i, batch in enumerate(batches):
        save_file({"activation": batch}, path / f"{i:06}.safetensors")
    _sync(path)


def open_safetensors(path: Path) -> Select:
    """The slice of each file."""
    from safetensors import safe_open

    files = [safe_open(file, "np") for file in sorted(path.iterdir())]
    slices = [file.get_slice("activation") for file in files]
    rows = slices[0].get_shape()[0]

    def select(selection: Any) -> Rows:
        token, neuron = selection
        if isinstance(token, int):
            return np.asarray(slices[token // rows][token % rows, neuron])
        return np.concatenate([one[:, neuron] for one in slices])[token]

    return select


def write_memmap(path: Path, batches: Sequence[Rows], shape: Shape) -> None:
    """One memory-mapped .npy file."""
    path.mkdir()
    array = np.lib.format.open_memmap(path / "activation.npy", "w+", np.float32, _total(batches))
    for at, batch in _places(batches):
        array[at] = batch
    array.flush()
    _sync(path)


def open_memmap(path: Path) -> Select:
    """Only what is selected is read."""
    array = np.load(path / "activation.npy", mmap_mode="r")
    return lambda selection: np.array(array[selection])


FORMATS = {
    "ours": Format(write_ours, open_ours),
    "tensorstore": Format(write_tensorstore, open_tensorstore),
    "zarr_sharded": Format(write_zarr_sharded, open_zarr),
    "zarr": Format(write_zarr, open_zarr),
    "safetensors": Format(write_safetensors, open_safetensors),
    "memmap": Format(write_memmap, open_memmap),
}


def installed() -> tuple[dict[str, Format], dict[str, str]]:
    """The formats that can be measured here, and why the others cannot."""
    if importlib.util.find_spec("tensorstore"):
        return dict(FORMATS), {}
    return {name: way for name, way in FORMATS.items() if name != "tensorstore"}, {"tensorstore": "not installed"}


def _create_like_ours(path: Path, batches: Sequence[Rows], shape: Shape, dtype: Dtype) -> zarr.Array[Any]:
    keys: Any = {"name": "default", "configuration": {"separator": "."}}
    return zarr.create_array(
        path,
        shape=_total(batches),
        chunks=shape.chunk,
        shards=shape.batch,
        chunk_key_encoding=keys,
        **array_options(dtype),
    )


def _write_zarr(array: zarr.Array[Any], batches: Sequence[Rows]) -> None:
    for at, batch in _places(batches):
        array[at] = batch


def _tensorstore(path: Path) -> Any:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, open=True).result()


def _total(batches: Sequence[Rows]) -> tuple[int, int]:
    return sum(map(len, batches)), batches[0].shape[1]


def _places(batches: Sequence[Rows]) -> Iterator[tuple[slice, Rows]]:
    start = 0
    for batch in batches:
        yield slice(start, start + len(batch)), batch
        start += len(batch)


def _sync(path: Path) -> None:
    """Make everything below a directory durable."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync_directory(Path(folder, name))
        sync_directory(Path(folder))
