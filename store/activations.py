"""Raw activations as xarray Datasets: lazy, decoded, each row with what it is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import xarray as xr
from xarray.core.indexing import LazilyIndexedArray

from pnlac_fast.store.backend_array import ShardedArray
from pnlac_fast.store.checks import check_files, check_group, committed_units
from pnlac_fast.store.datasets import read_dataset
from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.journal import read_journal
from pnlac_fast.store.layout import BASE, SELECTORS, Layout
from pnlac_fast.store.names import unknown_name
from pnlac_fast.store.places import Location, Place, place_of
from pnlac_fast.store.schema import (
    EXAMPLES,
    METADATA,
    TOKENS,
    activations_path,
    capture_layout,
    raw_grid,
    slots_of,
)
from pnlac_fast.store.sharding import parse_sharding


def open_activations(path: Location, model: str, site: str) -> xr.Dataset:
    """Open raw activations, lazily.

    Parameters
    ----------
    path : str, PathLike or zarr Store
        The store.
    model : str
        A tuned model, or "base".
    site : str
        A site of the store.

    Returns
    -------
    xarray.Dataset
        `activation` (layer, token, neuron), or (token, selected) where chosen neurons were kept, with the coordinates
        `layer` and `neuron` on ``selected``; float16 where that is stored, float32 otherwise. Coordinates on ``token``:
        `example` (a row of `open_examples`), `topic`, `side` and `completion` (-1 for a row of the prompt), `position`
        and `token_id` (-1 for a mean over tokens), and `counts` (token, selector), how often each token selector
        counts the row. Rows of committed units only, in the order of the units. The attribute `selectors` lists the
        token selectors of which no token is missing among them. With dask, chunks of whole shards come from
        ``xr.open_dataset(path, engine="pnlac", group="activations/<model>/<site>", chunks={})``.

    Raises
    ------
    StoreError
        If the store keeps no raw activations, or has no such model or site; when values are read, if a shard is
        missing or damaged.
    """
    place = place_of(path)
    layout = capture_layout(place)
    if layout.raw.tokens == "none":
        raise StoreError(f"{place.name} keeps no raw activations; make a store with cache --raw last or --raw full.")
    for kind, name, known in (("model", model, (BASE, *layout.models)), ("site", site, layout.sites)):
        if name not in known:
            raise unknown_name(kind, name, known)
    committed = read_journal(place, layout)
    units = committed_units(place, layout, committed)
    group = activations_path(model, site)
    for part in (TOKENS, EXAMPLES, group):
        check_group(place, part)
    check_files(place, layout, committed, place.sizes(f"{TOKENS}/"), f"{TOKENS}/")
    slot = slots_of(layout).rows
    rows = [layout.units[unit].rows for unit in units]
    index = np.concatenate(
        [np.zeros(0, np.int64), *(unit * slot + np.arange(n) for unit, n in zip(units, rows, strict=True))]
    )
    tokens = read_dataset(place.store, TOKENS).isel(token=index).load()
    topics = read_dataset(place.store, EXAMPLES)["topic"].values
    if tokens["example"].size and not 0 <= tokens["example"].min() <= tokens["example"].max() < len(topics):
        raise StoreError(f"{place.name}/{TOKENS} names examples that do not exist; run pnlac-fast info --verify.")
    tokens["topic"] = ("token", topics[tokens["example"].values])
    others = read_dataset(place.store, group).drop_vars("activation").load()
    coords: dict[Any, Any] = dict(tokens.data_vars) | dict(others.variables) | {"selector": list(SELECTORS)}
    activation = _lazy(place, layout, f"{group}/activation", site).isel(token=index)
    ds = (
        xr.Dataset({"activation": activation}, attrs=others.attrs)
        .assign_coords(coords)
        .assign_attrs(model=model, site=site, selectors=list(kept_selectors(layout)))
    )
    for variable in ds.variables.values():
        if "token" in variable.dims:
            variable.encoding.setdefault("preferred_chunks", {})["token"] = tuple(n for n in rows if n) or (0,)
    return ds


def kept_selectors(layout: Layout) -> tuple[str, ...]:
    """Return the token selectors of which a store keeps every token, or all of the means."""
    asked = set(layout.tokens)
    if layout.raw.tokens in ("none", "last"):
        asked = {"last"} if layout.raw.tokens == "last" else set()
    elif layout.raw.tokens == "full":
        asked = {"last", "prompt"} | (set(SELECTORS) if asked & {"completion", "all"} else set())
    elif layout.raw.tokens == "selected":  # where the last position is the template's, no other selector has it
        both = {"prompt", "completion"}
        asked |= both if "all" in asked else {"all"} if both <= asked else set()
    return tuple(name for name in SELECTORS if name in asked)


def _lazy(place: Place, layout: Layout, path: str, site: str) -> xr.Variable:
    """Return the whole array, slots of units that are not there included."""
    content, grid = place.read(f"{path}/{METADATA}"), raw_grid(layout, site)
    try:
        sharding = parse_sharding(json.loads(content or b"null"), path)
    except (ValueError, TypeError) as error:
        raise StoreError(f"{place.name}/{path} is damaged; run pnlac-fast info --verify.") from error
    if (sharding.shape, sharding.shard, sharding.chunk, sharding.dtype) != (*grid, layout.raw.dtype):
        raise StoreError(f"{place.name}/{path} is not as the store's layout says; run pnlac-fast info --verify.")
    dims = ("token", "selected") if layout.raw.neurons else ("layer", "token", "neuron")
    lazy = LazilyIndexedArray(ShardedArray(place.files(path), sharding, path))
    return xr.Variable(dims, lazy, encoding={"preferred_chunks": dict(zip(dims, grid.file, strict=True))})
