"""A store in an object store, or wherever a zarr Store puts bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import ObjectStore

from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.files import StoreFiles, answered
from pnlac_fast.store.places import HIDDEN, Bytes, Place, Sum, sum_of

METADATA = "zarr.json"


T = TypeVar("T")


class RemotePlace(Place):
    """Any zarr Store. A value counts as durable when the store has acknowledged it.

    There are no locks here. What keeps two writers of one slot apart is `create`: on S3 and the like a conditional put
    (If-None-Match), which the service decides; elsewhere a look before the write.
    """

    threads = 8

    def __init__(self, store: Store, name: str) -> None:
        self.name, self._writable = name, store
        self.store = store if store.read_only else store.with_read_only(True)

    def read(self, key: str) -> bytes | None:
        found = self._run(self.store.get(key, default_buffer_prototype()))
        return None if found is None else found.to_bytes()

    def put(self, key: str, pieces: Iterable[Bytes]) -> None:
        self._check_writable()
        content = bytearray()
        for piece in pieces:
            content += memoryview(piece)
        self._run(self._writable.set(key, _buffer(content)))

    def create(self, key: str, content: bytes) -> bool:
        self._check_writable()
        if isinstance(self._writable, ObjectStore):
            return self._run(_put_if_absent(self._writable.store, key, content))
        if self._run(self._writable.exists(key)):
            return False
        self._run(self._writable.set_if_not_exists(key, _buffer(content)))
        return self.read(key) == content

    def sync(self) -> None:
        """Do nothing: an acknowledged value has its name."""

    def sizes(self, prefix: str = "") -> dict[str, int]:
        async def look() -> dict[str, int]:
            if isinstance(self.store, ObjectStore):  # one listing tells the sizes too
                folder = prefix.rpartition("/")[0]
                listed = [meta async for page in self.store.store.list(folder or None) for meta in page]
                return {meta["path"]: meta["size"] for meta in listed}
            keys = [key async for key in self.store.list()]
            return dict(zip(keys, await asyncio.gather(*map(self.store.getsize, keys)), strict=True))

        return {
            key: size
            for key, size in sorted(self._run(look()).items())
            if key.startswith(prefix) and not any(part.startswith(HIDDEN) for part in key.split("/"))
        }

    def remove(self, prefix: str) -> None:
        self._check_writable()
        self._run(self._writable.delete(prefix))
        self._run(self._writable.delete_dir(prefix))

    def replace(self, path: str, files: Iterable[tuple[str, Bytes]]) -> dict[str, Sum]:
        # A group is there when its zarr.json is: it goes first and comes last.
        self.remove(f"{path}/{METADATA}")
        self.remove(path)
        written: dict[str, Sum] = {}
        last: Bytes = b""
        for name, content in files:
            written[name] = sum_of(content)
            if name == METADATA:
                last = content
            else:
                self.put(f"{path}/{name}", (content,))
        self.put(f"{path}/{METADATA}", (last,))
        return written

    @contextmanager
    def changing(self) -> Iterator[None]:
        yield

    @contextmanager
    def claim(self, slot: tuple[int, int, int]) -> Iterator[None]:
        self._check_writable()
        yield

    def files(self, path: str) -> StoreFiles:
        return StoreFiles(self.store, path)

    def foreign(self) -> str | None:
        return next(iter(self.sizes()), None)

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        return answered(call, self.name)

    def _check_writable(self) -> None:
        if self._writable.read_only:
            raise StoreError(f"{self.name} was opened to be read only; give a store that can be written.")


def store_of_url(url: str) -> Store:
    """Return the zarr Store of a URL: obstore for ``s3://``, fsspec for all others.

    Credentials, region and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and so on), never
    from the URL.
    """
    scheme, _, rest = url.partition("://")
    if "@" in rest.split("/", 1)[0]:
        raise StoreError(f"The {scheme} URL holds credentials; set them in the environment instead.")
    try:
        if scheme == "s3":
            from obstore.store import from_url

            return ObjectStore(from_url(url))
        from zarr.storage import FsspecStore

        return FsspecStore.from_url(url)
    except ImportError as error:
        missing = error.name or str(error)
        raise StoreError(f"{scheme}:// needs the package {missing}; pip install 'pnlac-fast[remote]'.") from error
    except (ValueError, OSError) as error:
        raise StoreError(f"{url} cannot be opened ({error}); check the URL and the credentials.") from error


async def _put_if_absent(store: Any, key: str, content: bytes) -> bool:
    import obstore

    try:
        await obstore.put_async(store, key, content, mode="create")
    except obstore.exceptions.AlreadyExistsError:
        return False
    return True


def _buffer(content: Any) -> Any:
    return default_buffer_prototype().buffer.from_bytes(content)
