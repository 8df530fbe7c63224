"""Patches do what they say, teacher-forced and while generating, and never nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pnlac_fast import store as stores
from pnlac_fast.architecture import SITES
from pnlac_fast.caching import cache
from pnlac_fast.errors import UserError
from pnlac_fast.generation import answers
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.localize import locate
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.patching import patch, patched
from pnlac_fast.stance import margins

IDS = torch.tensor([[1, 5, 9, 12, 7], [1, 8, 8, 4, 6]])


def neurons(model: Model, site: str = "mlp_mid", layers: tuple[int, ...] = (0, 2), count: int = 7) -> NeuronSet:
    member = np.zeros((len(model.blocks), model.width(site)), bool)
    for layer in layers:
        member[layer, layer : 3 * count : 3] = True
    return NeuronSet("some", "general", member, site=site, found={"tokens": "last"})


def everything(model: Model, site: str = "mlp_mid") -> NeuronSet:
    return NeuronSet("all", "general", np.ones((len(model.blocks), model.width(site)), bool), site=site)


@pytest.fixture(params=["adapter", "checkpoint"])
def pair(request: pytest.FixtureRequest, model_paths, adapter_paths) -> tuple[Model, Model]:
    """Base and tuned, sharing weights or not."""
    base = load_model(model_paths["llama"], dtype="float64")
    return base, load_tuned(base, adapter_paths["race"] if request.param == "adapter" else model_paths["llama_tuned"])


def logits(model: Model, **inputs: object) -> torch.Tensor:
    with torch.no_grad(), model.active() as hf:
        return hf(input_ids=IDS, **inputs).logits


@pytest.mark.parametrize("site", SITES)
def test_patched_activations_are_the_sources(pair, site: str) -> None:
    base, tuned = pair
    chosen = neurons(base, site)
    seen: dict[str, dict[int, torch.Tensor]] = {"base": {}, "tuned": {}, "patched": {}}
    for name, model in (("base", base), ("tuned", tuned)):
        with model.tapped(site, lambda layer, a, name=name: seen[name].__setitem__(layer, a.clone())):
            logits(model)
    with patched(base, chosen, source=tuned):
        record = seen["patched"]
        with base.tapped(site, lambda layer, a: record.__setitem__(layer, a.clone())):
            logits(base)
    for layer in (0, 2):
        at = chosen.layer(layer)
        assert torch.equal(seen["patched"][layer][..., at], seen["tuned"][layer][..., at])
    rest = [i for i in range(base.width(site)) if i not in chosen.layer(0)]
    assert torch.equal(seen["patched"][0][..., rest], seen["base"][0][..., rest])


def test_patching_the_whole_last_residual_gives_the_source_model(pair) -> None:
    base, tuned = pair
    if base.hf is not tuned.hf:  # the checkpoint's head differs too, so compare what goes into it
        base.hf.lm_head.weight.data.copy_(tuned.hf.lm_head.weight.data)
        base.hf.model.norm.weight.data.copy_(tuned.hf.model.norm.weight.data)
    with patched(base, everything(base, "resid"), source=tuned):
        assert torch.allclose(logits(base), logits(tuned), rtol=1e-6, atol=1e-8)


def test_patching_a_model_into_itself_changes_nothing(pair) -> None:
    base, _ = pair
    plain = logits(base)
    same = Model(base.weights, base.tokenizer, "same", base.origin)
    with patched(base, neurons(base), source=same):
        assert torch.equal(logits(base), plain)
    assert torch.equal(logits(base), plain)


@pytest.mark.parametrize("direction", ["into base", "into tuned"])
def test_generation_feeds_both_models_the_patched_models_own_tokens(pair, direction: str) -> None:
    """Cached decoding equals decoding anew from the whole text at every step, where the source sees the same tokens."""
    base, tuned = pair
    into, source = (base, tuned) if direction == "into base" else (tuned, base)
    chosen = everything(base)
    steps = 8
    with patched(into, chosen, source=source), into.active() as hf:
        cached = hf.generate(input_ids=IDS, max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0)
    text = IDS
    with torch.no_grad(), patched(into, chosen, source=source), into.active() as hf:
        for _ in range(steps):
            following = hf(input_ids=text, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            text = torch.cat([text, following], 1)
    assert torch.equal(cached, text)
    free = {}
    for name, model in (("into", into), ("source", source)):
        with model.active() as hf:
            free[name] = hf.generate(
                input_ids=IDS, max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0
            )
    assert not torch.equal(cached, free["into"])
    assert not torch.equal(cached, free["source"])


def test_constant_zero_and_scale_patches(pair) -> None:
    base, _ = pair
    chosen = neurons(base, layers=(1,))
    seen: list[torch.Tensor] = []
    values = np.random.default_rng(0).standard_normal(chosen.member.shape)
    with base.tapped("mlp_mid", lambda _, a: seen.append(a.clone()), layers=[1]):
        logits(base)
    for options, expected in (
        ({"values": values}, torch.tensor(values[1][chosen.layer(1)]).expand(2, 5, -1)),
        ({"scale": 0.0}, torch.zeros(2, 5, len(chosen), dtype=torch.float64)),
        ({"scale": 2.0}, 2 * seen[0][..., chosen.layer(1)]),
    ):
        with patched(base, chosen, **options), base.tapped("mlp_mid", lambda _, a: seen.append(a.clone()), layers=[1]):
            logits(base)
        assert torch.allclose(seen.pop()[..., chosen.layer(1)], expected)


def test_a_patch_that_does_not_happen_is_an_error(pair) -> None:
    base, tuned = pair
    with pytest.raises(RuntimeError, match="written 0 times in 0 passes"), patched(base, neurons(base), source=tuned):
        pass
    base.blocks[2].forward = lambda hidden_states, *args, **kwargs: hidden_states
    skipped = pytest.raises(RuntimeError, match="written 1 times in 1 passes over 2 layers")
    with skipped, patched(base, neurons(base), scale=0.0):
        logits(base)


def test_an_error_inside_the_patch_is_not_replaced(pair) -> None:
    base, tuned = pair
    with pytest.raises(KeyError, match="mine"), patched(base, neurons(base), source=tuned):
        raise KeyError("mine")


def test_bad_patches_are_refused(pair) -> None:
    base, tuned = pair
    with pytest.raises(ValueError, match="exactly one"), patched(base, neurons(base)):
        pass
    empty = NeuronSet("none", "general", np.zeros((3, 48), bool))
    with pytest.raises(UserError, match="is empty"), patched(base, empty, source=tuned):
        pass


@pytest.fixture(scope="module")
def located(model_paths, adapter_paths, questions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("located")
    cache(model_paths["llama"], adapter_paths, questions, root / "s.zarr")
    locate(root / "s.zarr", top=0.4, out=root / "n.json")
    return root


def test_patch_command_measures_every_run(model_paths, adapter_paths, questions, located: Path) -> None:
    result = patch(
        model_paths["llama"],
        adapter_paths,
        located / "n.json",
        questions,
        store=located / "s.zarr",
        directions=("tuned_into_base", "base_into_tuned"),
        kinds=("tuned", "mean", "zero", "scale"),
        draws=2,
        max_new_tokens=3,
        training_data=questions,
    )
    assert result.sizes["run"] == 2 * 2 * (2 + 4 * 5)
    base = load_model(model_paths["llama"])
    race = load_tuned(base, adapter_paths["race"])
    runs = result.where(result["tuned_topic"] == "race", drop=True)
    forward = runs.where(runs["direction"] == "tuned_into_base", drop=True)
    plain = {name: forward["margin"].values[forward["neurons"].values == name][0] for name in ("none", "tuned")}
    assert np.allclose(plain["none"], margins(base, questions))
    assert np.allclose(plain["tuned"], margins(race, questions))
    from pnlac_fast.neurons import load_sets

    general = load_sets(located / "n.json")["race/general"]
    with patched(base, general, source=race):
        expected = margins(base, questions)
        text = answers(base, questions, max_new_tokens=3)
    row = ((forward["neurons"] == "general") & (forward["kind"] == "tuned")).values
    assert np.allclose(forward["margin"].values[row][0], expected)
    assert forward["answer"].values[row][0].tolist() == text
    assert set(np.unique(result["label"])) <= {-1, 0, 1}
    means = stores.open_contrast(located / "s.zarr").sel(topic="economy", site="mlp_mid", tokens="last", model="race")
    with patched(base, general, values=means["mean_tuned"].values):
        expected = margins(base, [q for q in questions if q.topic == "economy"])
    row = ((forward["neurons"] == "general") & (forward["kind"] == "mean")).values
    assert np.allclose(forward["margin"].values[row][0][result["topic"].values == "economy"], expected)
    again = stores.open_result(located / "s.zarr", "patching")
    assert np.array_equal(again["margin"].values, result["margin"].values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("median",)}, "no patch 'median'"),
        ({"directions": ("up",)}, "no direction 'up'"),
        ({"kinds": ("mean",)}, "takes its means from a store"),
        ({"training_data": ()}, "Labels need answers"),
    ],
)
def test_bad_options_are_refused(model_paths, adapter_paths, questions, located: Path, options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        patch(model_paths["llama"], adapter_paths, located / "n.json", questions, **options)


def test_unknown_tuned_topic_is_refused(model_paths, adapter_paths, questions, located: Path) -> None:
    with pytest.raises(UserError, match="name it by its topic"):
        patch(model_paths["llama"], {"mine": adapter_paths["race"]}, located / "n.json", questions)
