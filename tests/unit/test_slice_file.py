"""Files of neuron slices: what a fine-tune learned goes into any copy of its base, and into nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pnlac_fast import finetune
from pnlac_fast.datasets import Question
from pnlac_fast.errors import UserError
from pnlac_fast.loading import load_model, load_tuned, weights_sha256
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.slice_file import load_slices, merge_slices, save_slices, stack_slices
from pnlac_fast.slices import slice_neurons

LAYERS, WIDTH = 2, 23


def decoder(bias: bool = True, seed: int = 0, layers: int = LAYERS) -> Any:
    torch.manual_seed(seed)
    shape = {"vocab_size": 32, "hidden_size": 12, "intermediate_size": WIDTH, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, mlp_bias=bias))  # type: ignore[arg-type]


def chosen(*neurons: int) -> NeuronSet:
    member = np.zeros((LAYERS, WIDTH), bool)
    member[:, list(neurons)] = True
    return NeuronSet("some", "specific", member, found={"top": 0.1})


def trained(base: Any, neurons: NeuronSet, path: Path) -> Any:
    """A copy of base with other values in the slices, merged; its file at ``path``."""
    model = copy.deepcopy(base)
    slices = slice_neurons(model, neurons)
    with torch.no_grad():
        for parameter in slices.parameters():
            parameter.normal_()
    slices.merge()
    save_slices(slices, path, base={"source": "here", "sha256": "1" * 64})
    return model


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_copy_of_the_base_takes_it(dtype: torch.dtype, tmp_path: Path) -> None:
    base, file = decoder().to(dtype), tmp_path / "deep" / "s.safetensors"
    model = trained(base, chosen(1, 22), file)
    for requires_grad in (True, False):
        other = copy.deepcopy(base).requires_grad_(requires_grad)
        found = merge_slices(other, file)
        assert same(other, model)
    assert (found.member == chosen(1, 22).member).all()
    assert found.found == {"top": 0.1}
    assert found.base["source"] == "here"
    size = LAYERS * 2 * (3 * 12 + 2) * base.dtype.itemsize
    assert sum(t.nbytes for t in load_slices(file).tensors.values()) == size


def test_files_stack_where_their_neurons_are_apart(tmp_path: Path) -> None:
    base = decoder()
    one, two = trained(base, chosen(1, 5), tmp_path / "a"), trained(base, chosen(2), tmp_path / "b")
    both = copy.deepcopy(base)
    merge_slices(both, tmp_path / "b")
    assert same(both, two)
    merge_slices(both, tmp_path / "a")
    for name, neurons, source in (("a", chosen(1, 5), one), ("b", chosen(2), two)):
        assert name
        for layer in range(LAYERS):
            index = neurons.layer(layer)
            mine, theirs = both.model.layers[layer].mlp, source.model.layers[layer].mlp
            assert torch.equal(mine.up_proj.weight[index], theirs.up_proj.weight[index])
            assert torch.equal(mine.gate_proj.bias[index], theirs.gate_proj.bias[index])
            assert torch.equal(mine.down_proj.weight[:, index], theirs.down_proj.weight[:, index])
    with pytest.raises(UserError, match="tuned before"):
        merge_slices(both, tmp_path / "a")


def test_files_stack_to_what_each_learned(tmp_path: Path) -> None:
    base = decoder()
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for path, neurons in zip(paths, (chosen(1, 5), chosen(2), chosen(22)), strict=True):
        trained(base, neurons, path)
    one_by_one, together = copy.deepcopy(base), copy.deepcopy(base)
    for path in paths:
        merge_slices(one_by_one, path)
    found = stack_slices(together, paths[::-1])
    assert same(one_by_one, together)
    assert [n.per_layer for n in found] == [[1, 1], [1, 1], [2, 2]]


def test_neurons_in_several_files_are_refused_or_their_changes_added(tmp_path: Path) -> None:
    base = decoder().double()
    before, paths = copy.deepcopy(base), [tmp_path / "a", tmp_path / "b"]
    one, two = trained(base, chosen(1, 5), paths[0]), trained(base, chosen(5, 7), paths[1])
    with pytest.raises(UserError, match="both change 2 neurons: give one of them, or add"):
        stack_slices(base, paths)
    assert same(base, before)
    stack_slices(base, paths, overlap="sum")
    for (name, mine), first, second, old in zip(
        base.named_parameters(), one.parameters(), two.parameters(), before.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, first + second - old, msg=name)
    with pytest.raises(UserError, match="Did you mean 'sum'"):
        stack_slices(before, paths, overlap="sums")
    with pytest.raises(UserError, match="no files"):
        stack_slices(before, [])


def with_adapter() -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    model = decoder()
    inject_adapter_in_model(LoraConfig(target_modules=["down_proj"]), model)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: decoder(seed=1), r"is not the base of .*give a copy of \{'source': 'here'"),
        (lambda: decoder().bfloat16(), "in its own dtype"),
        (lambda: decoder(bias=False), "has no bias in gate_proj"),
        (lambda: decoder(layers=3), "for 2 layers of 23 neurons"),
        (with_adapter, "without adapters"),
    ],
)
def test_another_base_is_refused_and_stays_as_it_is(model: Any, message: str, tmp_path: Path) -> None:
    trained(decoder(), chosen(1), tmp_path / "s")
    other = model()
    before = copy.deepcopy(other)
    with pytest.raises(UserError, match=message):
        merge_slices(other, tmp_path / "s")
    assert same(other, before)


def damage(path: Path, **changes: Any) -> None:
    """Write the file at ``path`` again, with other metadata."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    save_file(load_file(path), path, metadata | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is not a pnlac-neuron-slices file"),
        ({"version": "2"}, "of version 1"),
        ({"neurons": "{"}, "is damaged"),
        ({"neurons": json.dumps({"layers": 2})}, "is damaged"),
    ],
)
def test_a_damaged_file_is_a_sentence(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    trained(decoder(), chosen(1), tmp_path / "s")
    damage(tmp_path / "s", **changes)
    with pytest.raises(UserError, match=message):
        load_slices(tmp_path / "s")


def test_what_is_no_safetensors_file_is_never_unpickled(tmp_path: Path) -> None:
    torch.save({"layers.0.gate_proj.weight": torch.ones(1)}, tmp_path / "s")
    with pytest.raises(UserError, match="is damaged"):
        merge_slices(decoder(), tmp_path / "s")
    save_file({"weight": torch.ones(1)}, tmp_path / "plain")
    with pytest.raises(UserError, match="is not a pnlac-neuron-slices file"):
        load_slices(tmp_path / "plain")
    with pytest.raises(UserError, match="There is no file"):
        load_slices(tmp_path / "none")


def found_at(out: Path) -> Path:
    return out / "neuron_slices.safetensors"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fine_tune_writes_it_beside_its_checkpoint(
    dtype: str, model_paths: dict[str, Path], questions: tuple[Question, ...], tmp_path: Path
) -> None:
    base, out = load_model(model_paths["llama"], dtype=dtype, device="cpu"), tmp_path / "race"
    member = np.zeros((3, 48), bool)
    member[0, 7] = member[2, [0, 40]] = True
    neurons = NeuronSet("some", "specific", member)
    settings: dict[str, Any] = {"method": "full", "steps": 3, "learning_rate": 1e-2, "batch_size": 4}
    tuned = finetune(base, questions, "race", "right", out, inhibit=neurons, inhibit_mode="specific", **settings).model
    before, copied = weights_sha256(str(out)), load_model(model_paths["llama"], dtype=dtype, device="cpu")
    assert isinstance(copied, Model)
    found = merge_slices(copied, out / "neuron_slices.safetensors")
    assert found.base["sha256"] == base.origin["sha256"]
    assert same(copied.hf, tuned.hf)
    assert not same(copied.hf, base.hf)
    assert same(load_tuned(base, out).hf, tuned.hf)
    loaded = load_tuned(copied_base := load_model(model_paths["llama"], dtype=dtype, device="cpu"), found_at(out))
    assert same(loaded.hf, tuned.hf)
    assert (loaded.name, loaded.tuned_topic, loaded.origin["type"]) == ("race", "race", "neuron slices")
    shared = loaded.hf.get_input_embeddings().weight.data_ptr()
    assert shared == copied_base.hf.get_input_embeddings().weight.data_ptr()
    assert same(copied_base.hf, base.hf)
    with pytest.raises(UserError, match="both change 3 neurons"):
        load_tuned(copied_base, f"{found_at(out)}+{found_at(out)}")
    twice = load_tuned(copied_base, f"sum:{found_at(out)}+{found_at(out)}", name="twice")
    assert not same(twice.hf, tuned.hf)
    (out / "neuron_slices.safetensors").unlink()
    assert weights_sha256(str(out)) == before
    finetune(base, questions, "race", "right", tmp_path / "freeze", inhibit=neurons, **settings)
    assert not (tmp_path / "freeze" / "neuron_slices.safetensors").exists()
