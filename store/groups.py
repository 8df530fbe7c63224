"""Whole groups come and go at once, and the root's consolidated metadata never tells of one that is not there."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Any

from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from pnlac_fast.store.journal import encode_line, group_key, listed
from pnlac_fast.store.places import Bytes, Place
from pnlac_fast.store.schema import METADATA, root_document


def contents(store: MemoryStore) -> dict[str, bytes]:
    """Return what is in a memory store, sorted by key."""

    async def read() -> dict[str, bytes]:
        keys = sorted([key async for key in store.list()])
        found = {key: await store.get(key, default_buffer_prototype()) for key in keys}
        return {key: value.to_bytes() for key, value in found.items() if value is not None}

    return sync(read())


def write_root(place: Place, attributes: dict[str, Any], consolidated: dict[str, Any]) -> None:
    """Write the root's metadata, with the metadata of all groups and arrays in `consolidated`."""
    place.write(METADATA, [encode_root(attributes, consolidated)])
    place.sync()


def encode_root(attributes: dict[str, Any], consolidated: dict[str, Any]) -> bytes:
    """Return the root's ``zarr.json``: the same bytes for the same content."""
    document = root_document(attributes)
    document["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": consolidated}
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False).encode()


def collect(place: Place, without: Collection[str] = ()) -> dict[str, Any]:
    """Return the metadata of all groups and arrays below the root but for those at and below `without`, by path.

    What is no JSON is left out: one damaged result must not keep others from being written. `verify` finds it.
    """
    names = [key.removesuffix("/" + METADATA) for key in place.sizes() if key.endswith("/" + METADATA)]
    found = place.read_all(f"{name}/{METADATA}" for name in names if not _is_below(name, without))
    documents = {}
    for key in sorted(found):
        with suppress(ValueError, RecursionError):
            documents[key.removesuffix("/" + METADATA)] = json.loads(found[key])
    return documents


def _is_below(name: str, paths: Collection[str]) -> bool:
    return any(name == path or name.startswith(path + "/") for path in paths)


def consolidate(place: Place, attributes: dict[str, Any]) -> None:
    """Write the root's metadata anew: `attributes`, and what is there."""
    write_root(place, attributes, collect(place))


def withdraw(place: Place, paths: Iterable[str]) -> None:
    """Take groups out of the root's consolidated metadata."""
    content = place.read(METADATA)
    if content is None:
        return
    document = json.loads(content)
    below = document.get("consolidated_metadata", {}).get("metadata", {})
    gone = list(paths)
    hidden = {name for name in below if _is_below(name, gone)}
    if hidden:
        write_root(place, document["attributes"], {n: m for n, m in below.items() if n not in hidden})


def lists_anything(place: Place) -> bool:
    """Whether the root's consolidated metadata tells of any group."""
    return bool(json.loads(place.read(METADATA) or b"{}").get("consolidated_metadata", {}).get("metadata"))


def replace_group(place: Place, path: str, files: Iterable[tuple[str, Bytes]]) -> None:
    """Make or replace the group `path`; the caller holds `place.changing()`.

    Stock readers go by the root's consolidated metadata. So a group that is to be replaced is taken out of it first and
    put back last: whoever opens it in between, or after a crash, finds no group rather than one that is half old.

    Parameters
    ----------
    place : Place
        The store's place.
    path : str
        The group, such as ``results/stance``; its parent exists.
    files : iterable of (str, bytes)
        Every file of the group, names relative to it.
    """
    withdraw(place, [path])
    place.remove(group_key(path))
    written = place.replace(path, files)
    record = {"group": path, "files": listed({f"{path}/{name}": value for name, value in written.items()})}
    place.write(group_key(path), [encode_line(record)])
    place.sync()
    content = place.read(METADATA)
    assert content is not None
    consolidate(place, json.loads(content)["attributes"])


def remove_groups(place: Place, paths: Iterable[str]) -> None:
    """Remove those of the groups `paths` that are there; the caller holds `place.changing()`."""
    gone = list(paths)
    withdraw(place, gone)
    for path in gone:
        place.remove(group_key(path))
        place.remove(path)
