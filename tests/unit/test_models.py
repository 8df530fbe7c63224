"""Sites are what they say, adapters switch cleanly, and what cannot work is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pnlac_fast.architecture import SITES
from pnlac_fast.errors import UserError
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.models import Model

IDS = torch.tensor([[1, 5, 9, 12, 7]])


def collect(model: Model, site: str) -> list[Tensor]:
    seen: list[Tensor] = []
    with torch.no_grad(), model.active() as hf, model.tapped(site, lambda layer, a: seen.append(a.clone())):
        hf(input_ids=IDS)
    return seen


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_sites_equal_an_independent_computation(model_paths, kind: str) -> None:
    model = load_model(model_paths[kind], dtype="float64", device="cpu")
    with torch.no_grad():
        states = model.hf(input_ids=IDS, output_hidden_states=True).hidden_states
    mid, out, resid = (collect(model, site) for site in SITES)
    for layer, block in enumerate(model.blocks):
        weight = {name: getattr(block.mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj")}
        # what the MLP reads: the residual stream after attention, normalised
        before = resid[layer] - out[layer]
        normal = before * torch.rsqrt(before.pow(2).mean(-1, keepdim=True) + model.hf.config.rms_norm_eps)
        read = normal * block.post_attention_layernorm.weight
        gate = read @ weight["gate_proj"].T
        expected = gate * torch.sigmoid(gate) * (read @ weight["up_proj"].T)
        # transformers computes the norm in float32 whatever the dtype
        assert torch.allclose(mid[layer], expected, rtol=1e-5, atol=1e-6)
        assert torch.allclose(out[layer], expected @ weight["down_proj"].T, rtol=1e-5, atol=1e-6)
        if layer + 1 < len(model.blocks):  # the last hidden state is normalised once more
            assert torch.allclose(resid[layer], states[layer + 1], rtol=1e-9)
    assert [model.width(site) for site in SITES] == [48, 32, 32]


@pytest.mark.parametrize("site", SITES)
def test_returned_tensor_takes_the_activations_place(llama: Model, site: str) -> None:
    with torch.no_grad():
        before = llama.hf(input_ids=IDS).logits
        with llama.tapped(site, lambda layer, a: a * 0, layers=[1]):
            during = llama.hf(input_ids=IDS).logits
        after = llama.hf(input_ids=IDS).logits
    assert not torch.allclose(before, during)
    assert torch.equal(before, after)


def test_adapters_share_weights_and_leave_the_base_as_it_was(model_paths, adapter_paths) -> None:
    base = load_model(model_paths["llama"])
    with torch.no_grad():
        before = base.hf(input_ids=IDS).logits
    race, science = (load_tuned(base, adapter_paths[name]) for name in ("race", "science"))
    assert race.hf is base.hf
    logits = {}
    with torch.no_grad():
        for model in (race, base, science, race):
            with model.active() as hf:
                logits.setdefault(model.name, []).append(hf(input_ids=IDS).logits)
        with race.active() as outer:
            with base.active() as hf:
                assert torch.equal(hf(input_ids=IDS).logits, before)
            assert torch.equal(outer(input_ids=IDS).logits, logits["race"][0])
    assert torch.equal(logits["llama"][0], before)
    assert torch.equal(*logits["race"])
    assert not torch.allclose(logits["race"][0], logits["science"][0])


def test_adapter_equals_its_merged_weights(model_paths, adapter_paths) -> None:
    from peft import PeftModel

    base = load_model(model_paths["llama"], dtype="float64")
    race = load_tuned(base, adapter_paths["race"])
    merged = PeftModel.from_pretrained(load_model(model_paths["llama"], dtype="float64").hf, adapter_paths["race"])
    with torch.no_grad():
        expected = merged.merge_and_unload()(input_ids=IDS).logits
        with race.active() as hf:
            assert torch.allclose(hf(input_ids=IDS).logits, expected, rtol=1e-6, atol=1e-8)


def test_origin_names_the_weights(model_paths) -> None:
    a, b = load_model(model_paths["llama"]), load_model(model_paths["llama_tuned"])
    assert a.origin["sha256"] == load_model(model_paths["llama"]).origin["sha256"] != b.origin["sha256"]
    assert a.name == "llama"


def test_adapter_of_another_base_is_refused(model_paths, adapter_paths, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(model_paths["llama"], intermediate_size=40)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    LlamaForCausalLM(LlamaConfig.from_pretrained(model_paths["llama"], num_hidden_layers=2)).save_pretrained(
        tmp_path / "shallow"
    )
    for name, message in (("narrow", "does not fit"), ("shallow", "have a place")):
        for file in model_paths["llama"].glob("tokenizer*"):
            shutil.copy(file, tmp_path / name)
        with pytest.raises(UserError, match=message):
            load_tuned(load_model(tmp_path / name), adapter_paths["race"])
        with pytest.raises(UserError, match="give a model tuned from this base"):
            load_tuned(load_model(tmp_path / name), model_paths["llama_tuned"])


def test_bad_models_are_refused(model_paths, adapter_paths, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot load the model"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="Did you mean 'float32'"):
        load_model(model_paths["llama"], dtype="float23")
    with pytest.raises(UserError, match=r"is an adapter: give its base model \(.*llama\) as --model"):
        load_model(adapter_paths["race"])
    base = load_model(model_paths["llama"])
    with pytest.raises(UserError, match="no site"):
        base.width("mlp")
    load_tuned(base, adapter_paths["race"])
    with pytest.raises(UserError, match="name them apart"):
        load_tuned(base, adapter_paths["race"])
    shutil.copytree(adapter_paths["race"], tmp_path / "pickled")
    (tmp_path / "pickled/adapter_model.safetensors").rename(tmp_path / "pickled/adapter_model.bin")
    with pytest.raises(UserError, match="has no adapter_model"):
        load_tuned(base, tmp_path / "pickled")


def test_model_without_mlps_is_refused(model_paths, tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(num_hidden_layers=1, hidden_size=8, vocab_size=16)).save_pretrained(tmp_path)
    for file in model_paths["llama"].glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(UserError, match=r"MLP of model type 'mamba' is not found.*--last-projection"):
        load_model(tmp_path)


def test_a_directory_without_tokenizer_and_damaged_weights_are_told(model_paths, tmp_path: Path) -> None:
    shutil.copytree(model_paths["llama"], tmp_path / "m")
    for file in (tmp_path / "m").glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"has no tokenizer: copy tokenizer\.json"):
        load_model(tmp_path / "m")
    weights = tmp_path / "m/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"weights of .* are damaged .*copy them anew"):
        load_model(tmp_path / "m")


def test_pickled_weights_are_never_read(model_paths, tmp_path: Path) -> None:
    shutil.copytree(model_paths["llama"], tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    torch.save({}, tmp_path / "m/pytorch_model.bin")
    with pytest.raises(UserError, match="Cannot load the model"):
        load_model(tmp_path / "m")


def test_finetune_record_is_part_of_the_origin(model_paths, tmp_path: Path) -> None:
    shutil.copytree(model_paths["llama"], tmp_path / "m")
    (tmp_path / "m/pnlac.json").write_text(json.dumps({"tuned_topic": "race"}))
    assert load_model(tmp_path / "m").tuned_topic == "race"
