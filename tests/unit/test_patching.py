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
from pnlac_fast.patches import Patch, apply, load_patch, load_patched, patched, save_patch
from pnlac_fast.patching import patch, patched_margins
from pnlac_fast.recovery import recovered
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
        ({"shift": values}, seen[0][..., chosen.layer(1)] + torch.tensor(values[1][chosen.layer(1)])),
        ({"scale": 0.5, "shift": values}, seen[0][..., chosen.layer(1)] / 2 + torch.tensor(values[1][chosen.layer(1)])),
    ):
        with patched(base, chosen, **options), base.tapped("mlp_mid", lambda _, a: seen.append(a.clone()), layers=[1]):
            logits(base)
        assert torch.allclose(seen.pop()[..., chosen.layer(1)], expected)


@pytest.mark.parametrize("site", SITES)
def test_sets_that_share_a_reading_of_the_source_are_patched_as_if_alone(pair, questions, site: str) -> None:
    base, tuned = pair
    first, second = neurons(base, site), neurons(base, site, layers=(1, 2), count=9)
    zero = {topic: Patch(first, 0.0, np.zeros(first.member.shape, "f4")) for topic in ("race", "science", "economy")}
    shuffled = questions[::2] + questions[1::2]
    together = patched_margins(base, tuned, [first, zero, second], shuffled, batch_tokens=60)
    alone = ((first, {"source": tuned}), (first, {"scale": 0.0}), (second, {"source": tuned}))
    for row, (chosen, options) in zip(together, alone, strict=True):
        with patched(base, chosen, **options):
            assert np.allclose(row, margins(base, shuffled), rtol=1e-6)
    assert not np.allclose(together[0], together[1])


def test_a_patch_goes_through_its_file_unchanged(pair, tmp_path: Path) -> None:
    base, _ = pair
    chosen = neurons(base)
    add = np.where(chosen.member, np.random.default_rng(0).standard_normal(chosen.member.shape), 0).astype("f4")
    plain = logits(base)
    for scale in (0.0, 1.0, -0.5):
        patch = Patch(chosen, scale, add)
        with apply(base, patch):
            expected = logits(base)
        save_patch(patch, tmp_path / "new" / "p.safetensors", base=base.origin)
        again = load_patch(tmp_path / "new" / "p.safetensors")
        assert (again.scale, again.neurons.name) == (scale, chosen.name)
        assert np.array_equal(again.neurons.member, chosen.member)
        assert np.array_equal(again.add, add)
        for model in (base, base.hf):
            with load_patched(model, tmp_path / "new" / "p.safetensors") as applied:
                assert len(applied) == len(chosen)
                assert torch.equal(logits(base), expected)
        assert torch.equal(logits(base), plain)
        assert not torch.allclose(expected, plain)


def test_patch_files_are_checked(pair, model_paths, tmp_path: Path) -> None:
    base, _ = pair
    file = tmp_path / "p.safetensors"
    save_patch(Patch(neurons(base), 0.0, np.zeros((3, 48), "f4")), file, base=base.origin)
    other = load_model(model_paths["llama_tuned"])
    with pytest.raises(UserError, match="sha256"), load_patched(other, file):
        pass
    with pytest.raises(UserError, match="make one with pnlac-fast patch --save"):
        load_patch(tmp_path / "none.safetensors")
    damaged = file.read_bytes().replace(b"layers.2.add", b"layers.1.add")
    for content, said in ((b"", "damaged"), (damaged, "damaged"), (file.read_bytes()[:-3], "damaged")):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=said):
            load_patch(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="not a pnlac-patch file"):
        load_patch(model_paths["llama"] / "model.safetensors")


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


