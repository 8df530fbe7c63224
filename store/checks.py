"""Is what a unit brings what the layout asks for, and are the files of committed units still there?"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from zarr.core.group import GroupMetadata
from zarr.core.metadata.v3 import ArrayV3Metadata

from pnlac_fast.store.datasets import UNREADABLE
from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.journal import JOURNAL, Committed, done_units, group_key, written_with
from pnlac_fast.store.layout import BASE, SELECTORS, Layout
from pnlac_fast.store.places import Place, sum_of
from pnlac_fast.store.schema import CONTRAST, METADATA, TOKEN_COLUMNS
from pnlac_fast.store.shards import stored_dtype

MOST_LOADED = 1 << 31  # bytes that a small dataset may have in memory
MOST_CHUNK = 1 << 30


def check_sums(
    layout: Layout,
    unit: int,
    counts: npt.NDArray[Any],
    base: Mapping[str, npt.NDArray[Any]],
    tuned: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Raise ValueError where sums have the wrong shape or dtype, StoreError where they are not finite."""
    tokens, models, layers = len(layout.tokens), len(layout.models), layout.layers
    _check_array("counts", counts, (tokens,), "int64")
    if counts.min() < 0:
        raise ValueError("counts must not be negative")
    _check_keys("base", base, layout.sites)
    _check_keys("tuned", tuned, layout.sites)
    for site, width in layout.widths.items():
        own = width // layout.parts
        _check_array(f"base[{site!r}]", base[site], (tokens, 2, layers, own), "float64")
        _check_array(f"tuned[{site!r}]", tuned[site], (models, tokens, 3, layers, own), "float64")
        _check_finite(layout, unit, "base model", site, base[site])
        for m, model in enumerate(layout.models):
            _check_finite(layout, unit, f"tuned model {model!r}", site, tuned[site][m])


def _check_finite(layout: Layout, unit: int, model: str, site: str, sums: npt.NDArray[Any]) -> None:
    if not np.isfinite(sums).all():
        layer = int(np.argwhere(~np.isfinite(sums))[:, -2].min())
        raise StoreError(
            f"The activations of the {model} at {site}, layer {layer}, are not finite in unit {unit} "
            f"({layout.units[unit]}); try another dtype such as float32, or check the model's weights."
        )


