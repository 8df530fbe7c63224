"""Every architecture at small size with random weights, its MLP by hand, and what a neuron of it owns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pnlac_fast import prompts
from pnlac_fast.loading import from_hf
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.passes import run

HIDDEN, WIDTH, LAYERS, VOCABULARY = 16, 24, 2, 40
TEXTS = ([5, 9, 3, 12, 7, 20, 11], [5, 9, 3, 30], [8, 2, 6, 6, 31])
SITES = ("mlp_mid", "mlp_out", "resid")


@dataclass(frozen=True)
class Mlp:
    """An MLP by hand: its activations from its input, [token, hidden] to [token, neuron], and its last projection."""

    middle: Callable[[Any, Tensor], Tensor]
    last: Callable[[Any, Tensor], Tensor]
    reads: str = "mlp"


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def gated(act: Callable[[Tensor], Tensor], names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Mlp:
    gate, up, down = names

    def middle(block: Any, x: Tensor) -> Tensor:
        mlp = block.mlp
        return act(x @ getattr(mlp, gate).weight.T) * (x @ getattr(mlp, up).weight.T)

    return Mlp(middle, lambda block, a: a @ getattr(block.mlp, down).weight.T)


def halves(act: Callable[[Tensor], Tensor]) -> Mlp:
    def middle(block: Any, x: Tensor) -> Tensor:
        both = block.mlp.gate_up_proj.weight
        return act(x @ both[: len(both) // 2].T) * (x @ both[len(both) // 2 :].T)

    return Mlp(middle, lambda block, a: a @ block.mlp.down_proj.weight.T)


def plain(act: Callable[[Tensor], Tensor], first: str, last: str, transposed: bool = False) -> Mlp:
    def times(block: Any, path: str, x: Tensor) -> Tensor:
        linear = block.get_submodule(path)
        return x @ (linear.weight if transposed else linear.weight.T) + (0 if linear.bias is None else linear.bias)

    reads = first if "." not in first else first.rpartition(".")[0]
    return Mlp(lambda b, x: act(times(b, first, x)), lambda b, a: times(b, last, a), reads)


def mixture(act: Callable[[Tensor], Tensor], renormalised: bool) -> Mlp:
    """Every expert for every token, times a routing weight that is zero but for the two chosen ones."""

    def middle(block: Any, x: Tensor) -> Tensor:
        experts, shares = block.mlp.experts, torch.softmax(x @ block.mlp.gate.weight.T, -1)
        least = shares.sort(descending=True).values[:, 1:2]
        shares = torch.where(shares >= least, shares, 0)
        if renormalised:
            shares = shares / shares.sum(-1, keepdim=True)
        found = []
        for e, both in enumerate(experts.gate_up_proj):
            gate, up = x @ both[: len(both) // 2].T, x @ both[len(both) // 2 :].T
            found.append(shares[:, e, None] * act(gate) * up)
        return torch.cat(found, -1)

    def last(block: Any, a: Tensor) -> Tensor:
        return a @ torch.cat([down.T for down in block.mlp.experts.down_proj])

    return Mlp(middle, last)


def clamped_mixture(limit: float = 7.0) -> Mlp:
    """As of GPT-OSS: gate and up alternate, weights are [input, output], all have biases; that of down is zero here."""

    def middle(block: Any, x: Tensor) -> Tensor:
        experts, router = block.mlp.experts, block.mlp.router
        logits = x @ router.weight.T + router.bias
        least = logits.sort(descending=True).values[:, 1:2]
        shares = torch.softmax(torch.where(logits >= least, logits, -torch.inf), -1)
        found = []
        for e, (weight, bias) in enumerate(zip(experts.gate_up_proj, experts.gate_up_proj_bias, strict=True)):
            both = x @ weight + bias
            gate, up = both[:, ::2].clamp(max=limit), both[:, 1::2].clamp(-limit, limit)
            found.append(shares[:, e, None] * (up + 1) * gate / (1 + torch.exp(-1.702 * gate)))
        return torch.cat(found, -1)

    return Mlp(middle, lambda block, a: a @ block.mlp.experts.down_proj.flatten(0, 1))


TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LIKE_LLAMA = TOKENS | {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
WIDE = LIKE_LLAMA | {"head_dim": 12}
LIKE_GPT2 = TOKENS | {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 2, "n_positions": 64}
MIXED = WIDE | {"num_experts_per_tok": 2}
NEOX = plain(gelu, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
# model type: its configuration, and its MLP by hand
KINDS: dict[str, tuple[dict[str, Any], Mlp]] = {
    "llama": (LIKE_LLAMA, gated(silu)),
    "mistral": (LIKE_LLAMA | {"sliding_window": 4}, gated(silu)),
    "qwen2": (LIKE_LLAMA, gated(silu)),
    "qwen3": (WIDE, gated(silu)),
    "gemma": (WIDE, gated(gelu_tanh)),
    "gemma2": (WIDE | {"sliding_window": 4}, gated(gelu_tanh)),
    "gemma3_text": (WIDE | {"sliding_window": 4}, gated(gelu_tanh)),
    "phi3": (LIKE_LLAMA, halves(silu)),
    "glm": (WIDE, halves(silu)),
    "olmo2": (LIKE_LLAMA, gated(silu)),
    "granite": (LIKE_LLAMA, gated(silu)),
    "cohere": (LIKE_LLAMA, gated(silu)),
    "stablelm": (LIKE_LLAMA, gated(silu)),
    "starcoder2": (LIKE_LLAMA, plain(gelu_tanh, "mlp.c_fc", "mlp.c_proj")),
    "falcon": (
        TOKENS | {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "bias": True},
        NEOX,
    ),
    "gpt_neox": ({k: v for k, v in LIKE_LLAMA.items() if k != "num_key_value_heads"}, NEOX),
    "gpt2": (LIKE_GPT2, plain(gelu_tanh, "mlp.c_fc", "mlp.c_proj", transposed=True)),
    "gptj": (LIKE_GPT2 | {"rotary_dim": 4}, plain(gelu_tanh, "mlp.fc_in", "mlp.fc_out")),
    "bloom": (
        TOKENS | {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 2},
        plain(gelu_tanh, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "opt": (
        TOKENS
        | {"hidden_size": HIDDEN, "ffn_dim": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
        | {"word_embed_proj_dim": HIDDEN, "max_position_embeddings": 64},
        plain(torch.relu, "fc1", "fc2"),
    ),
    "mixtral": (MIXED | {"num_local_experts": 3}, mixture(silu, renormalised=True)),
    "qwen3_moe": (
        MIXED | {"num_experts": 4, "moe_intermediate_size": 10, "norm_topk_prob": False},
        mixture(silu, renormalised=False),
    ),
    "olmoe": (
        LIKE_LLAMA | {"num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": False},
        mixture(silu, renormalised=False),
    ),
    "gpt_oss": (
        MIXED
        | {"num_local_experts": 3, "sliding_window": 4}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        clamped_mixture(),
    ),
}
INTERFACELESS = ("falcon", "gptj", "bloom")  # their attention is not behind transformers' interface

# of blocks that are not alike: what its configuration has besides, the MLP to read, the layers that have one
MIXED_BLOCKS: dict[str, tuple[dict[str, Any], str, tuple[int, ...]]] = {
    "deepseek_v3": (
        {"n_routed_experts": 4, "moe_intermediate_size": 12, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        | {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
        | {"num_key_value_heads": 2, "head_dim": 8},
        "mlp.experts",
        (1, 2, 3),
    ),
    "jamba": (
        {"num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2}
        | {"mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_offset": 1},
        "feed_forward.down_proj",
        (0, 2),
    ),
}


@cache
def decoder(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A decoder in float64 with random weights throughout: biases and norms too, and every layer of another scale."""
    config = AutoConfig.for_model(kind, **(KINDS[kind][0] | changes))
    hf: Any = AutoModelForCausalLM.from_config(config).double().eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            scale = 0.6 if "mlp.gate.weight" in name or "router.weight" in name else 0.3  # routers that are sure
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * scale)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.add_(1)
            if name.endswith("experts.down_proj_bias"):
                parameter.zero_()
    if hasattr(hf, "set_experts_implementation"):
        hf.set_experts_implementation("eager")
    return hf.requires_grad_(False)


