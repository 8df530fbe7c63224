"""Every architecture: what freezing, slices and anchors take for a neuron's weights is what gradients say."""

from __future__ import annotations

import copy
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import (
    HIDDEN,
    KINDS,
    LAYERS,
    MIXED,
    MIXED_BLOCKS,
    TEXTS,
    active,
    decoder,
    moving,
    opened,
    opened_for_gradients,
    path_of,
    some,
    states,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pnlac_fast import finetune
from pnlac_fast.anchoring import Anchor
from pnlac_fast.base_activations import base_activations
from pnlac_fast.errors import UserError
from pnlac_fast.inhibition import InhibitFT
from pnlac_fast.loading import from_hf, load_model, load_tuned
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.slice_file import merge_slices, save_slices
from pnlac_fast.slices import slice_neurons


@pytest.mark.parametrize("kind", KINDS)
def test_freezing_keeps_exactly_the_weights_that_a_neuron_depends_on(kind: str) -> None:
    hf = copy.deepcopy(decoder(kind)).requires_grad_(True)
    model = from_hf(hf, None, name=kind)
    neuron = active(model)
    own = moving(model, neuron)
    assert sum(int(mask.sum()) for mask in own.values()) >= 2 * HIDDEN
    prefix = f"{model.architecture.blocks}.{LAYERS - 1}."
    inhibit = InhibitFT(some(model, LAYERS - 1, neuron))
    inhibit.prepare(hf)
    optimizer = torch.optim.AdamW(hf.parameters(), lr=0.1, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in hf.named_parameters()}
    args, state = SimpleNamespace(max_grad_norm=1.0), SimpleNamespace(global_step=0)
    inhibit.on_train_begin(args, state, None, model=hf, optimizer=optimizer)
    ids = torch.tensor([TEXTS[0]])
    hf(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    state.global_step = 1
    inhibit.on_train_end(args, state, None)
    for name, parameter in hf.named_parameters():
        still = parameter.detach() == before[name]
        expected = own.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if expected is None:
            assert not still.all(), name
        else:
            assert torch.equal(still, expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_an_anchor_pulls_by_the_gradient_of_its_term(kind: str) -> None:
    hf = copy.deepcopy(decoder(kind, seed=1)).requires_grad_(True)
    model, ids = from_hf(hf, None, name=kind), torch.tensor([TEXTS[0]])
    neurons = some(model, LAYERS - 1, 1, model.width("mlp_mid") - 2)
    if model.architecture.experts:  # one that is active on these tokens
        neurons = some(model, LAYERS - 1, int(states(model, [TEXTS[0]])[0]["mlp_mid", LAYERS - 1].std(0).argmax()))
    base = base_activations(opened(kind), [TEXTS[0]], neurons)
    chosen = neurons.layer(LAYERS - 1)
    before = states(opened(kind), [TEXTS[0]])[0]["mlp_mid", LAYERS - 1][:-1, chosen]  # the last token is not held
    assert torch.allclose(base.values, before, rtol=1e-9)

    def gradients(anchored: bool) -> list[Tensor]:
        seen: list[Tensor] = []
        hf.zero_grad()
        anchor, decode = Anchor(neurons, 3.0, base), hf.get_decoder()
        with ExitStack() as place:
            if anchored:
                anchor.install(model, hf, place)
            else:
                place.enter_context(model.tapped("mlp_mid", lambda _, a: seen.append(a), [LAYERS - 1]))
            decode.training = True  # it alone, so that there is no dropout
            loss = hf(input_ids=ids, labels=ids).loss
            if not anchored:
                change = (seen[0][0][:-1, chosen] - before) / before.std(0, correction=0)
                loss = loss + 3.0 * change.square().mean()
            loss.backward()
        hf.eval()
        return [p.grad.clone() for p in hf.parameters() if p.grad is not None]

    for mine, theirs in zip(gradients(True), gradients(False), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()) + 1e-12)


@pytest.mark.parametrize("kind", ["phi3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("mode", ["freeze", "specific"])
def test_a_lora_leaves_still_neurons_as_they_are(kind: str, mode: str) -> None:
    from peft import LoraConfig, get_peft_model

    hf = copy.deepcopy(decoder(kind)).float()
    model = from_hf(hf, None, name=kind)
    targets = [projection.name for projection in model.architecture.projections]
    own = moving(opened_for_gradients(kind), 5)
    peft: Any = get_peft_model(hf, LoraConfig(r=2, target_modules=targets, fan_in_fan_out=kind == "gpt2"))
    inhibit = InhibitFT(some(model, LAYERS - 1, 5), mode)
    inhibit.prepare(peft)
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=0.1)
    args, state = SimpleNamespace(max_grad_norm=0.0), SimpleNamespace(global_step=0)
    inhibit.on_train_begin(args, state, None, model=peft, optimizer=optimizer)
    ids = torch.tensor([TEXTS[0]])
    for _ in range(2):
        optimizer.zero_grad()
        peft(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    state.global_step = 2
    inhibit.on_train_end(args, state, None)
    block = model.blocks[LAYERS - 1]
    for projection in model.architecture.projections:
        moved = block.get_submodule(projection.path).get_delta_weight("default") != 0
        mine = own[f"{projection.path}.weight"]
        assert not moved[mine if mode == "freeze" else ~mine].any()
        assert moved[~mine if mode == "freeze" else mine].all()


@pytest.mark.parametrize("kind", KINDS)
def test_slices_train_what_a_neuron_depends_on(kind: str, tmp_path: Path) -> None:
    hf = opened_for_gradients(kind).hf
    base, full = copy.deepcopy(hf), copy.deepcopy(hf)
    model, ids = from_hf(hf, None, name=kind), torch.tensor([TEXTS[0]])
    neuron = active(model)
    own = moving(model, neuron)
    before = hf(input_ids=ids).logits
    slices = slice_neurons(hf, some(model, LAYERS - 1, neuron))
    assert sum(p.numel() for p in slices.parameters()) == sum(int(mask.sum()) for mask in own.values())
    loss = hf(input_ids=ids, labels=ids)
    assert torch.allclose(loss.logits, before, rtol=1e-9, atol=1e-9)
    loss.loss.backward()
    full(input_ids=ids, labels=ids).loss.backward()
    assert [n for n, p in hf.named_parameters() if p.requires_grad != ("slice_" in n)] == []
    for part in slices.parts:
        wanted = dict(full.get_submodule(path_of(hf, part.module)).named_parameters(recurse=False))
        for (name, place), mine in zip(part.places.items(), (part.weight, part.bias), strict=False):
            theirs = place.take(wanted[name].grad)
            assert torch.allclose(mine.grad, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max())), name
    with torch.no_grad():
        for parameter in slices.parameters():
            parameter.add_(1)
    moved = hf(input_ids=ids).logits
    slices.merge()
    assert torch.allclose(hf(input_ids=ids).logits, moved, rtol=1e-9, atol=1e-9)
    assert [type(m) for m in hf.modules()] == [type(m) for m in base.modules()]
    prefix = f"{model.architecture.blocks}.{LAYERS - 1}."
    for (name, parameter), before in zip(hf.named_parameters(), base.parameters(), strict=True):
        mask = own.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        assert torch.equal(parameter != before, torch.zeros_like(parameter, dtype=torch.bool) if mask is None else mask)
    save_slices(slices, tmp_path / "s")
    merge_slices(base, tmp_path / "s")
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), hf.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gpt_oss"])
def test_the_output_of_an_mlp_is_sliced(kind: str, tmp_path: Path) -> None:
    hf = opened_for_gradients(kind).hf
    base, ids = copy.deepcopy(hf), torch.tensor([TEXTS[0]])
    member = np.zeros((LAYERS, HIDDEN), bool)
    member[1, [2, 7]] = True
    slices = slice_neurons(hf, NeuronSet("some", "general", member, site="mlp_out"))
    hf(input_ids=ids, labels=ids).loss.backward()
    full: Any = copy.deepcopy(base)
    full(input_ids=ids, labels=ids).loss.backward()
    for part in slices.parts:
        wanted = dict(full.get_submodule(path_of(hf, part.module)).named_parameters(recurse=False))
        for (name, place), mine in zip(part.places.items(), (part.weight, part.bias), strict=False):
            assert torch.allclose(mine.grad, place.take(wanted[name].grad), rtol=1e-6, atol=1e-9)
            assert mine.grad.any()
    with torch.no_grad():
        for parameter in slices.parameters():
            parameter.add_(1)
    slices.merge()
    pairs = zip(hf.named_parameters(), base.parameters(), strict=True)
    changed = {name for (name, p), old in pairs if (p != old).any()}
    assert changed == {n for n, _ in hf.named_parameters() if "h.1.mlp.c_proj" in n or "1.mlp.experts.down_proj" in n}
    save_slices(slices, tmp_path / "s")
    merge_slices(base, tmp_path / "s")
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), hf.parameters(), strict=True))


