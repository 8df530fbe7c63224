"""Stores that are no directories: S3 through obstore (against moto's server), fsspec, and any zarr Store object."""

from __future__ import annotations

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from pnlac_fast.store import (
    StoreError,
    create_results,
    info,
    merge,
    open_activations,
    open_contrast,
    open_result,
    verify,
    write_result,
)
from pnlac_fast.store.places import Place, place_of


class Broken(BaseHTTPRequestHandler):
    """Passes everything on to a server, but cuts off the connection of chosen puts when their body has half arrived."""

    behind = ""
    cut: frozenset[int] = frozenset()
    puts = 0

    def do_GET(self) -> None:
        self._pass_on(b"")

    do_HEAD = do_DELETE = do_GET

    def do_PUT(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        number, Broken.puts = Broken.puts, Broken.puts + 1
        if number in self.cut:
            self.rfile.read(length // 2)
            self.connection.close()
            return
        self._pass_on(self.rfile.read(length))

    do_POST = do_PUT

    def _pass_on(self, body: bytes) -> None:
        connection = http.client.HTTPConnection(self.behind.removeprefix("http://"))
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def everything(location: object) -> dict[str, bytes]:
    place = location if isinstance(location, Place) else place_of(location)  # type: ignore[arg-type]
    return place.read_all(place.sizes())


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Give the files of the store with raw rows, written to a directory."""
    from tests.store.conftest import Sample

    return everything(Sample("last").fill(tmp_path_factory.mktemp("local") / "s.zarr"))


@pytest.mark.parametrize("kind", ["s3", "fsspec", "memory"])
def test_the_same_bytes_everywhere(kind, request, make_sample, local) -> None:
    if kind == "s3":
        where = request.getfixturevalue("bucket") + "/runs/s.zarr"
    else:
        where = "memory://somewhere/s.zarr" if kind == "fsspec" else MemoryStore()
    sample = make_sample(raw="last")
    with sample.open(where) as writer:
        for unit in (3, 0, 5):
            sample.commit(writer, unit)
    assert info(where)["units_done"] == 3
    with sample.open(where) as writer:
        assert writer.pending == (1, 2, 4)
        for unit in writer.pending:
            sample.commit(writer, unit)
        writer.finish()
    assert everything(where) == local
    want = np.concatenate([sample.raw(unit)[1]["second", "resid"] for unit in range(6)], 1)
    np.testing.assert_array_equal(open_activations(where, "second", "resid")["activation"], want)
    ds = xr.Dataset({"a": ("b", [1, 2])})
    for _ in range(2):  # made, then replaced
        write_result(where, "x", ds)
        xr.testing.assert_identical(open_result(where, "x"), ds)
    stock = xr.open_zarr(place_of(where).store, group="contrast")
    xr.testing.assert_equal(stock.load(), open_contrast(where).load())
    if kind == "s3":
        xr.testing.assert_equal(xr.open_dataset(where, engine="pnlac").load(), stock)


def test_a_second_writer_is_refused_at_its_first_commit(bucket, sample) -> None:
    where = bucket + "/s.zarr"
    with sample.open(where) as first, sample.open(where) as second:
        sample.commit(first, 0)
        with pytest.raises(StoreError, match=r"Another process has just committed unit 0.*--worker i/n"):
            sample.commit(second, 0)


def test_the_service_decides_who_commits(bucket, sample, monkeypatch) -> None:
    where = bucket + "/s.zarr"
    with sample.open(where) as first, sample.open(where) as second:
        real = second.place.read
        monkeypatch.setattr(second.place, "read", lambda key: None if "unit.0" in key else real(key))
        sample.commit(first, 0)
        with pytest.raises(StoreError, match="Another process has just committed unit 0"):
            sample.commit(second, 0)
    place = place_of(where)
    assert place.create("a", b"1")
    assert not place.create("a", b"2")  # answered with 412
    assert place.read("a") == b"1"


def test_workers_at_the_same_time(bucket, make_sample, local) -> None:
    where, errors = bucket + "/s.zarr", []

    def work(index: int) -> None:
        sample = make_sample(raw="last")
        try:
            with sample.open(where, worker=(index, 3)) as writer:
                for unit in writer.pending:
                    sample.commit(writer, unit)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    merge(where)
    assert everything(where) == local


def test_interrupted_puts_are_sent_again(service, bucket, make_sample, local, monkeypatch) -> None:
    monkeypatch.setattr(Broken, "behind", service)
    monkeypatch.setattr(Broken, "puts", 0)
    monkeypatch.setattr(Broken, "cut", frozenset((2, 9, 30, 31, 50)))
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        make_sample(raw="last").fill(bucket + "/s.zarr")
        assert Broken.puts > 60
        assert everything(bucket + "/s.zarr") == local
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()


class Failing(WrapperStore[MemoryStore]):
    """A store whose n-th write fails, before or after it was done."""

    left = -1
    after = False

    async def set(self, key: str, value: Buffer) -> None:
        Failing.left -= 1
        if Failing.left == -1 and not self.after:
            raise RuntimeError("connection reset")
        await super().set(key, value)
        if Failing.left == -1:
            raise RuntimeError("connection reset")

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        await self.set(key, value)


@pytest.mark.parametrize("after", [False, True])
def test_a_write_that_fails_anywhere_costs_nothing(make_sample, local, after, monkeypatch) -> None:
    monkeypatch.setattr(Failing, "after", after)
    sample = make_sample(raw="last")
    for number in (*range(12), *range(12, 400, 17)):
        store = Failing(MemoryStore())
        monkeypatch.setattr(Failing, "left", number)
        try:
            sample.fill(store)
        except (StoreError, OSError) as error:
            assert "connection reset" in str(error)  # noqa: PT017
        else:
            break  # there are no more writes than that
        sample.fill(store)
        assert everything(store) == local
    assert 60 < number < 390


def test_places_that_cannot_be_used(bucket, sample, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="opened to be read only"):
        sample.open(MemoryStore(read_only=True))
    with pytest.raises(OSError, match=r"s3://no-such-bucket-at-all/s.zarr: .*"):
        sample.open("s3://no-such-bucket-at-all/s.zarr")
    with pytest.raises(StoreError, match="does not exist"):
        info(bucket + "/nothing.zarr")
    other = bucket + "/other.zarr"
    zarr.create_array(place_of(other)._writable, shape=(2,), dtype="f4")  # type: ignore[attr-defined]
    for call in (sample.open, create_results, info):
        with pytest.raises(StoreError, match="not a pnlac store"):
            call(other)
    sample.open(LocalStore(tmp_path / "l.zarr")).close()
    assert (tmp_path / "l.zarr" / "journal" / "store.json").exists()


class Silent(WrapperStore[MemoryStore]):
    """A store that answers no reads of parts of files."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if byte_range is not None:
            raise RuntimeError("no answer")
        return await super().get(key, prototype, byte_range)


def test_a_service_that_does_not_answer_is_a_sentence(make_sample) -> None:
    store = MemoryStore()
    make_sample(raw="last").fill(store)
    rows = open_activations(Silent(store), "base", "resid")
    with pytest.raises((StoreError, OSError), match="no answer"):
        rows.load()
    assert "no answer" in verify(Silent(store))[0].problem
