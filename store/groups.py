"""Whole groups come and go at once, and the root's consolidated metadata never tells of one that is not there."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import zarr
from zarr.errors import ZarrUserWarning

from pnlac_fast.store.durable import DurableStore, sync_directory, write_file

WORK = ".work"  # groups are made here, out of the sight of readers
METADATA = "zarr.json"
_OLD = "old."


def write_root(root: Path, attributes: dict[str, Any]) -> None:
    """Write the root's metadata anew, without consolidated metadata, in one durable rename."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    write_file(root / METADATA, json.dumps(document, indent=2, ensure_ascii=False).encode())
    sync_directory(root)


def consolidate(root: Path) -> None:
    """Write the metadata of all groups and arrays into the root's ``zarr.json``, in one durable rename."""
    store = DurableStore(root)
    with warnings.catch_warnings():
        # zarr warns that other readers may ignore this metadata, which they may, and that our journal is no array.
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(store)
    store.flush()


def withdraw(root: Path, path: str) -> None:
    """Take the group `path` out of the root's consolidated metadata, in one durable rename."""
    document = json.loads((root / METADATA).read_bytes())
    listed = document.get("consolidated_metadata", {}).get("metadata", {})
    hidden = [name for name in listed if name == path or name.startswith(path + "/")]
    if hidden:
        for name in hidden:
            del listed[name]
        write_file(root / METADATA, json.dumps(document, indent=2, ensure_ascii=False).encode())
        sync_directory(root)


def replace_group(root: Path, path: str, write: Callable[[DurableStore], None]) -> None:
    """Make or replace the group `path` of the store at `root`; the caller holds `changing_groups`.

    Stock readers go by the root's consolidated metadata. So a group that is to be replaced is taken out of it first and
    put back last: whoever opens it in between, or after a crash, finds no group rather than one that is half old.

    Parameters
    ----------
    root : Path
        The store's directory.
    path : str
        The group, such as ``results/stance``; its parent exists.
    write : callable
        Fills the store that it is given, whose root becomes the group.
    """
    work, target = root / WORK, root / path
    _clear_work(root)
    store = DurableStore(work / "new")
    write(store)
    store.flush()
    withdraw(root, path)
    if target.exists():
        target.rename(work / (_OLD + quote(path, safe="")))
    (work / "new").rename(target)
    sync_directory(target.parent)
    consolidate(root)
    _clear_work(root)


def remove_groups(root: Path, paths: Sequence[str]) -> None:
    """Remove those of the groups `paths` that are there; the caller holds `changing_groups`."""
    for path in paths:
        withdraw(root, path)
    _clear_work(root)
    for path in paths:
        if (root / path).exists():
            shutil.rmtree(root / path)
    sync_directory(root)


def _clear_work(root: Path) -> None:
    """Remove what was being made, but put a group back that a crash kept from being replaced."""
    work = root / WORK
    if work.exists():
        for old in work.glob(_OLD + "*"):
            target = root / unquote(old.name.removeprefix(_OLD))
            if not target.exists():
                old.rename(target)
        shutil.rmtree(work)
