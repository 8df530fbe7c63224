"""Format 1.0: the groups of a store, the shapes, chunks and dimension names of its arrays, and its header."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec

from pnlac_fast.store.datasets import ATTRIBUTE, FLAT_KEYS, write_dataset
from pnlac_fast.store.errors import StoreError, VersionError
from pnlac_fast.store.journal import STORE, read_record
from pnlac_fast.store.layout import BASE, SELECTORS, Layout
from pnlac_fast.store.names import RESULT_NAME, directory_name
from pnlac_fast.store.places import Place
from pnlac_fast.store.shards import array_options, stored_dtype

MAJOR, MINOR = 1, 0
METADATA = "zarr.json"
CONTRAST, PARTIALS, ACTIVATIONS, TOKENS = "contrast", "partials", "activations", "tokens"
EXAMPLES, NEURON_SETS, RESULTS = "examples", "neuron_sets", "results"

BASE_MOMENTS = ("sum a", "sum a^2")
TUNED_MOMENTS = ("sum b", "sum b^2", "sum (b-a)^2")
TOKEN_COLUMNS = ("example", "side", "completion", "position", "token_id")
SIDES = ("right", "left")  # what the numbers in the column `side` mean

# Measured on rows of 14336 neurons: 256 x 1024 reads one token and one neuron about equally fast.
CHUNK_ROWS, CHUNK_NEURONS = 256, 1024
CHUNK_BYTES, SHARD_BYTES = 1 << 20, 64 << 20

CHECKED = (Crc32cCodec(),)


class Header(NamedTuple):
    """What the root of a store says of it."""

    kind: str
    version: tuple[int, int]
    layout: Layout | None
    provenance: dict[str, Any]
    examples: str
    attributes: dict[str, Any]


class Slots(NamedTuple):
    """Where units keep their raw rows: unit `u` owns the rows ``u * rows .. (u + 1) * rows - 1``."""

    rows: int
    chunk_rows: int


def mark(kind: str, **more: Any) -> dict[str, Any]:
    """Return the attributes that say what a group is, and in which version of the format."""
    return {ATTRIBUTE: {"kind": kind, "version": {"major": MAJOR, "minor": MINOR}, **more}}


def root_document(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a group that has `attributes`."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def read_header(place: Place) -> Header:
    """Return the header of the store at `place`.

    Raises
    ------
    StoreError
        If nothing is there, if it is not a pnlac store, or if a newer major version of the format wrote it.
    """
    content = place.read(METADATA)
    if content is None:
        reason = "is not a pnlac store" if place.foreign() else "does not exist"
        raise StoreError(f"{place.name} {reason}; give the path of a store that the cache command made.")
    try:
        attributes = json.loads(content)["attributes"]
        header = parse_header(attributes, place.name)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StoreError(
            f"{place.name} is not a pnlac store, though it may be another Zarr store; check the path."
        ) from None
    line = read_record(place, STORE)
    if line is not None and line.get("attributes") != attributes:
        raise StoreError(
            f"{place.name}/{METADATA} does not agree with {STORE}; pnlac-fast info --verify says what is damaged, and "
            "how to mend it."
        )
    return header


def capture_layout(place: Place) -> Layout:
    """Return the layout of the store at `place`; StoreError where it has none, since it holds results only."""
    layout = read_header(place).layout
    if layout is None:
        raise StoreError(f"{place.name} holds results only; give the store of a cache command.")
    return layout


def parse_header(attributes: Any, name: str) -> Header:
    """Return what the root's attributes say; ValueError, KeyError or TypeError where they are no pnlac store's."""
    ours = attributes[ATTRIBUTE]
    kind, version = ours["kind"], (int(ours["version"]["major"]), int(ours["version"]["minor"]))
    if version[0] > MAJOR:
        raise VersionError(
            f"{name} has format {version[0]}.{version[1]}, and this version reads formats up to {MAJOR}.x; "
            "upgrade pnlac-fast to open it."
        )
    try:
        layout = Layout.from_json(ours["layout"]) if kind == "capture" else None
    except (ValueError, KeyError, TypeError, AttributeError, StoreError) as error:
        raise StoreError(
            f"The layout in {name}/{METADATA} is damaged ({error}); run the cache command again with --repair."
        ) from error
    provenance, examples = ours.get("provenance", {}), ours.get("examples", "")
    if not (isinstance(kind, str) and isinstance(provenance, dict) and isinstance(examples, str)):
        raise ValueError("the kind and the hash of the examples are text, and the provenance is an object")
    return Header(kind, version, layout, provenance, examples, attributes)


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


def is_whole(path: str) -> bool:
    """Whether `path` is that of a group which is written, and replaced, as a whole."""
    above, _, name = path.rpartition("/")
    return path in (CONTRAST, NEURON_SETS) or (above == RESULTS and RESULT_NAME.fullmatch(name) is not None)


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
    """Open an array to be read."""
    array = zarr.open_group(store, mode="r", use_consolidated=False)[path]
    if not isinstance(array, zarr.Array):
        raise TypeError(f"{path} is a group, not an array")
    return array


class Grid(NamedTuple):
    """How an array is cut: the shape of a file (a shard, or a chunk where there are no shards), and of its chunks."""

    shape: tuple[int, ...]
    file: tuple[int, ...]
    chunk: tuple[int, ...]

    def key(self, path: str, at: Sequence[int]) -> str:
        """Return the file that holds the element with the index `at`."""
        return f"{path}/c." + ".".join(str(index // size) for index, size in zip(at, self.file, strict=True))


def partials_grid(layout: Layout, site: str, name: str) -> Grid:
    """Return the grid of the partial sums ``base`` or ``tuned`` of a site."""
    inner = (len(layout.tokens), 2) if name == "base" else (len(layout.models), len(layout.tokens), 3)
    width = layout.widths[site]
    whole = (*(max(1, size) for size in inner), layout.layers)
    file = (1, *whole, width // layout.parts)
    return Grid((len(layout.units), *inner, layout.layers, width), file, file)


def raw_grid(layout: Layout, site: str) -> Grid:
    """Return the grid of a site's raw activations: (layer, token, neuron), or (token, selected)."""
    slots, raw = slots_of(layout), layout.raw
    rows = len(layout.units) * slots.rows
    if raw.neurons:
        count = raw.neurons[site][0]
        neurons, pieces = even_split(max(1, count), CHUNK_NEURONS)
        return Grid((rows, count), (slots.rows, neurons * pieces), (slots.chunk_rows, neurons))
    width = layout.widths[site] // layout.parts
    if layout.parts == 1:
        neurons, pieces = even_split(width, CHUNK_NEURONS)
    else:  # parts begin where files do
        neurons = max(size for size in range(1, min(width, CHUNK_NEURONS) + 1) if width % size == 0)
        pieces = width // neurons
    bytes_per_layer = stored_dtype(raw.dtype).itemsize * slots.rows * width
    layers = fitting_layers(len(raw.layers), bytes_per_layer, SHARD_BYTES)
    return Grid(
        (len(raw.layers), rows, layout.widths[site]),
        (layers, slots.rows, neurons * pieces),
        (1, slots.chunk_rows, neurons),
    )


