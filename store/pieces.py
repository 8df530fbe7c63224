"""Write a file of signed pieces at the disk's own rate, durably and under its name only when it is complete."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pnlac_fast.store.durable import PARTIAL
from pnlac_fast.store.shards import CRC_BYTES

_EARLY = 4 << 20  # bytes after which the disk is set to work


class Written(NamedTuple):
    """What was written.

    Attributes
    ----------
    bytes : int
        Length of the file.
    checksum : int
        The CRC-32 (zlib's) of the last four bytes of every piece, which are the piece's own CRC-32C. It depends on
        every bit of the file as the CRC-32 of the whole would, and takes no second pass over it.
    """

    bytes: int
    checksum: int


def write_pieces(path: Path, pieces: Iterable[npt.NDArray[np.uint8]]) -> Written:
    """Write `pieces`, each ending in its CRC-32C, so that the file is either as before or complete and on the disk.

    The name is durable when its directory is fsynced, which is left to the caller.
    """
    partial = path.with_name(path.name + PARTIAL)
    size = checksum = started = 0
    with partial.open("wb", buffering=0) as file:
        for piece in pieces:
            checksum = zlib.crc32(piece[-CRC_BYTES:].data, checksum)
            _write_all(file.fileno(), piece)
            size += piece.size
            if size - started >= _EARLY:
                _start_writing(file.fileno(), started, size - started)
                started = size
        os.fsync(file.fileno())
    partial.replace(path)
    return Written(size, checksum)


def _write_all(descriptor: int, piece: npt.NDArray[np.uint8]) -> None:
    done = 0
    while done < piece.size:
        done += os.write(descriptor, piece[done:].data)


def _start_writing(descriptor: int, start: int, length: int) -> None:
    """Let the disk work on what was written while the next pieces are made, and not only from fsync on.

    That is what the advice amounts to on Linux, for pages that have not been written yet; they stay in memory.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)
