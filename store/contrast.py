"""The statistics of base, tuned and their difference, from the partial sums of the units."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr
from zarr.abc.store import Store

from pnlac_fast.store.datasets import write_dataset
from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.layout import Layout
from pnlac_fast.store.schema import CHUNK_BYTES, PARTIALS, create_array, fitting_layers, mark, open_array, partials_path

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


def write_contrast(partials: Store, target: Store, layout: Layout) -> None:
    """Add the partial sums of all units in unit order, and write the group /contrast.

    Parameters
    ----------
    partials : zarr Store
        The store that holds the partial sums of every unit.
    target : zarr Store
        An empty store that becomes the group.
    layout : Layout
        The layout of the store.

    Raises
    ------
    StoreError
        If a partial sum does not read as it was written; it names the unit.
    """
    counts = _counts(partials, layout)
    _write_coordinates(target, layout, counts)
    arrays = _create(target, layout)
    widest = max(layout.widths.values())
    shape = (len(layout.models), len(layout.sites), len(layout.tokens), layout.layers, widest)
    for t, topic in enumerate(layout.topics):
        rows = {name: np.full(shape[1:], np.nan, "float32") for name in OF_BASE}
        rows |= {name: np.full(shape, np.nan, "float32") for name in OF_TUNED}
        for s, site in enumerate(layout.sites):
            base, tuned = (_total(partials, layout, topic, site, name) for name in ("base", "tuned"))
            for name, values in statistics(counts[t], base, tuned).items():
                rows[name][..., s, :, :, : layout.widths[site]] = values
        for name in OF_BASE:
            arrays[name][t] = rows[name]
        for name in OF_TUNED:
            for m in range(shape[0]):
                arrays[name][m, t] = rows[name][m]


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
            "restore the file from a copy, or start again with --overwrite."
        ) from error


def _write_coordinates(target: Store, layout: Layout, counts: npt.NDArray[np.int64]) -> None:
    names = {name: (name[:-1], np.array(getattr(layout, name), object)) for name in ("topics", "models", "sites")}
    coords: dict[str, Any] = {dim: (dim, values) for dim, values in names.values()}
    coords["tokens"] = ("tokens", np.array(layout.tokens, object))
    coords["layer"] = ("layer", np.arange(layout.layers, dtype=np.int32))
    coords["width"] = ("site", np.array([layout.widths[site] for site in layout.sites], np.int32))
    n = xr.Variable(("topic", "tokens"), counts, {"long_name": "number of tokens"})
    write_dataset(target, xr.Dataset({"n": n}, coords=coords), mark("contrast"))


def _create(target: Store, layout: Layout) -> dict[str, zarr.Array[Any]]:
    widest = max(layout.widths.values())
    inner = (len(layout.sites), len(layout.tokens), layout.layers, widest)
    layers = fitting_layers(layout.layers, 4 * widest, CHUNK_BYTES)
    chunk = (1, 1, layers, widest)
    shard = (*inner[:2], math.ceil(layout.layers / layers) * layers, widest)
    dims = ("topic", "site", "tokens", "layer", "neuron")
    arrays = {}
    for names, outer, outer_dims in ((OF_BASE, (), ()), (OF_TUNED, (len(layout.models),), ("model",))):
        for name, meaning in names.items():
            ones = (1,) * (len(outer) + 1)
            arrays[name] = create_array(
                target,
                name,
                (*outer, len(layout.topics), *inner),
                (*outer_dims, *dims),
                "float32",
                (*ones, *chunk),
                shards=(*ones, *shard),
                fill=math.nan,
                attributes={"long_name": meaning, "coordinates": "width"},
            )
    return arrays
