"""Make a store, or open one that is there to go on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from zarr.storage import MemoryStore

from pnlac_fast.store.datasets import write_dataset
from pnlac_fast.store.errors import StoreError, VersionError, writing
from pnlac_fast.store.groups import consolidate, contents, encode_root, lists_anything, remove_groups
from pnlac_fast.store.headers import read_copies
from pnlac_fast.store.journal import JOURNAL, STORE, decode_line, encode_line, listed, read_record
from pnlac_fast.store.layout import Layout, fingerprint
from pnlac_fast.store.places import Location, Place, place_of
from pnlac_fast.store.repairing import repair as mend
from pnlac_fast.store.schema import (
    ACTIVATIONS,
    CONTRAST,
    EXAMPLES,
    METADATA,
    NEURON_SETS,
    PARTIALS,
    RESULTS,
    TOKENS,
    Header,
    create_arrays,
    mark,
    parse_header,
    read_header,
    root_document,
)
from pnlac_fast.store.writer import Writer

_OF_CAPTURE = (CONTRAST, PARTIALS, ACTIVATIONS, TOKENS, EXAMPLES)
_OF_USERS = (RESULTS, NEURON_SETS)
EXAMPLE_COLUMNS = ("topic", "instruction", "key")


def open_writer(
    path: Location,
    layout: Layout,
    *,
    provenance: dict[str, Any],
    examples: Mapping[str, Sequence[Any]],
    selected: Mapping[str, npt.NDArray[np.int32]] | None = None,
    worker: tuple[int, int] = (0, 1),
    part: int = 0,
    overwrite: bool = False,
    repair: bool = False,
) -> Writer:
    """Create a store, or open one made with the same layout to go on with it.

    Parameters
    ----------
    path : str, PathLike or zarr Store
        A directory that does not exist, is empty, or is a store; a URL; or any zarr Store.
    layout : Layout
        What decides the numbers.
    provenance : dict
        JSON values that say where the store comes from; those of the run that created it are kept.
    examples : dict of str to sequence
        Columns of equal length, one row per question: text or whole numbers; `topic`, `instruction` and `key` at least.
    selected : dict of site to int32 array (neuron, 2), optional
        Layer and neuron of each chosen neuron, where `layout.raw` keeps chosen neurons only.
    worker : (int, int)
        Which of how many writers this one is: worker i of n takes the units whose number is i modulo n. Any number of
        them, changed between runs, ends in the same bytes.
    part : int
        Which of `layout.parts` slices of neurons this writer brings.
    overwrite : bool
        Start anew: remove the groups of an existing store, results included. Other directories are never touched.
    repair : bool
        Read the whole store first, and mend it: metadata and examples are written again, what crashes have left is
        removed, and units that are damaged become pending. Results and neuron sets that are damaged stay as they are.

    Returns
    -------
    Writer
        Holds the right to write as this worker until closed.

    Raises
    ------
    StoreError
        If another process writes as this worker, or with another number of workers; if the store was made with other
        settings (the message lists each difference); if the path is not a store; if a committed unit's files are
        missing; if there is nothing to repair, or several workers are to do it.
    """
    place = place_of(path)
    columns = _examples(layout, examples)
    chosen = _selected(layout, selected)
    if not (0 <= worker[0] < worker[1] and 0 <= part < layout.parts):
        raise ValueError(f"worker {worker} or part {part} of {layout.parts} is out of range")
    if overwrite and (worker[1] > 1 or layout.parts > 1):
        raise StoreError(f"Several workers cannot start {place.name} anew; remove it first, or let one process do it.")
    if repair:
        _check_repairable(place, layout, columns, worker, overwrite=overwrite)
    else:
        _occupant(place)
    attributes = mark("capture", layout=layout.to_json(), provenance=provenance, examples=fingerprint(columns))
    with writing(place.name), ExitStack() as held:
        with place.changing():
            held.enter_context(place.claim((*worker, part)))
            place.recover()
            if repair:
                made = partial(_capture_files, layout, columns, chosen)
                mend(place, read_copies(place), attributes, made, part)
            header = _occupant(place)
            if header is not None and header.layout is None and not overwrite:
                raise StoreError(f"{place.name} holds results only; give another path, or use --overwrite.")
            if header is not None and overwrite:
                place.remove(JOURNAL)
                remove_groups(place, (*_OF_CAPTURE, *_OF_USERS))
            elif header is not None:
                _check_same(place, header, layout, fingerprint(columns))
            if read_record(place, STORE) is None:
                _create(place, attributes, _capture_files(layout, columns, chosen), layout, anew=overwrite)
            elif not lists_anything(place):  # making it was cut off at the very end
                consolidate(place, read_header(place).attributes)
        return Writer(place, layout, columns["topic"], worker, part, held.pop_all())


def create_results(path: Location, *, provenance: dict[str, Any] | None = None) -> None:
    """Make a store for results only at `path`, or mend one; where a capture is already, leave it as it is.

    Parameters
    ----------
    path : path, URL or zarr Store
        Where.
    provenance : dict, optional
        JSON values that say where the results come from.

    Raises
    ------
    StoreError
        If `path` is something else than a store or an empty directory.
    """
    place = place_of(path)
    try:
        _occupant(place)
    except VersionError:
        raise
    except StoreError:
        if read_copies(place).header is None:
            raise
    with writing(place.name), place.changing():
        copies = read_copies(place)
        if copies.header is not None and copies.header.layout is not None:
            return
        attributes = mark("results", provenance=provenance or {})
        if copies.header is not None:
            mend(place, copies, attributes, _results_files)
        if read_record(place, STORE) is None:
            _create(place, attributes, _results_files(), None, anew=False)
        elif not lists_anything(place):
            consolidate(place, read_header(place).attributes)


def _check_repairable(
    place: Place, layout: Layout, columns: dict[str, list[Any]], worker: tuple[int, int], *, overwrite: bool
) -> None:
    """Raise StoreError where there is nothing to repair, or it cannot be done so."""
    if overwrite:
        raise StoreError("A store is either repaired or started anew; leave out --repair or --overwrite.")
    if worker[1] > 1:
        raise StoreError(
            f"Several workers cannot repair {place.name}; let one process do it, without --worker, and redo the units."
        )
    header = read_copies(place).header
    if header is None:
        lines = place.read_all(key for key in place.sizes(f"{JOURNAL}/") if key.startswith(f"{JOURNAL}/unit."))
        if not any((decode_line(line) or {}).get("layout") == layout.fingerprint() for line in lines.values()):
            raise StoreError(f"There is no store of these settings at {place.name} to repair; leave out --repair.")
    elif header.layout is None:
        raise StoreError(f"{place.name} holds results only; give the path of a store that the cache command made.")
    else:
        _check_same(place, header, layout, fingerprint(columns))


def _occupant(place: Place) -> Header | None:
    """Return the header of the store at `place`, None where there is nothing; refuse everything else."""
    if place.read(METADATA) is not None:
        header = read_header(place)
        if place.read("journal.jsonl") is not None:
            raise StoreError(
                f"{place.name} was made by a version before the first release, which this one does not read; make it "
                "again at another path."
            )
        return header
    foreign = place.foreign()
    if foreign is not None:
        raise StoreError(
            f"{place.name} is not a pnlac store (it holds {foreign}), and is left alone; give another path."
        )
    return None


def _check_same(place: Place, header: Header, layout: Layout, examples: str) -> None:
    assert header.layout is not None
    differences = header.layout.differences(layout)
    if header.examples != examples:
        differences.append(("examples (sha256)", header.examples[:12], examples[:12]))
    if differences:
        given = "; ".join(f"{name}: stored {stored}, given {given}" for name, stored, given in differences)
        raise StoreError(f"{place.name} was made with other settings ({given}); use --overwrite, or give another path.")


def _create(
    place: Place, attributes: dict[str, Any], files: Mapping[str, bytes], layout: Layout | None, *, anew: bool
) -> None:
    """Write what a store is made of: the root, so that it is known to be one; `files`; and the line that says so."""
    root = encode_root(attributes, {})
    if anew:
        place.write(METADATA, [root])
    elif not place.create(METADATA, root):
        attributes = _agreed(place, read_header(place).attributes, attributes, layout)
    written = {name: place.write(name, [content]) for name, content in files.items()}
    place.sync()
    record = {"attributes": attributes, "files": listed(written)}
    if not place.create(STORE, encode_line(record)):  # another worker was faster
        theirs = read_record(place, STORE)
        assert theirs is not None
        attributes = _agreed(place, theirs["attributes"], attributes, layout)
    consolidate(place, attributes)


def _agreed(place: Place, stored: Any, given: dict[str, Any], layout: Layout | None) -> dict[str, Any]:
    """Return the attributes that are there, which must be of the same layout; they say where the store comes from."""
    header, ours = parse_header(stored, place.name), parse_header(given, place.name)
    if header.kind != ours.kind:
        raise StoreError(f"{place.name} is being made as something else by another process; give another path.")
    if layout is not None:
        _check_same(place, header, layout, ours.examples)
    return header.attributes


def _capture_files(
    layout: Layout, columns: dict[str, list[Any]], selected: Mapping[str, npt.NDArray[np.int32]]
) -> dict[str, bytes]:
    made = MemoryStore()
    write_dataset(made, _table(columns), mark("examples"), EXAMPLES)
    create_arrays(made, layout, selected)
    return _below_root(made) | _results_files()


def _results_files() -> dict[str, bytes]:
    document = root_document(mark("results"))
    return {f"{RESULTS}/{METADATA}": json.dumps(document, indent=2, ensure_ascii=False).encode()}


def _below_root(made: MemoryStore) -> dict[str, bytes]:
    """Return the files of `made` but for the root's metadata, which is ours to write."""
    return {name: content for name, content in contents(made).items() if name != METADATA}


