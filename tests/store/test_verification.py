"""Every byte counts: what is flipped, cut off, missing or foreign is found, named, and mended to the same bytes."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from pnlac_fast.store import StoreError, create_results, info, open_contrast, verify, write_result, write_sets
from pnlac_fast.store.journal import encode_line, read_journal
from pnlac_fast.store.places import place_of
from pnlac_fast.store.units import unit_files
from pnlac_fast.store.verification import certify

RESULT = xr.Dataset(
    {"margin": ("run", np.arange(5.0)), "model": ("run", np.array(list("abcde"), object))},
    attrs={"provenance": {"command": ["pnlac-fast", "score", "--model", "a b"]}},
)
SETS = xr.Dataset({"member": (("neuron_set", "layer", "neuron"), np.eye(11, dtype=bool)[None, :3])})


@pytest.fixture
def sample(make_sample):
    return make_sample(raw="last")


@pytest.fixture
def whole(finished_raw):
    """A finished store with raw rows, a result and neuron sets."""
    write_result(finished_raw, "stance", RESULT)
    write_sets(finished_raw, SETS)
    return finished_raw


def damage(path: Path, how: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif how == "cut off":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "cut off", "empty", "missing"])
def test_damage_of_any_file_is_found_and_only_that(whole, tree, how):
    rng, files = random.Random(how), tree(whole)
    assert verify(whole) == []
    data = [name for name in files if name != "zarr.json" and not name.startswith("journal/")]
    assert len(data) > 100
    for damaged in (data, *([name] for name in files if name not in data)):
        for name in damaged:
            damage(whole / name, how, rng)
        assert [(found.file, found.kind) for found in verify(whole)] == [(name, "damaged") for name in damaged]
        for name in damaged:
            (whole / name).write_bytes(files[name])


def test_findings_say_which_unit_or_group_and_what_to_do(whole):
    rng = random.Random(0)
    damaged = {
        "partials/mlp_mid/base/c.2.0.0.0.0": ("unit 2 (topic 'abortion', questions 4 to 5)", "--repair"),
        "journal/unit.4.0.json": ("unit 4 (topic 'schools & taxes', questions 2 to 3)", "--repair"),
        "contrast/rms/zarr.json": ("contrast", "--repair"),
        "examples/key/c.0": ("store", "--repair"),
        "results/stance/margin/c.0": ("results/stance", "pnlac-fast score --model 'a b'"),
        "neuron_sets/member/zarr.json": ("neuron_sets", "pnlac-fast locate"),
        "zarr.json": ("store", "--repair"),
    }
    for name in damaged:
        damage(whole / name, "flipped" if name != "zarr.json" else "missing", rng)
    found = {finding.file: finding for finding in verify(whole)}
    assert found.keys() == damaged.keys()
    for name, (owner, action) in damaged.items():
        assert found[name].owner == owner
        assert action in found[name].action
    report = info(whole, verify=True)
    assert report.keys() == {"path", "findings"}  # nothing else can be told
    with pytest.raises(StoreError, match=r"contrast/rms/zarr.json is changed and 6 more; run the same cache command"):
        certify(report)


def test_foreign_files_are_found_and_stay(whole, sample, tree):
    for name in ("notes.txt", "contrast/rms/c.9.9.9.9.9.9", "results/own/x", "journal/x", "a.partial"):
        (whole / name).parent.mkdir(exist_ok=True)
        (whole / name).write_text("mine")
    before = tree(whole)
    found = verify(whole)
    assert len(found) == 5
    assert {finding.kind for finding in found} == {"foreign"}
    with pytest.raises(StoreError, match=r"is sound, but 5 of .* not its own, such as a\.partial; move it"):
        certify(info(whole, verify=True))
    sample.open(whole, repair=True).close()
    assert tree(whole) == before


def test_a_unit_lost_from_a_whole_store_is_a_finding_and_not_one_of_an_unfinished_store(whole, tmp_path, sample):
    (whole / "journal/unit.3.0.json").unlink()
    (found,) = verify(whole)
    assert (found.file, found.problem, found.unit, found.part) == ("journal/unit.3.0.json", "is missing", 3, 0)
    with sample.open(tmp_path / "s.zarr") as writer:
        assert verify(writer.place) == []
        sample.commit(writer, 2)
        assert verify(writer.place) == []


def test_what_a_crash_leaves_is_named_and_no_damage(tmp_path, sample, monkeypatch, tree):
    path = tmp_path / "s.zarr"

    def crash(*args):
        raise KeyboardInterrupt

    with sample.open(path) as writer:
        sample.commit(writer, 1)
        before = tree(path)
        with monkeypatch.context() as patched:
            patched.setattr("pnlac_fast.store.writer.commit_unit", crash)
            with pytest.raises(KeyboardInterrupt):
                sample.commit(writer, 0)
        (path / "partials/n/c.2.0.partial").write_bytes(b"half")
        (path / "journal/unit.2.0.json.partial").write_bytes(b"half")
    found = verify(path)
    assert {finding.kind for finding in found} == {"leftover"}
    assert {finding.file for finding in found} == tree(path).keys() - before.keys()
    certify(info(path, verify=True))
    with sample.open(path, repair=True) as writer:
        assert tree(path) == before
        assert len(writer.pending) == 5


@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_repair_gives_the_same_bytes(whole, sample, tree, how):
    rng, files = random.Random(how), tree(whole)
    names = [name for name in files if "neuron_sets" not in name and "stance" not in name]
    chosen = ["zarr.json", "journal/store.json", "journal/group.contrast.json", *rng.sample(names, 4)]
    for damaged in (*([name] for name in chosen), rng.sample(names, 20), ["zarr.json", "journal/store.json"]):
        for name in damaged:
            damage(whole / name, how, rng)
        with sample.open(whole, repair=True) as writer:
            for unit in writer.pending:
                sample.commit(writer, unit)
            writer.finish()
        assert verify(whole) == []
        assert tree(whole) == files


def test_repair_leaves_damaged_results_as_they_are(whole, sample, tree):
    files = tree(whole)
    for name in ("results/stance/margin/zarr.json", "neuron_sets/member/c.0.0.0", "partials/n/c.1.0"):
        damage(whole / name, "cut off", random.Random(0))
    with sample.open(whole, repair=True) as writer:
        assert writer.pending == (1,)
        sample.commit(writer, 1)
        writer.finish()
    assert [finding.owner for finding in verify(whole)] == ["neuron_sets", "results/stance"]
    write_result(whole, "stance", RESULT)
    write_sets(whole, SETS)
    assert verify(whole) == []
    assert tree(whole) == files


def test_damage_is_refused_with_the_way_to_mend_it_unless_it_is_to_be_mended(whole, sample):
    damage(whole / "journal/unit.0.0.json", "flipped", random.Random(0))
    with pytest.raises(StoreError, match="--repair"):
        sample.open(whole)
    with sample.open(whole, repair=True) as writer:
        assert writer.pending == (0,)


def test_repair_that_cannot_work_is_refused(whole, tmp_path, sample, make_sample, tree):
    create_results(tmp_path / "results.zarr")
    before = tree(tmp_path)
    for call, message in (
        (lambda: sample.open(tmp_path / "new.zarr", repair=True), "no store of these settings .* leave out --repair"),
        (lambda: sample.open(whole, repair=True, overwrite=True), "either repaired or started anew"),
        (lambda: sample.open(whole, repair=True, worker=(0, 2)), "let one process do it"),
        (lambda: sample.open(tmp_path / "results.zarr", repair=True), "holds results only"),
        (lambda: make_sample(raw="last", settings={}).open(whole, repair=True), "made with other settings"),
    ):
        with pytest.raises(StoreError, match=message):
            call()
    assert tree(tmp_path) == before
    assert not (tmp_path / "new.zarr").exists()
    for name in ("zarr.json", "journal/store.json"):
        (whole / name).write_bytes(b"{}")
    with pytest.raises(StoreError, match="no store of these settings"):
        make_sample(raw="last", settings={}).open(whole, repair=True)
    with pytest.raises(StoreError, match=r"both zarr\.json and journal/store\.json are damaged"):
        verify(whole)


def test_lines_of_another_store_are_found_and_their_units_redone(whole, sample, make_sample, tmp_path, tree):
    files = tree(whole)
    other = make_sample(raw="last", settings={}).fill(tmp_path / "other.zarr")
    (other / "journal/unit.2.0.json").replace(whole / "journal/unit.2.0.json")
    (whole / "journal/unit.9.0.json").write_bytes(encode_line({"unit": 9}))
    (whole / "journal/unit.3.0.json").write_bytes(
        encode_line({"unit": 3, "part": 0, "layout": sample.layout.fingerprint(), "files": {"../up": [0, ""]}})
    )
    assert [f.problem for f in verify(whole)] == [
        "is of another store",
        "does not list the unit's files",
        "is the line of no unit of this store",
    ]
    with sample.open(whole, repair=True) as writer:
        assert writer.pending == (2, 3)
        for unit in writer.pending:
            sample.commit(writer, unit)
    assert tree(whole) == files


def test_files_of_a_unit_are_those_that_it_writes(tmp_path, make_sample):
    for number, sample in enumerate((make_sample(), make_sample(raw="full"), make_sample(models=()))):
        with sample.open(tmp_path / f"{number}.zarr") as writer:
            sample.commit(writer, 4)
            (record,) = read_journal(writer.place, sample.layout)
        assert set(unit_files(sample.layout, 4, 0)) == record.files.keys()


def test_results_only_stores_are_mended_by_the_next_command(tmp_path, tree):
    path = tmp_path / "r.zarr"
    create_results(path)
    write_result(path, "stance", RESULT)
    files = tree(path)
    for name in ("zarr.json", "journal/store.json", "results/zarr.json"):
        for how in ("flipped", "missing"):
            damage(path / name, how, random.Random(1))
            (found,) = verify(path)
            assert (found.file, found.owner) == (name, "store")
            create_results(path)
            assert verify(path) == []
            assert tree(path) == files


def test_any_zarr_store_is_verified(finished):
    from zarr.storage import FsspecStore

    place = place_of(FsspecStore.from_url(f"local://{finished}"))
    assert verify(place) == []
    file = finished / "contrast/rms/c.0.0.0.0.0.0"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    (finding,) = verify(place)
    assert (finding.file, finding.problem) == ("contrast/rms/c.0.0.0.0.0.0", "is changed")
    assert open_contrast(finished).sizes["layer"] == 3


def test_a_file_that_cannot_be_read_is_a_finding(finished, monkeypatch):
    import os

    real = os.preadv

    def failing(descriptor, buffers, offset):
        if "partials/n/c.5.0" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    (finding,) = verify(finished)
    assert (finding.problem, finding.unit) == ("cannot be read (Input/output error)", 5)
    assert json.loads(json.dumps(info(finished, verify=True)))["findings"][0]["unit"] == 5