def opened(kind: str, seed: int = 0) -> Model:
    return from_hf(decoder(kind, seed), None, name=kind)


def states(model: Model, texts: list[list[int]], side: str = "right", shortcuts: Any = ()) -> list[dict[Any, Tensor]]:
    """Per text, the activations by site and layer, [position, neuron]."""
    (batch,) = prompts.batches(texts, 1000, padding_side=side)
    found: list[dict[Any, Tensor]] = [{} for _ in texts]

    def visit(site: str, layer: int, activation: Tensor, _: bool) -> None:
        for i, rows in zip(batch.index, batch.rows, strict=True):
            found[i][site, layer] = activation[list(rows)].clone()

    run(model, batch, SITES, visit, shortcuts=shortcuts)
    return found


def inputs_of(model: Model, path: str, text: list[int]) -> list[Tensor]:
    """What a module of every block reads, and in the end the final norm's input, by plain hooks, [token, width]."""
    seen: list[Tensor] = []
    modules = [block.get_submodule(path) if path else block for block in model.blocks]
    hooks = [
        m.register_forward_pre_hook(lambda _, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True)
        for m in modules
    ]
    with torch.no_grad():
        model.hf(input_ids=torch.tensor([text]))
    for hook in hooks:
        hook.remove()
    return [x.flatten(0, -2) for x in seen]


