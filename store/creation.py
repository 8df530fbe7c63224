"""Make a store, or open one that is there to go on with it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pnlac_fast.store.datasets import write_dataset
from pnlac_fast.store.durable import DurableStore
from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.groups import WORK, consolidate, remove_groups, write_root
from pnlac_fast.store.journal import JOURNAL, Journal
from pnlac_fast.store.layout import Layout, fingerprint
from pnlac_fast.store.locks import LOCK, changing_groups
from pnlac_fast.store.names import local_directory
from pnlac_fast.store.schema import (
    ACTIVATIONS,
    CONTRAST,
    EXAMPLES,
    NEURON_SETS,
    PARTIALS,
    RESULTS,
    TOKENS,
    Header,
    create_arrays,
    mark,
    read_header,
)
from pnlac_fast.store.writer import Writer

_OF_CAPTURE = (CONTRAST, PARTIALS, ACTIVATIONS, TOKENS, EXAMPLES)
_OF_USERS = (RESULTS, NEURON_SETS)
EXAMPLE_COLUMNS = ("topic", "instruction", "key")


def open_writer(
    path: str | os.PathLike[str],
    layout: Layout,
    *,
    provenance: dict[str, Any],
    examples: Mapping[str, Sequence[Any]],
    overwrite: bool = False,
) -> Writer:
    """Create a store, or open one made with the same layout to go on with it.

    Parameters
    ----------
    path : str or PathLike
        A directory that does not exist, is empty, or is a store.
    layout : Layout
        What decides the numbers.
    provenance : dict
        JSON values that say where the store comes from; those of the run that created it are kept.
    examples : dict of str to sequence
        Columns of equal length, one row per question: text or whole numbers; `topic`, `instruction` and `key` at least.
    overwrite : bool
        Start anew: remove the groups of an existing store, results included. Other directories are never touched.

    Returns
    -------
    Writer
        Holds the store's lock until closed.

    Raises
    ------
    StoreError
        If another process writes to the store; if it was made with other settings (the message lists each
        difference); if the path is not a store; if a committed unit's files are missing.
    """
    root = local_directory(path)
    columns = _examples(layout, examples)
    _occupant(root)
    root.mkdir(parents=True, exist_ok=True)
    with changing_groups(root):
        header = _occupant(root)
        if header is not None and header.layout is None and not overwrite:
            raise StoreError(f"{root} holds results only; give another path, or use --overwrite to remove them.")
        journal = Journal(root)
        try:
            if header is not None and overwrite:
                journal.clear()
                remove_groups(root, (*_OF_CAPTURE, *_OF_USERS))
            elif header is not None:
                _check_same(root, header, layout, fingerprint(columns))
            if header is None or overwrite or not journal.started:
                _create(root, layout, provenance, columns)
                journal.start(layout)
            return Writer(root, layout, journal, columns["topic"])
        except BaseException:
            journal.close()
            raise


def create_results(path: str | os.PathLike[str], *, provenance: dict[str, Any] | None = None) -> None:
    """Make a store for results only at `path`; where any pnlac store is already, leave it as it is.

    Raises
    ------
    StoreError
        If `path` is something else than a store or an empty directory.
    """
    root = local_directory(path)
    _occupant(root)
    root.mkdir(parents=True, exist_ok=True)
    with changing_groups(root):
        if _occupant(root) is None:
            _begin(root, mark("results", provenance=provenance or {}))
            consolidate(root)


def _occupant(root: Path) -> Header | None:
    """Return the header of the store at `root`, None where there is nothing; refuse everything else."""
    if not root.exists():
        return None
    if not root.is_dir():
        raise StoreError(f"{root} is a file; give the path of a directory that is a store or does not exist yet.")
    if (root / "zarr.json").exists():
        return read_header(root)
    # A crash between the first steps of making a store leaves no more than these.
    foreign = sorted({entry.name for entry in root.iterdir()} - {LOCK, JOURNAL, WORK, "zarr.json.partial"})
    if foreign:
        raise StoreError(f"{root} is not a pnlac store (it holds {foreign[0]}), and is left alone; give another path.")
    return None


def _check_same(root: Path, header: Header, layout: Layout, examples: str) -> None:
    assert header.layout is not None
    differences = header.layout.differences(layout)
    if header.examples != examples:
        differences.append(("examples (sha256)", header.examples[:12], examples[:12]))
    if differences:
        listed = "; ".join(f"{name}: stored {stored}, given {given}" for name, stored, given in differences)
        raise StoreError(f"{root} was made with other settings ({listed}); use --overwrite, or give another path.")


def _begin(root: Path, attributes: dict[str, Any]) -> None:
    write_root(root, attributes)
    (root / RESULTS).mkdir(exist_ok=True)
    if not (root / RESULTS / "zarr.json").exists():
        write_root(root / RESULTS, mark("results"))


def _create(root: Path, layout: Layout, provenance: dict[str, Any], columns: dict[str, list[Any]]) -> None:
    attributes = mark("capture", layout=layout.to_json(), provenance=provenance, examples=fingerprint(columns))
    if (root / "zarr.json").exists():
        remove_groups(root, _OF_CAPTURE)
    _begin(root, attributes)
    store = DurableStore(root)
    write_dataset(store, _table(columns), mark("examples"), EXAMPLES)
    create_arrays(store, layout)
    store.flush()
    consolidate(root)


def _examples(layout: Layout, examples: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    columns = {name: list(values) for name, values in examples.items()}
    missing = [name for name in EXAMPLE_COLUMNS if name not in columns]
    if missing or len({len(values) for values in columns.values()}) != 1:
        raise ValueError(f"examples need the columns {', '.join(EXAMPLE_COLUMNS)}, all of one length")
    unknown = sorted(set(columns["topic"]) - set(layout.topics))
    if unknown:
        raise ValueError(f"an example has the topic {unknown[0]!r}, which is not in the layout")
    return columns


def _table(columns: dict[str, list[Any]]) -> xr.Dataset:
    def array(values: list[Any]) -> Any:
        numbers = bool(values) and all(isinstance(value, int) for value in values)
        return np.array(values, np.int64 if numbers else object)

    return xr.Dataset({name: ("example", array(values)) for name, values in columns.items()})