def _examples(layout: Layout, examples: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    columns = {name: list(values) for name, values in examples.items()}
    missing = [name for name in EXAMPLE_COLUMNS if name not in columns]
    if missing or len({len(values) for values in columns.values()}) != 1:
        raise ValueError(f"examples need the columns {', '.join(EXAMPLE_COLUMNS)}, all of one length")
    unknown = sorted(set(columns["topic"]) - set(layout.topics))
    if unknown:
        raise ValueError(f"an example has the topic {unknown[0]!r}, which is not in the layout")
    return columns


def _selected(layout: Layout, selected: Mapping[str, npt.NDArray[np.int32]] | None) -> dict[str, npt.NDArray[np.int32]]:
    """Return the chosen neurons, or raise ValueError where they are not those of the layout."""
    given = dict(selected or {})
    if layout.raw.neurons != describe_selected(given):
        raise ValueError("the chosen neurons are not those of the layout")
    for site, pairs in given.items():
        if len(pairs) and (pairs.min() < 0 or (pairs >= (layout.layers, layout.widths[site])).any()):
            raise ValueError(f"a chosen neuron of {site} does not exist")
    return given


def describe_selected(selected: Mapping[str, npt.NDArray[np.int32]]) -> dict[str, list[Any]]:
    """Return what `Raw.neurons` says of `selected` neurons: how many, and the SHA-256 of their (layer, neuron) list."""
    return {site: [len(pairs), fingerprint(np.asarray(pairs).tolist())] for site, pairs in selected.items()}


def _table(columns: dict[str, list[Any]]) -> xr.Dataset:
    def array(values: list[Any]) -> Any:
        numbers = bool(values) and all(isinstance(value, int) for value in values)
        return np.array(values, np.int64 if numbers else object)

    return xr.Dataset({name: ("example", array(values)) for name, values in columns.items()})
