"""Format 1.0: the groups of a store, the shapes, chunks and dimension names of its arrays, and its header."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec
from zarr.core.chunk_key_encodings import ChunkKeyEncodingParams

from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.layout import BASE, Layout
from pnlac_fast.store.names import directory_name

MAJOR, MINOR = 1, 0
ATTRIBUTE = "pnlac"  # the one attribute of every group that is ours
CONTRAST, PARTIALS, ACTIVATIONS, TOKENS = "contrast", "partials", "activations", "tokens"
EXAMPLES, NEURON_SETS, RESULTS = "examples", "neuron_sets", "results"

BASE_MOMENTS = ("sum a", "sum a^2")
TUNED_MOMENTS = ("sum b", "sum b^2", "sum (b-a)^2")
TOKEN_COLUMNS = ("example", "position", "token_id")

# Measured on rows of 14336 neurons: 256 x 1024 reads one token and one neuron about equally fast.
CHUNK_ROWS, CHUNK_NEURONS = 256, 1024
CHUNK_BYTES, SHARD_BYTES = 1 << 20, 64 << 20

CHECKED = (Crc32cCodec(),)
# All chunks of an array lie in its own directory, so that one fsync makes their names durable.
FLAT_KEYS = ChunkKeyEncodingParams(name="default", separator=".")


class Header(NamedTuple):
    """What the root of a store says of it."""

    kind: str
    version: tuple[int, int]
    layout: Layout | None
    provenance: dict[str, Any]
    examples: str


class Slots(NamedTuple):
    """Where units keep their raw rows: unit `u` owns the rows ``u * rows .. (u + 1) * rows - 1``."""

    rows: int
    chunk_rows: int


def mark(kind: str, **more: Any) -> dict[str, Any]:
    """Return the attributes that say what a group is, and in which version of the format."""
    return {ATTRIBUTE: {"kind": kind, "version": {"major": MAJOR, "minor": MINOR}, **more}}


def read_header(root: Path) -> Header:
    """Return the header of the store at `root`.

    Raises
    ------
    StoreError
        If nothing is there, if it is not a pnlac store, or if a newer major version of the format wrote it.
    """
    try:
        attributes = json.loads((root / "zarr.json").read_bytes())["attributes"]
        ours = attributes[ATTRIBUTE]
        kind, version = ours["kind"], (int(ours["version"]["major"]), int(ours["version"]["minor"]))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        reason = "is not a pnlac store" if root.exists() else "does not exist"
        raise StoreError(f"{root} {reason}; give the path of a store that the cache command made.") from None
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{root} is not a pnlac store, though it may be another Zarr store; check the path.") from None
    if version[0] > MAJOR:
        raise StoreError(
            f"{root} has format {version[0]}.{version[1]}, and this version reads formats up to {MAJOR}.x; "
            "upgrade pnlac-fast to open it."
        )
    try:
        layout = Layout.from_json(ours["layout"]) if kind == "capture" else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"The layout in {root}/zarr.json is damaged ({error}); restore it from a copy.") from error
    return Header(kind, version, layout, ours.get("provenance", {}), ours.get("examples", ""))


def slots_of(layout: Layout) -> Slots:
    """Return the slots of a layout: the largest unit's rows, rounded up to whole chunks."""
    largest = max(1, max(unit.rows for unit in layout.units))
    chunk_rows, chunks = even_split(largest, CHUNK_ROWS)
    return Slots(chunks * chunk_rows, chunk_rows)


def even_split(size: int, limit: int) -> tuple[int, int]:
    """Return the length and the number of the fewest equal pieces, none longer than `limit`, that cover `size`."""
    pieces = math.ceil(size / limit)
    return math.ceil(size / pieces), pieces


