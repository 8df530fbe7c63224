"""ENOSPC and EIO at the n-th call that changes something: a sentence, nothing lost, and the same command goes on."""

from __future__ import annotations

import errno
import os
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from pnlac_fast.store import (
    StoreError,
    create_results,
    merge,
    open_contrast,
    open_partials,
    open_result,
    verify,
    write_result,
)

disk = runpy.run_path(str(Path(__file__).with_name("faults.py")))["disk"]
LONG = bool(os.environ.get("PNLAC_LONG_TESTS"))


@pytest.fixture
def sample(make_sample):
    """The smallest store; in a long run one that has files of every kind."""
    raw = "last" if LONG else "none"
    return make_sample(raw=raw, models=("m",), sites=("s",), tokens=("last",), layers=3, widths={"s": 4})


@pytest.fixture
def whole_files(tree):
    """Give what `tree` gives but for halves of files: where removing one fails, it stays until it is written again."""
    return lambda path: {name: content for name, content in tree(path).items() if not name.endswith(".partial")}


def damaged(path):
    return [finding for finding in verify(path) if finding.kind != "leftover"]


def result(number: float) -> xr.Dataset:
    return xr.Dataset({"x": ("a", np.full(3, number))})


def every_fault(monkeypatch, action, undo, step=1):
    """Let each call that `action` makes fail in turn; yield after each that raised, which it must with a sentence."""
    with disk(monkeypatch) as counted:
        action()
    undo()
    assert counted.calls > 10
    for number in range(0, counted.calls, 1 if LONG else step):
        for error in (errno.ENOSPC, errno.EIO) if LONG else ((errno.ENOSPC, errno.EIO)[number % 2],):
            with disk(monkeypatch, number, error) as faulty:
                with pytest.raises(StoreError) as caught:
                    action()
                assert faulty.failed
            assert os.strerror(error) in str(caught.value)
            assert "nothing is lost" in str(caught.value)
            yield number
            undo()


def test_creation(tmp_path, sample, monkeypatch, whole_files):
    path = tmp_path / "s.zarr"
    sample.open(tmp_path / "whole.zarr").close()
    whole = whole_files(tmp_path / "whole.zarr")
    remove = lambda: shutil.rmtree(path, ignore_errors=True)  # noqa: E731
    for _ in every_fault(monkeypatch, lambda: sample.open(path).close(), remove):
        sample.open(path).close()
        assert whole_files(path) == whole
        assert not damaged(path)


def test_units(tmp_path, sample, monkeypatch, whole_files):
    path = tmp_path / "s.zarr"
    with sample.open(path) as writer:
        sample.commit(writer, 1)
    before, saved = whole_files(path), shutil.copytree(path, tmp_path / "before.zarr")

    def restore():
        shutil.rmtree(path)
        shutil.copytree(saved, path)

    def action():
        with sample.open(path) as writer:
            sample.commit(writer, 0)

    def with_the_same_writer():
        with sample.open(path) as writer:
            for _ in range(2):
                try:
                    sample.commit(writer, 0)
                    return
                except StoreError as error:
                    first = error
            raise first

    action()
    whole = whole_files(path)
    restore()
    for _ in every_fault(monkeypatch, action, restore):
        assert open_partials(path, "s").sizes["unit"] in (1, 2)
        assert all(content == before[name] for name, content in whole_files(path).items() if name in before)
        assert not damaged(path)
        with sample.open(path) as writer:
            if 0 in writer.pending:
                sample.commit(writer, 0)
        assert whole_files(path) == whole
    with disk(monkeypatch) as counted:
        action()
    opening = counted.calls
    for number in range(opening // 3, opening):
        restore()
        with disk(monkeypatch, number):
            with_the_same_writer()
        assert whole_files(path) == whole


def test_statistics(tmp_path, sample, monkeypatch, whole_files):
    path = tmp_path / "s.zarr"
    with sample.open(path) as writer:
        for unit in writer.pending:
            sample.commit(writer, unit)
    saved = shutil.copytree(path, tmp_path / "before.zarr")
    merge(path)
    whole = whole_files(path)

    def restore():
        shutil.rmtree(path)
        shutil.copytree(saved, path)

    restore()
    for _ in every_fault(monkeypatch, lambda: merge(path), restore, step=4):
        assert not damaged(path)
        merge(path)
        assert whole_files(path) == whole
    merge(path)
    assert open_contrast(path).sizes["topic"] == 2


def test_results(tmp_path, monkeypatch, whole_files):
    path = tmp_path / "r.zarr"
    for _ in every_fault(monkeypatch, lambda: create_results(path), lambda: shutil.rmtree(path, ignore_errors=True)):
        create_results(path)
        assert not damaged(path)
    create_results(path)
    write_result(path, "x", result(1))
    saved = shutil.copytree(path, tmp_path / "before.zarr")
    write_result(path, "x", result(2))
    whole = whole_files(path)

    def restore():
        shutil.rmtree(path)
        shutil.copytree(saved, path)

    restore()
    for _ in every_fault(monkeypatch, lambda: write_result(path, "x", result(2)), restore):
        assert not damaged(path)
        try:
            assert open_result(path, "x")["x"].values[0] in (1, 2)
        except StoreError as error:  # moved away, and moved back by the next write
            assert "has no result 'x'" in str(error)  # noqa: PT017
        write_result(path, "y", result(3))
        assert open_result(path, "x")["x"].values[0] in (1, 2)
        shutil.rmtree(path / "results/y")
        (path / "journal/group.results%2Fy.json").unlink()
        write_result(path, "x", result(2))
        assert whole_files(path) == whole
