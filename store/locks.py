"""Who may write: one writer of units for its whole life, and one change of the groups at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


def try_lock(descriptor: int) -> bool:
    """Take the exclusive lock of an open file unless another holds it; the kernel drops it when the process ends."""
    import fcntl  # POSIX only, and readers of a store work anywhere

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def changing_groups(root: Path) -> Iterator[None]:
    """Wait for, then hold, the right to add or replace groups of the store at `root`."""
    import fcntl

    descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
