"""Parts of files, from a local disk or from any Zarr store."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from zarr.abc.store import RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

T = TypeVar("T")
Bytes = npt.NDArray[np.uint8]
_TOGETHER = 32  # requests under way at once, which also bounds the memory they take


class Part(NamedTuple):
    """Bytes of a file: `length` of them from `start` on, or the last `length` where `start` is None."""

    key: str
    start: int | None
    length: int


class Files(Protocol):
    """Where the files of an array are. Implementations hold no open handles, so that they can be pickled."""

    def read(self, parts: Iterable[Part]) -> Iterator[Bytes | None]:
        """Yield the bytes of each part, fewer where the file ends before, and None where there is no file.

        An array is valid until the next one is asked for. Parts of one file should follow one another.
        """
        ...


@dataclass(frozen=True)
class LocalFiles:
    """The files in a directory.

    They are read, not mapped: a file that is cut off meanwhile is an error then, not a signal that ends the process.
    """

    root: Path

    def read(self, parts: Iterable[Part]) -> Iterator[Bytes | None]:
        """As `Files.read`; every part is read into the same memory, which stays in the cache."""
        buffer = np.empty(0, np.uint8)
        for key, wanted in groupby(parts, attrgetter("key")):
            path = self.root / key
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                yield from (None for _ in wanted)
                continue
            try:
                size = os.fstat(descriptor).st_size
                for part in wanted:
                    start = max(0, size - part.length) if part.start is None else part.start
                    length = max(0, min(part.length, size - start))
                    if length > buffer.size:
                        buffer = np.empty(length, np.uint8)
                    yield buffer[: _read_into(buffer[:length], descriptor, start, path)]
            finally:
                os.close(descriptor)


@dataclass(frozen=True)
class StoreFiles:
    """The files below `path` in a Zarr store, such as one on an object store."""

    store: Store
    path: str

    def read(self, parts: Iterable[Part]) -> Iterator[Bytes | None]:
        """As `Files.read`; many requests are under way at once."""
        remaining = iter(parts)
        while some := list(islice(remaining, _TOGETHER)):
            yield from answered(self._together(some), str(self.store))

    async def _together(self, parts: list[Part]) -> list[Bytes | None]:
        return await asyncio.gather(*map(self._part, parts))

    async def _part(self, part: Part) -> Bytes | None:
        wanted: RangeByteRequest | SuffixByteRequest = SuffixByteRequest(part.length)
        if part.start is not None:
            wanted = RangeByteRequest(part.start, part.start + part.length)
        found = await self.store.get(f"{self.path}/{part.key}".lstrip("/"), default_buffer_prototype(), wanted)
        return None if found is None else found.as_numpy_array().view(np.uint8)


def answered(call: Coroutine[Any, Any, T], name: str) -> T:
    """Wait for a call of a Zarr store. Whatever a client library raises becomes an OSError, as a disk's would be."""
    try:
        return sync(call)
    except OSError:
        raise
    except Exception as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"{name}: {said}") from error


def _read_into(target: Bytes, descriptor: int, start: int, path: Path) -> int:
    """Fill `target` from `start` on, and return how many bytes there were."""
    done = 0
    while done < target.size:
        try:
            count = os.preadv(descriptor, [target[done:].data], start + done)
        except OSError as error:  # which does not say of which file
            raise OSError(error.errno, error.strerror, str(path)) from error
        if not count:
            break
        done += count
    return done