def create_arrays(store: Store, layout: Layout, selected: Mapping[str, npt.NDArray[np.int32]]) -> None:
    """Write the metadata of the arrays that units fill: partial sums, and raw rows where they are kept."""
    units, tokens = len(layout.units), len(layout.tokens)
    zarr.create_group(store, path=PARTIALS, attributes=mark("partials"))
    create_array(store, f"{PARTIALS}/n", (units, tokens), ("unit", "tokens"), "int64", (1, tokens), fill=-1)
    for site in layout.sites:
        path = partials_path(site)
        zarr.create_group(store, path=path, attributes=mark("partials", site=site))
        for name, moments, dims in (
            ("base", BASE_MOMENTS, ("tokens", "base_moment")),
            ("tuned", TUNED_MOMENTS, ("model", "tokens", "tuned_moment")),
        ):
            grid = partials_grid(layout, site, name)
            create_array(
                store,
                f"{path}/{name}",
                grid.shape,
                ("unit", *dims, "layer", "neuron"),
                "float64",
                grid.chunk,
                fill=math.nan,
                attributes={"moments": list(moments)},
            )
    if layout.raw.tokens != "none":
        _create_raw(store, layout, selected)


def _create_raw(store: Store, layout: Layout, selected: Mapping[str, npt.NDArray[np.int32]]) -> None:
    slots, raw = slots_of(layout), layout.raw
    rows = len(layout.units) * slots.rows
    zarr.create_group(store, path=TOKENS, attributes=mark("tokens"))
    for column in TOKEN_COLUMNS:
        meaning = {"flag_values": [0, 1], "flag_meanings": " ".join(SIDES)} if column == "side" else None
        create_array(
            store, f"{TOKENS}/{column}", (rows,), ("token",), "int32", (slots.rows,), fill=-1, attributes=meaning
        )
    counts = (rows, len(SELECTORS))
    chunk = (slots.rows, len(SELECTORS))
    attributes = {"selectors": list(SELECTORS)}
    create_array(
        store, f"{TOKENS}/counts", counts, ("token", "selector"), "int32", chunk, fill=0, attributes=attributes
    )
    zarr.create_group(store, path=ACTIVATIONS, attributes=mark("activations"))
    for model in (BASE, *layout.models):
        group = f"{ACTIVATIONS}/{directory_name(model)}"
        zarr.create_group(store, path=group, attributes=mark("activations", model=model))
        for site in layout.sites:
            path, grid = activations_path(model, site), raw_grid(layout, site)
            if raw.neurons:
                dims: tuple[str, ...] = ("token", "selected")
                coords = {name: ("selected", selected[site][:, i]) for i, name in enumerate(("layer", "neuron"))}
            else:
                dims = ("layer", "token", "neuron")
                coords = {"layer": ("layer", np.array(raw.layers, np.int32))}
            write_dataset(store, xr.Dataset(coords=coords), mark("activations", model=model, site=site), path)
            zarr.create_array(
                store,
                name=f"{path}/activation",
                shape=grid.shape,
                chunks=grid.chunk,
                shards=grid.file,
                dimension_names=dims,
                chunk_key_encoding=FLAT_KEYS,
                **array_options(raw.dtype),
            )