def test_a_curve_patches_sets_of_every_size(model_paths, adapter_paths, questions, located: Path) -> None:
    kinds = ("general", "mean", "off_minus_on", "top", "random", "random_top")
    result = patch(
        model_paths["llama"],
        {"race": adapter_paths["race"]},
        located / "n.json",
        questions,
        store=located / "s.zarr",
        sets=kinds,
        shares=(0.125, 0.05),
        draws=2,
        boots=50,
    )
    runs = [r for r in zip(*(result[n].values.tolist() for n in ("neurons", "draw", "count")), strict=True) if r[2]]
    each = [(k, i) for k in kinds for i in (range(2) if k.startswith("random") else (-1,))]
    assert runs == [(k, i, n) for n in (7, 18) for k, i in each]
    base = load_model(model_paths["llama"])
    grown = locate(located / "s.zarr", top=0.4, general_share=0.125)["race"]
    for neurons, name in ((grown.general, "general"), (grown.contrasted["off_minus_on"], "off_minus_on")):
        with patched(base, neurons, source=load_tuned(base, adapter_paths["race"], name=name)):
            expected = margins(base, questions)
        row = ((result["neurons"] == name) & (result["count"] == 18)).values
        assert np.allclose(result["margin"].values[row][0], expected)
    assert np.array_equal(
        stores.open_result(located / "s.zarr", "patching_curve")["recovered"], result["recovered"], equal_nan=True
    )


def test_there_is_no_specific_set_of_a_chosen_size(model_paths, adapter_paths, questions, located: Path) -> None:
    options = {"store": located / "s.zarr", "sets": ("specific",), "shares": (0.1,)}
    with pytest.raises(UserError, match="no specific set of a chosen size for 'race'"):
        patch(model_paths["llama"], adapter_paths, located / "n.json", questions, **options)


def test_recovered_fractions_follow_their_definition(model_paths, adapter_paths, questions, located: Path) -> None:
    result = patch(model_paths["llama"], adapter_paths, located / "n.json", questions, draws=1, boots=200)
    mean = result["margin"].groupby("topic").mean()
    names = zip(result["model"].values.tolist(), result["neurons"].values.tolist(), strict=True)
    at = {name: i for i, name in enumerate(names)}
    for model, off in (("race", ("science", "economy")), ("science", ("race", "economy"))):
        for neurons in ("general", "random", "none", "tuned"):
            moved = [mean[at[model, n]] - mean[at[model, "none"]] for n in (neurons, "tuned")]
            on, other = (
                float(np.mean([moved[0].sel(topic=t) for t in ts]) / np.mean([moved[1].sel(topic=t) for t in ts]))
                for ts in ((model,), off)
            )
            found = result["recovered"][at[model, neurons]]
            assert np.allclose(found.sel(bound="estimate"), [on, other])
            assert (found.sel(bound="low") <= found.sel(bound="high")).all()
    one = recovered(result.isel(question=(result["topic"] == "race").values), boots=20)
    assert np.isnan(one.sel(part="off")).all()


def test_saved_patches_do_what_was_measured(
    model_paths, adapter_paths, questions, located: Path, tmp_path: Path
) -> None:
    race = [q for q in questions if q.topic == "race"]
    result = patch(
        model_paths["llama"],
        {"race": adapter_paths["race"]},
        located / "n.json",
        race,
        store=located / "s.zarr",
        sets=("general", "random"),
        kinds=("shift", "zero", "tuned"),
        directions=("tuned_into_base", "base_into_tuned"),
        draws=1,
        boots=20,
        save=tmp_path,
    )
    directions = ("tuned_into_base", "base_into_tuned")
    names = {f"race-general-{kind}-{direction}.safetensors" for kind in ("shift", "zero") for direction in directions}
    assert {file.name for file in tmp_path.iterdir()} == names
    base = load_model(model_paths["llama"])
    subjects = dict(zip(directions, (base, load_tuned(base, adapter_paths["race"])), strict=True))
    for i, run in enumerate(zip(*(result[n].values for n in ("neurons", "kind", "direction")), strict=True)):
        if run[0] == "general" and run[1] != "tuned":  # of one topic, whose means a file holds as they are
            with load_patched(subjects[run[2]], tmp_path / f"race-general-{run[1]}-{run[2]}.safetensors"):
                assert np.allclose(margins(subjects[run[2]], race), result["margin"][i], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sets": ("generals",)}, "Did you mean 'general'"),
        ({"shares": (0.1,)}, "give it with --store"),
        ({"save": "here"}, "fits in no file"),
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
