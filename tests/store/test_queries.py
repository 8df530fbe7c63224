"""Queries against numpy, on plain, lazy, chunked and pickled Datasets."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from pnlac_fast.store import (
    Raw,
    StoreError,
    describe_selected,
    neuron,
    open_activations,
    open_contrast,
    open_examples,
    prompt,
    top_neurons,
    topic_means,
    with_result,
    with_text,
)
from pnlac_fast.store.activations import kept_selectors

LAYERS, WIDTH = 3, 11


@pytest.fixture(scope="module")
def full(make_sample, tmp_path_factory):
    """Give a finished store of the sample that keeps all tokens, and what its units hold of the model "second"."""
    sample = make_sample("full")
    path = sample.fill(tmp_path_factory.mktemp("queries") / "full.zarr")
    units = [unit for unit, described in enumerate(sample.layout.units) if described.rows]
    raw = [sample.raw(unit) for unit in units]
    columns = {name: np.concatenate([table[name] for table, _ in raw]) for name in raw[0][0]}
    return path, columns, np.concatenate([values["second", "mlp_mid"] for _, values in raw], 1)


@pytest.fixture(params=["lazy", "engine", "dask", "memory", "pickled"])
def rows(request, full):
    """Give the rows of the model "second" in every form they may have."""
    path, form = full[0], request.param
    if form in ("engine", "dask"):
        chunks = {} if form == "dask" else None
        return xr.open_dataset(path, engine="pnlac", group="activations/second/mlp_mid", chunks=chunks)
    ds = open_activations(path, "second", "mlp_mid")
    if form == "memory":
        return ds.load()
    return ds if form == "lazy" else pickle.loads(pickle.dumps(ds))


@pytest.mark.parametrize("chunked", [False, True])
def test_top_neurons(finished, chunked):
    contrast = open_contrast(finished)
    found = top_neurons(contrast.chunk({}) if chunked else contrast, 4)
    assert found["layer"].dims == ("model", "topic", "rank")
    for model in contrast["model"].values:
        for topic in contrast["topic"].values:
            at = {"model": model, "topic": topic}
            values = contrast["rms"].sel(at | {"site": "mlp_mid", "tokens": "last"}).values
            best = np.argsort(-values, axis=None)[:4]
            of = found.sel(at)
            assert list(zip(*(of[name].values.tolist() for name in ("layer", "neuron")), strict=True)) == [
                divmod(int(index), values.shape[1]) for index in best
            ]
            np.testing.assert_array_equal(of["value"], values.flat[best])
    frame = found.to_dataframe()
    assert list(frame.columns) == ["layer", "neuron", "value"]
    assert len(frame) == 2 * 2 * 4


def test_top_neurons_of_a_narrower_site_a_share_and_any_score(finished):
    contrast = open_contrast(finished)
    chosen = {"model": "second", "topic": "abortion", "site": "resid", "tokens": "completion"}
    everything = top_neurons(contrast, share=1.0, score="mean_diff", **chosen)
    assert everything["value"].dims == ("rank",)
    assert everything.sizes["rank"] == LAYERS * 4  # what is beyond the width of the site is no neuron
    assert np.isfinite(everything["value"]).all()
    score = xr.DataArray([[1.0, np.nan, 3.0], [3.0, np.inf, 0.0]], dims=("layer", "neuron"))
    best = top_neurons(score, share=0.5)
    assert list(zip(best["layer"].values.tolist(), best["neuron"].values.tolist(), strict=True)) == [
        (1, 1),
        (0, 2),
        (1, 0),
    ]
    assert top_neurons(score, share=1e-9).sizes["rank"] == 1
    for n in (0, 6):
        with pytest.raises(StoreError, match="There are 5 neurons with a score"):
            top_neurons(score, n)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "welch_t"}, "no statistic 'welch_t'; it has mean_base"),
        ({"model": "third"}, "no model 'third'; it has org/first, second"),
        ({"topic": ["abortion", "guns"]}, "no topic 'guns'"),
        ({"layers": 3}, "no dimension 'layers'"),
    ],
)
def test_names_that_are_not_there(finished, options, message):
    with pytest.raises(StoreError, match=message):
        top_neurons(open_contrast(finished), **options)


def test_one_neuron(full, rows):
    _, columns, values = full
    found = neuron(rows, 2, 7)
    assert found.dims == ("token",)
    np.testing.assert_array_equal(found, values[2, :, 7])
    for name in ("example", "position", "token_id"):
        np.testing.assert_array_equal(found[name], columns[name])
    assert int(found["layer"]) == 2
    assert int(found["neuron"]) == 7
    for wrong in ((3, 0), (0, WIDTH), (0, -1)):
        with pytest.raises(StoreError, match="There is no layer"):
            neuron(rows, *wrong)


def test_one_prompt_in_the_order_of_its_tokens(full, rows):
    _, columns, values = full
    example = int(columns["example"][0])
    mine = np.flatnonzero(columns["example"] == example)
    shuffled = rows.isel(token=np.random.default_rng(0).permutation(rows.sizes["token"]))
    for given in (rows, shuffled):
        found = prompt(given, example)
        np.testing.assert_array_equal(found["activation"], values[:, mine])
        np.testing.assert_array_equal(found["position"], columns["position"][mine])
    with pytest.raises(StoreError, match="no row of example 3"):
        prompt(rows.isel(token=slice(0, 5)), 3)


def test_means_of_topics(full, rows, monkeypatch):
    _, columns, values = full
    monkeypatch.setattr("pnlac_fast.store.queries._AT_ONCE", 3 * 8 * WIDTH)  # blocks of three rows
    found = topic_means(rows, "completion")
    assert found.dims == ("topic", "layer", "neuron")
    weight = columns["counts"][:, 1].astype(float)
    for topic in ("abortion", "schools & taxes"):
        own = weight * (rows["topic"].values == topic)
        np.testing.assert_allclose(found.sel(topic=topic), np.average(values, axis=1, weights=own), rtol=1e-12)
        assert int(found["n"].sel(topic=topic)) == own.sum()
    part = topic_means(rows.sel(layer=[2]).isel(neuron=slice(3, 5)), "completion")
    np.testing.assert_allclose(part, found.sel(layer=[2]).isel(neuron=slice(3, 5)), rtol=1e-12)


def test_means_of_what_is_not_kept(finished_raw, rows):
    last = open_activations(finished_raw, "base", "resid")
    assert last.attrs["selectors"] == ["last"]
    with pytest.raises(StoreError, match="does not keep all rows that 'prompt' counts, only those of last"):
        topic_means(last, "prompt")
    silent = rows.assign_coords(counts=rows["counts"] * 0)
    with pytest.raises(StoreError, match="None of these rows counts for 'last'"):
        topic_means(silent, "last")


@pytest.mark.parametrize(
    ("raw", "tokens", "kept"),
    [
        ("none", ("all",), ()),
        ("last", ("all", "last"), ("last",)),
        ("pooled", ("prompt", "completion"), ("completion", "prompt")),
        ("selected", ("prompt",), ("prompt",)),
        ("selected", ("completion", "prompt"), ("completion", "prompt", "all")),
        ("selected", ("all",), ("completion", "prompt", "all")),
        ("full", ("last",), ("last", "prompt")),
        ("full", ("completion",), ("last", "completion", "prompt", "all")),
    ],
)
def test_selectors_of_which_every_token_is_kept(make_sample, raw, tokens, kept):
    assert kept_selectors(make_sample(raw, tokens=tokens).layout) == kept


def test_chosen_neurons(make_sample, tmp_path):
    pairs = {"mlp_mid": np.array([[0, 3], [2, 7]], np.int32), "resid": np.array([[1, 1]], np.int32)}
    sample = make_sample("full")
    sample.layout = replace(sample.layout, raw=Raw("full", neurons=describe_selected(pairs)))
    with sample.open(tmp_path / "s.zarr", selected=pairs) as writer:
        for unit in writer.pending:
            table, raw = sample.raw(unit)
            chosen = {(m, s): np.ascontiguousarray(v[pairs[s][:, 0], :, pairs[s][:, 1]].T) for (m, s), v in raw.items()}
            writer.commit(unit, *sample.sums(unit), table, chosen)
    rows = open_activations(tmp_path / "s.zarr", "second", "mlp_mid")
    values = rows["activation"].values
    np.testing.assert_array_equal(neuron(rows, 2, 7), values[:, 1])
    weight = rows["counts"].sel(selector="all") * (rows["topic"] == "abortion")
    np.testing.assert_allclose(
        topic_means(rows, "all").sel(topic="abortion"), np.average(values, axis=0, weights=weight), rtol=1e-12
    )
    with pytest.raises(StoreError, match="neuron 3 is none of them"):
        neuron(rows, 2, 3)


def test_joins_with_text_and_with_a_result(full, rows):
    path, columns, values = full
    examples = open_examples(path)
    joined = with_text(rows, examples)
    assert joined["instruction"].values.tolist() == [f"Frage {i}, où?" for i in columns["example"]]
    assert with_text(neuron(rows, 0, 0), examples)["key"].values.tolist() == joined["key"].values.tolist()
    asked = np.unique(columns["example"])[::-1][:-1]  # all but the first, in another order
    result = xr.Dataset(
        {"margin": (("run", "question"), np.stack([asked * 1.0, asked * 10.0])), "spread": ("run", [0.1, 0.2])},
        coords={
            "model": ("run", np.array(["base", "second"], object)),
            "key": ("question", examples["key"].values[asked]),
            "topic": ("question", examples["topic"].values[asked]),
        },
    )
    found = with_result(joined, result)
    there = np.isin(columns["example"], asked)
    assert 0 < there.sum() < there.size
    assert found["margin"].dims == ("run", "token")
    np.testing.assert_array_equal(found["margin"][1], 10.0 * columns["example"][there])
    np.testing.assert_array_equal(found["activation"], values[:, there])
    assert found["spread"].values.tolist() == [0.1, 0.2]
    assert found["model"].values.tolist() == ["base", "second"]
    np.testing.assert_array_equal(found["topic"], joined["topic"].values[there])

    with pytest.raises(StoreError, match="No question is both"):
        with_result(joined, result.assign_coords(key=("question", [f"x{i}" for i in range(len(asked))])))
    with pytest.raises(StoreError, match="key of a question twice"):
        with_result(joined, result.isel(question=[0, 0]))
    with pytest.raises(StoreError, match="Both the rows and the result have 'activation'"):
        with_result(joined, result.rename(margin="activation"))


def test_dask_reads_whole_shards(full):
    path, _, values = full
    lazy = xr.open_dataset(path, engine="pnlac", group="activations/second/mlp_mid", chunks={})
    shards = list((path / "activations" / "second" / "mlp_mid" / "activation").glob("c.*"))
    assert lazy["activation"].data.npartitions == len(shards) == 4
    assert lazy["activation"].chunksizes["token"] == (5, 7, 5, 7)
    assert len(lazy["activation"].data.__dask_graph__()) < 40
    mean = lazy["activation"].groupby(lazy["topic"].compute()).mean().sel(topic="abortion")
    np.testing.assert_allclose(mean, values[:, :12].mean(1), rtol=1e-5)
    sent = pickle.loads(pickle.dumps(lazy))
    np.testing.assert_array_equal(sent["activation"].values, values)
