"""The statistics are those of the activations, and stock xarray opens them."""

import warnings

import numpy as np
import pytest
import xarray as xr

from pnlac_fast.store import StoreError, Unit, info, open_contrast, open_examples


def test_statistics_equal_numpy_in_float64(finished, sample):
    ds = open_contrast(finished).load()
    layout = sample.layout
    for t, topic in enumerate(layout.topics):
        seen = [sample.tokens(u) for u, unit in enumerate(layout.units) if unit.topic == topic]
        for site, width in layout.widths.items():
            a = np.concatenate([tokens.base[site] for tokens in seen], 1)
            b = np.concatenate([tokens.tuned[site] for tokens in seen], 2)
            at = ds.sel(topic=topic, site=site).isel(neuron=slice(width))
            assert (ds["n"].values[t] == a.shape[1]).all()
            for name, want in {
                "mean_base": a.mean(1),
                "std_base": a.std(1),
                "mean_tuned": b.mean(2),
                "std_tuned": b.std(2),
                "mean_diff": (b - a).mean(2),
                "std_diff": (b - a).std(2),
                "rms": np.sqrt(((b - a) ** 2).mean(2)),
            }.items():
                np.testing.assert_allclose(at[name].values, want, rtol=1e-6, atol=1e-7, err_msg=name)


def test_dims_dtypes_and_widths(finished, sample):
    ds = open_contrast(finished)
    dims = ("model", "topic", "site", "tokens", "layer", "neuron")
    assert ds["rms"].dims == dims
    assert ds["mean_base"].dims == dims[1:]
    assert ds["n"].dims == ("topic", "tokens")
    assert ds["rms"].dtype == np.float32
    assert ds["n"].dtype == np.int64
    assert ds["width"].values.tolist() == [11, 4]
    assert ds["model"].values.tolist() == list(sample.layout.models)
    assert "neuron" not in ds.coords
    assert not ds["rms"].variable._in_memory
    narrow = ds["rms"].sel(site="resid").values
    assert np.isnan(narrow[..., 4:]).all()
    assert np.isfinite(narrow[..., :4]).all()


def test_stock_xarray_opens_it_without_a_warning(finished_raw):
    path = finished_raw
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as the whole suite does, and here for its own sake
        stock = xr.open_zarr(path, group="contrast").load()
        whole = xr.open_datatree(path, engine="zarr")
        xr.testing.assert_equal(stock, open_contrast(path).load())
        xr.testing.assert_equal(whole["contrast"].to_dataset().load(), stock)
    assert {"contrast", "partials", "activations", "tokens", "examples", "results"} == set(whole.children)
    assert float(stock["rms"].sel(model="second", topic="abortion", site="resid", tokens="last")[0, 0]) > 0


def test_examples_come_back(finished, sample):
    ds = open_examples(finished)
    assert {name: ds[name].values.tolist() for name in ds} == sample.examples
    assert ds["instruction"].dtype == object


def test_topic_without_tokens_is_nan(tmp_path, sample):
    with sample.open(tmp_path / "s.zarr") as writer:
        for unit in writer.pending:
            counts, base, tuned = sample.sums(unit)
            if sample.layout.units[unit].topic == "abortion":
                counts, base = 0 * counts, {site: 0 * sums for site, sums in base.items()}
                tuned = {site: 0 * sums for site, sums in tuned.items()}
            writer.commit(unit, counts, base, tuned)
        writer.finish()
    ds = open_contrast(tmp_path / "s.zarr")
    assert ds["n"].sel(topic="abortion").values.tolist() == [0, 0]
    assert np.isnan(ds["rms"].sel(topic="abortion").values).all()
    assert np.isfinite(ds["rms"].sel(topic="schools & taxes", site="mlp_mid").values).all()


def test_sums_are_added_in_the_order_of_the_units(tmp_path, sample):
    with sample.open(tmp_path / "s.zarr") as writer:
        for unit in (2, 5, 0, 3, 1, 4):  # of each topic, its third unit first
            _, base, tuned = sample.sums(unit)
            summand = (1e17, -1e17, 3.0)[unit % 3]  # (1e17 - 1e17) + 3 = 3, and any other order gives 0
            sums = {site: np.full_like(values, summand) for site, values in base.items()}
            writer.commit(unit, np.array([1, 1]), sums, {site: 0 * values for site, values in tuned.items()})
        writer.finish()
    assert (open_contrast(tmp_path / "s.zarr")["mean_base"].sel(site="mlp_mid") == 1).all()


def test_store_without_tuned_models(tmp_path, make_sample):
    path = make_sample(models=()).fill(tmp_path / "s.zarr")
    ds = open_contrast(path)
    assert ds["rms"].shape == (0, 2, 2, 2, 3, 11)
    assert np.isfinite(ds["mean_base"].sel(site="mlp_mid").values).all()


