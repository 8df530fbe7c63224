"""Results and neuron sets come back as they were, and are replaced as a whole."""

from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest
import xarray as xr

from pnlac_fast.store import (
    StoreError,
    create_results,
    info,
    list_results,
    open_contrast,
    open_result,
    open_sets,
    write_result,
    write_sets,
)


def stance(questions=3):
    rng = np.random.default_rng(questions)
    margin = rng.normal(size=(2, questions))
    margin[0, 0] = np.nan
    return xr.Dataset(
        {
            "margin": (("run", "question"), margin, {"units": "nats"}),
            "label": (("run", "question"), rng.integers(-1, 2, (2, questions)).astype(np.int8)),
            "reached": ("run", np.array([True, False])),
        },
        coords={
            "model": ("run", np.array(["base", "Modèle"], object)),
            "tuned_topic": ("run", np.array(["", "abortion"], object)),
            "key": ("question", np.array([f"{i:04x}" for i in range(questions)], object)),
            "step": ("run", np.array([-1, 7])),
        },
        attrs={"normalise": "token", "accuracy": 0.75, "topics": ["a", "b"], "none": None},
    )


def test_result_comes_back_identical(tmp_path):
    create_results(tmp_path / "r.zarr", provenance={"command": "score"})
    write_result(tmp_path / "r.zarr", "stance", stance())
    back = open_result(tmp_path / "r.zarr", "stance")
    xr.testing.assert_identical(back, stance())
    assert back["model"].dtype == object
    assert {name: back[name].dtype for name in back} == {name: stance()[name].dtype for name in back}
    stock = xr.open_zarr(tmp_path / "r.zarr", group="results/stance")
    xr.testing.assert_equal(stock.load(), back)


def test_fixed_width_text_numpy_attributes_and_empty_arrays(tmp_path):
    create_results(tmp_path / "r.zarr")
    ds = xr.Dataset(
        {"x": (("run", "question"), np.zeros((0, 2)))},
        coords={"model": ("run", np.array([], object)), "topic": ("question", np.array(["a", "bb"]))},
        attrs={"share": np.float64(0.05), "counts": np.array([1, 2])},
    )
    write_result(tmp_path / "r.zarr", "empty", ds)
    back = open_result(tmp_path / "r.zarr", "empty")
    assert back["x"].shape == (0, 2)
    assert back["model"].dtype == object
    assert back["topic"].dtype == object
    assert back["topic"].values.tolist() == ["a", "bb"]
    assert back.attrs == {"share": 0.05, "counts": [1, 2]}


def test_result_in_a_finished_store_is_seen_and_replaced(finished):
    path = finished
    for questions in (3, 5, 2):
        write_result(path, "stance", stance(questions))
        assert xr.open_zarr(path, group="results/stance").sizes["question"] == questions
        assert xr.open_datatree(path, engine="zarr")["results/stance"].sizes["question"] == questions
        xr.testing.assert_identical(open_result(path, "stance"), stance(questions))
    write_result(path, "training", stance(1))
    assert list_results(path) == info(path)["results"] == ["stance", "training"]
    assert sorted(xr.open_datatree(path, engine="zarr")["results"].children) == ["stance", "training"]
    assert open_contrast(path).sizes["layer"] == 3
    assert not (path / ".work").exists()


@pytest.mark.parametrize("steps", range(5))
def test_crash_while_replacing_never_shows_half_a_result(tmp_path, steps, monkeypatch):
    path = tmp_path / "r.zarr"
    create_results(path)
    write_result(path, "stance", stance(3))
    left = iter(range(steps))

    def crashing(real):
        def call(*args, **kwargs):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:  # withdraw, move away, move in, clean, consolidate
        for name in ("groups.withdraw", "groups.consolidate", "local.shutil.rmtree"):
            target = f"pnlac_fast.store.{name}"
            patched.setattr(target, crashing(resolve_name(target)))
        patched.setattr(Path, "rename", crashing(Path.rename))
        with pytest.raises(KeyboardInterrupt):
            write_result(path, "stance", stance(5))
    listed = [name for name in xr.open_datatree(path, engine="zarr").groups if name.endswith("stance")]
    for name in listed:
        xr.testing.assert_equal(xr.open_zarr(path, group=name).load(), open_result(path, "stance"))
    write_result(path, "other", stance(1))  # puts right what the crash left
    back = open_result(path, "stance")
    xr.testing.assert_identical(back, stance(3 if steps < 3 else 5))
    xr.testing.assert_equal(xr.open_zarr(path, group="results/stance").load(), back)


