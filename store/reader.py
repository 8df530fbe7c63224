"""Open what a store holds as xarray Datasets. Nothing here writes, and nothing is ever unpickled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pnlac_fast.store.datasets import read_dataset
from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.journal import read_journal
from pnlac_fast.store.layout import BASE, Layout
from pnlac_fast.store.names import local_directory, unknown_name
from pnlac_fast.store.results import list_results, open_sets
from pnlac_fast.store.schema import (
    CONTRAST,
    EXAMPLES,
    NEURON_SETS,
    TOKENS,
    Header,
    activations_path,
    read_header,
    slots_of,
)


def open_contrast(path: str | os.PathLike[str]) -> xr.Dataset:
    """Open the statistics of base, tuned and their difference, lazily.

    Parameters
    ----------
    path : str or PathLike
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
    root = local_directory(path)
    layout = _layout(root, read_header(root))
    if not (root / CONTRAST / "zarr.json").exists():
        done, units = len(read_journal(root, layout)), len(layout.units)
        raise StoreError(f"{root} is unfinished: {done} of {units} units are there; run the same cache command again.")
    return read_dataset(root, CONTRAST)


def open_activations(path: str | os.PathLike[str], model: str, site: str) -> xr.Dataset:
    """Open raw activations, lazily.

    Parameters
    ----------
    path : str or PathLike
        The store.
    model : str
        A tuned model, or "base".
    site : str
        A site of the store.

    Returns
    -------
    xarray.Dataset
        `activation` (layer, token, neuron), float32, with the coordinates `example` (a row of `open_examples`),
        `position`, `token_id` and `topic` on ``token``. Rows of committed units only, in the order of the units.

    Raises
    ------
    StoreError
        If the store keeps no raw activations, or has no such model or site.
    """
    root = local_directory(path)
    layout = _layout(root, read_header(root))
    if layout.raw == "none":
        raise StoreError(f"{root} keeps no raw activations; make one with cache --raw last or --raw full.")
    for kind, name, known in (("model", model, (BASE, *layout.models)), ("site", site, layout.sites)):
        if name not in known:
            raise unknown_name(kind, name, known)
    slot = slots_of(layout).rows
    units = sorted(record.unit for record in read_journal(root, layout))
    rows = [unit * slot + np.arange(layout.units[unit].rows) for unit in units]
    index = np.concatenate([np.zeros(0, np.int64), *rows])
    tokens = read_dataset(root, TOKENS).isel(token=index).load()
    topics = read_dataset(root, EXAMPLES)["topic"].values
    tokens["topic"] = ("token", topics[tokens["example"].values])
    activations = read_dataset(root, activations_path(model, site)).isel(token=index)
    coords = {"layer": np.arange(layout.layers, dtype=np.int32)} | dict(tokens.data_vars)
    return activations.assign_coords(coords).assign_attrs(model=model, site=site)


def open_examples(path: str | os.PathLike[str]) -> xr.Dataset:
    """Return the questions of a store, read into memory: `topic`, `instruction`, `key` and others on ``example``."""
    root = local_directory(path)
    _layout(root, read_header(root))
    return read_dataset(root, EXAMPLES).load()


def info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a store holds, as JSON values.

    Parameters
    ----------
    path : str or PathLike
        The store.

    Returns
    -------
    dict
        path, kind ("capture" or "results"), format_version, provenance, bytes, neuron_sets and results (names); for a
        capture also complete, units_done, units_total, questions, topics, models, sites, tokens, layers, widths, raw
        and settings.

    Raises
    ------
    StoreError
        If `path` is no store, or its journal is damaged.
    """
    root = local_directory(path)
    header = read_header(root)
    report: dict[str, Any] = {
        "path": str(root),
        "kind": header.kind,
        "format_version": "{}.{}".format(*header.version),
        "provenance": header.provenance,
        "bytes": sum(entry.stat().st_size for entry in root.rglob("*") if entry.is_file()),
        "neuron_sets": _set_names(root),
        "results": list_results(root),
    }
    layout = header.layout
    if layout is None:
        return report
    described = layout.to_json()
    units = described.pop("units")
    return report | {
        "complete": (root / CONTRAST / "zarr.json").exists(),
        "units_done": len(read_journal(root, layout)),
        "units_total": len(units),
        "questions": sum(unit.count for unit in layout.units),
        **described,
    }


def _layout(root: Path, header: Header) -> Layout:
    if header.layout is None:
        raise StoreError(f"{root} holds results only; give the store of a cache command.")
    return header.layout


def _set_names(root: Path) -> list[str]:
    if not (root / NEURON_SETS / "zarr.json").exists():
        return []
    sets = open_sets(root)
    names = sets["name"] if "name" in sets else sets["neuron_set"]
    return [str(name) for name in names.values]
