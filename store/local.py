"""A store in a local directory: what is written is on the disk, and groups come and go at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, unquote

from zarr.storage import LocalStore

from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.files import LocalFiles
from pnlac_fast.store.places import HIDDEN, Bytes, Place, Sum, sum_of
from pnlac_fast.store.schema import is_whole

PARTIAL = ".partial"
LOCK, WORK, WRITERS = ".lock", ".work", ".writers"
_OLD = "old."
_EARLY = 4 << 20  # bytes after which the disk is set to work


class LocalPlace(Place):
    """A directory that may not exist yet.

    zarr's own LocalStore renames a complete file into place, but never calls fsync: after a power cut a renamed file
    may be empty. Here a file is fsynced under a temporary name, renamed, and its directory fsynced by `sync`. The
    temporary name follows from the key, so that writing a value again after a crash takes away what the crash left.
    """

    threads = 1

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, str(root)
        self.store = LocalStore(root, read_only=True)
        self._touched: set[Path] = set()
        self._inside: set[Path] = set()  # directories that were seen to be no links out of the store

    def read(self, key: str) -> bytes | None:
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def put(self, key: str, pieces: Iterable[Bytes]) -> None:
        target = self.root / key
        self._make(target.parent)
        write_file(target, pieces)
        self._touched.add(target.parent)

    def create(self, key: str, content: bytes) -> bool:
        target = self.root / key
        self._make(target.parent)
        partial = _write_partial(target, (content,))
        try:
            os.link(partial, target)  # unlike a rename, this refuses to replace
        except FileExistsError:
            return False
        finally:
            partial.unlink()
        self._touched.add(target.parent)
        self.sync()
        return True

    def sync(self) -> None:
        for directory in sorted(self._touched):
            sync_directory(directory)
        self._touched = set()

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found: dict[str, int] = {}
        for directory, folders, files in os.walk(self.root / prefix.rpartition("/")[0]):
            folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
            below = os.path.relpath(directory, self.root)
            for name in files:
                key = name if below == "." else f"{below}/{name}".replace(os.sep, "/")
                if key.startswith(prefix) and not name.startswith(HIDDEN):
                    with suppress(FileNotFoundError):  # a worker has just given a file its name
                        found[key] = os.lstat(os.path.join(directory, name)).st_size
        return dict(sorted(found.items()))

    def remove(self, prefix: str) -> None:
        target = self.root / prefix
        if target.is_dir():
            shutil.rmtree(target)
        elif target.exists():
            target.unlink()
        else:
            return
        sync_directory(target.parent)

    def replace(self, path: str, files: Iterable[tuple[str, Bytes]]) -> dict[str, Sum]:
        work, target = self.root / WORK, self.root / path
        self.recover()
        new = work / "new"
        written = {}
        for name, content in files:
            file = new / name
            self._make(file.parent)
            write_file(file, (content,))
            self._touched.add(file.parent)
            written[name] = sum_of(content)
        self.sync()
        self._make(target.parent)
        if target.exists():
            target.rename(work / (_OLD + quote(path, safe="")))
        new.rename(target)
        sync_directory(target.parent)
        self.recover()
        return written

    def files(self, path: str) -> LocalFiles:
        return LocalFiles(self.root / path)

    def foreign(self) -> str | None:
        if not self.root.exists():
            return None
        if not self.root.is_dir():
            raise StoreError(
                f"{self.name} is a file; give the path of a directory that is a store or is not there yet."
            )
        # A crash between the first steps of making a store leaves no more than these.
        ours = {LOCK, WORK, WRITERS, "zarr.json" + PARTIAL}
        return min((entry.name for entry in self.root.iterdir() if entry.name not in ours), default=None)

    def recover(self) -> None:
        """Remove what was being made when a process died, but put a group back that had only been moved away."""
        work = self.root / WORK
        if work.exists():
            for old in work.glob(_OLD + "*"):
                path = unquote(old.name.removeprefix(_OLD))
                if is_whole(path) and not (self.root / path).exists():
                    old.rename(self.root / path)
            shutil.rmtree(work)

    @contextmanager
    def changing(self) -> Iterator[None]:
        self._make(self.root)
        descriptor = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            _lock(descriptor, wait=True)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def claim(self, slot: tuple[int, int, int]) -> Iterator[None]:
        worker, workers, part = slot
        self._make(self.root / WRITERS)
        own = self.root / WRITERS / f"{worker}.{workers}.{part}"
        descriptor = os.open(own, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            held = [] if _lock(descriptor, wait=False) else [own]
            # Workers of another number would share units with this one.
            held += [
                other
                for other in sorted((self.root / WRITERS).iterdir())
                if other.name.split(".")[1] != str(workers) and _held(other)
            ]
            if held:
                other, of, _ = held[0].name.split(".")
                who = "Another process is writing" if of == "1" else f"Worker {other}/{of} is writing"
                raise StoreError(
                    f"{who} to {self.name}; wait until it ends, use another path, or give every process a --worker "
                    "i/n of its own with one n."
                )
            yield
        finally:
            os.close(descriptor)

    def _make(self, directory: Path) -> None:
        if directory not in self._inside:
            if not directory.resolve().is_relative_to(self.root.resolve()):
                raise StoreError(f"{directory} leads out of the store, and is not written to; put a directory there.")
            self._inside.add(directory)
        if not directory.exists():
            directory.mkdir(parents=True, exist_ok=True)
            above = (parent for parent in directory.parents if parent.is_relative_to(self.root))
            self._touched.update((*above, self.root.parent))


def write_file(path: Path, pieces: Iterable[Bytes]) -> None:
    """Write the joined `pieces` to `path` so that the file is either as before or complete and on the disk."""
    _write_partial(path, pieces).replace(path)


def _write_partial(path: Path, pieces: Iterable[Bytes]) -> Path:
    partial = path.with_name(path.name + PARTIAL)
    size = started = 0
    with open(partial, "wb", buffering=0, opener=_no_link) as file:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:  # the system may take less than all of it
                written = os.write(file.fileno(), rest)
                rest, size = rest[written:], size + written
            if size - started >= _EARLY:
                _start_writing(file.fileno(), started, size - started)
                started = size
        os.fsync(file.fileno())
    return partial


def _no_link(path: str, flags: int) -> int:
    """Open a file, but not what a link of that name leads to."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _start_writing(descriptor: int, start: int, length: int) -> None:
    """Let the disk work on what was written while the next pieces are made, and not only from fsync on.

    That is what the advice amounts to on Linux, for pages that have not been written yet; they stay in memory.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Take the exclusive lock of an open file; the kernel drops it when the process ends."""
    import fcntl  # POSIX only, and readers of a store work anywhere

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _held(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR)
    try:
        return not _lock(descriptor, wait=False)
    finally:
        os.close(descriptor)