def test_sets_come_back(finished):
    path = finished
    with pytest.raises(StoreError, match="run the locate command"):
        open_sets(path)
    member = np.zeros((2, 3, 11), bool)
    member[0, 1, 4] = member[1, 2] = True
    sets = xr.Dataset(
        {"member": (("neuron_set", "layer", "neuron"), member)},
        coords={
            "name": ("neuron_set", np.array(["general", "specific/abortion"], object)),
            "kind": ("neuron_set", np.array(["general", "specific"], object)),
        },
        attrs={"score": "rms", "share": 0.05},
    )
    write_sets(path, sets)
    xr.testing.assert_identical(open_sets(path), sets)
    assert open_sets(path)["member"].dtype == bool
    assert info(path)["neuron_sets"] == ["general", "specific/abortion"]
    xr.testing.assert_equal(xr.open_zarr(path, group="neuron_sets").load(), sets)
    with pytest.raises(ValueError, match="dtype bool"):
        write_sets(path, sets.astype(np.int8))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../stance", "zarr.json", "_x", "1st", "é", "a" * 65, "a\0", "a\n"]
)
def test_hostile_result_names_are_refused(tmp_path, name, tree):
    create_results(tmp_path / "r.zarr")
    before = tree(tmp_path)
    for call in (
        lambda: write_result(tmp_path / "r.zarr", name, stance()),
        lambda: open_result(tmp_path / "r.zarr", name),
    ):
        with pytest.raises(StoreError, match=r"cannot name a result|has no result"):
            call()
    assert tree(tmp_path) == before


def test_what_cannot_be_kept_is_refused_and_the_old_result_stays(tmp_path):
    path = tmp_path / "r.zarr"
    create_results(path)
    write_result(path, "stance", stance())
    for ds, message in (
        (xr.Dataset({"x": ("a", np.array(["text", 1.5], object))}), "x mixes text"),
        (xr.Dataset({"x": ("a", np.array([{"a": 1}], object))}), "x mixes text"),
        (xr.Dataset({"x": ("a", np.array([1j]))}), "complex128"),
        (xr.Dataset(attrs={"x": object()}), "not plain JSON"),
        (xr.Dataset(attrs={"x": float("nan")}), "not plain JSON"),
        (xr.Dataset(attrs={"pnlac": 1}), "store's own"),
    ):
        with pytest.raises(StoreError, match=message):
            write_result(path, "stance", ds)
    xr.testing.assert_identical(open_result(path, "stance"), stance())


def test_results_only_store(tmp_path, finished, sample):
    path = tmp_path / "r.zarr"
    create_results(path, provenance={"command": "score"})
    create_results(path, provenance={"command": "another"})
    assert info(path)["kind"] == "results"
    assert info(path)["provenance"] == {"command": "score"}
    with pytest.raises(StoreError, match="holds results only"):
        open_contrast(path)
    with pytest.raises(StoreError, match="holds results only"):
        sample.open(path)
    with pytest.raises(StoreError, match="has no result 'stance'; it has none"):
        open_result(path, "stance")
    with pytest.raises(StoreError, match="does not exist"):
        write_result(tmp_path / "absent.zarr", "stance", stance())
    create_results(finished)
    assert open_contrast(finished).sizes["layer"] == 3
    sample.open(path, overwrite=True).close()
    assert info(path)["kind"] == "capture"
