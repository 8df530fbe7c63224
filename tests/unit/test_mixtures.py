"""Mixtures of experts: read without a trace, and written to experts that a token is not sent to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pnlac_fast.adapters import quiet
from pnlac_fast.checkup import self_check
from pnlac_fast.errors import UserError
from pnlac_fast.inhibition import InhibitFT
from pnlac_fast.loading import from_hf, load_model, load_tuned
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet

HIDDEN, WIDTH, EXPERTS = 16, 8, 4  # the widths that grouped kernels ask for
IDS = torch.tensor([[3, 9, 4, 7, 12]])
SHAPE = {
    "vocab_size": 40,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "moe_intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}


def mixture(kind: str, dtype: torch.dtype = torch.float32, implementation: str | None = None) -> Model:
    count = {"qwen3_moe": "num_experts"}.get(kind, "num_local_experts")
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE, **{count: EXPERTS}, **rope)
    hf: Any = AutoModelForCausalLM.from_config(config).to(dtype)
    hf.set_experts_implementation(implementation or hf.config._experts_implementation)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return from_hf(hf, None, name=kind)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_reading_changes_no_more_than_rounding(kind: str, implementation: str) -> None:
    model = mixture(kind, implementation=implementation)
    assert model.architecture.experts == EXPERTS
    with torch.no_grad():
        before = model.hf(input_ids=IDS).logits
        with model.tapped("mlp_mid", lambda *_: None, layers=[1]), model.tapped("mlp_out", lambda *_: None):
            during = model.hf(input_ids=IDS).logits
        assert torch.equal(model.hf(input_ids=IDS).logits, before)
    assert torch.allclose(during, before, rtol=1e-4, atol=1e-5)
    assert model.hf.config._experts_implementation == implementation
    assert all(check["holds"] for check in self_check(model)["checks"].values())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_two_of_four_experts_are_active_and_the_others_zero(kind: str) -> None:
    model = mixture(kind, torch.float64, "eager")
    seen = []
    with torch.no_grad(), model.tapped("mlp_mid", lambda _, a: seen.append(a), [0]):
        model.hf(input_ids=IDS)
    active = (seen[0].view(*IDS.shape, EXPERTS, WIDTH) != 0).any(-1)
    assert (active.sum(-1) == 2).all()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_value_written_to_an_idle_expert_takes_effect(kind: str) -> None:
    model = mixture(kind, torch.float64, "eager")
    outs, idle = [], []

    def write(_: int, activation: torch.Tensor) -> torch.Tensor:
        idle.append(int((activation[0, 2].view(EXPERTS, WIDTH) == 0).all(-1).nonzero()[0]))
        new = activation.clone()
        new[0, 2, idle[0] * WIDTH + 3] = 2.0
        return new

    with torch.no_grad():
        for visit in (lambda *_: None, write):
            with model.tapped("mlp_mid", visit, [1]), model.tapped("mlp_out", lambda _, a: outs.append(a), [1]):
                model.hf(input_ids=IDS)
    experts: Any = model.projection(1, "down_proj")
    down = experts.down_proj[idle[0]]
    column = down[3] if experts.is_transposed else down[:, 3]
    assert torch.allclose(outs[1][0, 2], outs[0][0, 2] + 2 * column, rtol=1e-9)
    others = [0, 1, 3, 4]
    assert torch.allclose(outs[1][0, others], outs[0][0, others], rtol=1e-9)


def test_float64_is_loaded_with_an_implementation_that_knows_it(tmp_path, model_paths) -> None:
    import shutil

    mixture("mixtral").hf.save_pretrained(tmp_path)
    for file in model_paths["llama"].glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    model = load_model(tmp_path, dtype="float64")
    assert all(check["error"] < 1e-6 for check in self_check(model)["checks"].values())


def test_adapters_on_experts_are_read_as_their_merged_weights(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False)
    with quiet():
        peft: Any = get_peft_model(mixture("mixtral", torch.float64, "eager").hf, config)
    peft.save_pretrained(tmp_path)
    base, other = (mixture("mixtral", torch.float64, "eager") for _ in range(2))
    tuned = load_tuned(base, tmp_path, name="t")
    with quiet():
        merged = PeftModel.from_pretrained(other.hf, tmp_path).merge_and_unload()
    seen: list[torch.Tensor] = []
    for model in (tuned, from_hf(merged, None), base, mixture("mixtral", torch.float64, "eager")):
        with torch.no_grad(), model.tapped("mlp_mid", lambda _, a: seen.append(a), [1]), model.active() as hf:
            hf(input_ids=IDS)
    assert torch.allclose(seen[0], seen[1], rtol=1e-6, atol=1e-9)
    assert torch.equal(seen[2], seen[3])
    assert not torch.allclose(seen[0], seen[2])


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("mode", ["freeze", "specific"])
def test_a_lora_on_experts_leaves_still_neurons_as_they_are(kind: str, mode: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = mixture(kind, implementation="eager")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with quiet():
        peft: Any = get_peft_model(model.hf, LoraConfig(r=3, target_modules=["q_proj"], target_parameters=targets))
    seen: list[torch.Tensor] = []
    with torch.no_grad(), model.tapped("mlp_mid", lambda _, a: seen.append(a), [1]):
        model.hf(input_ids=IDS)
    expert, neuron = divmod(int(seen[0][0].abs().sum(0).argmax()), WIDTH)
    member = np.zeros((2, EXPERTS * WIDTH), bool)
    member[1, expert * WIDTH + neuron] = True
    inhibit = InhibitFT(NeuronSet("s", "general", member), mode)
    inhibit.prepare(peft)
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=0.1)
    args, state = SimpleNamespace(max_grad_norm=1.0), SimpleNamespace(global_step=0)
    inhibit.on_train_begin(args, state, None, model=peft, optimizer=optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        peft(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    state.global_step = 2
    inhibit.on_train_end(args, state, None)
    outer: Any = model.blocks[1].get_submodule("mlp.experts")
    wrappers = {w.parameter_name: w for w in (outer, outer.base_layer)}
    experts = outer.base_layer.base_layer
    own = {name: torch.zeros_like(getattr(experts, name), dtype=torch.bool) for name in wrappers}
    rows = [2 * neuron, 2 * neuron + 1] if kind == "gpt_oss" else [neuron, WIDTH + neuron]
    for name, at in (("gate_up_proj", rows), ("down_proj", [neuron])):
        last = (name == "gate_up_proj") == experts.is_transposed  # whether the neurons are in the last dimension
        own[name][(expert, slice(None), at) if last else (expert, at)] = True
    for name, wrapper in wrappers.items():
        moved = wrapper.get_delta_weight("default") != 0
        still = own[name] if mode == "freeze" else ~own[name]
        assert own[name].sum() == HIDDEN * (2 if name == "gate_up_proj" else 1)
        assert not moved[still].any(), name
        assert moved[expert][~still[expert]].all(), name


def test_neurons_of_experts_are_not_slowed() -> None:
    model = mixture("mixtral")
    inhibit = InhibitFT(NeuronSet("s", "general", np.ones((2, EXPERTS * WIDTH), bool)), "freeze", 0.5)
    inhibit.prepare(model.hf)
    optimizer = torch.optim.AdamW(model.hf.parameters())
    args, state = SimpleNamespace(max_grad_norm=0.0), SimpleNamespace(global_step=0)
    with pytest.raises(UserError, match="frozen but not slowed"):
        inhibit.on_train_begin(args, state, None, model=model.hf, optimizer=optimizer)
