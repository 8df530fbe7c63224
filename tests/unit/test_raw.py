"""What is kept of the activations themselves, in every mode, against all of them in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from pnlac_fast import store as stores
from pnlac_fast.caching import cache
from pnlac_fast.errors import UserError
from pnlac_fast.loading import load_model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.prompts import TOKENS
from pnlac_fast.raw import Keep, choose_kept

SELECTORS = ("prompt", "completion")
KEY = ("example", "side", "completion", "position")


@pytest.fixture(scope="module")
def captured(model_paths, questions, tmp_path_factory):  # type: ignore[no-untyped-def]
    """Give a function that caches a few questions with some raw options and opens a model's rows."""
    directory = tmp_path_factory.mktemp("raw")
    arguments = (model_paths["llama"], {"t": model_paths["llama_tuned"]}, questions[:9])

    def run(model: str = "t", site: str = "mlp_mid", **options: Any) -> xr.Dataset:
        out = directory / f"{abs(hash(repr(options)))}.zarr"
        if not out.exists():
            cache(*arguments, out, sites=("mlp_mid", "resid"), tokens=SELECTORS, unit_tokens=60, **options)
        return stores.open_activations(out, model, site).load()

    return run


def by_key(ds: xr.Dataset) -> dict[tuple[int, ...], int]:
    return {key: row for row, key in enumerate(zip(*(ds[name].values.tolist() for name in KEY), strict=True))}


@pytest.mark.parametrize("model", ["base", "t"])
def test_selected_are_the_counted_rows_of_full(captured, model: str) -> None:
    full, selected = (captured(model, raw=raw) for raw in ("full", "selected"))
    counted = full.isel(token=full["counts"].sel(selector=list(SELECTORS)).any("selector"))
    assert 0 < selected.sizes["token"] < full.sizes["token"]
    there, here = by_key(counted), by_key(selected)
    assert set(there) == set(here)
    rows = counted.isel(token=[there[key] for key in here])
    for name in ("activation", "token_id", "counts", "topic"):
        np.testing.assert_array_equal(rows[name], selected[name])


def test_every_row_says_what_it_is(captured, questions, model_paths) -> None:
    full = captured(raw="full")
    tokenizer = load_model(model_paths["llama"]).tokenizer
    for example, question in enumerate(questions[:9]):
        of = full.isel(token=full["example"].values == example)
        prompt = of.isel(token=of["side"].values == -1)
        assert prompt["completion"].values.tolist() == [-1] * prompt.sizes["token"]
        assert prompt["token_id"].values.tolist() == tokenizer(question.instruction)["input_ids"]
        assert prompt["counts"].sel(selector="last").values.tolist() == [0] * (prompt.sizes["token"] - 1) + [1]
        for side, name in enumerate(("right", "left")):
            for number, text in enumerate(question.completions(name)):
                mine = of.isel(token=(of["side"].values == side) & (of["completion"].values == number))
                assert mine["token_id"].values.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
                assert (mine["counts"].sel(selector=["completion", "all"]) == 1).all()
                assert (mine["counts"].sel(selector=["last", "prompt"]) == 0).all()


def test_pooled_are_means_over_what_a_selector_counts(captured) -> None:
    full, pooled = (captured(raw=raw) for raw in ("full", "pooled"))
    assert (pooled["position"] == -1).all()
    assert ((pooled["counts"] > 0).sum("selector") == 1).all()
    for row in range(pooled.sizes["token"]):
        mean = pooled.isel(token=row)
        selector = TOKENS[int(mean["counts"].values.argmax())]
        same = [full[name].values == mean[name].values for name in ("example", "side", "completion")]
        of = full.isel(token=np.logical_and.reduce(same))
        of = of.isel(token=of["counts"].sel(selector=selector).values > 0)
        assert of.sizes["token"] == mean["counts"].max()
        np.testing.assert_allclose(mean["activation"], of["activation"].mean("token"), rtol=1e-5, atol=1e-6)


