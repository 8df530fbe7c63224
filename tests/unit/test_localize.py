"""Scores, sets and their files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from pnlac_fast import store as stores
from pnlac_fast.errors import UserError
from pnlac_fast.loading import load_model
from pnlac_fast.localize import locate
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet, for_training, load_sets, random_from, random_like, save_sets
from pnlac_fast.scores import scores
from pnlac_fast.top_sets import find, grow, ranks, top_set

TOPICS = ["race", "science", "economy"]


def contrast(rms: np.ndarray, **others: np.ndarray) -> xr.Dataset:
    """A contrast of one model, site and selector from arrays [topic, layer, neuron]."""
    dims = ("model", "topic", "site", "tokens", "layer", "neuron")
    names = ("std_tuned", "mean_diff", "std_diff", "std_base", "mean_base")
    arrays = {"rms": rms, **{name: others.get(name, np.ones_like(rms)) for name in names}}
    data = {name: (dims, value[None, :, None, None].astype("f4")) for name, value in arrays.items()}
    for name in ("std_base", "mean_base"):
        data[name] = (dims[1:], arrays[name][:, None, None].astype("f4"))
    coords = {
        "model": ["m"],
        "topic": TOPICS,
        "site": ["mlp_mid"],
        "tokens": ["last"],
        "width": ("site", [rms.shape[-1]]),
    }
    data["n"] = (("topic", "tokens"), np.full((len(TOPICS), 1), 10))
    return xr.Dataset(data, coords=coords)


def test_general_specific_and_top_follow_their_definitions() -> None:
    rms = np.random.default_rng(0).random((3, 4, 25))
    found = find(contrast(rms), "m", top=0.3)
    tops = {}
    for t, topic in enumerate(TOPICS):
        order = sorted((-np.float32(rms[t, i, j]), i, j) for i in range(4) for j in range(25))[:30]
        tops[topic] = {(i, j) for _, i, j in order}
        assert {tuple(x) for x in np.argwhere(found.top[topic].member)} == tops[topic]
    general = tops["race"] & tops["science"] & tops["economy"]
    assert {tuple(x) for x in np.argwhere(found.general.member)} == general
    for topic in TOPICS:
        others = set().union(*(tops[t] for t in TOPICS if t != topic))
        assert {tuple(x) for x in np.argwhere(found.specific[topic].member)} == tops[topic] - others
    paper = find(contrast(rms), "m", top=0.3, specific="paper")
    assert {tuple(x) for x in np.argwhere(paper.specific["race"].member)} == tops["race"] - general
    assert found.overlap[0, 1] == pytest.approx(
        len(tops["race"] & tops["science"]) / len(tops["race"] | tops["science"])
    )
    assert found.chance["general"] == pytest.approx(0.027)
    assert found.chance["jaccard"] == pytest.approx(0.3 / 1.7)


def test_a_specific_share_takes_those_of_the_top_set_that_rank_lowest_elsewhere() -> None:
    generator = np.random.default_rng(2)
    rms, mean, std = generator.random((3, 3, 4, 25))
    data = contrast(rms, mean_base=mean, std_base=std)
    found = find(data, "m", top=0.3, specific_share=0.07)
    part = scores(data, "part").values[0, :, 0, 0]
    for t, topic in enumerate(TOPICS):
        best = np.stack([ranks(part[o]) for o in range(3) if o != t]).min(0)
        inside = sorted((-best[i, j], i, j) for i, j in np.argwhere(found.top[topic].member))
        assert {tuple(x) for x in np.argwhere(found.specific[topic].member)} == {(i, j) for _, i, j in inside[:7]}
    assert found.chance["specific"] == found.specific["race"].found["specific_share"] == 0.07
    assert np.array_equal(found.general.member, find(data, "m", top=0.3).general.member)
    with pytest.raises(UserError, match="raise --top"):
        find(data, "m", top=0.05, specific_share=0.07)


def test_chance_is_what_independent_scores_give() -> None:
    generator = np.random.default_rng(1)
    shares: dict[str, list[float]] = {"general": [], "specific": []}
    for specific in ("strict", "paper"):
        shares["specific"] = []
        for _ in range(30):
            found = find(contrast(generator.random((3, 10, 200))), "m", top=0.3, specific=specific)
            shares["general"].append(found.general.share)
            shares["specific"].append(found.specific["race"].share)
        assert np.mean(shares["specific"]) == pytest.approx(found.chance["specific"], rel=0.05)
    assert np.mean(shares["general"]) == pytest.approx(0.027, rel=0.1)


def test_scores_follow_their_definitions() -> None:
    generator = np.random.default_rng(0)
    parts = {name: generator.random((3, 2, 5)) + 0.1 for name in ("rms", "std_base", "std_tuned", "std_diff")}
    parts |= {name: generator.standard_normal((3, 2, 5)) for name in ("mean_diff", "mean_base")}
    data = contrast(parts["rms"], **{k: v for k, v in parts.items() if k != "rms"})
    expected = {
        "rms": parts["rms"],
        "std_rms": parts["rms"] / parts["std_base"],
        "mean_diff": abs(parts["mean_diff"]),
        "cohens_d": abs(parts["mean_diff"]) / np.sqrt((parts["std_base"] ** 2 + parts["std_tuned"] ** 2) / 2),
        "welch_t": abs(parts["mean_diff"]) / np.sqrt((parts["std_base"] ** 2 + parts["std_tuned"] ** 2) / 9),
        "paired_t": abs(parts["mean_diff"]) / (parts["std_diff"] / 3),
        "part": np.sqrt(parts["rms"] * np.hypot(parts["mean_base"], parts["std_base"])),
    }
    for name, value in expected.items():
        assert np.allclose(scores(data, name).values[0, :, 0, 0], value, rtol=1e-5)


def test_t_statistics_are_those_of_scipy() -> None:
    generator = np.random.default_rng(3)
    a = generator.standard_normal((12, 3, 2, 4))  # [token, topic, layer, neuron]
    b = a + 0.3 * generator.standard_normal(a.shape) + 0.1
    d = b - a
    moments = {"std_base": a.std(0), "std_tuned": b.std(0), "mean_diff": d.mean(0), "std_diff": d.std(0)}
    data = contrast(np.sqrt((d**2).mean(0)), **moments).assign(n=(("topic", "tokens"), np.full((3, 1), 12)))
    welch, paired = scipy.stats.ttest_ind(b, a, equal_var=False), scipy.stats.ttest_rel(b, a)
    for name, expected in (("welch_t", welch), ("paired_t", paired)):
        found = scores(data, name).values[0, :, 0, 0]
        assert np.allclose(found, abs(expected.statistic), rtol=1e-5)


def test_sets_without_intersection() -> None:
    rms = np.random.default_rng(5).random((3, 4, 25))
    found = find(contrast(rms), "m", top=0.5, tuned_topic="science")
    size = len(found.general)
    score = rms.astype("f4").astype("f8")
    on, off = score[1], (score[0] + score[2]) / 2
    for kind, value in (("mean", score.mean(0)), ("off_minus_on", off - on), ("on_minus_off", on - off)):
        members = found.mean if kind == "mean" else found.contrasted[kind]
        assert members.kind == kind
        assert len(members) == size
        assert value[members.member].min() > value[~members.member].max()
    assert not find(contrast(rms), "m", top=0.5).contrasted  # what it was tuned on is not known


def test_neurons_that_never_vary_score_zero_or_infinity() -> None:
    rms = np.array([[[0.0, 1.0]]] * 3)
    score = scores(contrast(rms, std_base=np.zeros((3, 1, 2))), "std_rms").values[0, 0, 0, 0, 0]
    assert score.tolist() == [0.0, np.inf]


def test_ties_go_to_the_lower_layer_and_neuron() -> None:
    assert np.argwhere(top_set(np.ones((2, 4)), 0.5)).tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert ranks(np.array([[1.0, 3.0], [3.0, 2.0]])).tolist() == [[3, 0], [1, 2]]


@given(st.integers(0, 1000), st.floats(0.01, 1.0))
def test_top_sets_are_those_of_the_ranks(seed: int, fraction: float) -> None:
    generator = np.random.default_rng(seed)
    score = generator.integers(0, 6, (3, 17)).astype(float)
    score[generator.random((3, 17)) < 0.1] = np.inf
    assert np.array_equal(top_set(score, fraction), ranks(score) < max(1, round(51 * fraction)))
    score[generator.random((3, 17)) < 0.1] = np.nan
    assert np.array_equal(top_set(score, fraction), ranks(score) < max(1, round(51 * fraction)))


def test_top_per_layer_takes_the_same_share_of_each() -> None:
    score = np.arange(40.0).reshape(4, 10)
    assert top_set(score, 0.2).sum(1).tolist() == [0, 0, 0, 8]
    assert top_set(score, 0.2, per_layer=True).sum(1).tolist() == [2, 2, 2, 2]


@given(st.integers(0, 1000), st.floats(0.01, 1.0))
def test_grow_gives_exactly_the_share_and_agrees_with_the_intersection(seed: int, share: float) -> None:
    score = np.random.default_rng(seed).random((3, 4, 25))
    grown = grow(score, share)
    assert grown.sum() == max(1, round(100 * share))
    for fraction in (0.2, 0.4, 0.6):
        shared = np.stack([top_set(s, fraction) for s in score]).all(0)
        smaller, larger = (shared, grown) if shared.sum() <= grown.sum() else (grown, shared)
        worst = np.stack([ranks(s) for s in score]).max(0)
        assert worst[smaller].max(initial=-1) <= worst[larger].max(initial=-1)


@given(st.integers(0, 50))
def test_random_sets_match_counts_and_avoid_the_excluded(seed: int) -> None:
    member = np.zeros((3, 20), bool)
    member[0, :5] = member[2, 3:15] = True
    neurons = NeuronSet("g", "general", member)
    drawn = random_like(neurons, seed, exclude=member)
    assert drawn.per_layer == neurons.per_layer == [5, 0, 12]
    assert not (drawn.member & member)[0].any()
    assert (drawn.member & member)[2].sum() == 4  # only 8 of 20 are outside the set
    assert np.array_equal(drawn.member, random_like(neurons, seed, exclude=member).member)


@given(st.integers(0, 50))
def test_random_sets_from_a_pool(seed: int) -> None:
    generator = np.random.default_rng(seed)
    pool = generator.random((3, 20)) < 0.5
    member = np.zeros((3, 20), bool)
    member[0, :4] = member[1, 3:6] = True
    neurons = NeuronSet("g", "general", member)
    free = pool & ~member
    drawn = random_from(neurons, pool, seed)
    assert len(drawn) == 7
    assert not (drawn.member & ~free).any()
    for layer, count in enumerate((4, 3, 0)):
        assert drawn.per_layer[layer] >= min(count, free[layer].sum())
    if (free.sum(1) >= [4, 3, 0]).all():
        assert drawn.per_layer == [4, 3, 0]
    with pytest.raises(UserError, match="only 0 others"):
        random_from(neurons, member, seed)


def test_random_sets_differ_and_are_uniform() -> None:
    neurons = NeuronSet("g", "general", np.eye(1, 10, dtype=bool))
    hits = sum(random_like(neurons, seed).member[0] for seed in range(2000))
    assert (abs(hits - 200) < 60).all()


def test_file_round_trip(tmp_path: Path) -> None:
    found = find(contrast(np.random.default_rng(0).random((3, 4, 25))), "m", base={"sha256": "abc"})
    save_sets(found.sets, tmp_path / "new" / "n.json")
    (tmp_path / "new" / "n.json").rename(tmp_path / "n.json")
    read = load_sets(tmp_path / "n.json")
    assert list(read) == [s.name for s in found.sets]
    for s in found.sets:
        again = read[s.name]
        assert np.array_equal(s.member, again.member)
        assert (s.kind, s.topic, s.model, s.site, s.found, s.base) == (
            again.kind, again.topic, again.model, again.site, again.found, again.base,
        )  # fmt: skip
    assert for_training(tmp_path / "n.json", "freeze", "race").kind == "general"
    assert for_training(tmp_path / "n.json", "specific", "science").topic == "science"
    assert for_training(tmp_path / "n.json", "freeze", "race", name="m/top/race").kind == "top"
    with pytest.raises(UserError, match="Did you mean 'm/general'"):
        for_training(tmp_path / "n.json", "freeze", "race", name="m/generale")
    with pytest.raises(UserError, match="0 neuron sets are specific for law"):
        for_training(tmp_path / "n.json", "specific", "law")


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", '{"format": "pnlac-neurons", "version": 9, "sets": []}', "x" * 10]
    + [
        json.dumps({"format": "pnlac-neurons", "version": 1, "sets": [entry]})
        for entry in (
            {},
            {"layers": 1, "width": 2, "neurons": {"0": [5]}},
            {"layers": 1, "width": 2, "neurons": {"0": [-1]}},
        )
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "n.json").write_text(content)
    with pytest.raises(UserError, match="locate"):
        load_sets(tmp_path / "n.json")


def test_sets_refuse_other_models(llama: Model, model_paths) -> None:
    inside = NeuronSet("g", "general", np.ones((3, 48), bool), base=llama.origin)
    inside.check(llama)
    with pytest.raises(UserError, match="sha256"):
        inside.check(load_model(model_paths["llama_tuned"]))
    with pytest.raises(UserError, match="3 layers of 40 neurons"):
        NeuronSet("g", "general", np.ones((3, 40), bool)).check(llama)
    with pytest.raises(UserError, match="is empty"):
        NeuronSet("g", "general", np.zeros((3, 48), bool)).check(llama)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "rmse"}, "Did you mean 'rms'"),
        ({"specific": "stric"}, "Did you mean 'strict'"),
        ({"site": "resid"}, "no site 'resid'"),
        ({"tokens": "prompt"}, "no tokens 'prompt'"),
        ({"top": 0.0}, "between 0 and 100 %"),
        ({"top": 5.0}, "between 0 and 100 %"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find(contrast(np.random.default_rng(0).random((3, 2, 5))), "m", **options)
    with pytest.raises(UserError, match="no model 'n'"):
        find(contrast(np.random.default_rng(0).random((3, 2, 5))), "n")


def test_locate_writes_the_sets_into_the_store_and_a_file(
    model_paths, adapter_paths, questions, tmp_path: Path
) -> None:
    from pnlac_fast.caching import cache

    store = tmp_path / "s.zarr"
    cache(model_paths["llama"], adapter_paths, questions, store, sites=("mlp_mid", "resid"), tokens=("last", "prompt"))
    found = locate(store, top=0.2, out=tmp_path / "n.json")
    kept = stores.open_sets(store)
    for name in ("race", "science"):
        member = kept["member"].sel(neuron_set=f"{name}/general").values
        assert np.array_equal(member, found[name].general.member)
    assert set(load_sets(tmp_path / "n.json")) == set(kept["neuron_set"].values)
    resid = locate(store, top=0.2, site="resid", tokens="prompt", score="std_rms", general_share=0.125)
    assert resid["race"].general.member.shape == (3, 32)
    assert len(resid["race"].general) == 12
    load_sets(tmp_path / "n.json")["race/general"].check(load_model(model_paths["llama"]))

    options: dict[str, float] = {"top": 0.2, "specific_share": 0.05}
    held = locate(store, hold_out=1, **options)["race"]
    assert list(held.top) == list(held.specific) == ["race", "economy"]  # science comes after race
    without = find(stores.open_contrast(store).sel(topic=["race", "economy"]), "race", **options)
    assert np.array_equal(held.specific["race"].member, without.specific["race"].member)
    assert not np.array_equal(held.general.member, locate(store, **options)["race"].general.member)
    with pytest.raises(UserError, match="2 besides 'race' cannot be held out"):
        locate(store, hold_out=2)
    for wrong in ({"evidence": True, "hold_out": 1}, {"score": "attribution", "specific_share": 0.05}):
        with pytest.raises(UserError, match=r"without --hold-out|leave out --score"):
            locate(store, **wrong)
