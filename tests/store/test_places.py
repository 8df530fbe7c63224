"""Paths and names that are awkward, other people's directories, other versions of the format."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
import zarr

from pnlac_fast.store import (
    StoreError,
    create_results,
    info,
    open_activations,
    open_contrast,
    open_examples,
    open_writer,
)
from pnlac_fast.store.journal import decode_line, encode_line
from pnlac_fast.store.places import place_of

HOSTILE = ("../../up", "/etc/passwd", "..", ".", "__x", "zarr.json", "C:\\x", "a b%2F", "Gesundheit/é中", "c", "A")


@pytest.mark.parametrize(("models", "sites"), [(HOSTILE, ("s",)), (("m",), HOSTILE)])
def test_hostile_names_of_models_and_sites_stay_inside(tmp_path, make_sample, models, sites):
    sample = make_sample(raw="last", models=models, sites=sites, widths=dict.fromkeys(sites, 2))
    path = tmp_path / "s.zarr"
    with sample.open(path) as writer:
        sample.commit(writer, 0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.zarr"]
    for model in models:
        for site in sites:
            seen = open_activations(path, model, site)["activation"].values
            np.testing.assert_array_equal(seen, sample.raw(0)[1][model, site])
    whole = xr.open_datatree(path, engine="zarr")
    nodes = {node.attrs["pnlac"]["model"]: node for node in whole["activations"].children.values()}
    assert set(nodes) == {"base", *models}
    for node in nodes.values():
        assert {child.attrs["pnlac"]["site"] for child in node.children.values()} == set(sites)


@pytest.mark.parametrize("name", ["", "a\nb", "a\0", "\ud800", "x" * 201, "é" * 70, 5])
def test_names_that_cannot_be_kept(make_sample, name):
    for field in ("models", "tokens"):
        with pytest.raises(StoreError, match=r"name"):
            make_sample(**{field: (name,)})
    with pytest.raises(StoreError, match="listed twice"):
        make_sample(models=("a", "a"))


def test_other_peoples_directories_are_left_alone(tmp_path, sample, tree):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("text")
    zarr.create_array(tmp_path / "foreign.zarr", shape=(2,), dtype="f4")
    xr.Dataset({"x": ("a", [1])}, attrs={"pnlac": 5}).to_zarr(tmp_path / "odd.zarr", consolidated=False)
    before = tree(tmp_path)
    for name in ("home", "file", "foreign.zarr", "odd.zarr"):
        for call in (
            lambda path: sample.open(path),
            lambda path: sample.open(path, overwrite=True),
            create_results,
            open_contrast,
            info,
        ):
            with pytest.raises(StoreError, match=r"not a pnlac store|is a file"):
                call(tmp_path / name)
    assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    sample.open(tmp_path / "empty").close()
    sample.open(tmp_path / "made" / "on" / "the way").close()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "empty"),
        ("s3://me:secret@bucket/x", "holds credentials"),
        ("nosuch://x/y", "cannot be opened"),
        ("a\0b", "zero byte"),
    ],
)
def test_paths_that_are_no_places(sample, path, message):
    for call in (sample.open, create_results, open_contrast, open_examples, info):
        with pytest.raises(StoreError, match=message):
            call(path)


def rewrite(path, change):
    """Change both copies of the header."""
    document = json.loads((path / "zarr.json").read_text())
    change(document["attributes"]["pnlac"])
    (path / "zarr.json").write_text(json.dumps(document))
    line = path / "journal/store.json"
    record = decode_line(line.read_bytes())
    line.write_bytes(encode_line(record | {"attributes": document["attributes"]}))


def test_newer_major_is_refused_and_newer_minor_opens(finished, sample):
    path = finished
    before = open_contrast(path).load()

    def newer_minor(ours):
        ours["version"]["minor"] = 7
        ours["layout"]["something_new"] = True

    rewrite(path, newer_minor)
    xr.testing.assert_identical(open_contrast(path).load(), before)
    assert info(path)["format_version"] == "1.7"
    sample.open(path).close()
    rewrite(path, lambda ours: ours["version"].update(major=2, minor=0))
    for call in (open_contrast, info, sample.open, lambda path: sample.open(path, overwrite=True), create_results):
        with pytest.raises(StoreError, match=r"format 2\.0, and this version reads formats up to 1\.x; upgrade"):
            call(path)


@pytest.mark.parametrize("damage", ["layout", "units", "widths"])
def test_damaged_header_is_a_sentence(finished, damage):
    path = finished
    rewrite(path, lambda ours: ours.update(layout=5) if damage == "layout" else ours["layout"].update({damage: 3}))
    with pytest.raises(StoreError, match="is damaged"):
        info(path)


def test_examples_must_fit(tmp_path, sample):
    for examples in ({"topic": []}, sample.examples | {"key": ["x"]}, sample.examples | {"topic": ["unknown"] * 12}):
        with pytest.raises(ValueError, match="example"):
            open_writer(tmp_path / "s.zarr", sample.layout, provenance={}, examples=examples)
    assert not (tmp_path / "s.zarr").exists()


def test_every_array_is_checksummed_and_none_has_fixed_width_text(finished_raw):
    arrays = [json.loads(file.read_text()) for file in finished_raw.rglob("zarr.json")]
    arrays = [array for array in arrays if array["node_type"] == "array"]
    assert len(arrays) > 20
    for array in arrays:
        last = array["codecs"][-1]
        if last["name"] == "sharding_indexed":
            assert last["configuration"]["index_codecs"][-1]["name"] == "crc32c"
            last = last["configuration"]["codecs"][-1]
        assert last["name"] == "crc32c"
        assert array["data_type"] in ("float32", "float64", "int64", "int32", "string")
        if array["data_type"].startswith("float"):
            assert array["fill_value"] == "NaN"
        assert array["dimension_names"]


def test_importing_the_store_loads_no_torch():
    code = "import sys, pnlac_fast.store; print([m for m in ('torch', 'transformers', 'dask') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_listing_while_another_worker_gives_a_file_its_name(finished, monkeypatch):
    place = place_of(finished)
    before, walk = place.sizes(), os.walk

    def with_one_gone(top):
        for directory, folders, files in walk(top):
            yield directory, folders, [*files, "c.0.partial"]

    monkeypatch.setattr(os, "walk", with_one_gone)
    assert place.sizes() == before
