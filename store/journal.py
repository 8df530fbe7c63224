"""The journal: one checksummed line per committed unit. Readers trust only what it names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import google_crc32c

from pnlac_fast.store.durable import sync_directory
from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.layout import Layout
from pnlac_fast.store.locks import try_lock

JOURNAL = "journal.jsonl"
_HEAD, _MIDDLE, _TAIL = b'{"crc32c":"', b'","record":', b"}"


class Committed(NamedTuple):
    """A committed unit: its index in the layout and, for each file it wrote, the bytes and the CRC-32."""

    unit: int
    files: dict[str, tuple[int, int]]


def encode_line(record: dict[str, Any]) -> bytes:
    """Return the line ``{"crc32c":"<8 hex digits>","record":<record>}``, with the checksum of the record's bytes."""
    body = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    return _HEAD + b"%08x" % google_crc32c.value(body) + _MIDDLE + body + _TAIL + b"\n"


def decode_line(line: bytes) -> dict[str, Any] | None:
    """Return the record of a journal line (without its newline), or None where the line is torn or damaged."""
    start = len(_HEAD) + 8 + len(_MIDDLE)
    body = line[start : -len(_TAIL)]
    if line != _HEAD + b"%08x" % google_crc32c.value(body) + _MIDDLE + body + _TAIL:
        return None
    try:
        record = json.loads(body)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def parse(content: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records of a journal and the length of its sound beginning in bytes.

    A last line that is torn was never acknowledged, and is left out. A damaged line with a sound one after it is not a
    crash's work, and raises StoreError.
    """
    lines = content.split(b"\n")[:-1]
    decoded = [decode_line(line) for line in lines]
    sound = next((index for index, record in enumerate(decoded) if record is None), len(decoded))
    if any(record is not None for record in decoded[sound:]):
        raise StoreError(
            f"Line {sound + 1} of {path} is damaged, so it cannot be told which unit it committed; "
            "restore the file from a copy, or start again with --overwrite."
        )
    return [record for record in decoded[:sound] if record is not None], sum(len(line) + 1 for line in lines[:sound])


def read_journal(root: Path, layout: Layout) -> list[Committed]:
    """Return the committed units of the store at `root`, in the order of their commits; reads only, takes no lock."""
    path = root / JOURNAL
    return _committed(parse(path.read_bytes(), path)[0], layout, path) if path.exists() else []


def _committed(records: list[dict[str, Any]], layout: Layout, path: Path) -> list[Committed]:
    if not records:
        return []
    head, *rest = records
    if head.get("layout") != layout.fingerprint():
        raise StoreError(f"{path} belongs to another store; put the store's own journal back, or use --overwrite.")
    seen: dict[int, Committed] = {}
    for record in rest:
        try:
            unit = int(record["unit"])
            files = {str(name): (int(size), int(crc, 16)) for name, (size, crc) in record["files"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{path} has a line that is no unit's; restore it or use --overwrite.") from error
        if unit in seen or not 0 <= unit < len(layout.units):
            raise StoreError(f"{path} names unit {unit}, which is doubled or unknown; restore it or use --overwrite.")
        seen[unit] = Committed(unit, files)
    return list(seen.values())


class Journal:
    """The journal of one store, opened by its only writer.

    Parameters
    ----------
    root : Path
        The store's directory.

    Raises
    ------
    StoreError
        If another writer holds the journal.
    """

    def __init__(self, root: Path) -> None:
        self.path = root / JOURNAL
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not try_lock(self._descriptor):
                raise StoreError(f"Another process is writing to {root}; wait until it ends, or use another path.")
            self._records, self._length = parse(self.path.read_bytes(), self.path)
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def started(self) -> bool:
        """Whether the journal has its first line, which is written when the store's arrays are all there."""
        return bool(self._records)

    @property
    def closed(self) -> bool:
        """Whether the right to write was given back."""
        return self._descriptor < 0

    def start(self, layout: Layout) -> None:
        """Write the first line, which ties the journal to `layout`."""
        self._append({"journal": 1, "layout": layout.fingerprint()})
        sync_directory(self.path.parent)

    def committed(self, layout: Layout) -> list[Committed]:
        """Return the committed units in the order of their commits."""
        return _committed(self._records, layout, self.path)

    def commit(self, unit: int, files: dict[str, tuple[int, int]]) -> None:
        """Write the line of `unit`; when this returns, the unit is committed for good."""
        listed = {name: [size, f"{crc:08x}"] for name, (size, crc) in files.items()}
        self._append({"unit": unit, "files": listed})

    def clear(self) -> None:
        """Forget everything, durably."""
        os.ftruncate(self._descriptor, 0)
        os.fsync(self._descriptor)
        self._records, self._length = [], 0

    def _append(self, record: dict[str, Any]) -> None:
        line = encode_line(record)
        os.ftruncate(self._descriptor, self._length)  # cuts the torn tail of a crash or of a failed append
        written = 0
        while written < len(line):
            written += os.pwrite(self._descriptor, line[written:], self._length + written)
        os.fsync(self._descriptor)
        self._records.append(record)
        self._length += len(line)

    def close(self) -> None:
        """Give the journal, and with it the right to write, back; closing twice does nothing."""
        if not self.closed:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
