"""Open what a store holds as xarray Datasets. Nothing here writes, and nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import xarray as xr

from pnlac_fast.store.checks import check_files, check_group, committed_units
from pnlac_fast.store.datasets import read_dataset, sound
from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.headers import read_copies
from pnlac_fast.store.journal import done_units, group_key, read_journal
from pnlac_fast.store.names import unknown_name
from pnlac_fast.store.places import Location, Place, place_of
from pnlac_fast.store.results import list_results, open_sets
from pnlac_fast.store.schema import (
    CONTRAST,
    EXAMPLES,
    METADATA,
    NEURON_SETS,
    PARTIALS,
    capture_layout,
    partials_path,
    read_header,
)
from pnlac_fast.store.shards import DTYPE_ATTRIBUTE
from pnlac_fast.store.verification import verify_place


def open_contrast(path: Location) -> xr.Dataset:
    """Open the statistics of base, tuned and their difference, lazily.

    Parameters
    ----------
    path : str, PathLike or zarr Store
        The store.

    Returns
    -------
    xarray.Dataset
        Dimensions (model, topic, site, tokens, layer, neuron). `n` (topic, tokens), int64, tokens counted.
        `mean_base` and `std_base` (topic, site, tokens, layer, neuron); `mean_tuned`, `std_tuned`, `mean_diff`,
        `std_diff` and `rms` (model, topic, site, tokens, layer, neuron); all float32, in the units of the activation.
        With d = tuned - base for the same token, mean_diff is the mean of d, rms the square root of the mean of d^2;
        standard deviations are of the population. Coordinate `width` (site): neurons beyond it are NaN.

    Raises
    ------
    StoreError
        If `path` is no store, holds no statistics, or is unfinished.
    """
    place = place_of(path)
    layout = capture_layout(place)
    if place.read(f"{CONTRAST}/{METADATA}") is None:
        done, units = len(done_units(read_journal(place, layout), layout)), len(layout.units)
        then = "pnlac-fast merge it" if done == units else "run the same cache command again"
        raise StoreError(f"{place.name} is unfinished: {done} of {units} units are there; {then}.")
    check_group(place, CONTRAST)
    return read_dataset(place.store, CONTRAST)


def open_partials(path: Location, site: str) -> xr.Dataset:
    """Open the sums of every unit that is committed, lazily: what halves of the questions and the like are made of.

    Parameters
    ----------
    path : str, PathLike or zarr Store
        The store, finished or not.
    site : str
        A site of the store.

    Returns
    -------
    xarray.Dataset
        `n` (unit, tokens), int64; `base` (unit, tokens, base_moment, layer, neuron), sums of a and a^2, and `tuned`
        (unit, model, tokens, tuned_moment, layer, neuron), sums of b, b^2 and (b - a)^2, float64, with a and b the base
        and tuned model's activations. Coordinates `unit` (its number), `topic`, `first` and `count` (its questions) on
        ``unit``, and `tokens`, `model`, `base_moment`, `tuned_moment`, `layer`.

    Raises
    ------
    StoreError
        If `path` is no store or has no such site.
    """
    place = place_of(path)
    layout = capture_layout(place)
    if site not in layout.sites:
        raise unknown_name("site", site, layout.sites)
    check_group(place, PARTIALS)
    sizes = place.sizes()
    committed = read_journal(place, layout, sizes)
    for group in (partials_path(site), f"{PARTIALS}/n"):
        check_files(place, layout, committed, sizes, f"{group}/")
    units = committed_units(place, layout, committed)
    ds = read_dataset(place.store, partials_path(site))
    described = [layout.units[unit] for unit in units]
    coords: dict[str, Any] = {
        "unit": units,
        "topic": ("unit", np.array([unit.topic for unit in described], object)),
        "first": ("unit", np.array([unit.first for unit in described], np.int64)),
        "count": ("unit", np.array([unit.count for unit in described], np.int64)),
        "tokens": np.array(layout.tokens, object),
        "model": np.array(layout.models, object),
        "layer": np.arange(layout.layers, dtype=np.int32),
    }
    with sound(f"{place.name}/{partials_path(site)}"):
        ds = ds.assign(n=read_dataset(place.store, PARTIALS)["n"])
        moments = {f"{name}_moment": list(ds[name].attrs["moments"]) for name in ("base", "tuned")}
        return ds.isel(unit=units).assign_coords(coords | moments)


def open_examples(path: Location) -> xr.Dataset:
    """Return the questions of a store, read into memory: `topic`, `instruction`, `key` and others on ``example``."""
    place = place_of(path)
    capture_layout(place)
    check_group(place, EXAMPLES, loaded=True)
    return read_dataset(place.store, EXAMPLES).load()


def info(path: Location, *, verify: bool = False) -> dict[str, Any]:
    """Return what a store holds, as JSON values.

    Parameters
    ----------
    path : str, PathLike or zarr Store
        The store.
    verify : bool
        Also read every byte, and add ``findings``: see :func:`pnlac_fast.store.verify`.

    Returns
    -------
    dict
        path, kind ("capture" or "results"), format_version, provenance, bytes, neuron_sets and results (names), and
        arrays (array, dims, shape, dtype, bytes and files of each); for a capture also complete, units_done,
        units_total, units_missing (their numbers), questions, rows, rows_total, topics, models, sites, tokens,
        layers, widths, raw and settings. With `verify`, findings; where these keep the rest from being told, only path
        and findings.

    Raises
    ------
    StoreError
        If `path` is no store; without `verify`, if its journal is damaged.
    """
    place = place_of(path)
    if not verify:
        return _describe(place)
    findings = [asdict(finding) for finding in verify_place(place, read_copies(place))]
    try:
        report = _describe(place)
    except StoreError:
        if not findings:
            raise
        report = {"path": place.name}
    return report | {"findings": findings}


def _describe(place: Place) -> dict[str, Any]:
    header = read_header(place)
    sizes = place.sizes()
    report: dict[str, Any] = {
        "path": place.name,
        "kind": header.kind,
        "format_version": "{}.{}".format(*header.version),
        "provenance": header.provenance,
        "bytes": sum(sizes.values()),
        "neuron_sets": _set_names(place),
        "results": list_results(place),
        "arrays": _arrays(place, sizes),
    }
    layout = header.layout
    if layout is None:
        return report
    described = layout.to_json()
    units = described.pop("units")
    done = done_units(read_journal(place, layout, sizes), layout)
    return report | {
        "complete": group_key(CONTRAST) in sizes,
        "units_done": len(done),
        "units_total": len(units),
        "units_missing": [unit for unit in range(len(units)) if unit not in done],
        "questions": sum(unit.count for unit in layout.units),
        "rows": sum(layout.units[unit].rows for unit in done),
        "rows_total": sum(unit.rows for unit in layout.units),
        **described,
    }


def _arrays(place: Place, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return what each array is, by the metadata that the root holds of all, and what it takes."""
    with sound(f"{place.name}/{METADATA}"):
        root = json.loads(place.read(METADATA) or b"{}")
        described = root.get("consolidated_metadata", {}).get("metadata", {})
        held: dict[str, list[int]] = {}
        for key, size in sizes.items():
            held.setdefault(key.rpartition("/")[0], []).append(size)
        return [
            {
                "array": path,
                "dims": document.get("dimension_names"),
                "shape": document["shape"],
                "dtype": document.get("attributes", {}).get(DTYPE_ATTRIBUTE, document["data_type"]),
                "bytes": sum(held.get(path, ())),
                "files": len(held.get(path, ())),
            }
            for path, document in sorted(described.items())
            if document["node_type"] == "array"
        ]


def _set_names(place: Place) -> list[str]:
    if place.read(f"{NEURON_SETS}/{METADATA}") is None:
        return []
    sets = open_sets(place)
    names = sets["name"] if "name" in sets else sets["neuron_set"]
    return [str(name) for name in names.values]
