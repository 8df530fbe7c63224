"""Neuron slices against plain training of all parameters in float64, of which only the chosen entries are kept."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from sliced_by_hand import (
    EVERY,
    HIDDEN,
    KINDS,
    LAYERS,
    ONE,
    WIDTH,
    batch,
    chosen,
    compare,
    decoder,
    gradients,
    mine,
    own_name,
    taken,
    weights,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pnlac_fast.neurons import NeuronSet
from pnlac_fast.slices import slice_neurons


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "neurons", [chosen(), chosen("mlp_out"), chosen(member=EVERY), chosen(member=ONE)], ids=["mid", "out", "all", "one"]
)
def test_gradients_are_the_rows_and_columns_of_the_full_ones(kind: str, neurons: NeuronSet) -> None:
    model = decoder(kind)
    logits, full = model(**batch()).logits, gradients(model, batch(0), batch(1))
    model.zero_grad()
    slice_neurons(model, neurons)
    assert torch.equal(model(**batch()).logits, logits)
    compare(gradients(model, batch(0), batch(1)), full, neurons)


@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_pytorch_tanh", "relu2"])
def test_any_activation(act: str) -> None:
    model = decoder(act=act)
    full = gradients(model, batch())
    model.zero_grad()
    slice_neurons(model, chosen())
    compare(gradients(model, batch()), full, chosen())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_bits(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = decoder().train()
        slice_neurons(model, chosen())
        model.model.embed_tokens.register_forward_hook(lambda _, __, out: out.requires_grad_(True))
        if checkpointing and not reentrant:
            model.activation_checkpointing_enable()
        elif checkpointing:
            for block in model.model.layers:
                block.mlp.forward = functools.partial(checkpoint, block.mlp.forward, use_reentrant=True)
        found.append(gradients(model, batch()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_other_precisions_are_as_near_as_plain_training(dtype: torch.dtype, autocast: bool) -> None:
    model, exact = decoder(dtype=dtype), decoder(dtype=dtype).double()
    reference = gradients(exact, batch())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(**batch()).logits
        plain = gradients(model, batch())
        model.zero_grad()
        slice_neurons(model, chosen())
        assert torch.equal(model(**batch()).logits, logits)
        found = gradients(model, batch())
    for name in reference:
        if mine(name, chosen()) is None:
            continue
        expected = taken(name, reference[name], chosen())
        got, by_plain = found[own_name(name)], taken(name, plain[name], chosen())
        assert got.dtype == dtype
        error, usual = (got.double() - expected).norm(), (by_plain.double() - expected).norm()
        assert error <= 1.5 * usual + 1e-6 * expected.norm()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("site", ["mlp_mid", "mlp_out"])
def test_training_is_plain_training_of_the_chosen_entries(site: str, fused: bool) -> None:
    model, neurons = decoder(), chosen(site)
    plain = copy.deepcopy(model)
    still = weights(plain)
    for name, parameter in plain.named_parameters():
        kept = torch.zeros_like(parameter)
        if (index := mine(name, neurons)) is not None:
            kept.index_fill_(int(site == "mlp_mid" and name.endswith("down_proj.weight")), index, 1)
        parameter.register_hook(lambda g, kept=kept: g * kept)
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.0, "fused": fused}
    slices = slice_neurons(model, neurons)
    both = ((plain, torch.optim.AdamW(plain.parameters(), **settings)), (model, torch.optim.AdamW(slices.parameters())))
    both[1][1].param_groups[0].update(both[0][1].param_groups[0] | {"params": slices.parameters()})
    for step in range(5):
        losses = []
        for one, optimizer in both:
            optimizer.zero_grad()
            loss = one(**batch(step)).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    slices.merge()
    for name, parameter in model.named_parameters():
        index = mine(name, neurons)
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-7, atol=1e-9)
        if index is None:
            assert torch.equal(parameter, still[name])
        else:
            assert not torch.equal(taken(name, parameter, neurons), taken(name, still[name], neurons))


def test_gradient_and_optimizer_take_the_memory_of_the_slices_only() -> None:
    member = np.zeros((LAYERS, WIDTH), bool)
    member[:, 4] = True  # 4 %
    model = decoder()
    plain = sum(p.nbytes for p in model.parameters())
    slices = slice_neurons(model, chosen(member=member))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    gradients(model, batch())
    optimizer.step()
    grads = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = sum(t.nbytes for s in optimizer.state.values() for n, t in s.items() if n != "step")
    size = LAYERS * (3 * HIDDEN + 2) * 8
    assert grads == size
    assert moments == 2 * size
    assert size <= 0.05 * plain
    assert {id(p) for p in optimizer.state} == {id(p) for p in slices.parameters()}


def test_nothing_below_the_lowest_slice_is_differentiated() -> None:
    model = decoder()
    slice_neurons(model, chosen(member=ONE))  # in the second layer
    seen: list[tuple[int, bool]] = []
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(
            lambda _, args, out, i=i: seen.append((args[0].requires_grad, out.requires_grad))
        )
    model(**batch())
    assert seen == [(False, False), (False, True), (True, True)]


def test_hooks_on_projections_see_and_change_gradients() -> None:
    """A penalty on activations works on a model with slices."""
    model = decoder()
    losses = []
    for sliced in (False, True):
        if sliced:
            model.zero_grad()
            slice_neurons(model, chosen())
        terms: list[Tensor] = []
        down = model.model.layers[2].mlp.down_proj
        handle = down.register_forward_pre_hook(lambda _, args, terms=terms: terms.append(args[0].square().mean()))
        (model(**batch()).loss + terms[0]).backward()
        handle.remove()
        losses.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    compare(losses[1], losses[0], chosen())


@pytest.mark.filterwarnings("ignore")  # the compiler trips over warnings of its own
def test_a_compiled_mlp_trains_the_same() -> None:
    model = decoder()
    slices = slice_neurons(model, chosen())
    mlp, x = model.model.layers[2].mlp, torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    compiled = torch.compile(mlp, backend="aot_eager")
    for _ in range(2):
        outputs = []
        for forward in (mlp, compiled):
            y = forward(x)
            outputs.append((y, *torch.autograd.grad(y.square().sum(), [p.weight for p in slices.parts[3:]])))
        for one, other in zip(*outputs, strict=True):
            torch.testing.assert_close(one, other)
        with torch.no_grad():
            for parameter in slices.parameters():
                parameter.add_(0.1)
