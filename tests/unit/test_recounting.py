"""Statistics from raw activations against those of the models, and what raw activations cannot tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from pnlac_fast import cache, locate, patch, recount
from pnlac_fast import store as stores
from pnlac_fast.errors import Interrupted, UserError
from pnlac_fast.neurons import NeuronSet

SITES = ("mlp_mid", "resid")


@pytest.fixture(scope="module")
def cached(model_paths, questions, tmp_path_factory):
    """Give a function that caches a few questions of each topic, and returns the store."""
    directory = tmp_path_factory.mktemp("recount")
    few = [q for i, q in enumerate(questions) if i % 7 < 3]
    arguments = (model_paths["llama"], {"race": model_paths["llama_tuned"]}, few)

    def run(**options: Any) -> Path:
        out = directory / f"{abs(hash(repr(options)))}.zarr"
        if not out.exists():
            cache(*arguments, out, **{"sites": SITES, "unit_tokens": 100} | options)
        return out

    return run


def same(found: Path, expected: Path, tolerance: float = 2e-6) -> None:
    """Compare the statistics of two stores, relative to what each neuron has typically."""
    ours, theirs = (stores.open_contrast(path).load() for path in (found, expected))
    xr.testing.assert_equal(ours["n"], theirs["n"])
    for name in theirs.data_vars:
        scale = float(abs(theirs[name]).max())
        np.testing.assert_allclose(ours[name], theirs[name], rtol=tolerance, atol=tolerance * scale, err_msg=str(name))
    assert ours.sizes == theirs.sizes


def test_full_rows_give_what_the_models_give(cached, tmp_path: Path) -> None:
    source = cached(raw="full", tokens=("all",))
    tokens = ("last", "completion", "prompt", "all")
    result = recount(source, tmp_path / "r.zarr", tokens=tokens)
    same(tmp_path / "r.zarr", cached(tokens=tokens))
    n = stores.open_contrast(tmp_path / "r.zarr")["n"].sum("topic")
    assert result["counted"] == {name: int(n.sel(tokens=name)) for name in tokens}
    assert stores.info(tmp_path / "r.zarr")["raw"]["tokens"] == "none"
    for site in SITES:
        ours, theirs = (
            stores.open_partials(path, site).load() for path in (tmp_path / "r.zarr", cached(tokens=tokens))
        )
        assert ours["topic"].values.tolist() == theirs["topic"].values.tolist()
        np.testing.assert_array_equal(ours["n"], theirs["n"])
        scale = float(theirs["tuned"].max())
        np.testing.assert_allclose(ours["tuned"], theirs["tuned"], rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("side", ["right", "left"])
def test_one_side(cached, tmp_path: Path, side: str) -> None:
    recount(cached(raw="full", tokens=("all",)), tmp_path / "r.zarr", tokens=("all", "last"), side=side)
    same(tmp_path / "r.zarr", cached(tokens=("all", "last"), side=side))


@pytest.mark.parametrize(
    ("raw", "kept", "asked"),
    [("last", ("last",), ("last",)), ("selected", ("prompt", "completion"), ("all", "prompt"))],
)
def test_fewer_rows_where_they_suffice(cached, tmp_path: Path, raw: str, kept: Any, asked: Any) -> None:
    recount(cached(raw=raw, tokens=kept), tmp_path / "r.zarr", tokens=asked)
    same(tmp_path / "r.zarr", cached(tokens=asked))


def test_narrow_dtypes_up_to_their_rounding(cached, tmp_path: Path) -> None:
    recount(cached(raw="last", raw_dtype="bfloat16"), tmp_path / "r.zarr")
    same(tmp_path / "r.zarr", cached(), tolerance=2**-6)
    with pytest.raises(AssertionError):
        same(tmp_path / "r.zarr", cached())


def test_some_topics_in_blocks_of_rows(cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pnlac_fast.recounting._AT_ONCE", 3 * 8 * 48)
    source = cached(raw="full", tokens=("all",))
    result = recount(source, tmp_path / "r.zarr", tokens=("all",), topics=("economy", "race"))
    found, whole = stores.open_contrast(tmp_path / "r.zarr"), stores.open_contrast(source)
    assert result["topics"] == found["topic"].values.tolist() == ["economy", "race"]
    expected = whole["rms"].sel(topic=["economy", "race"])
    np.testing.assert_allclose(found["rms"], expected, rtol=1e-5, atol=1e-6)
    assert set(stores.open_examples(tmp_path / "r.zarr")["topic"].values) == {"economy", "race"}


def test_locating_and_patching_read_it_like_any_other(cached, model_paths, questions, tmp_path: Path) -> None:
    out = tmp_path / "r.zarr"
    recount(cached(raw="full", tokens=("all",)), out, tokens=("last",))
    file = tmp_path / "neurons.json"
    found, expected = locate(out, top=0.3, out=file)["race"], locate(cached(), top=0.3)["race"]
    np.testing.assert_array_equal(found.general.member, expected.general.member)
    assert found.general.base == expected.general.base
    result = patch(
        model_paths["llama"],
        {"race": model_paths["llama_tuned"]},
        file,
        questions[::7],
        store=out,
        kinds=("mean",),
        sets=("general",),
        draws=0,
    )
    assert np.isfinite(result["margin"]).all()


def test_it_says_where_the_numbers_come_from_and_goes_on_after_a_stop(
    cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = cached(raw="full", tokens=("all",)), tmp_path / "r.zarr"
    commit, seen = stores.Writer.commit, []

    def stopped(self: stores.Writer, unit: int, *arguments: Any) -> None:
        seen.append(unit)
        if len(seen) == 2:
            raise KeyboardInterrupt
        commit(self, unit, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(stores.Writer, "commit", stopped)
        with pytest.raises(Interrupted, match="Run the same command again"):
            recount(source, out)
    assert stores.info(out)["units_done"] == 1
    recount(source, out)
    same(out, cached())
    told, of = stores.info(out), stores.info(source)
    assert told["provenance"]["source"]["path"] == str(source)
    assert told["provenance"]["base"] == of["provenance"]["base"]
    assert told["settings"]["recounted"]["dtype"] == "float32"
    assert told["settings"]["side"] == "none"
    with pytest.raises(stores.StoreError, match="settings"):
        recount(cached(raw="last"), out)


@pytest.mark.parametrize(
    ("options", "asked", "message"),
    [
        ({}, {}, "keeps no raw activations"),
        ({"raw": "pooled"}, {}, "keeps means over tokens"),
        ({"raw": "last", "raw_layers": [0, 2]}, {}, "of 2 of 3 layers only"),
        ({"raw": "last", "raw_neurons": True}, {}, "of chosen neurons only"),
        ({"raw": "last"}, {"tokens": ("prompt",)}, "only those of last"),
        ({"raw": "full"}, {"tokens": ("all",)}, "only those of last, prompt"),
        ({"raw": "full", "tokens": ("all",)}, {"tokens": ("first",)}, "no token selector 'first'"),
        ({"raw": "full", "tokens": ("all",)}, {"tokens": ("all", "all")}, "Give each token selector once"),
        ({"raw": "full", "tokens": ("all",)}, {"topics": ("guns",)}, "no topic 'guns'"),
        ({"raw": "full", "tokens": ("all",)}, {"side": "centre"}, "no side 'centre'"),
        ({"raw": "full", "tokens": ("all",), "side": "left"}, {"tokens": ("all",)}, "give --side left"),
    ],
)
def test_what_cannot_be_told(cached, tmp_path: Path, options: Any, asked: Any, message: str) -> None:
    if options.get("raw_neurons"):
        options = options | {"sites": ("mlp_mid",), "raw_neurons": [NeuronSet("a", "top", np.eye(3, 48) > 0)]}
    with pytest.raises(UserError, match=message):
        recount(cached(**options), tmp_path / "r.zarr", **asked)
    assert not (tmp_path / "r.zarr").exists()


def test_the_source_is_not_written_over_and_must_be_complete(cached, model_paths, questions, tmp_path: Path) -> None:
    source = cached(raw="last")
    with pytest.raises(UserError, match="a store of their own"):
        recount(source, source, overwrite=True)
    half = tmp_path / "half.zarr"
    tuned = {"t": model_paths["llama_tuned"]}
    cache(model_paths["llama"], tuned, questions[:9], half, raw="last", unit_tokens=20, worker="0/2")
    with pytest.raises(UserError, match=r"is unfinished \(\d of \d units\)"):
        recount(half, tmp_path / "r.zarr")