def test_layers_split_over_several_chunks(tmp_path, finished, sample, monkeypatch):
    monkeypatch.setattr("pnlac_fast.store.contrast.CHUNK_BYTES", 2 * 4 * 11)  # two of three layers
    split = open_contrast(sample.fill(tmp_path / "split.zarr")).load()
    xr.testing.assert_identical(split, open_contrast(finished).load())


def test_unfinished_store_says_how_far_it_is(tmp_path, sample):
    path = tmp_path / "s.zarr"
    with sample.open(path) as writer:
        sample.commit(writer, 4)
        sample.commit(writer, 1)
        with pytest.raises(StoreError, match=r"4 of 6 units are missing .*\(0, 2-3, 5\).*run the same cache command"):
            writer.finish()
    with pytest.raises(StoreError, match=r"2 of 6 units are there; run the same cache command again"):
        open_contrast(path)
    report = info(path)
    assert (report["complete"], report["units_done"], report["units_total"]) == (False, 2, 6)
    assert report["units_missing"] == [0, 2, 3, 5]
    assert not [array for array in report["arrays"] if array["array"].startswith("contrast/")]


def test_info_of_a_finished_store(finished, sample):
    report = info(finished)
    assert report["complete"] is True
    assert report["format_version"] == "1.0"
    assert report["questions"] == 12
    assert report["provenance"] == {"run": 1}
    assert report["widths"] == {"mlp_mid": 11, "resid": 4}
    assert report["settings"] == sample.layout.settings
    files = (path for path in finished.rglob("*") if path.is_file())
    assert report["bytes"] == sum(path.stat().st_size for path in files)
    arrays = {array.pop("array"): array for array in report["arrays"]}
    assert set(arrays) == {str(f.parent.relative_to(finished)) for f in finished.rglob("zarr.json")} - {
        str(folder.relative_to(finished)) for folder in finished.rglob("*") if list(folder.glob("*/zarr.json"))
    } - {".", "results"}
    shape = [2, 2, 2, 2, 3, 11]
    assert arrays["contrast/rms"] == {
        "dims": ["model", "topic", "site", "tokens", "layer", "neuron"],
        "shape": shape,
        "dtype": "float32",
        "bytes": sum(path.stat().st_size for path in (finished / "contrast" / "rms").iterdir()),
        "files": 5,
    }


@pytest.mark.parametrize("where", ["base", "tuned"])
def test_sums_that_are_not_finite_are_refused(tmp_path, sample, where):
    counts, base, tuned = sample.sums(0)
    (base if where == "base" else tuned)["resid"][..., 2, 1] = np.inf
    with sample.open(tmp_path / "s.zarr") as writer:
        with pytest.raises(StoreError, match=r"resid, layer 2, are not finite in unit 0 .*'abortion'"):
            writer.commit(0, counts, base, tuned)
        assert 0 in writer.pending


def test_misshapen_sums_are_refused(tmp_path, sample):
    counts, base, tuned = sample.sums(0)
    with sample.open(tmp_path / "s.zarr") as writer:
        with pytest.raises(ValueError, match="counts must be int64"):
            writer.commit(0, counts.astype(np.int32), base, tuned)
        with pytest.raises(ValueError, match="negative"):
            writer.commit(0, -counts, base, tuned)
        with pytest.raises(ValueError, match=r"float64 \(2, 2, 3, 4\)"):
            writer.commit(0, counts, base | {"resid": base["resid"].astype(np.float32)}, tuned)
        with pytest.raises(ValueError, match="keys"):
            writer.commit(0, counts, base, {"resid": tuned["resid"]})
        with pytest.raises(ValueError, match="does not exist"):
            writer.commit(6, counts, base, tuned)
        assert len(writer.pending) == 6
    with pytest.raises(ValueError, match="closed"):
        writer.commit(0, counts, base, tuned)
    with pytest.raises(ValueError, match="closed"):
        writer.finish()


def test_layouts_that_cannot_be(make_sample):
    for change, message in (
        ({"topics": (), "units": ()}, "no topics"),
        ({"units": ()}, "no questions"),
        ({"models": ("base",)}, "base model's own name"),
        ({"raw": "some"}, "none, last, pooled, selected, full"),
    ):
        with pytest.raises(StoreError, match=message):
            make_sample(**change)
    for change in (
        {"layers": 0},
        {"widths": {"resid": 4}},
        {"units": (Unit("unknown", 0, 1),)},
        {"units": (Unit("abortion", -1, 1),)},
        {"units": (Unit("abortion", 0, 1, 5),)},
        {"settings": {"x": float("nan")}},
        {"settings": {"x": object()}},
    ):
        with pytest.raises(ValueError, match=r"."):
            make_sample(**change)
