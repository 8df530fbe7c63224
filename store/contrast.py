"""The statistics of base, tuned and their difference, from the partial sums of the units."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr
from zarr.abc.store import Store
from zarr.storage import MemoryStore

from pnlac_fast.store.datasets import write_dataset
from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.groups import contents
from pnlac_fast.store.layout import Layout
from pnlac_fast.store.places import Bytes
from pnlac_fast.store.schema import (
    CHUNK_BYTES,
    PARTIALS,
    Grid,
    create_array,
    fitting_layers,
    mark,
    open_array,
    partials_path,
)
from pnlac_fast.store.shards import encode_shard

OF_BASE = {
    "mean_base": "mean activation of the base model",
    "std_base": "population standard deviation of the base model's activation",
}
OF_TUNED = {
    "mean_tuned": "mean activation of the tuned model",
    "std_tuned": "population standard deviation of the tuned model's activation",
    "mean_diff": "mean of tuned minus base, token by token",
    "std_diff": "population standard deviation of tuned minus base",
    "rms": "root mean square of tuned minus base",
}

Floats = npt.NDArray[np.float64]


def statistics(n: npt.NDArray[np.int64], base: Floats, tuned: Floats) -> dict[str, Floats]:
    """Turn sums into means and population standard deviations.

    Parameters
    ----------
    n : int64 array (tokens,)
        Number of tokens summed; where it is 0 the statistics are NaN.
    base : float64 array (tokens, 2, layer, neuron)
        Sums of a and a^2, with a the base model's activation.
    tuned : float64 array (model, tokens, 3, layer, neuron)
        Sums of b, b^2 and (b - a)^2, with b the tuned model's activation of the same token.

    Returns
    -------
    dict of str to float64 array
        The names of `OF_BASE`, (tokens, layer, neuron), and of `OF_TUNED`, (model, tokens, layer, neuron).
    """
    count = np.where(n > 0, n, np.nan)[:, None, None, None]
    a, aa = np.moveaxis(base / count, 1, 0)
    b, bb, dd = np.moveaxis(tuned / count, 2, 0)
    d = b - a

    def deviation(square: Floats, mean: Floats) -> Floats:
        return np.sqrt(np.maximum(square - mean**2, 0))  # rounding may leave less than nothing of a variance of 0

    return {
        "mean_base": a,
        "std_base": deviation(aa, a),
        "mean_tuned": b,
        "std_tuned": deviation(bb, b),
        "mean_diff": d,
        "std_diff": deviation(dd, d),
        "rms": np.sqrt(dd),
    }


def contrast_files(store: Store, layout: Layout) -> Iterator[tuple[str, Bytes]]:
    """Add the partial sums of all units in unit order, and give the files of the group /contrast one by one.

    Parameters
    ----------
    store : zarr Store
        The store that holds the partial sums of every unit.
    layout : Layout
        The layout of the store.

    Yields
    ------
    (str, bytes)
        Name in the group, and content.

    Raises
    ------
    StoreError
        If a partial sum does not read as it was written; it names the unit.
    """
    counts = _counts(store, layout)
    made = MemoryStore()
    _write_coordinates(made, layout, counts)
    grids = _create(made, layout)
    yield from contents(made).items()
    for t, topic in enumerate(layout.topics):
        rows: dict[str, npt.NDArray[np.float32]] = {}
        for s, site in enumerate(layout.sites):
            base, tuned = (_total(store, layout, topic, site, name) for name in ("base", "tuned"))
            for name, values in statistics(counts[t], base, tuned).items():
                if name not in rows:
                    lead = () if name in OF_BASE else (len(layout.models),)
                    rows[name] = np.full(
                        (*lead, *grids[name].file[-4:-2], layout.layers, _widest(layout)), np.nan, "f4"
                    )
                rows[name][..., s, :, :, : layout.widths[site]] = values
        for name, grid in grids.items():
            for m in range(len(layout.models) if name in OF_TUNED else 1):
                at = (m, t, 0, 0, 0, 0) if name in OF_TUNED else (t, 0, 0, 0, 0)
                block = rows[name][m : m + 1, None] if name in OF_TUNED else rows[name][None]
                yield grid.key(name, at), encode_shard(block, grid.file, grid.chunk, "float32")


def _widest(layout: Layout) -> int:
    return max(layout.widths.values())


def _counts(store: Store, layout: Layout) -> npt.NDArray[np.int64]:
    array = open_array(store, f"{PARTIALS}/n")
    counts = np.zeros((len(layout.topics), len(layout.tokens)), np.int64)
    for index, unit in enumerate(layout.units):
        counts[layout.topics.index(unit.topic)] += _read(array, layout, index)
    return counts


def _total(store: Store, layout: Layout, topic: str, site: str, name: str) -> Floats:
    array = open_array(store, f"{partials_path(site)}/{name}")
    total = np.zeros(array.shape[1:])
    for index, unit in enumerate(layout.units):
        if unit.topic == topic:
            total += _read(array, layout, index)
    return total


def _read(array: zarr.Array[Any], layout: Layout, unit: int) -> npt.NDArray[Any]:
    try:
        return np.asarray(array[unit])
    except ValueError as error:  # the checksum of the chunk
        raise StoreError(
            f"The sums of unit {unit} ({layout.units[unit]}) in {array.path} are damaged; "
            "run the cache command again with --repair."
        ) from error


def _write_coordinates(target: Store, layout: Layout, counts: npt.NDArray[np.int64]) -> None:
    names = {name: (name[:-1], np.array(getattr(layout, name), object)) for name in ("topics", "models", "sites")}
    coords: dict[str, Any] = {dim: (dim, values) for dim, values in names.values()}
    coords["tokens"] = ("tokens", np.array(layout.tokens, object))
    coords["layer"] = ("layer", np.arange(layout.layers, dtype=np.int32))
    coords["width"] = ("site", np.array([layout.widths[site] for site in layout.sites], np.int32))
    n = xr.Variable(("topic", "tokens"), counts, {"long_name": "number of tokens"})
    write_dataset(target, xr.Dataset({"n": n}, coords=coords), mark("contrast"))


def _create(target: Store, layout: Layout) -> dict[str, Grid]:
    widest = _widest(layout)
    inner = (len(layout.sites), len(layout.tokens), layout.layers, widest)
    layers = fitting_layers(layout.layers, 4 * widest, CHUNK_BYTES)
    dims = ("topic", "site", "tokens", "layer", "neuron")
    grids = {}
    for names, outer, outer_dims in ((OF_BASE, (), ()), (OF_TUNED, (len(layout.models),), ("model",))):
        for name, meaning in names.items():
            ones = (1,) * (len(outer) + 1)
            grid = Grid(
                (*outer, len(layout.topics), *inner),
                (*ones, *inner[:2], math.ceil(layout.layers / layers) * layers, widest),
                (*ones, 1, 1, layers, widest),
            )
            create_array(
                target,
                name,
                grid.shape,
                (*outer_dims, *dims),
                "float32",
                grid.chunk,
                shards=grid.file,
                fill=math.nan,
                attributes={"long_name": meaning, "coordinates": "width"},
            )
            grids[name] = grid
    return grids