def check_rows(
    layout: Layout,
    unit: int,
    rows: Mapping[str, npt.NDArray[Any]] | None,
    raw: Mapping[tuple[str, str], npt.NDArray[Any]] | None,
    topics: Sequence[str],
) -> None:
    """Raise ValueError where raw rows are not those that the layout promised; `topics` are those of the examples."""
    count = layout.units[unit].rows
    if not count:
        if any(len(column) for column in (rows or {}).values()) or any(values.size for values in (raw or {}).values()):
            raise ValueError(f"unit {unit} brings raw rows, but its layout says that it has none")
        return
    _check_keys("rows", rows or {}, (*TOKEN_COLUMNS, "counts"))
    _check_keys("raw", raw or {}, [(model, site) for model in (BASE, *layout.models) for site in layout.sites])
    assert rows is not None
    assert raw is not None
    for name, column in rows.items():
        shape: tuple[int, ...] = (count, len(SELECTORS)) if name == "counts" else (count,)
        _check_array(f"rows[{name!r}]", column, shape, "int32")
    kept = layout.raw
    for (model, site), values in raw.items():
        if kept.neurons:
            shape = (count, kept.neurons[site][0])
        else:
            shape = (len(kept.layers), count, layout.widths[site] // layout.parts)
        _check_array(f"raw[{model!r}, {site!r}]", values, shape, stored_dtype(kept.dtype).name)
    example = rows["example"]
    if example.min() < 0 or example.max() >= len(topics):
        raise ValueError(f"rows['example'] must lie between 0 and {len(topics) - 1}")
    if {topics[index] for index in example.tolist()} != {layout.units[unit].topic}:
        raise ValueError(f"unit {unit} brings rows of examples that are not of its topic")


def check_files(
    place: Place, layout: Layout, committed: Iterable[Committed], sizes: Mapping[str, int], prefix: str = ""
) -> None:
    """Raise StoreError where a file of a committed unit is missing or has another length; it names the unit.

    Only the files whose keys begin with `prefix` are looked at.
    """
    for unit, _, files in committed:
        for name, (size, _) in files.items():
            found = sizes.get(name)
            if found != size and name.startswith(prefix):
                what = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise StoreError(
                    f"Unit {unit} ({layout.units[unit]}) is damaged: {place.name}/{name} {what}; "
                    "run the cache command again with --repair."
                )


def committed_units(place: Place, layout: Layout, committed: list[Committed]) -> list[int]:
    """Return the units of which every part is committed, sorted; StoreError where a finished store lacks one."""
    done = done_units(committed, layout)
    if len(done) < len(layout.units) and place.read(group_key(CONTRAST)) is not None:
        raise _damaged(place, JOURNAL, f"lacks the lines of {len(layout.units) - len(done)} units, which were there")
    return sorted(done)


def check_group(place: Place, path: str, *, loaded: bool = False) -> None:
    """Raise StoreError where a file of a group is missing, its metadata is changed, or asks for too much memory.

    zarr takes a chunk that is missing for fill values, and metadata for what it says. And opening a group reads its
    coordinates, and with `loaded` all of it: a forged or damaged shape of 10^12 elements would be filled with fill
    values, and a chunk of 10^12 bytes be allocated, before anything looked wrong.
    """
    sizes, written = place.sizes(f"{path}/"), written_with(place, path)
    for key, (size, _) in written.items():
        if sizes.get(key) != size:
            raise _damaged(place, key, f"has {sizes[key]} bytes instead of {size}" if key in sizes else "is missing")
    keys = [key for key in sizes if key.endswith("/" + METADATA)]
    for key, content in place.read_all(keys).items():
        if key in written and sum_of(content) != written[key]:
            raise _damaged(place, key, "is changed")
        try:
            document = json.loads(content)
            if document["node_type"] == "group":
                GroupMetadata.from_dict(json.loads(content))
                continue
            ArrayV3Metadata.from_dict(json.loads(content))  # zarr would leave out what it cannot read, with a warning
            shape, chunk = document["shape"], document["chunk_grid"]["configuration"]["chunk_shape"]
            for codec in document["codecs"]:
                if codec["name"] == "sharding_indexed":
                    chunk = codec["configuration"]["chunk_shape"]
            lengths = [*shape, *chunk]
            if len(shape) != len(chunk) or not all(isinstance(length, int) and length >= 0 for length in lengths):
                raise ValueError("sizes must be whole numbers")
            item = 16 if document["data_type"] == "string" else np.dtype(document["data_type"]).itemsize
        except UNREADABLE as error:
            raise _damaged(place, key, f"is damaged ({type(error).__name__}: {error})") from error
        name = key.removesuffix("/" + METADATA)
        read = loaded or len(shape) < 2
        if item * math.prod(chunk) > MOST_CHUNK or (read and item * math.prod(shape) > MOST_LOADED):
            raise StoreError(
                f"{place.name}/{name} claims the shape {shape} in chunks of {chunk}, which is too large to be true; "
                "run pnlac-fast info --verify on the store."
            )


def _damaged(place: Place, key: str, what: str) -> StoreError:
    return StoreError(
        f"{place.name}/{key} {what}; pnlac-fast info --verify says what else is damaged, and how to mend it."
    )


def _check_keys(what: str, given: Mapping[Any, Any], wanted: Iterable[Any]) -> None:
    if set(given) != set(wanted):
        raise ValueError(f"{what} must have the keys {sorted(wanted)}, not {sorted(given)}")


def _check_array(what: str, array: npt.NDArray[Any], shape: tuple[int, ...], dtype: str) -> None:
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ValueError(f"{what} must be {dtype} {shape}, not {array.dtype} {array.shape}")
