"""Three readers agree on every array, and two writers never share a slot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray as xr
import zarr

from pnlac_fast.store import StoreError

SLOT = """
import runpy, sys
from pathlib import Path
from pnlac_fast.store import StoreError
sample = runpy.run_path(sys.argv[1])["Sample"]()
try:
    sample.open(Path(sys.argv[2]), worker=(int(sys.argv[3]), int(sys.argv[4]))).close()
    print("taken")
except StoreError as error:
    print(error)
"""


def test_zarr_tensorstore_and_xarray_agree_on_every_array(finished_raw):
    tree = xr.open_datatree(finished_raw, engine="zarr")
    documents = {file.parent: json.loads(file.read_text()) for file in finished_raw.rglob("zarr.json")}
    paths = [path for path, document in documents.items() if document["node_type"] == "array"]
    assert len(paths) == 40
    numbers = 0
    for path in paths:
        name = str(path.relative_to(finished_raw))
        by_zarr = zarr.open_array(path, mode="r")[...]
        by_xarray = tree[name].variable
        if by_zarr.dtype.kind == "T":  # tensorstore has no such type; the two others need not have the same one
            assert by_xarray.values.astype(object).tolist() == by_zarr.astype(object).tolist()
            continue
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        by_tensorstore = tensorstore.open(spec, open=True).result().read().result()
        np.testing.assert_array_equal(by_tensorstore, by_zarr)
        fill = by_xarray.encoding.get("_FillValue")  # which xarray turns into NaN where it is a number
        values = by_zarr if fill is None else np.where(by_zarr == fill, np.nan, by_zarr)
        np.testing.assert_array_equal(by_xarray.values, values)
        numbers += 1
    assert numbers > 30


@pytest.mark.parametrize(
    ("held", "asked", "said"),
    [
        ((0, 1), (0, 1), "Another process is writing"),
        ((0, 2), (0, 2), "Worker 0/2 is writing"),
        ((0, 2), (1, 2), "taken"),
        ((1, 2), (0, 3), "Worker 1/2 is writing"),
        ((0, 2), (0, 1), "Worker 0/2 is writing"),
    ],
)
def test_two_processes_share_no_slot(tmp_path, sample, held, asked, said):
    path, script = tmp_path / "s.zarr", Path(__file__).with_name("conftest.py")
    with sample.open(path, worker=held) as writer:
        command = [sys.executable, "-c", SLOT, str(script), str(path), *map(str, asked)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith(said)
        if said != "taken":
            with pytest.raises(StoreError, match=said):
                sample.open(path, worker=asked)
        sample.commit(writer, writer.pending[0])
    sample.open(path, worker=asked).close()


def test_links_out_of_the_store_are_not_written_through(tmp_path, sample, tree):
    outside = tmp_path / "outside"
    (outside / "base").mkdir(parents=True)
    (outside / "precious").write_text("mine")
    path = tmp_path / "s.zarr"
    sample.open(path).close()
    base = path / "partials/mlp_mid/base"
    (base / "zarr.json").replace(outside / "base" / "zarr.json")
    base.rmdir()
    base.symlink_to(outside / "base")
    (path / "partials/n/c.0.0").symlink_to(outside / "precious")
    (path / "partials/n/c.1.0.partial").symlink_to(outside / "precious")
    before = tree(outside)
    with sample.open(path) as writer:
        for unit, said in ((0, "leads out of the store"), (1, "symbolic links")):
            with pytest.raises(StoreError, match=said):
                sample.commit(writer, unit)
    base.unlink()
    with sample.open(path, repair=True) as writer:
        sample.commit(writer, 0)
    assert not (path / "partials/n/c.0.0").is_symlink()
    assert tree(outside) == before


def test_a_store_that_is_a_link_is_written_to_where_it_leads(tmp_path, sample):
    (tmp_path / "disk").mkdir()
    (tmp_path / "s.zarr").symlink_to(tmp_path / "disk")
    sample.fill(tmp_path / "s.zarr")
    assert (tmp_path / "disk" / "zarr.json").exists()


def test_what_a_forged_crash_asks_for_stays_inside(tmp_path, sample):
    path = tmp_path / "s.zarr"
    sample.open(path).close()
    for name in ("old.%2E%2E%2Fevil", "old.%2Fevil", "old.examples", "old.results%2F..%2F..%2Fevil"):
        (path / ".work" / name).mkdir(parents=True)
    sample.open(path).close()
    assert os.listdir(tmp_path) == ["s.zarr"]
    assert not (path / ".work").exists()
