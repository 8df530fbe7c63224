"""Gradients of a whole decoder in float64, and which of their entries are a neuron's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from pnlac_fast.neurons import NeuronSet

LAYERS, WIDTH, HIDDEN = 3, 23, 18
KINDS = ("llama", "qwen2", "gemma")
DIMS = {"mlp_mid": {"gate_proj": 0, "up_proj": 0, "down_proj": 1}, "mlp_out": {"down_proj": 0}}


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
