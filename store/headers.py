"""The two copies of what a store says of itself: the root's attributes, and the journal's first line."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from pnlac_fast.store.errors import StoreError, VersionError
from pnlac_fast.store.journal import STORE, decode_line
from pnlac_fast.store.places import Location, Place, place_of
from pnlac_fast.store.schema import METADATA, Header, parse_header


class Copies(NamedTuple):
    """Both copies, None where one is missing or damaged, and what the better one says.

    Attributes
    ----------
    root : object
        The attributes in the root's ``zarr.json``.
    line : dict
        The record of ``journal/store.json``. It has a checksum, so where the two differ it is right.
    header : Header
        What the store says of itself; None where neither copy says anything.
    """

    root: Any
    line: dict[str, Any] | None
    header: Header | None


def read_copies(place: Place) -> Copies:
    """Read both copies; StoreError only if a newer major version of the format wrote them."""
    line = decode_line(place.read(STORE) or b"")
    root = _attributes(place.read(METADATA))
    header = None if line is None else _parse(line.get("attributes"), place.name)
    return Copies(root, line, header or _parse(root, place.name))


def settings_of(path: Location) -> dict[str, Any]:
    """Return the settings of the store at `path` even if one copy of them is damaged; nothing where there are none."""
    header = read_copies(place_of(path)).header
    return {} if header is None or header.layout is None else header.layout.settings


def _attributes(content: bytes | None) -> Any:
    try:
        return json.loads(content or b"null")["attributes"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _parse(attributes: Any, name: str) -> Header | None:
    try:
        return parse_header(attributes, name)
    except VersionError:
        raise
    except (StoreError, ValueError, LookupError, TypeError):
        return None
