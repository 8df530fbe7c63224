"""Where a store is: a local directory, an object store, or any zarr Store; all of them as keys with bytes."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeAlias

import xxhash
from zarr.abc.store import Store

from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.files import Files

Bytes: TypeAlias = bytes | bytearray | memoryview
Sum: TypeAlias = tuple[int, str]  # bytes of a file, and their XXH3-64 as 16 hex digits
Location: TypeAlias = str | os.PathLike[str] | Store

HIDDEN = "."  # names that begin so belong to writers: locks, and groups that are being made


class Place(ABC):
    """A place for one store.

    Attributes
    ----------
    name : str
        The path or URL, for messages.
    store : zarr Store
        The same place for zarr, to be read.
    threads : int
        How many values are best written at a time.
    """

    name: str
    store: Store
    threads: int

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """Return the value of `key`, or None where there is none."""

    @abstractmethod
    def put(self, key: str, pieces: Iterable[Bytes]) -> None:
        """Write the joined `pieces` as the value of `key`: as before or complete, and in both cases on the disk.

        A piece is valid until the next one is asked for.
        """

    @abstractmethod
    def create(self, key: str, content: bytes) -> bool:
        """Write `content` unless `key` has a value already; return whether it was written. It is durable then."""

    @abstractmethod
    def sync(self) -> None:
        """Make the names of all values written so far durable."""

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the bytes of every value whose key begins with `prefix`, hidden ones left out, sorted by key."""

    @abstractmethod
    def remove(self, prefix: str) -> None:
        """Remove the value `prefix` and all below it."""

    @abstractmethod
    def replace(self, path: str, files: Iterable[tuple[str, Bytes]]) -> dict[str, Sum]:
        """Make or replace the group `path` of `files`, its own ``zarr.json`` among them; return their sums."""

    @abstractmethod
    def changing(self) -> AbstractContextManager[None]:
        """Wait for, then hold, the right to add or replace groups, where the place can grant it to one alone."""

    @abstractmethod
    def claim(self, slot: tuple[int, int, int]) -> AbstractContextManager[None]:
        """Hold the right to write as `slot`: worker, of how many, and part. StoreError where another holds it."""

    @abstractmethod
    def files(self, path: str) -> Files:
        """Return the files below `path`, to be read in parts."""

    @abstractmethod
    def foreign(self) -> str | None:
        """Return the name of something here that is not a store's, or None; StoreError where this is a file."""

    def recover(self) -> None:  # noqa: B027 - most places have nothing to tidy up
        """Tidy up what a dead process was making."""

    def write(self, key: str, pieces: Iterable[Bytes]) -> Sum:
        """Write as `put` does; return the bytes and their hash."""
        size, digest = 0, xxhash.xxh3_64()

        def counted() -> Iterator[Bytes]:
            nonlocal size
            for piece in pieces:
                size += len(piece)
                digest.update(piece)
                yield piece

        self.put(key, counted())
        return size, digest.hexdigest()

    def read_all(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Return the values of several keys, those without one left out."""
        listed = list(keys)
        with ThreadPoolExecutor(self.threads) as pool:
            found = dict(zip(listed, pool.map(self.read, listed), strict=True))
        return {key: value for key, value in found.items() if value is not None}


def sum_of(content: Bytes) -> Sum:
    """Return how many bytes there are, and their XXH3-64.

    Not CRC-32C: chunks end in their own, and the CRC-32C of any bytes followed by their CRC-32C is always the same. And
    XXH3 keeps up with any disk, which zlib's CRC-32 does not.
    """
    return len(content), xxhash.xxh3_64(content).hexdigest()


def place_of(location: Location | Place) -> Place:
    """Return the place that a path, URL or zarr Store names.

    Raises
    ------
    StoreError
        If it is empty, no path, or a URL for which a package is missing.
    """
    from pnlac_fast.store.local import LocalPlace
    from pnlac_fast.store.remote import RemotePlace, store_of_url

    if isinstance(location, Place):
        return location
    if isinstance(location, Store):
        root = getattr(location, "root", None)
        return LocalPlace(root) if isinstance(root, Path) else RemotePlace(location, str(location))
    text = os.fspath(location)
    if not text:
        raise StoreError("The path of the store is empty; name a directory such as run.zarr.")
    if "\0" in text:
        raise StoreError("The path of the store holds a zero byte; give an ordinary path.")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalPlace(Path(text))
    if scheme == "file":
        return LocalPlace(Path(rest))
    return RemotePlace(store_of_url(text), text)