def some(model: Model, layer: int, *neurons: int) -> NeuronSet:
    member = np.zeros((LAYERS, model.width("mlp_mid")), bool)
    member[layer, list(neurons)] = True
    return NeuronSet("some", "general", member)


def moving(model: Model, neuron: int) -> dict[str, Tensor]:
    """Which entries of the last block's parameters a neuron depends on or acts through, found by gradients."""
    last, middle, out = LAYERS - 1, [], []

    def alone(_: int, activation: Tensor) -> Tensor:
        middle.append(activation[..., neuron].sum())
        only = torch.zeros_like(activation)
        only[..., neuron] = activation[..., neuron].detach() + 1
        return only

    owned = {n: p for n, p in model.blocks[last].named_parameters() if ".self_attn." not in n}
    with model.tapped("mlp_mid", alone, [last]), model.tapped("mlp_out", lambda _, a: out.append(a.sum()), [last]):
        model.hf(input_ids=torch.tensor([TEXTS[0]]))
    into, onward = (
        torch.autograd.grad(value, list(owned.values()), retain_graph=True, allow_unused=True)
        for value in (middle[0], out[0])
    )
    found = {}
    for (name, parameter), own, by in zip(owned.items(), into, onward, strict=True):
        if (
            "norm" in name
            or "ln_" in name
            or "attention" in name
            or "attn" in name
            or "router" in name
            or name == "mlp.gate.weight"
        ):
            continue
        parts = [g != 0 for g in (own, None if name.endswith("bias") else by) if g is not None]
        found[name] = torch.stack(parts).any(0) if parts else torch.zeros_like(parameter, dtype=torch.bool)
    return found


def active(model: Model) -> int:
    """A neuron; of a mixture, one of an expert that the text is sent to."""
    if not model.architecture.experts:
        return model.width("mlp_mid") - 2
    return int(states(model, [TEXTS[0]])[0]["mlp_mid", LAYERS - 1].abs().sum(0).argmax())


def opened_for_gradients(kind: str) -> Model:
    return from_hf(copy.deepcopy(decoder(kind)).requires_grad_(True), None, name=kind)


def path_of(hf: Any, module: Any) -> str:
    return next(name for name, one in hf.named_modules() if one is module)
