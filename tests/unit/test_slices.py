"""Neuron slices against plain training of all parameters in float64, of which only the chosen entries are kept."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from pnlac_fast.adapters import Weights
from pnlac_fast.errors import UserError
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.sliced import SlicedLinear
from pnlac_fast.slices import Slices, slice_neurons

LAYERS, WIDTH, HIDDEN = 3, 23, 18
KINDS = ("llama", "qwen2", "gemma")
DIMS = {"mlp_mid": {"gate_proj": 0, "up_proj": 0, "down_proj": 1}, "mlp_out": {"down_proj": 0}}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def decoder(kind: str = "llama", dtype: torch.dtype = torch.float64, act: str | None = None) -> Any:
    """Random weights; the Llama has biases in its MLP, the Gemma a GELU."""
    shape: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "initializer_range": 0.2,
    } | ({} if act is None else {"hidden_act": act})
    torch.manual_seed(0)
    model: Any
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape, mlp_bias=True))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    else:
        model = GemmaForCausalLM(GemmaConfig(**shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype)


def some(site: str = "mlp_mid") -> np.ndarray:
    """Three neurons of the first layer, none of the second, one of the last."""
    member = np.zeros((LAYERS, WIDTH if site == "mlp_mid" else HIDDEN), bool)
    member[0, [0, 3, 17]] = True
    member[2, 5] = True
    return member


def chosen(site: str = "mlp_mid", member: np.ndarray | None = None) -> NeuronSet:
    return NeuronSet("some", "specific", some(site) if member is None else member, site=site)


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(model: Any, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    for rows in batches:
        model(**rows).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def mine(name: str, neurons: NeuronSet) -> Tensor | None:
    """Index of the chosen entries of a parameter of a plain model, None where it has none."""
    if ".mlp." not in name:
        return None
    layer, part, kind = int(name.split(".")[2]), *name.split(".")[4:6]
    dim = DIMS[neurons.site].get(part)
    index = torch.tensor(neurons.layer(layer), dtype=torch.int64)
    return None if dim is None or not len(index) or (kind == "bias" and dim) else index


def taken(name: str, tensor: Tensor, neurons: NeuronSet) -> Tensor:
    index = mine(name, neurons)
    assert index is not None
    return tensor[:, index] if neurons.site == "mlp_mid" and name.endswith("down_proj.weight") else tensor[index]


def own_name(name: str) -> str:
    """Name of the slice of a weight or bias."""
    head, _, kind = name.rpartition(".")
    return f"{head}.slice_{kind}"


def compare(found: dict[str, Tensor], full: dict[str, Tensor], neurons: NeuronSet, rtol: float = 1e-12) -> None:
    """Gradients of slices are the rows and columns of the full gradients, and there are no others."""
    names = [name for name in full if mine(name, neurons) is not None]
    assert sorted(found) == sorted(own_name(name) for name in names)
    for name in names:
        expected = taken(name, full[name], neurons)
        assert found[own_name(name)].shape == expected.shape
        error = (found[own_name(name)] - expected).norm()
        assert error <= rtol * expected.norm()
        assert expected.any()


EVERY = np.ones((LAYERS, WIDTH), bool)
ONE = np.zeros((LAYERS, WIDTH), bool)
ONE[1, 22] = True


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


def test_what_is_frozen_stays_frozen() -> None:
    model = decoder()
    for block in model.model.layers:
        block.mlp.up_proj.requires_grad_(False)
    slices = slice_neurons(model, chosen())
    assert slices.covered == {"gate_proj": 2, "down_proj": 2}
    assert [p.part for p in slices.parts] == ["gate_proj", "down_proj"] * 2


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