def test_chosen_layers_and_neurons(captured) -> None:
    full = captured(raw="full")["activation"]
    some = captured(raw="full", raw_layers=[2, 0])
    assert some["layer"].values.tolist() == [0, 2]
    np.testing.assert_array_equal(some["activation"], full.sel(layer=[0, 2]))
    member = np.zeros((3, 48), bool)
    member[0, 5] = member[2, [0, 47]] = True
    resid = np.zeros((3, full_width := captured(site="resid", raw="full").sizes["neuron"]), bool)
    resid[1, full_width - 1] = True
    sets = (NeuronSet("a", "general", member), NeuronSet("b", "top", resid, site="resid"))
    chosen = captured(raw="full", raw_neurons=sets)
    assert chosen["activation"].dims == ("token", "selected")
    pairs = list(zip(chosen["layer"].values.tolist(), chosen["neuron"].values.tolist(), strict=True))
    assert pairs == [(0, 5), (2, 0), (2, 47)]
    for i, (layer, neuron) in enumerate(pairs):
        np.testing.assert_array_equal(chosen["activation"][:, i], full.sel(layer=layer)[:, neuron])
    assert captured(site="resid", raw="full", raw_neurons=sets).sizes["selected"] == 1


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_narrow_dtypes_are_rounded_once(captured, dtype: str, torch_dtype: torch.dtype) -> None:
    full, narrow = captured(raw="full")["activation"], captured(raw="full", raw_dtype=dtype)["activation"]
    rounded = torch.from_numpy(full.values).to(torch_dtype).float().numpy()
    np.testing.assert_array_equal(narrow.values.astype(np.float32), rounded)


def test_auto_keeps_the_models_dtype(model_paths) -> None:
    for dtype in ("bfloat16", "float32"):
        model = load_model(model_paths["llama"], dtype=dtype)
        assert choose_kept(model, ("mlp_mid",), "last").dtype == dtype
    assert choose_kept(load_model(model_paths["llama"], dtype="float64"), ("mlp_mid",), "last").dtype == "float32"


def test_what_is_beyond_a_dtype_is_refused() -> None:
    rows = {0: torch.tensor([[1.0, 7e4]])}
    with pytest.raises(UserError, match=r"70000 at mlp_mid is beyond the range of float16.*--raw-dtype"):
        Keep("last", "float16", (0,)).reduce(rows, "mlp_mid")
    rows = {0: torch.tensor([[1.0, float("inf")]])}
    assert np.isinf(Keep("last", "float16", (0,)).reduce(rows, "mlp_mid")).sum() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "some"}, "no raw mode"),
        ({"tokens": "last", "dtype": "int8"}, "no raw dtype"),
        ({"tokens": "last", "layers": [3]}, "choose from 0 to 2"),
        ({"tokens": "last", "layers": []}, "choose from 0 to 2"),
        ({"tokens": "none", "dtype": "float16"}, "choose a --raw mode"),
        ({"tokens": "last", "neurons": [NeuronSet("a", "top", np.ones((3, 32), bool), site="resid")]}, "--site resid"),
        ({"tokens": "last", "layers": [1], "neurons": [NeuronSet("a", "top", np.eye(3, 48) > 0)]}, None),
        (
            {"tokens": "last", "layers": [1], "neurons": [NeuronSet("a", "top", np.eye(1, 144).reshape(3, 48) > 0)]},
            "no neuron at mlp_mid",
        ),
    ],
)
def test_what_cannot_be_kept(model_paths, options: dict[str, Any], message: str | None) -> None:
    model = load_model(model_paths["llama"])
    if message is None:
        assert choose_kept(model, ("mlp_mid",), **options).neurons["mlp_mid"].tolist() == [[1, 1]]
        return
    with pytest.raises(UserError, match=message):
        choose_kept(model, ("mlp_mid",), **options)


def test_workers_in_any_number_end_in_the_same_bytes(model_paths, questions, tmp_path: Path) -> None:
    def tree(root: Path) -> dict[str, bytes]:
        files = (path for path in root.rglob("*") if path.is_file() and ".writers" not in path.parts)
        return {str(path.relative_to(root)): path.read_bytes() for path in files if path.name != ".lock"}

    def run(out: Path, worker: str) -> None:
        cache(base, {"t": model_paths["llama_tuned"]}, questions, out, raw="last", unit_tokens=20, worker=worker)

    base = load_model(model_paths["llama"])
    run(tmp_path / "one.zarr", "0/1")
    total = stores.info(tmp_path / "one.zarr")["units_total"]
    assert total > 6
    several = tmp_path / "several.zarr"
    run(several, "2/3")
    with pytest.raises(stores.StoreError, match=rf"{total - total // 3} of {total} units are missing .*\(0-1, 3-4, "):
        stores.merge(several)
    run(several, "1/2")
    run(several, "0/2")
    assert not stores.info(several)["complete"]
    assert stores.merge(several) == {"units": total}
    whole, merged = (tree(path) for path in (tmp_path / "one.zarr", several))
    assert set(whole) == set(merged)
    # When a run was made differs; zarr.json and the store's own line say so.
    assert {name for name in whole if whole[name] != merged[name]} <= {"zarr.json", "journal/store.json"}
