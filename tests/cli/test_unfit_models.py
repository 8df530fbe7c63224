"""Models, adapters and neurons that cannot be used: one sentence that says why and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from typed import MEND, refused

from pnlac_fast.loading import load_model


def test_no_model_at_a_path(cli, base, tuned, tmp_path: Path) -> None:
    asked = ["--data", base[3], *tuned, "--out", tmp_path / "s.zarr"]
    refused(cli("cache", "--model", tmp_path / "nothing", *asked), MEND, "Cannot load the model")
    refused(cli("cache", *base, "--tuned", tmp_path / "nothing", "--out", tmp_path / "s.zarr"), MEND, "Cannot load")
    refused(cli("cache", "--model", tuned[1], *asked), MEND, "is an adapter", "--tuned")
    assert not (tmp_path / "s.zarr").exists()


def test_a_model_type_without_mlps(cli, base, tuned, world: Path, tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1}
    MambaForCausalLM(MambaConfig(**shape)).save_pretrained(tmp_path / "mamba")
    for file in (world / "base").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "mamba")
    asked = ["score", "--model", tmp_path / "mamba", *base[2:], "--tuned", f"t={tmp_path / 'mamba'}"]
    refused(cli(*asked), MEND, "type 'mamba' is not found", "--last-projection", "mixer.out_proj")
    refused(cli(*asked, "--last-projection", "mlp.down_proj"), MEND, "at 'mlp.down_proj'")


def test_an_adapter_for_another_base(cli, base, model_paths, world: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    asked = ["--data", base[3], "--out", tmp_path / "s.zarr"]
    other = LlamaConfig(
        **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3},
        **{"num_attention_heads": 2, "num_key_value_heads": 2},
    )
    narrow = LlamaForCausalLM(other)
    get_peft_model(narrow, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    said = refused(cli("cache", *base[:2], *asked, "--tuned", tmp_path / "adapter"), MEND, "does not fit this base")
    assert len(said) < 500
    narrow = LlamaForCausalLM(other)
    narrow.save_pretrained(tmp_path / "narrow")
    for file in (world / "base").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "narrow")
    refused(
        cli("cache", *base[:2], *asked, "--tuned", tmp_path / "narrow"), MEND, "MLP neurons", "tuned from this base"
    )
    assert not (tmp_path / "s.zarr").exists()


def test_an_adapter_that_needs_unpickling(cli, base, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    (tmp_path / "a" / "adapter_model.bin").write_text("")
    refused(cli("cache", *base, "--tuned", tmp_path / "a", "--out", tmp_path / "s.zarr"), MEND, "safetensors")


def test_weights_that_are_not_finite(cli, base, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "tuned" / "science", tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    asked = [*base, "--tuned", tmp_path / "broken"]
    refused(cli("cache", *asked, "--out", tmp_path / "s.zarr"), MEND, "'broken' at mlp_mid, layer 1", "--dtype float32")
    refused(cli("score", *asked, "--store", tmp_path / "s.zarr"), MEND, "'broken' are not finite")


def test_neurons_of_another_model(cli, base, tuned, world: Path, model_paths, tmp_path: Path) -> None:
    file = world / "neurons.json"
    other = ["--model", model_paths["llama_tuned"], *base[2:]]
    said = ("was found in a base model with sha256", "locate the neurons on this model")
    refused(cli("patch", *other, *tuned, "--neurons", file), MEND, *said)
    finetune = ["finetune", *other, "--topic", "race", "--side", "left", "--steps", 1, "--out", tmp_path / "t"]
    refused(cli(*finetune, "--inhibit", file), MEND, *said)
    refused(cli(*finetune, "--inhibit", tmp_path / "none.json"), MEND, "no neuron file", "pnlac-fast locate")
    refused(cli(*finetune, "--inhibit", world / "data"), MEND, "no neuron file")
    refused(cli(*finetune, "--inhibit", world / "base" / "config.json"), MEND, "not a pnlac-neurons file")
    refused(cli(*finetune, "--inhibit", file, "--set", "race/genral"), MEND, "Did you mean 'race/general'")
    assert not list(tmp_path.iterdir())


def test_an_empty_neuron_set(cli, base, tuned, world: Path, tmp_path: Path) -> None:
    record = json.loads((world / "neurons.json").read_text())
    for entry in record["sets"]:
        if entry["kind"] == "general":
            entry["neurons"] = {}
    (tmp_path / "n.json").write_text(json.dumps(record))
    said = ("'race/general' is empty", "raise --top")
    refused(cli("patch", *base, *tuned, "--neurons", tmp_path / "n.json"), MEND, *said)
    finetune = ["finetune", *base, "--topic", "race", "--side", "left", "--steps", 1, "--out", tmp_path / "t"]
    refused(cli(*finetune, "--inhibit", tmp_path / "n.json"), MEND, *said)
    assert not list(tmp_path.glob("t*"))


def test_an_inhibition_that_meets_no_weight(cli, base, world: Path, tmp_path: Path) -> None:
    asked = ["finetune", *base, "--topic", "race", "--side", "left", "--steps", 1, "--out", tmp_path / "t"]
    asked += ["--inhibit", world / "neurons.json"]
    refused(cli(*asked, "--target-modules", "q_proj,v_proj"), MEND, "q_proj and v_proj only", "add gate_proj")
    refused(cli(*asked, "--target-modules", "q_prj"), MEND, "q_prj")
    assert not list(tmp_path.glob("t*"))


def test_models_are_loaded_unpickled_never(cli, base, tmp_path: Path) -> None:
    shutil.copytree(base[1], tmp_path / "m")
    torch.save(load_model(base[1]).hf.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model.safetensors").unlink()
    refused(cli("env", "--model", tmp_path / "m"), MEND, "Cannot load the model")
