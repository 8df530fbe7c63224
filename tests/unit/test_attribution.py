"""Attribution is the first-order effect of a patch, and the contrast of sides is what its words say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from pnlac_fast import prompts
from pnlac_fast import store as stores
from pnlac_fast.attribution import attribute
from pnlac_fast.errors import UserError
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.localize import locate
from pnlac_fast.models import Model
from pnlac_fast.neurons import choose, jaccard, load_sets
from pnlac_fast.scores import toward_tuning
from pnlac_fast.sides import contrast_sides
from pnlac_fast.stance import margins


def moved_by(base: Model, tuned: Model, site: str, questions, layer: int, neuron: int, step: float) -> np.ndarray:
    """How far margins move when one neuron goes ``step`` of the way from base to tuned; one text a pass."""
    recorded: list[torch.Tensor] = []

    def record(_: int, activation: torch.Tensor) -> None:
        recorded.append(activation[..., neuron].clone())

    def shift(_: int, activation: torch.Tensor) -> torch.Tensor:
        changed = activation.clone()
        changed[..., neuron] += step * (recorded.pop(0) - activation[..., neuron])
        return changed

    plain = margins(base, questions, batch_tokens=1)
    with tuned.tapped(site, record, [layer]):
        margins(tuned, questions, batch_tokens=1)
    with base.tapped(site, shift, [layer]):
        return margins(base, questions, batch_tokens=1) - plain


@pytest.mark.parametrize("site", ["mlp_mid", "resid"])
@pytest.mark.parametrize("shared", [True, False], ids=["adapter", "checkpoint"])
def test_attribution_is_the_derivative_of_a_patch(
    model_paths, adapter_paths, questions, site: str, shared: bool
) -> None:
    base = load_model(model_paths["llama"], dtype="float64")
    tuned = load_tuned(base, adapter_paths["race"] if shared else model_paths["llama_tuned"], name="race")
    result = attribute(base, {"race": tuned}, questions, site=site, batch_tokens=200)
    step = 0.01  # central differences; norms compute in float32, so a smaller one drowns in rounding
    for layer, neuron in ((0, 3), (1, 17), (2, 5)):
        ends = [moved_by(base, tuned, site, questions, layer, neuron, s) for s in (step, -step)]
        moved = (ends[0] - ends[1]) / (2 * step)
        for topic in ("race", "economy"):
            own = np.array([q.topic == topic for q in questions])
            found = float(result["attribution"].sel(model="race", topic=topic, layer=layer, neuron=neuron))
            assert found == pytest.approx(moved[own].mean(), rel=2e-3, abs=1e-6)
    shift = margins(tuned, questions) - margins(base, questions)
    own = np.array([q.topic == "science" for q in questions])
    assert float(result["shift"].sel(model="race", topic="science")) == pytest.approx(shift[own].mean())
    assert not any(p.grad is not None for p in base.hf.parameters())


def test_attribution_does_not_depend_on_batches_nor_on_other_models(model_paths, adapter_paths, questions) -> None:
    base = load_model(model_paths["llama"], dtype="float64")
    both = {name: load_tuned(base, path, name=name) for name, path in adapter_paths.items()}
    together = attribute(base, both, questions, batch_tokens=4096, normalise="sum")
    alone = attribute(base, {"science": both["science"]}, questions, batch_tokens=30, normalise="sum")
    assert np.allclose(together["attribution"].sel(model="science"), alone["attribution"][0], rtol=1e-5, atol=1e-9)
    assert together["tuned_topic"].values.tolist() == ["race", "science"]


def test_the_sign_of_attribution_follows_the_tuning() -> None:
    value = xr.DataArray(np.ones((1, 2, 1, 3)), dims=("model", "topic", "layer", "neuron"))
    coords = {"model": ["m"], "topic": ["race", "science"], "tuned_topic": ("model", ["race"])}
    for shift, sign in (([[-0.5, 2.0]], -1), ([[0.5, -2.0]], 1)):
        result = xr.Dataset({"attribution": value, "shift": (("model", "topic"), shift)}, coords=coords)
        assert (toward_tuning(result, "m") == sign).all()
        unknown = result.assign_coords(tuned_topic=("model", [""]))
        assert (toward_tuning(unknown, "m") == -sign).all()


def test_attribution_of_sets_is_that_of_their_neurons_on_held_out_questions(
    model_paths, adapter_paths, questions, tmp_path: Path
) -> None:
    from pnlac_fast.caching import cache

    store, located, probe = tmp_path / "s.zarr", questions[::2], questions[1::2]
    cache(model_paths["llama"], adapter_paths, located, store, unit_tokens=20)
    base = load_model(model_paths["llama"], dtype="float32")
    tuned = {name: load_tuned(base, path, name=name) for name, path in adapter_paths.items()}
    inputs = {"model": base, "data": located, "probe": probe}
    options = {"top": 0.4, "evidence": True, "draws": 3, "batch_tokens": 100}
    sets = locate(store, tuned=tuned, **options, **inputs)
    result = stores.open_result(store, "set_attribution")
    assert "attribution" not in stores.list_results(store)  # one pair a question is no score of neurons
    whole = attribute(base, tuned, probe)
    first = [replace(q, right=q.right[:1], left=q.left[:1]) for q in located]
    ranking = toward_tuning(attribute(base, tuned, first), "science").values
    topics = list(dict.fromkeys(q.topic for q in located))
    at = topics.index("science")
    off_minus_on = np.delete(ranking, at, axis=0).mean(0) - ranking[at]
    general = sets["science"].general
    own = result.isel(run=(result["model"] == "science").values)
    kinds = own["neurons"].values.tolist()
    assert kinds == ["none", "tuned", "general", "specific", "top", "random", "random", "random", "attribution"]
    assert [v is None for v in np.where(np.isnan(own["overlap"].values[:, 0]), None, 0)] == [True] * 2 + [False] * 7
    members = {
        "general": general.member,
        "specific": sets["science"].specific["science"].member,
        "attribution": off_minus_on >= np.sort(off_minus_on.ravel())[-len(general)],
    }
    for kind, member in members.items():
        run = kinds.index(kind)
        assert int(own["count"][run]) == member.sum()
        assert float(own["overlap"][run, 0]) == pytest.approx(jaccard(member, general.member))
        moved = own["margin"][run] - own["margin"][0]
        for topic in topics:
            expected = whole["attribution"].sel(model="science", topic=topic).values[member].sum()
            assert float(moved[(own["topic"] == topic).values].mean()) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    ends = own["margin"].values[:2]
    assert np.allclose(ends, [margins(base, probe), margins(tuned["science"], probe)], atol=1e-5)
    on = float(own["recovered"].sel(part="on", bound="estimate")[2])
    science = (own["topic"] == "science").values
    assert on == pytest.approx(
        float((own["margin"][2] - ends[0])[science].mean() / (ends[1] - ends[0])[science].mean())
    )
    with pytest.raises(UserError, match="located, race, science: give --tuned for each"):
        locate(store, tuned={"race": tuned["race"]}, **options, **inputs)
    with pytest.raises(UserError, match="attribution in the evidence: give --model, --tuned and --data too"):
        locate(store, probe=probe)


def test_sides_are_means_over_completions_paired_by_question(model_paths, questions) -> None:
    base = load_model(model_paths["qwen2"], dtype="float64")
    found = contrast_sides(base, questions, sites=("mlp_mid", "mlp_out"), batch_tokens=64)
    group = [q for q in questions if q.topic == "science"]
    means: dict[str, list[np.ndarray]] = {"left": [], "right": []}
    for side, rows in means.items():
        for question in group:
            texts = prompts.encode(base.tokenizer, [question], side=side)
            tokens = []
            for text in texts:
                seen: list[torch.Tensor] = []
                with torch.no_grad(), base.tapped("mlp_out", lambda _, a, seen=seen: seen.append(a[0]), [1]):
                    base.hf(input_ids=torch.tensor([text.ids]))
                tokens.append(seen[0][text.prompt :])
            rows.append(torch.cat(tokens).mean(0).numpy())
    left, right = (np.stack(means[side]) for side in ("left", "right"))
    own = found.sel(model="sides", topic="science", site="mlp_out", tokens="completion", layer=1)
    own = own.isel(neuron=slice(0, 32))
    for name, expected in (
        ("mean_base", left.mean(0)),
        ("std_base", left.std(0)),
        ("mean_tuned", right.mean(0)),
        ("mean_diff", (right - left).mean(0)),
        ("std_diff", (right - left).std(0)),
        ("rms", np.sqrt(((right - left) ** 2).mean(0))),
    ):
        assert np.allclose(own[name].values, expected, rtol=1e-4, atol=1e-7), name
    assert int(own["n"]) == len(group)
    assert np.isnan(found["rms"].sel(site="mlp_out").isel(neuron=slice(32, None))).all()


def test_locating_without_any_fine_tune(model_paths, questions, tmp_path: Path) -> None:
    store = tmp_path / "new.zarr"
    found = locate(
        store, contrast="sides", model=model_paths["llama"], data=questions, top=0.3, out=tmp_path / "n.json"
    )
    again = locate(store, contrast="sides", score="paired_t", top=0.3)
    assert set(found) == set(again) == {"sides"}
    sets = load_sets(tmp_path / "n.json")
    assert choose(sets, "general", model="race").member.sum() == len(found["sides"].general) > 0
    assert sets["sides/general"].found["tokens"] == "completion"
    sets["sides/general"].check(load_model(model_paths["llama"]))
    with pytest.raises(UserError, match="sha256"):
        sets["sides/general"].check(load_model(model_paths["llama_tuned"]))


def test_locating_by_attribution_and_keeping_scores(model_paths, adapter_paths, questions, tmp_path: Path) -> None:
    from pnlac_fast.caching import cache

    store = tmp_path / "s.zarr"
    cache(model_paths["llama"], adapter_paths, questions, store)
    with pytest.raises(UserError, match="holds no attribution yet: give --model, --data and --tuned"):
        locate(store, score="attribution")
    inputs = {"model": model_paths["llama"], "tuned": adapter_paths, "data": questions}
    found = locate(store, score="attribution", top=0.3, general_share=0.1, **inputs)["science"]
    value = toward_tuning(stores.open_result(store, "attribution"), "science").values
    assert np.array_equal(found.score.values, value)
    kept = locate(store, top=0.3, keep_scores=("rms", "welch_t", "attribution"))["science"]
    table = xr.open_zarr(store, group="results/scores")["value"]
    assert table.dims == ("score", "model", "topic", "site", "layer", "neuron")
    at = {"model": "science", "site": "mlp_mid"}
    assert np.allclose(table.sel(score="attribution", **at), value, rtol=1e-6)
    assert np.allclose(table.sel(score="rms", **at), kept.score, rtol=1e-6)
    with pytest.raises(UserError, match="Scores of moments need no model"):
        locate(store, **inputs)
    with pytest.raises(UserError, match="Attribution needs a tuned model"):
        locate(store, contrast="sides", score="attribution", **inputs)
