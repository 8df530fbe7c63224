"""Results and neuron sets: small xarray Datasets, each a group of its own that is replaced as a whole."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import xarray as xr

from pnlac_fast.store.datasets import read_dataset, write_dataset
from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.groups import replace_group
from pnlac_fast.store.locks import changing_groups
from pnlac_fast.store.names import check_result_name, local_directory, unknown_name
from pnlac_fast.store.schema import NEURON_SETS, RESULTS, mark, read_header

_SET_DIMS = ("neuron_set", "layer", "neuron")


def write_result(path: str | os.PathLike[str], name: str, ds: xr.Dataset) -> None:
    """Write or replace a result.

    Parameters
    ----------
    path : str or PathLike
        The store.
    name : str
        The name of the result: a letter, then at most 63 letters, digits or underscores.
    ds : xarray.Dataset
        Numbers, truth values and text of any dimensions; attributes are JSON values. It is kept exactly, text as
        variable-length strings.

    Raises
    ------
    StoreError
        If `path` is no store, the name is not allowed, or a variable or attribute cannot be kept.
    """
    _write(path, f"{RESULTS}/{check_result_name(name)}", ds, mark("result"))


def open_result(path: str | os.PathLike[str], name: str) -> xr.Dataset:
    """Return the result `name`, read into memory; StoreError lists the results that are there if it is not."""
    root = local_directory(path)
    known = list_results(path)
    if name not in known:
        raise unknown_name("result", name, known)
    return read_dataset(root, f"{RESULTS}/{name}").load()


def list_results(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the results in a store, sorted."""
    root = local_directory(path)
    read_header(root)
    return sorted(entry.parent.name for entry in (root / RESULTS).glob("*/zarr.json"))


def write_sets(path: str | os.PathLike[str], ds: xr.Dataset) -> None:
    """Write or replace the neuron sets of a store.

    Parameters
    ----------
    path : str or PathLike
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


def open_sets(path: str | os.PathLike[str]) -> xr.Dataset:
    """Return the neuron sets that `write_sets` wrote, read into memory; StoreError if there are none."""
    root = local_directory(path)
    read_header(root)
    if not (root / NEURON_SETS / "zarr.json").exists():
        raise StoreError(f"{root} holds no neuron sets; run the locate command on it first.")
    return read_dataset(root, NEURON_SETS).load()


def _write(path: str | os.PathLike[str], group: str, ds: xr.Dataset, attributes: dict[str, Any]) -> None:
    root = local_directory(path)
    read_header(root)
    with changing_groups(root):
        replace_group(root, group, lambda store: write_dataset(store, ds, attributes))
