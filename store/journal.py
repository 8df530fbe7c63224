"""The journal: one checksummed line per committed thing, each in a file of its own. Readers trust only what it names.

A line a file, not lines in one file: object stores cannot append, and workers need not know of each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import google_crc32c

from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.layout import Layout
from pnlac_fast.store.places import Place, Sum

JOURNAL = "journal"
STORE = f"{JOURNAL}/store.json"
_UNIT = re.compile(rf"{JOURNAL}/unit\.[^/]*\.json")  # and not what a crash left of one, which has another ending
_HEAD, _MIDDLE, _TAIL = b'{"crc32c":"', b'","record":', b"}"

Files = dict[str, Sum]


class Committed(NamedTuple):
    """One part of a committed unit: the unit, the part, and each file it wrote with its bytes and their hash."""

    unit: int
    part: int
    files: Files


def encode_line(record: Mapping[str, Any]) -> bytes:
    """Return the line ``{"crc32c":"<8 hex digits>","record":<record>}``, with the checksum of the record's bytes."""
    body = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    return _HEAD + b"%08x" % google_crc32c.value(body) + _MIDDLE + body + _TAIL + b"\n"


def decode_line(line: bytes) -> dict[str, Any] | None:
    """Return the record of a journal line, or None where the line is torn or damaged."""
    start = len(_HEAD) + 8 + len(_MIDDLE)
    body = line[start : -len(_TAIL) - 1]
    if line != _HEAD + b"%08x" % google_crc32c.value(body) + _MIDDLE + body + _TAIL + b"\n":
        return None
    try:
        record = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def unit_key(unit: int, part: int) -> str:
    """Return the key of the line of a unit's part."""
    return f"{JOURNAL}/unit.{unit}.{part}.json"


def group_key(path: str) -> str:
    """Return the key of the line of a group that is written as a whole."""
    return f"{JOURNAL}/group.{quote(path, safe='')}.json"


def group_of(key: str) -> str | None:
    """Return the group whose line `key` is, or None."""
    name = key.removeprefix(f"{JOURNAL}/group.")
    return unquote(name.removesuffix(".json")) if name != key else None


def listed(files: Files) -> dict[str, list[Any]]:
    """Return files as a record holds them: ``{name: [bytes, "<16 hex digits>"]}``."""
    return {name: [size, digest] for name, (size, digest) in sorted(files.items())}


def files_of(record: Mapping[str, Any]) -> Files:
    """Return the files of a record; ValueError where it has none."""
    try:
        return {str(name): (int(size), str(digest)) for name, (size, digest) in record["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("no files") from error


def read_record(place: Place, key: str, line: bytes | None = None) -> dict[str, Any] | None:
    """Return the record at `key`, or None where there is none; StoreError where it is damaged."""
    line = place.read(key) if line is None else line
    if line is None:
        return None
    record = decode_line(line)
    if record is None:
        raise StoreError(
            f"{place.name}/{key} is damaged; run the cache command again with --repair, or pnlac-fast info --verify "
            "to see all of the damage."
        )
    return record


def written_with(place: Place, path: str) -> Files:
    """Return the files of the group `path` that the line of the group, or else the store's, lists; none without one."""
    for key in (group_key(path), STORE):
        record = read_record(place, key)
        if record is not None:
            try:
                return {name: kept for name, kept in files_of(record).items() if name.startswith(f"{path}/")}
            except (ValueError, OverflowError) as error:
                raise StoreError(
                    f"{place.name}/{key} is no line of this store; run pnlac-fast info --verify."
                ) from error
    return {}


def commit_unit(place: Place, layout: Layout, unit: int, part: int, files: Files) -> bool:
    """Write the line of a unit's part; when this returns it is committed for good. False if another writer's is there.

    The same line there already counts as written: who wrote the same bits has lost nothing.
    """
    key = unit_key(unit, part)
    line = encode_line({"unit": unit, "part": part, "layout": layout.fingerprint(), "files": listed(files)})
    if place.create(key, line):
        return True
    place.sync()
    return place.read(key) == line


def read_journal(place: Place, layout: Layout, keys: Mapping[str, int] | None = None) -> list[Committed]:
    """Return the committed parts of units, sorted; `keys` are those of the place where they are known already."""
    known = place.sizes(f"{JOURNAL}/") if keys is None else keys
    lines = place.read_all(key for key in known if _UNIT.fullmatch(key))
    found = []
    for key, line in lines.items():
        record = read_record(place, key, line)
        assert record is not None
        try:
            unit, part, files = int(record["unit"]), int(record["part"]), files_of(record)
            ours = record["layout"] == layout.fingerprint() and unit_key(unit, part) == key
        except (KeyError, TypeError, ValueError):
            ours = False
        if not ours or not (0 <= unit < len(layout.units) and 0 <= part < layout.parts):
            raise StoreError(
                f"{place.name}/{key} belongs to another store; put the store's own file back, or use --repair."
            )
        found.append(Committed(unit, part, files))
    return sorted(found)


def done_units(committed: list[Committed], layout: Layout) -> set[int]:
    """Return the units of which every part is committed."""
    parts = [record.unit for record in committed]
    return {unit for unit in set(parts) if parts.count(unit) == layout.parts}
