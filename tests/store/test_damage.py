"""Stores that are damaged, or made to deceive: readers raise a sentence or give the right data, and take little memory.

A long run (PNLAC_LONG_TESTS) tries every file, and many more forgeries.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import xarray as xr

from pnlac_fast.store import (
    StoreError,
    info,
    list_results,
    open_activations,
    open_contrast,
    open_examples,
    open_partials,
    open_result,
    open_sets,
    verify,
    write_result,
    write_sets,
)
from pnlac_fast.store.journal import decode_line, encode_line
from pnlac_fast.store.places import sum_of

LONG = bool(os.environ.get("PNLAC_LONG_TESTS"))
READERS = {
    "contrast": open_contrast,
    "partials": lambda path: open_partials(path, "s"),
    "examples": open_examples,
    "base": lambda path: open_activations(path, "base", "s"),
    "tuned": lambda path: open_activations(path, "m", "s"),
    "result": lambda path: open_result(path, "stance"),
    "sets": open_sets,
}


@pytest.fixture(scope="module")
def sample(make_sample):
    return make_sample("last", models=("m",), sites=("s",), tokens=("last",), widths={"s": 4})


@pytest.fixture(scope="module")
def made(sample, tmp_path_factory):
    path = sample.fill(tmp_path_factory.mktemp("damage") / "s.zarr")
    text = np.array(list("abcde"), object)
    write_result(path, "stance", xr.Dataset({"margin": ("run", np.arange(5.0)), "model": ("run", text)}))
    write_sets(path, xr.Dataset({"member": (("neuron_set", "layer", "neuron"), np.eye(4, dtype=bool)[None, :3])}))
    return path


@pytest.fixture
def path(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "s.zarr"))


def look(path):
    """Return what each reader says: a loaded Dataset, a report, or None where it raises a sentence."""
    found = {}
    for name, read in (READERS | {"info": info, "results": list_results}).items():
        try:
            seen = read(path)
            found[name] = seen.load() if isinstance(seen, xr.Dataset) else seen
        except StoreError as error:
            assert str(error).strip()  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            found[name] = None
    return found


@pytest.mark.parametrize("seed", range(4 if LONG else 1))
def test_readers_give_the_right_data_or_a_sentence(path, tree, seed):
    rng, files, right = random.Random(seed), tree(path), look(path)
    assert all(seen is not None for seen in right.values())
    chosen = list(files) if LONG else rng.sample(sorted(files), 24)
    silent = []
    for number, name in enumerate(chosen):
        content = bytearray(files[name])
        match (number + seed) % 4:
            case 0 | 1:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            case 2:
                del content[rng.randrange(len(content)) :]
            case 3:
                content = None
        if content is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(content)
        for what, seen in look(path).items():
            if isinstance(seen, xr.Dataset):
                xr.testing.assert_identical(seen, right[what])
            elif seen is not None and what == "results":
                assert set(seen) <= set(right[what])
        if not [finding for finding in verify(path) if finding.kind == "damaged"]:
            silent.append(name)
        (path / name).write_bytes(files[name])
    assert not silent


ODD = (
    *(None, True, -1, 0, 1, 3, 10**12, 2**63, 2**70, 1.5, float("inf"), "", "x", "../../up", "/etc/passwd", "base"),
    *([], {}, [[]], [0], {"name": "gzip"}, {"name": "numcodecs.pickle"}, "object", "|O", "float64", "int8", "string"),
)


@contextmanager
def little_memory():
    """Let what takes a gigabyte more than there is now fail."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (1 << 30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def mutate(value, rng):
    """Return a copy of JSON values in which one, anywhere, is another or gone."""
    value = copy.deepcopy(value)
    node, parent, key = value, None, None
    while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.85):
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        parent, node = node, node[key]
    if parent is None:
        return rng.choice(ODD)
    if rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = rng.choice(ODD)
    return value


def forge(path, name, document):
    """Write metadata, and let the journal vouch for it."""
    content = json.dumps(document).encode()
    (path / name).write_bytes(content)
    for line in (path / "journal").iterdir():
        record = decode_line(line.read_bytes())
        if name in record.get("files", {}):
            record["files"][name] = list(sum_of(content))
        if name == "zarr.json" and line.name == "store.json":
            record["attributes"] = document.get("attributes") if isinstance(document, dict) else None
        write_line(line, record)


def write_line(line, record):
    try:
        line.write_bytes(encode_line(record))
    except ValueError:  # infinite numbers are in no line
        line.write_bytes(b"")


@pytest.mark.parametrize("seed", range(100 if LONG else 2))
def test_forged_metadata_is_refused_or_read_but_never_a_traceback(path, sample, tree, seed):
    rng, files = random.Random(seed), tree(path)
    names = ["zarr.json", "zarr.json", *(name for name in files if name.endswith(".json"))]
    with little_memory():
        for _ in range(12):
            name = rng.choice(names)
            if name.startswith("journal/"):
                record = mutate(decode_line(files[name]), rng)
                write_line(path / name, record if isinstance(record, dict) else {})
            else:
                document = json.loads(files[name])
                if name == "zarr.json":
                    document["attributes"] = mutate(document["attributes"], rng)
                forge(path, name, mutate(document, rng) if name != "zarr.json" or rng.random() < 0.2 else document)
            look(path)
            for call in (verify, sample.open, lambda path: sample.open(path, repair=True)):
                try:
                    made = call(path)
                except StoreError:
                    continue
                if not isinstance(made, list):
                    made.close()
            for name, content in files.items():
                (path / name).parent.mkdir(parents=True, exist_ok=True)  # repair may have removed /contrast
                (path / name).write_bytes(content)
            for name in tree(path).keys() - files.keys():
                (path / name).unlink()


def test_huge_shapes_are_refused(path):
    for name, read in (
        ("contrast/rms", open_contrast),
        ("examples/key", open_examples),
        ("tokens/side", READERS["base"]),
    ):
        file = path / name / "zarr.json"
        content = file.read_bytes()
        document = json.loads(content)
        document["shape"] = [10**13 for _ in document["shape"]]
        document["chunk_grid"]["configuration"]["chunk_shape"] = document["shape"]
        before = {line: line.read_bytes() for line in (path / "journal").iterdir()}
        forge(path, f"{name}/zarr.json", document)
        with little_memory(), pytest.raises(StoreError, match=r"too large to be true|zarr.json is damaged"):
            read(path)
        file.write_bytes(content)
        for line, bytes_ in before.items():
            line.write_bytes(bytes_)


def test_nothing_is_unpickled(path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    file = path / "examples/key/zarr.json"
    document = json.loads(file.read_text())
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    evil = pickle.dumps(["x"])
    for codecs in (
        [{"name": "numcodecs.pickle", "configuration": {}}, {"name": "bytes"}],
        [{"name": "pickle"}],
        [{"name": "vlen-bytes"}],
    ):
        forge(path, "examples/key/zarr.json", document | {"codecs": codecs, "data_type": "object"})
        (path / "examples/key/c.0").write_bytes(evil)
        with pytest.raises(StoreError):
            open_examples(path)
    np.save(path / "examples/key/c.0", np.array([{}], object), allow_pickle=True)
    with pytest.raises(StoreError):
        open_examples(path)
    look(path)
