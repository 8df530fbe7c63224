"""Small xarray Datasets as Zarr groups, kept exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core.indexing import ExplicitIndexer, IndexingSupport, LazilyIndexedArray, explicit_indexing_adapter
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.chunk_key_encodings import ChunkKeyEncodingParams

from pnlac_fast.store.errors import StoreError

ATTRIBUTE = "pnlac"  # the one attribute of every group that is ours
# All chunks of an array lie in its own directory, so that one fsync makes their names durable.
FLAT_KEYS = ChunkKeyEncodingParams(name="default", separator=".")
# What zarr and xarray raise where metadata or a chunk is not what they expect.
UNREADABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_PACKED = (ZstdCodec(level=3), Crc32cCodec())


def write_dataset(store: Store, ds: xr.Dataset, attributes: dict[str, Any], group: str | None = None) -> None:
    """Write a Dataset into an empty group, each array one compressed, checksummed chunk.

    Parameters
    ----------
    store : zarr Store
        Where to write.
    ds : xarray.Dataset
        Numbers, truth values and text; attributes are JSON values.
    attributes : dict
        Attributes of the group beside those of `ds`: what `schema.mark` returns.
    group : str, optional
        The group, the store's root by default.

    Raises
    ------
    StoreError
        If a variable has another dtype or mixes text with something else, or an attribute is not JSON.
    """
    variables = {name: _plain(str(name), variable) for name, variable in ds.variables.items()}
    coords = {name: variables.pop(name) for name in list(ds.coords)}
    plain = xr.Dataset(variables, coords=coords, attrs=_json_attributes(ds.attrs, "the dataset") | attributes)
    encoding = {
        str(name): {
            "chunks": tuple(max(1, size) for size in variable.shape),
            "compressors": _PACKED,
            "chunk_key_encoding": FLAT_KEYS,
        }
        for name, variable in plain.variables.items()
    }
    plain.to_zarr(store, group=group, mode="w-", zarr_format=3, consolidated=False, encoding=encoding)


def read_dataset(store: Store, group: str) -> xr.Dataset:
    """Return a group of `store`, lazily: text as Python strings, our own attribute left out.

    Whatever cannot be read as it was written, at once or later, is a StoreError.
    """
    with sound(f"{store}/{group}"):
        ds: xr.Dataset = xr.open_zarr(store, group=group, consolidated=False, chunks=None)
        ds.attrs.pop(ATTRIBUTE, None)
        texts = {name: variable for name, variable in ds.variables.items() if variable.dtype.kind == "T"}
        ds = ds.assign({name: variable.astype(object) for name, variable in texts.items()})
    lazy = {n: _lazy(v, f"{store}/{group}/{n}") for n, v in ds.variables.items() if not v._in_memory}
    return ds.assign(lazy)[sorted(ds.data_vars, key=str)]  # metadata is read concurrently, in no fixed order


class _Checked(BackendArray):
    """A lazy variable of which a chunk that is damaged is a StoreError."""

    def __init__(self, variable: xr.Variable, name: str) -> None:
        self.variable, self.name = variable, name
        self.shape, self.dtype = variable.shape, variable.dtype

    def __getitem__(self, key: ExplicitIndexer) -> Any:
        return explicit_indexing_adapter(key, self.shape, IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        with sound(self.name):
            return self.variable[key].values


def _lazy(variable: xr.Variable, name: str) -> xr.Variable:
    array = LazilyIndexedArray(_Checked(variable, name))
    return xr.Variable(variable.dims, array, variable.attrs, variable.encoding)


@contextmanager
def sound(name: str) -> Iterator[None]:
    """Turn what reading damaged data raises into a StoreError; `name` is what is being read."""
    try:
        yield
    except UNREADABLE as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise StoreError(
            f"{name} cannot be read ({said}); pnlac-fast info --verify says what is damaged, and how to mend it."
        ) from error


def _plain(name: str, variable: xr.Variable) -> xr.Variable:
    values = variable.values
    if values.dtype.kind in "OU":
        if not all(isinstance(value, str) for value in values.flat):
            raise StoreError(f"The variable {name} mixes text with other values; turn all of them into text.")
        # Not object: an empty object array has no text to show that it is text, and would come back as numbers.
        values = values.astype(np.dtypes.StringDType())
    elif values.dtype.kind not in "biufT":
        raise StoreError(f"The variable {name} has dtype {values.dtype}; use numbers, truth values or text.")
    return xr.Variable(variable.dims, values, _json_attributes(variable.attrs, f"variable {name}"))


def _json_attributes(attributes: Mapping[Any, Any], owner: str) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, (np.generic, np.ndarray)):
            return value.tolist()
        raise TypeError(f"{type(value).__name__} is not JSON")

    if ATTRIBUTE in attributes:
        raise StoreError(f"The attribute {ATTRIBUTE!r} of {owner} is the store's own; give it another name.")
    try:
        values: dict[str, Any] = json.loads(json.dumps(dict(attributes), default=plain, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"The attributes of {owner} are not plain JSON values ({error}); change them.") from error
    return values
