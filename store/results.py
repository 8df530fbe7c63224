"""Results and neuron sets: small xarray Datasets, each a group of its own that is replaced as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from zarr.storage import MemoryStore

from pnlac_fast.store.checks import check_group
from pnlac_fast.store.datasets import read_dataset, write_dataset
from pnlac_fast.store.errors import StoreError, writing
from pnlac_fast.store.groups import contents, replace_group
from pnlac_fast.store.names import check_result_name, unknown_name
from pnlac_fast.store.places import Location, Place, place_of
from pnlac_fast.store.schema import METADATA, NEURON_SETS, RESULTS, mark, read_header

_SET_DIMS = ("neuron_set", "layer", "neuron")


def write_result(path: Location, name: str, ds: xr.Dataset) -> None:
    """Write or replace a result.

    Parameters
    ----------
    path : str, PathLike or zarr Store
        The store.
    name : str
        The name of the result: a letter, then at most 63 letters, digits or underscores.
    ds : xarray.Dataset
        Numbers, truth values and text with any dimensions, such as (run, question); attributes are JSON values. It is
        kept exactly, text as variable-length strings.

    Raises
    ------
    StoreError
        If `path` is no store, the name is not allowed, or a variable or attribute cannot be kept.
    """
    _write(path, f"{RESULTS}/{check_result_name(name)}", ds, mark("result"))


def open_result(path: Location, name: str) -> xr.Dataset:
    """Return the result `name` with its own dimensions, such as (run, question), read into memory.

    StoreError lists the results that are there if it is not.
    """
    place = place_of(path)
    known = list_results(place)
    if name not in known:
        raise unknown_name("result", name, known)
    return _read(place, f"{RESULTS}/{name}")


def list_results(path: Location | Place) -> list[str]:
    """Return the names of the results in a store, sorted."""
    place = place_of(path)
    read_header(place)
    keys = [key.split("/") for key in place.sizes(f"{RESULTS}/")]
    return sorted(parts[1] for parts in keys if len(parts) == 3 and parts[2] == METADATA)


def write_sets(path: Location, ds: xr.Dataset) -> None:
    """Write or replace the neuron sets of a store.

    Parameters
    ----------
    path : str, PathLike or zarr Store
        The store.
    ds : xarray.Dataset
        `member`, bool (neuron_set, layer, neuron), with coordinates on ``neuron_set`` such as name, model, kind, topic
        and site, and how the sets were made as attributes.

    Raises
    ------
    StoreError
        If `path` is no store.
    """
    member = ds.get("member")
    if member is None or member.dims != _SET_DIMS or member.dtype != np.bool_:
        raise ValueError(f"neuron sets need a variable member of dtype bool with the dimensions {_SET_DIMS}")
    _write(path, NEURON_SETS, ds, mark("neuron_sets"))


def open_sets(path: Location | Place) -> xr.Dataset:
    """Return the neuron sets that `write_sets` wrote, with ``member`` (neuron_set, layer, neuron), read into memory.

    StoreError if there are none.
    """
    place = place_of(path)
    read_header(place)
    if place.read(f"{NEURON_SETS}/{METADATA}") is None:
        raise StoreError(f"{place.name} holds no neuron sets; run the locate command on it first.")
    return _read(place, NEURON_SETS)


def _read(place: Place, group: str) -> xr.Dataset:
    check_group(place, group, loaded=True)
    return read_dataset(place.store, group).load()


def _write(path: Location, group: str, ds: xr.Dataset, attributes: dict[str, Any]) -> None:
    place = place_of(path)
    read_header(place)
    made = MemoryStore()
    write_dataset(made, ds, attributes)
    with writing(f"{place.name}/{group}"), place.changing():
        replace_group(place, group, contents(made).items())
