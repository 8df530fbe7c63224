"""The format stays what it was: golden stores open with their numbers, and the schema holds for all that is written."""

from __future__ import annotations

import json
import runpy
import shutil
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jsonschema
import numpy as np
import pytest
import xarray as xr
import zarr

from pnlac_fast.store import (
    info,
    open_activations,
    open_contrast,
    open_examples,
    open_partials,
    open_result,
    open_sets,
    write_result,
)
from pnlac_fast.store.backend import groups

HERE = Path(__file__).parent / "golden"
SCHEMA = json.loads((resources.files("pnlac_fast.store") / "schema.json").read_text())
VALIDATORS = {
    name: jsonschema.Draft202012Validator(SCHEMA | {"$ref": f"#/$defs/{name}"}) for name in ("root", "line", "group")
}
STORES = ("statistics", "full-bfloat16", "chosen-float16", "results")


@pytest.fixture(scope="module", params=[*sorted(path.name for path in HERE.glob("format-*")), "written now"])
def golden(request, tmp_path_factory):
    """Give a folder of golden stores: each that was ever made, and one that is made by this version."""
    folder = tmp_path_factory.mktemp("golden") / "stores"
    if request.param == "written now":
        folder.mkdir()
        runpy.run_path(str(HERE / "make.py"))["main"](folder)
    else:
        shutil.copytree(HERE / request.param, folder)
    return folder


def numbers(golden: Path, name: str) -> dict[str, dict[str, Any]]:
    return json.loads((golden / "expected.json").read_text())[f"{name}.zarr"]


def agree(found: xr.Dataset, expected: dict[str, Any]) -> None:
    for name, values in expected.items():
        there = found[name].values
        if there.dtype.kind in "fiub":
            np.testing.assert_allclose(there, np.array(values, float), rtol=1e-6, err_msg=name)
        else:
            assert there.tolist() == values


@pytest.mark.parametrize("name", STORES)
def test_every_group_has_its_numbers(golden: Path, name: str) -> None:
    path = golden / f"{name}.zarr"
    functions = {"contrast": open_contrast, "examples": open_examples, "neuron_sets": open_sets}
    for group, expected in numbers(golden, name).items():
        agree(xr.open_dataset(path, engine="pnlac", group=group), expected)
        kind, *rest = group.split("/")
        if kind == "activations":
            agree(open_activations(path, unquote(rest[0]), rest[1]), expected)
        elif kind == "results":
            agree(open_result(path, rest[0]), expected)
        else:
            agree(functions[kind](path), expected)
    tree = xr.open_datatree(path, engine="pnlac")
    assert {node.path.strip("/") for node in tree.leaves} == set(groups(path))


def test_stock_readers_see_the_same(golden: Path) -> None:
    statistics, results = numbers(golden, "statistics"), numbers(golden, "results")
    for name, expected in (("statistics", statistics), ("results", results)):
        for group, values in expected.items():
            agree(xr.open_zarr(golden / f"{name}.zarr", group=group, chunks=None), values)
            agree(xr.open_datatree(golden / f"{name}.zarr", engine="zarr", chunks=None)[group].to_dataset(), values)
    for name in ("full-bfloat16", "chosen-float16"):
        for group, values in numbers(golden, name).items():
            if group == "examples":
                continue
            array = zarr.open_group(golden / f"{name}.zarr", mode="r")[f"{group}/activation"]
            stored = array[:]
            if array.attrs.get("pnlac_dtype") == "bfloat16":
                stored = (stored.astype(np.uint32) << 16).view(np.float32)
            rows = stored[:, :2] if stored.ndim == 3 else stored[:2]
            np.testing.assert_array_equal(rows, np.array(values["activation"]))


def test_what_is_written_and_what_is_not(golden: Path) -> None:
    for name, done in (("statistics", 2), ("full-bfloat16", 1), ("chosen-float16", 1)):
        told = info(golden / f"{name}.zarr", verify=True)
        assert told["findings"] == []
        assert (told["complete"], told["units_done"], told["format_version"][:2]) == (done == 2, done, "1.")
        assert open_partials(golden / f"{name}.zarr", "mlp_mid").sizes["unit"] == done
    chosen = open_activations(golden / "chosen-float16.zarr", "base", "mlp_mid")
    assert list(zip(chosen["layer"].values.tolist(), chosen["neuron"].values.tolist(), strict=True)) == [(0, 2), (1, 0)]
    assert chosen["activation"].dtype == np.float16
    result = open_result(golden / "results.zarr", "stance")
    assert result.attrs == {"scorer": "logprob"}
    assert (result["unparsed"].dtype, result["key"].dims) == (np.bool_, ("question",))


def check_schema(path: Path) -> None:
    """Hold a store against the schema."""
    VALIDATORS["root"].validate(json.loads((path / "zarr.json").read_text())["attributes"])
    for line in (path / "journal").iterdir():
        VALIDATORS["line"].validate(json.loads(line.read_text()))
    for metadata in path.glob("*/**/zarr.json"):
        document = json.loads(metadata.read_text())
        if document["node_type"] == "group":
            VALIDATORS["group"].validate(document["attributes"])


def test_golden_stores_follow_the_schema(golden: Path) -> None:
    for validator in VALIDATORS.values():
        validator.check_schema(validator.schema)
    for name in STORES:
        check_schema(golden / f"{name}.zarr")


@pytest.mark.parametrize(("raw", "parts"), [("none", 1), ("last", 1), ("full", 1), ("none", 2)])
def test_stores_of_every_kind_follow_the_schema(make_sample, tmp_path: Path, raw: str, parts: int) -> None:
    path, widths = tmp_path / "s.zarr", {"mlp_mid": 12, "resid": 4}
    sample = make_sample(raw, parts=parts, widths=widths)
    for part in range(parts):
        with sample.open(path, part=part) as writer:
            for unit in writer.pending:
                counts, base, tuned = sample.sums(unit)
                own = {site: slice(part * size // parts, (part + 1) * size // parts) for site, size in widths.items()}
                sums = counts, *({site: values[..., own[site]] for site, values in of.items()} for of in (base, tuned))
                writer.commit(unit, *sums, *(sample.raw(unit) if raw != "none" else ()))
            if part == parts - 1:
                writer.finish()
    write_result(path, "stance", xr.Dataset({"margin": ("question", [1.0])}))
    check_schema(path)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("root", {"version": {"major": 2, "minor": 0}}),
        ("root", {"kind": "else"}),
        ("root", {"layout": None}),
        ("root", {"examples": "0"}),
        ("line", {"unit": -1}),
        ("line", {"layout": "x"}),
        ("line", {"files": {"c.0": [1]}}),
    ],
)
def test_the_schema_refuses_what_is_none(golden: Path, what: str, change: dict[str, Any]) -> None:
    if what == "root":
        document = json.loads((golden / "statistics.zarr" / "zarr.json").read_text())["attributes"]
        document["pnlac"] |= change
    else:
        document = json.loads((golden / "statistics.zarr" / "journal" / "unit.0.0.json").read_text())
        document["record"] |= change
    with pytest.raises(jsonschema.ValidationError):
        VALIDATORS[what].validate(document)
