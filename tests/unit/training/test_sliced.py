"""A model with slices is to others the plain model: its weights, its saved state, and after merging itself."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sliced_by_hand import LAYERS, WIDTH, batch, chosen, decoder, some

from pnlac_fast.adapters import Weights
from pnlac_fast.errors import UserError
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.sliced import SlicedLinear
from pnlac_fast.slices import Slices, slice_neurons


def test_weights_hold_the_current_values_whatever_changed_the_slices() -> None:
    model = decoder()
    plain, slices = copy.deepcopy(model), slice_neurons(model, chosen())
    before = model(**batch()).logits
    for parameter in slices.parameters():
        parameter.data.add_(0.1)  # as some optimizers do, unseen by autograd
    with torch.no_grad():
        after = model(**batch()).logits
    assert not torch.equal(before, after)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(**batch()).logits, after)


def test_state_dicts_are_those_of_the_plain_model() -> None:
    model = decoder()
    plain, slices = copy.deepcopy(model), slice_neurons(model, chosen())
    with torch.no_grad():
        for parameter in slices.parameters():
            parameter.normal_()
    saved = copy.deepcopy(model.state_dict())
    assert saved.keys() == plain.state_dict().keys()
    other = copy.deepcopy(plain)
    again = slice_neurons(other, chosen())
    assert not other.load_state_dict(saved).missing_keys
    for one, same in zip(slices.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, same)
    saved["model.layers.0.mlp.gate_proj.weight"][1, 0] += 1
    with pytest.raises(UserError, match=r"gate_proj\.weight differs elsewhere.*resume with the same neurons"):
        other.load_state_dict(saved)
    del saved["model.layers.0.mlp.down_proj.weight"]
    missing = slice_neurons(copy.deepcopy(plain), chosen()).model.load_state_dict(
        {n: t for n, t in saved.items() if "layers.0.mlp.gate_proj" not in n}, strict=False
    )
    assert sorted(missing.missing_keys) == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.mlp.gate_proj.bias",
        "model.layers.0.mlp.gate_proj.weight",
    ]


def test_merging_leaves_the_plain_model_and_slices_can_come_back() -> None:
    model = decoder()
    model.model.embed_tokens.weight.requires_grad_(False)
    plain = copy.deepcopy(model)
    seen: list[int] = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda *_: seen.append(1))
    slices = slice_neurons(model, chosen())
    assert [n for n, p in model.named_parameters() if p.requires_grad and "slice_" not in n] == []
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in slices.parameters():
            parameter.add_(1.0)
    assert torch.equal(copied(**batch()).logits, plain(**batch()).logits)  # a copy has slices of its own
    seen.clear()
    expected = model(**batch()).logits
    slices.merge()
    slices.merge()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in plain.named_parameters()
    ]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert torch.equal(model(**batch()).logits, expected)
    assert seen == [1, 1]  # hooks stay, and fire with slices as without
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    slices.install()
    assert not slices.parts[1].weight.any()
    assert isinstance(model.model.layers[0].mlp.up_proj, SlicedLinear)


def test_what_is_frozen_stays_frozen() -> None:
    model = decoder()
    for block in model.model.layers:
        block.mlp.up_proj.requires_grad_(False)
    slices = slice_neurons(model, chosen())
    assert slices.covered == {"gate_proj": 2, "down_proj": 2}
    assert [p.part for p in slices.parts] == ["gate_proj", "down_proj"] * 2


def tied_layers() -> Any:
    model = decoder()
    model.model.layers[2].mlp = model.model.layers[0].mlp
    return model


def with_adapter() -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    model = decoder(dtype=torch.float32)
    inject_adapter_in_model(LoraConfig(target_modules=["down_proj"]), model)
    return model.requires_grad_(True)


def sliced_already() -> Any:
    model = decoder()
    slice_neurons(model, chosen())
    return model


@pytest.mark.parametrize(
    ("model", "neurons", "message"),
    [
        (decoder, NeuronSet("r", "specific", some("mlp_out"), site="resid"), "no weights of their own"),
        (decoder, NeuronSet("e", "specific", np.zeros((LAYERS, WIDTH), bool)), "is empty"),
        (decoder, NeuronSet("w", "specific", np.ones((LAYERS, WIDTH + 1), bool)), "locate them again"),
        (lambda: decoder().requires_grad_(False), chosen(), "set requires_grad on gate_proj, up_proj, down_proj"),
        (tied_layers, chosen(), "one shared parameter"),
        (with_adapter, chosen(), "down_proj of layer 0 is Linear, not a plain linear layer"),
        (sliced_already, chosen(), "SlicedLinear, not a plain linear layer: give a model without"),
    ],
)
def test_what_cannot_be_sliced_is_refused(model: Any, neurons: NeuronSet, message: str) -> None:
    made = model()
    before = [type(m) for m in made.modules()]
    with pytest.raises(UserError, match=message):
        slice_neurons(made, neurons)
    assert [type(m) for m in made.modules()] == before


def test_neurons_of_another_base_are_refused() -> None:
    neurons = NeuronSet("other", "specific", some(), base={"sha256": "0" * 64})
    model = Model(Weights(decoder()), None, "mine", {"sha256": "1" * 64})
    with pytest.raises(UserError, match="locate the neurons on this model"):
        slice_neurons(model, neurons)
    assert isinstance(slice_neurons(model, chosen()), Slices)