def fitting_layers(layers: int, bytes_per_layer: int, limit: int) -> int:
    """Return how many layers go together so that they take at most `limit` bytes (at least one layer)."""
    return max(1, min(layers, limit // bytes_per_layer))


def partials_path(site: str) -> str:
    """Return the group of a site's partial sums."""
    return f"{PARTIALS}/{directory_name(site)}"


def activations_path(model: str, site: str) -> str:
    """Return the group of a model's raw activations at a site."""
    return f"{ACTIVATIONS}/{directory_name(model)}/{directory_name(site)}"


def create_array(
    store: Store,
    path: str,
    shape: Sequence[int],
    dims: Sequence[str],
    dtype: str,
    chunks: Sequence[int],
    *,
    fill: float | int,
    shards: Sequence[int] | None = None,
    attributes: dict[str, Any] | None = None,
) -> zarr.Array[Any]:
    """Create an array as the format asks: checksummed chunks, no compression, flat chunk names."""
    return zarr.create_array(
        store,
        name=path,
        shape=tuple(shape),
        dtype=dtype,
        chunks=tuple(chunks),
        shards=tuple(shards) if shards else None,
        dimension_names=tuple(dims),
        fill_value=fill,
        compressors=CHECKED,
        filters=None,
        chunk_key_encoding=FLAT_KEYS,
        attributes=attributes,
    )


def open_array(store: Store, path: str) -> zarr.Array[Any]:
    """Open an array that `create_array` made, to be read or written."""
    array = zarr.open_group(store, mode="r" if store.read_only else "r+", use_consolidated=False)[path]
    if not isinstance(array, zarr.Array):
        raise TypeError(f"{path} is a group, not an array")
    return array


def create_arrays(store: Store, layout: Layout) -> None:
    """Create the empty arrays that units write: partial sums, and raw rows where they are kept."""
    units, models, tokens, layers = len(layout.units), len(layout.models), len(layout.tokens), layout.layers
    zarr.create_group(store, path=PARTIALS, attributes=mark("partials"))
    create_array(store, f"{PARTIALS}/n", (units, tokens), ("unit", "tokens"), "int64", (1, tokens), fill=-1)
    for site, width in layout.widths.items():
        path, sums = partials_path(site), (layers, width)
        zarr.create_group(store, path=path, attributes=mark("partials", site=site))
        for name, moments, dims, sizes in (
            ("base", BASE_MOMENTS, ("tokens", "base_moment"), (tokens, 2)),
            ("tuned", TUNED_MOMENTS, ("model", "tokens", "tuned_moment"), (models, tokens, 3)),
        ):
            create_array(
                store,
                f"{path}/{name}",
                (units, *sizes, *sums),
                ("unit", *dims, "layer", "neuron"),
                "float64",
                (1, *(max(1, size) for size in sizes), *sums),
                fill=math.nan,
                attributes={"moments": list(moments)},
            )
    if layout.raw != "none":
        _create_raw(store, layout)


def _create_raw(store: Store, layout: Layout) -> None:
    slots = slots_of(layout)
    rows = len(layout.units) * slots.rows
    zarr.create_group(store, path=TOKENS, attributes=mark("tokens"))
    for column in TOKEN_COLUMNS:
        create_array(store, f"{TOKENS}/{column}", (rows,), ("token",), "int32", (slots.rows,), fill=-1)
    zarr.create_group(store, path=ACTIVATIONS, attributes=mark("activations"))
    for model in (BASE, *layout.models):
        group = f"{ACTIVATIONS}/{directory_name(model)}"
        zarr.create_group(store, path=group, attributes=mark("activations", model=model))
        for site, width in layout.widths.items():
            path = activations_path(model, site)
            neurons, pieces = even_split(width, CHUNK_NEURONS)
            layers = fitting_layers(layout.layers, 4 * slots.rows * width, SHARD_BYTES)
            zarr.create_group(store, path=path, attributes=mark("activations", model=model, site=site))
            create_array(
                store,
                f"{path}/activation",
                (layout.layers, rows, width),
                ("layer", "token", "neuron"),
                "float32",
                (1, slots.chunk_rows, neurons),
                fill=math.nan,
                shards=(layers, slots.rows, pieces * neurons),
            )
