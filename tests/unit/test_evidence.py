"""Chance, halves, nulls and tests: each against a slow way to the same number, or a world whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import xarray as xr

from pnlac_fast import store as stores
from pnlac_fast.activations import read
from pnlac_fast.caching import cache
from pnlac_fast.chance import _hypergeometric, overlap
from pnlac_fast.errors import UserError
from pnlac_fast.evidence import evidence, summarise
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.localize import locate
from pnlac_fast.noise import noise_floor
from pnlac_fast.prompts import encode
from pnlac_fast.store.contrast import statistics
from pnlac_fast.top_sets import Localization, find

TOPICS = ("race", "science", "economy")
LAYERS, WIDTH = 2, 60


def world(change: np.ndarray, questions: int = 24, units: int = 6, noise: float = 1.0, seed: int = 0):
    """Contrast and partial sums of questions with the mean change [topic, layer, neuron], and the raw a and b."""
    generator = np.random.default_rng(seed)
    a = generator.standard_normal((len(TOPICS), questions, LAYERS, WIDTH))
    b = a + change[:, None] + noise * generator.standard_normal(a.shape)
    moments: dict[str, list[np.ndarray]] = {}
    sums: dict[str, list[np.ndarray]] = {"base": [], "tuned": []}
    for x, y in zip(a, b, strict=True):
        parts = (x, x**2), (y, y**2, (y - x) ** 2)
        total = [np.stack([part.sum(0) for part in group]) for group in parts]
        for name, value in statistics(np.array([questions]), total[0][None], total[1][None, None]).items():
            moments.setdefault(name, []).append(value.reshape(LAYERS, WIDTH))
        for name, group in zip(sums, parts, strict=True):
            for block in range(units):
                rows = slice(block * questions // units, (block + 1) * questions // units)
                sums[name].append(np.stack([part[rows].sum(0) for part in group]))
    dims = ("topic", "layer", "neuron")
    coords = {"topic": np.array(TOPICS, object), "layer": range(LAYERS)}
    contrast = xr.Dataset({name: (dims, np.stack(value)) for name, value in moments.items()}, coords)
    contrast = contrast.expand_dims(model=["m"], site=["mlp_mid"], tokens=["last"])
    contrast = contrast.assign_coords(width=("site", [WIDTH]))
    contrast["n"] = (("topic", "tokens"), np.full((3, 1), questions))
    unit = {
        "topic": ("unit", np.repeat(np.array(TOPICS, object), units)),
        "count": ("unit", np.full(3 * units, questions // units)),
    }
    partials = xr.Dataset(
        {
            "base": (("unit", "tokens", "base_moment", *dims[1:]), np.stack(sums["base"])[:, None]),
            "tuned": (("unit", "model", "tokens", "tuned_moment", *dims[1:]), np.stack(sums["tuned"])[:, None, None]),
            "n": (("unit", "tokens"), np.full((3 * units, 1), questions // units)),
        },
        coords={"model": ["m"], "tokens": ["last"], **unit},
    )
    return contrast, partials, a, b


def gathered(change: np.ndarray, *, top: float = 0.1, draws: int = 6, **options) -> tuple[Localization, xr.Dataset]:
    contrast, partials, _, _ = world(change, **options)
    found = {"m": find(contrast, "m", top=top)}
    return found["m"], evidence(found, contrast, partials, draws=draws)


def changes(common: float, own: float) -> np.ndarray:
    """Six neurons change on every topic, other six on each topic alone."""
    change = np.zeros((3, LAYERS, WIDTH))
    change[:, 0, :6] = common
    for t in range(3):
        change[t, 1, 6 * t : 6 * t + 6] = own
    return change


@pytest.mark.parametrize("seed", range(6))
def test_overlap_of_chance_is_the_hypergeometric_one(seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = (generator.random((2, 12)) < generator.random() for _ in range(2))
    found = overlap(a, b)
    index = []
    for _ in range(400):
        x, y = (np.stack([generator.permutation(row) for row in member]) for member in (a, b))
        index.append((x & y).sum() / max(1, (x | y).sum()) if (x | y).any() else 1.0)
    assert found.expected == pytest.approx(np.mean(index), abs=4 * np.std(index) / 20 + 1e-9)
    assert found.high >= found.expected - 1e-9
    flat = overlap(a, b, by_layer=False)
    shared, m, k = int((a & b).sum()), int(a.sum()), int(b.sum())
    assert flat.p == pytest.approx(scipy.stats.hypergeom.sf(shared - 1, 24, m, k))
    assert found.jaccard == flat.jaccard
    many = _hypergeometric(14336, 717, 900)
    assert np.allclose(many, scipy.stats.hypergeom.pmf(np.arange(718), 14336, 717, 900), rtol=1e-6, atol=1e-300)


def test_a_common_taste_for_a_layer_is_no_overlap() -> None:
    generator = np.random.default_rng(0)
    a, b = np.zeros((4, 400), bool), np.zeros((4, 400), bool)
    a[2], b[2] = generator.random(400) < 0.5, generator.random(400) < 0.5
    assert overlap(a, b).p > 0.01
    assert overlap(a, b, by_layer=False).p < 1e-6


def test_topics_that_differ_do_so_in_halves_and_against_shuffled_topics() -> None:
    found, result = gathered(changes(common=4, own=4))
    assert found.general.share == pytest.approx(6 / 120)
    record = summarise(result)[0]
    assert record["halves_same_topic"] == 1.0
    assert record["halves_other_topic"] == pytest.approx(6 / 18)
    assert (result["half_specific"] == 1).all()
    assert (result["half_general"] == 1).all()
    wide, mixed = gathered(changes(common=4, own=4), top=0.2)
    assert float(mixed["null_general"].min()) > wide.general.share  # shuffled topics agree on more neurons
    assert record["null_specific"][0] < 0.8 * record["specific"]
    figures = result["topic_overlap"].sel(model="m", topic="race", other="science")
    assert float(figures.sel(figure="jaccard")) == pytest.approx(6 / 18)
    assert float(figures.sel(figure="p")) < 0.01


def test_specific_neurons_of_topics_that_do_not_differ_are_no_more_than_noise() -> None:
    _, result = gathered(changes(common=0.6, own=0.0), draws=10)
    record = summarise(result)[0]
    low, high = record["null_specific"][1:]
    assert low <= record["specific"] <= high
    assert record["specific"] > 0.02  # and there are some: a set that is not empty proves nothing
    assert record["halves_same_topic"] - record["halves_other_topic"] < 0.1


def test_specific_sets_of_a_given_share_are_made_as_large_from_halves_and_shuffled_topics() -> None:
    contrast, partials, _, _ = world(changes(1, 1))
    result = evidence({"m": find(contrast, "m", top=0.2, specific_share=0.05)}, contrast, partials, draws=3)
    assert np.allclose(result["null_specific"], 0.05)
    assert np.allclose(result["specific"], 0.05)


def test_null_and_halves_are_what_locating_by_hand_gives() -> None:
    contrast, partials, a, b = world(changes(1, 1), questions=6, units=2)
    found = find(contrast, "m", top=0.2)
    result = evidence({"m": found}, contrast, partials, draws=12)
    rms = {}
    for t in range(3):
        for half in range(2):
            d = (b - a)[t, 3 * half : 3 * half + 3]
            rms[t, half] = np.sqrt((d**2).mean(0))
    tops = {key: value >= np.sort(value.ravel())[-24] for key, value in rms.items()}
    possible = {(tops[0, i] & tops[1, j]).sum() / (tops[0, i] | tops[1, j]).sum() for i in range(2) for j in range(2)}
    seen = result["half_overlap"].sel(model="m", topic="race", other="science").values
    assert all(np.isclose(value, list(possible)).any() for value in seen)
    assert len(set(seen)) > 1
    same = (tops[0, 0] & tops[0, 1]).sum() / (tops[0, 0] | tops[0, 1]).sum()
    assert np.allclose(result["half_overlap"].sel(model="m", topic="race", other="race"), same)


def test_false_discoveries_are_controlled_and_changes_found() -> None:
    contrast, partials, a, b = world(changes(2, 2))
    found = find(contrast, "m", top=0.1)
    result = evidence({"m": found}, contrast, partials, draws=1).sel(model="m")
    p = scipy.stats.ttest_rel(b, a, axis=1).pvalue
    assert np.allclose(result["p_change"], p, rtol=1e-3, atol=1e-7)
    q = scipy.stats.false_discovery_control(p[0].ravel()).reshape(LAYERS, WIDTH)
    assert np.allclose(result["q_change"].sel(topic="race"), q, rtol=1e-3, atol=1e-7)
    assert float(result["significant_top"].min()) > 0.9
    assert float(result["significant_general"]) == 1.0
    everywhere = result["q_everywhere"].values < 0.05
    assert everywhere[0, :6].all()
    assert everywhere.sum() <= 8
    _, none = gathered(changes(0, 0), draws=1)
    assert float(none["significant"].max()) < 0.05


def test_layers_are_ranked_raw_and_in_units_of_base() -> None:
    contrast, partials, _, _ = world(changes(0, 0))
    loud = (
        xr.where(contrast["layer"] == 1, 10.0, 1.0) if "layer" in contrast else xr.DataArray([1.0, 10.0], dims="layer")
    )
    scaled = contrast.assign({name: contrast[name] * loud for name in contrast.data_vars if name != "n"})
    found = find(scaled, "m", top=0.1)
    share = evidence({"m": found}, scaled, partials, draws=1)["layer_share"].sel(model="m", kind="top")
    assert share.sel(layer_score="rms").values.tolist() == [0.0, pytest.approx(0.2)]
    assert abs(share.sel(layer_score="std_rms") - 0.1).max() < 0.06
    assert np.allclose(share.sum("layer"), 0.2)


def test_seeds_of_one_fine_tune_are_held_against_each_other() -> None:
    made = [world(changes(3, 3), seed=seed) for seed in range(2)]
    names, tuned = ("first", "second", "other"), ("race", "race", "science")
    joined = []
    for part in range(2):
        each = [made[i][part].isel(model=0, drop=True) for i in (0, 1, 1)]
        own = [name for name, values in made[0][part].data_vars.items() if "model" in values.dims]
        joined.append(xr.concat(each, "model", data_vars=own, coords="minimal", compat="override"))
    contrast, partials = joined
    contrast, partials = (each.assign_coords(model=list(names)) for each in (contrast, partials))
    found = {n: find(contrast, n, top=0.1, tuned_topic=t) for n, t in zip(names, tuned, strict=True)}
    records = summarise(evidence(found, contrast, partials, draws=1))
    first, second, other = records
    expected = overlap(found["first"].general.member, found["second"].general.member)
    assert first["seeds_general"] == second["seeds_general"] == pytest.approx(expected.jaccard)
    assert first["seeds_chance"] == pytest.approx(expected.expected)
    assert first["seeds_general"] > 0.8 > 0.2 > first["seeds_chance"]
    assert "seeds_general" not in other


def test_a_topic_of_one_unit_cannot_be_halved() -> None:
    contrast, partials, _, _ = world(changes(1, 1), units=1)
    found = {"m": find(contrast, "m", top=0.1)}
    with pytest.raises(UserError, match="holds 'race' as one unit"):
        evidence(found, contrast, partials)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_noise_floor_is_that_of_the_arithmetic(model_paths, adapter_paths, questions, dtype: str) -> None:
    model = load_model(model_paths["llama"], dtype=dtype)
    load_tuned(model, adapter_paths["race"])  # its adapter is no part of the base model
    epsilon = torch.finfo(getattr(torch, dtype)).eps
    for tokens in ("last", "completion"):
        floor = noise_floor(model, questions, tokens=tokens)["rms"]
        assert dict(floor.sizes) == {"topic": 3, "layer": 3, "neuron": 48}
        texts = encode(model.tokenizer, questions, side="both")
        size = read(model, texts, tokens)[0].square().mean((1, 2)).sqrt().numpy()
        relative = floor.mean(("topic", "neuron")).values / size
        assert (relative > epsilon / 50).all()
        assert (relative < 50 * epsilon).all()


def test_no_noise_floor_in_float64(model_paths, questions) -> None:
    with pytest.raises(UserError, match="Nothing wider"):
        noise_floor(load_model(model_paths["llama"], dtype="float64"), questions)


def test_top_neurons_are_held_against_the_noise_floor() -> None:
    contrast, partials, _, _ = world(changes(2, 2))
    found = {"m": find(contrast, "m", top=0.1)}
    floor = xr.Dataset({"rms": abs(contrast["rms"].sel(model="m", site="mlp_mid", tokens="last", drop=True)) / 50})
    above = evidence(found, contrast, partials, floor=floor, draws=1)["above_floor"]
    assert np.allclose(above, 50)


def test_evidence_of_a_store(model_paths, adapter_paths, questions, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    cache(model_paths["llama"], adapter_paths, questions, store, unit_tokens=30, tokens=("prompt", "last"))
    options = {"tokens": "last", "evidence": True, "draws": 3, "top": 0.3}
    plain = locate(store, **options)
    result = xr.open_zarr(store, group="results/evidence")
    assert "above_floor" not in result
    found = locate(store, **options, model=model_paths["llama"], data=questions)
    again = stores.open_result(store, "evidence")
    assert float(again["above_floor"].min()) > 100
    for name in plain:
        assert np.array_equal(found[name].general.member, plain[name].general.member)
        own = again.sel(model=name)
        assert float(own["general"]) == pytest.approx(plain[name].general.share)
        assert np.array_equal(own["half_overlap"], result["half_overlap"].sel(model=name))
        contrast = stores.open_contrast(store).sel(model=name, site="mlp_mid", tokens="last")
        assert (contrast["n"] == 7).all()
        deviation = contrast["std_diff"].values * np.sqrt(7 / 6)
        t = abs(contrast["mean_diff"].values) / (deviation / np.sqrt(7))
        assert np.allclose(own["p_change"], 2 * scipy.stats.t.sf(t, 6), rtol=1e-3)
    both = overlap(found["race"].general.member, found["science"].general.member)
    assert np.allclose(again["model_overlap"].sel(model="race", other_model="science"), both)
    assert [record["model"] for record in summarise(again)] == ["race", "science"]
    locate(store, tokens="prompt", evidence=True, draws=1)  # whose noise was not measured
    assert "above_floor" not in stores.open_result(store, "evidence")
    with pytest.raises(UserError, match="Evidence comes from the sums"):
        locate(store, evidence=True, contrast="sides")
