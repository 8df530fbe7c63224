"""Files that are on the disk before anyone is told so."""

from __future__ import annotations

import asyncio
import os
import zlib
from pathlib import Path

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

PARTIAL = ".partial"


class DurableStore(LocalStore):
    """A Zarr store on local disk whose values are fsynced before they get their name, and are noted.

    zarr's own LocalStore writes under a temporary name and renames, so that a killed process leaves no torn value, but
    it never calls fsync: after a power cut a renamed file may be empty. The temporary name here follows from the key,
    so that writing a value again after a crash also takes away what the crash left.

    Attributes
    ----------
    written : dict of str to tuple of int
        Bytes and CRC-32 (zlib's) of each value written since the last call of `flush`. Not CRC-32C: chunks end in
        their own, and the CRC-32C of any bytes followed by their CRC-32C is one and the same number.
    """

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self.written: dict[str, tuple[int, int]] = {}
        self._touched: set[Path] = set()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DurableStore) and self.root == other.root

    def set_sync(self, key: str, value: Buffer) -> None:
        self._check_writable()
        content = value.as_numpy_array().data
        target = self.root / key
        if not target.parent.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            self._touched.update(parent for parent in target.parents if parent.is_relative_to(self.root))
        write_file(target, content)
        self._touched.add(target.parent)
        self.written[key] = (content.nbytes, zlib.crc32(content))

    async def set(self, key: str, value: Buffer) -> None:
        await asyncio.to_thread(self.set_sync, key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        if not await self.exists(key):
            await self.set(key, value)

    def flush(self) -> dict[str, tuple[int, int]]:
        """Make the names of all values written since the last flush durable, and return `written`."""
        for directory in sorted(self._touched):
            sync_directory(directory)
        self._touched = set()
        written, self.written = self.written, {}
        return dict(sorted(written.items()))


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write `content` to `path` so that the file is either as before or complete and on the disk."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
