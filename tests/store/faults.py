"""A disk that refuses: the n-th call of those that change something fails, as if it were full or broken."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CALLS = ("write", "fsync", "rename", "replace", "link", "mkdir", "unlink")


class Disk:
    """Counts calls, and lets one of them fail.

    Attributes
    ----------
    calls : int
        How many there were.
    failing : int
        The number of the call that fails, -1 for none.
    error : int or BaseException
        With which errno, or exception.
    """

    def __init__(self, failing: int = -1, error: int | BaseException = errno.ENOSPC) -> None:
        self.calls, self.failing, self.error = 0, failing, error

    @property
    def failed(self) -> bool:
        return 0 <= self.failing < self.calls

    def around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.failed and isinstance(self.error, BaseException):  # the dead do nothing more
                raise self.error
            number, self.calls = self.calls, self.calls + 1
            if number == self.failing:
                if name == "write":  # a full disk takes the beginning
                    real(args[0], args[1][: len(args[1]) // 2])
                if isinstance(self.error, BaseException):
                    raise self.error
                raise OSError(self.error, os.strerror(self.error))
            return real(*args, **kwargs)

        return call


@contextmanager
def disk(patch: Any, failing: int = -1, error: int | BaseException = errno.ENOSPC) -> Iterator[Disk]:
    """Let the disk be this one for a while; `patch` is pytest's monkeypatch."""
    found = Disk(failing, error)
    with patch.context() as patched:
        for name in CALLS:
            patched.setattr(os, name, found.around(name, getattr(os, name)))
        yield found