def test_slices_need_weights_that_are_plain() -> None:
    model = opened_for_gradients("llama")
    down = model.hf.model.layers[1].mlp.down_proj
    down.__class__ = type("Doubled", (torch.nn.Linear,), {"forward": lambda s, x: 2 * torch.nn.Linear.forward(s, x)})
    with pytest.raises(UserError, match=r"down_proj of layer 1 is Doubled.*or with mode freeze"):
        slice_neurons(model.hf, some(model, LAYERS - 1, 5))


@pytest.mark.parametrize("kind", ["gpt2", "deepseek_v3"])
def test_slices_of_a_fine_tune_are_a_tuned_model(kind: str, model_paths, questions, tmp_path: Path) -> None:
    path = None
    if kind == "gpt2":
        hf = copy.deepcopy(decoder(kind, vocab_size=64)).float()
    else:
        changes, path, _ = MIXED_BLOCKS[kind]
        config = AutoConfig.for_model(kind, **MIXED | {"vocab_size": 64, "num_hidden_layers": 4} | changes)
        hf = AutoModelForCausalLM.from_config(config)
    hf.save_pretrained(tmp_path / "base")
    for file in model_paths["llama"].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    base = load_model(tmp_path / "base", last_projection=path)
    member = np.zeros((len(base.blocks), base.width("mlp_mid")), bool)
    member[-1, : base.width("mlp_mid") // 2] = True
    neurons = NeuronSet("some", "specific", member, base=base.origin)
    before = {name: p.clone() for name, p in base.hf.named_parameters()}
    train: dict[str, Any] = {"steps": 2, "batch_size": 2, "warmup_steps": 0, "learning_rate": 1e-2, "method": "full"}
    made = finetune(
        base, questions, "race", "right", out=tmp_path / "race", inhibit=neurons, inhibit_mode="specific", **train
    ).model
    tuned = load_tuned(base, tmp_path / "race" / "neuron_slices.safetensors")
    moved = {name for name, p in tuned.hf.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(f"{base.architecture.blocks}.{base.architecture.read[-1]}.mlp." in name for name in moved)
    for (name, mine), theirs in zip(tuned.hf.named_parameters(), made.hf.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6), name
    assert all(torch.equal(p, before[name]) for name, p in base.hf.named_parameters())  # base is as it was
