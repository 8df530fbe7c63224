"""The errors of the store that a user can put right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class StoreError(Exception):
    """A store cannot be opened, read or written as asked: one sentence that names the next action. Exit code 3."""

    exit_code = 3


class VersionError(StoreError):
    """A newer major version of the format wrote the store."""


class ShardError(StoreError):
    """A shard of raw activations is missing or damaged.

    Attributes
    ----------
    key : str
        The shard's file, relative to the array.
    """

    def __init__(self, array: str, key: str, reason: str) -> None:
        super().__init__(array, key, reason)
        self.key = key

    def __str__(self) -> str:
        array, key, reason = self.args
        return f"{array}, shard {key}: {reason}; `pnlac-fast info --verify` finds all that has to be redone."


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn what a disk or an object store refuses into a StoreError; `what` is that which was to be written, where."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{what} could not be written ({error.strerror or error}); make room, or mend the disk or its permissions, "
            "and run the same command again: nothing is lost."
        ) from error
