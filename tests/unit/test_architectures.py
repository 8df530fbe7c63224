"""Every architecture: sites, patches and masks against computations by hand, and batches against single texts."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pnlac_fast import cache as cache_store
from pnlac_fast import finetune, locate, patch, prompts
from pnlac_fast.anchoring import Anchor
from pnlac_fast.architecture import architecture
from pnlac_fast.base_activations import base_activations
from pnlac_fast.capture import accumulate
from pnlac_fast.checkup import certify, self_check
from pnlac_fast.errors import UserError
from pnlac_fast.inhibition import InhibitFT
from pnlac_fast.loading import from_hf, load_model, load_tuned
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.passes import SHORTCUTS, run, usable
from pnlac_fast.patching import patched
from pnlac_fast.prompts import Text
from pnlac_fast.slice_file import merge_slices, save_slices
from pnlac_fast.slices import slice_neurons

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


@pytest.mark.parametrize("kind", KINDS)
def test_sites_equal_a_computation_by_hand(kind: str) -> None:
    model, mlp = opened(kind), KINDS[kind][1]
    (found,) = states(model, [TEXTS[0]])
    for layer, (block, x) in enumerate(zip(model.blocks, inputs_of(model, mlp.reads, TEXTS[0]), strict=True)):
        middle = mlp.middle(block, x)
        # routing weights are computed in single precision
        assert torch.allclose(found["mlp_mid", layer], middle, rtol=1e-6, atol=1e-6)
        assert torch.allclose(found["mlp_out", layer], mlp.last(block, middle), rtol=1e-6, atol=1e-6)
    streams = inputs_of(model, "", TEXTS[0])
    for layer in range(LAYERS - 1):
        assert torch.allclose(found["resid", layer], streams[layer + 1], rtol=1e-6, atol=1e-6)
    assert found["mlp_mid", 0].shape == (len(TEXTS[0]), model.width("mlp_mid"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_single_texts_and_padding_is_either_side(kind: str) -> None:
    for side in ("left", "right"):
        model, tolerance = opened(kind), 1e-9
        if side == "left" and model.hf.config._attn_implementation == "eager":
            # transformers' softmax is float32, in which the float64 mask of a whole row is infinite: NaN
            model, tolerance = from_hf(copy.deepcopy(model.hf).float(), None, name=kind), 1e-5
        alone = [states(model, [text])[0] for text in TEXTS]
        for mine, theirs in zip(states(model, list(TEXTS), side), alone, strict=True):
            for key, value in theirs.items():
                allowed = tolerance * float(value.abs().max())
                assert torch.allclose(mine[key], value, rtol=tolerance, atol=allowed), (side, key)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_the_same_with_every_shortcut_that_is_taken(kind: str) -> None:
    base, tuned = opened(kind), opened(kind, seed=1)
    texts = [Text(i, tuple(ids), len(ids) - 1, tuple(range(1, len(ids) - 1))) for i, ids in enumerate(TEXTS)]
    taken = usable(base, SHORTCUTS, longest=10)
    assert ("pack" in taken) == (kind not in INTERFACELESS)
    assert "stop" in taken
    tokens = ("last", "all")
    plain_, short = (
        accumulate(base, {"t": tuned}, texts, sites=sites, tokens=tokens, shortcuts=shortcuts)
        for sites, shortcuts in ((SITES, ()), (SITES[:1], taken))
    )
    assert (short.counts == plain_.counts).all()
    for mine, theirs in ((short.base, plain_.base), (short.tuned, plain_.tuned)):
        scale = np.abs(theirs["mlp_mid"]).max(-1, keepdims=True)
        assert (np.abs(mine["mlp_mid"] - theirs["mlp_mid"]) <= 1e-6 * scale).all()


def some(model: Model, layer: int, *neurons: int) -> NeuronSet:
    member = np.zeros((LAYERS, model.width("mlp_mid")), bool)
    member[layer, list(neurons)] = True
    return NeuronSet("some", "general", member)


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_changes_the_chosen_neurons_and_what_follows_from_them(kind: str) -> None:
    base, tuned, mlp = opened(kind), opened(kind, seed=1), KINDS[kind][1]
    last = LAYERS - 1
    neurons = [1, base.width("mlp_mid") - 2]
    before, source = states(base, [TEXTS[0]])[0], states(tuned, [TEXTS[0]])[0]
    seen: dict[Any, Tensor] = {}
    with patched(base, some(base, last, *neurons), source=tuned):
        taps = [base.tapped(site, lambda n, a, s=site: seen.__setitem__((s, n), a[0].clone())) for site in SITES]  # type: ignore[misc]
        with torch.no_grad(), taps[0], taps[1], taps[2]:
            base.hf(input_ids=torch.tensor([TEXTS[0]]))
    wanted = before["mlp_mid", last].clone()
    assert not torch.allclose(wanted[:, neurons], source["mlp_mid", last][:, neurons])
    wanted[:, neurons] = source["mlp_mid", last][:, neurons]
    assert torch.equal(seen["mlp_mid", last], wanted)
    out = mlp.last(base.blocks[last], wanted)
    assert torch.allclose(seen["mlp_out", last], out, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(out, before["mlp_out", last])
    for site in SITES:
        assert torch.allclose(seen[site, 0], before[site, 0], rtol=1e-12)


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


@pytest.mark.parametrize("kind", ["llama", "phi3", "opt", "mixtral", "falcon"])
def test_the_self_check_holds(kind: str) -> None:
    report = self_check(opened(kind))
    assert all(check["holds"] and check["error"] < 1e-6 for check in report["checks"].values())
    halves = {"halves"} if kind == "phi3" else set()
    assert set(report["checks"]) == {"batch", "padding", "reading", "writing", "projection"} | halves
    assert report["widths"]["mlp_mid"] == opened(kind).width("mlp_mid")
    assert ("pack" in report["left_out"]) == (kind in INTERFACELESS)


def test_the_self_check_finds_a_model_that_mixes_texts() -> None:
    hf = copy.deepcopy(decoder("llama"))
    hf.model.layers[0].register_forward_hook(lambda _, __, stream: stream + stream.mean((0, 1)))
    report = self_check(from_hf(hf, None, name="mixer"))
    assert {name for name, check in report["checks"].items() if not check["holds"]} == {"batch", "padding"}
    assert "more than rounding" in report["left_out"]["pack"]
    with pytest.raises(UserError, match=r"'mixer' does not pass its self-check \(batch, padding\)"):
        certify(report, "mixer")


def test_the_self_check_finds_a_last_projection_that_is_not_used() -> None:
    hf = copy.deepcopy(decoder("llama"))
    down = hf.model.layers[LAYERS - 1].mlp.down_proj
    down.register_forward_hook(lambda _, __, out: torch.ones_like(out))
    checks = self_check(from_hf(hf, None))["checks"]
    assert not checks["writing"]["holds"]
    assert not checks["projection"]["holds"]


def test_the_self_check_finds_gates_and_ups_that_alternate() -> None:
    hf = copy.deepcopy(decoder("phi3"))

    def forward(mlp: Any, x: Tensor) -> Tensor:
        both = mlp.gate_up_proj(x)
        return mlp.down_proj(silu(both[..., ::2]) * both[..., 1::2])

    for layer in hf.model.layers:
        layer.mlp.forward = partial(forward, layer.mlp)
    checks = self_check(from_hf(hf, None))["checks"]
    assert [name for name, check in checks.items() if not check["holds"]] == ["halves"]


def test_every_mlp_is_read_where_the_user_says() -> None:
    shape = MIXED | {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 14}
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", **shape))
    both = r"hold mlp\.experts \(32 neurons.*and mlp\.shared_expert\.down_proj \(14 neurons.*--last-projection"
    with pytest.raises(UserError, match=both):
        from_hf(hf, None)
    with pytest.raises(UserError, match=r"and no MLP at 'mlp\.gate': name the one"):
        from_hf(hf, None, last_projection="mlp.gate")
    for path, width in (("mlp.experts", 32), ("mlp.shared_expert.down_proj", 14)):
        model = from_hf(hf, None, last_projection=path)
        assert model.width("mlp_mid") == width
        assert all(check["holds"] for check in self_check(model)["checks"].values())


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


@pytest.mark.parametrize("kind", MIXED_BLOCKS)
def test_of_blocks_that_differ_those_with_one_kind_of_mlp_are_read(kind: str, tmp_path: Path) -> None:
    changes, path, read = MIXED_BLOCKS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **MIXED | {"num_hidden_layers": 4, "initializer_range": 0.3} | changes)
    hf: Any = AutoModelForCausalLM.from_config(config).double().eval()
    if hasattr(hf, "set_experts_implementation"):
        hf.set_experts_implementation("eager")
    with pytest.raises(UserError, match=r"neurons, layers? [0-9, ]+\) and .*blocks without it are left out"):
        architecture(hf)
    model = from_hf(hf, None, last_projection=path)
    report = self_check(model)
    assert all(check["holds"] for check in report["checks"].values())
    assert (report["read"], report["layers"]) == (list(read), len(read))
    (found,) = states(model, [TEXTS[0]])
    streams = inputs_of(from_hf(hf, None, last_projection=path), "", TEXTS[0])
    every: list[Tensor] = []
    for block in hf.get_submodule(model.architecture.blocks):
        block.register_forward_hook(lambda _, __, out: every.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        hf(input_ids=torch.tensor([TEXTS[0]]))
    for layer, number in enumerate(read):
        assert torch.allclose(found["resid", layer], every[number][0], rtol=1e-9)
        assert streams[layer].shape == found["resid", layer].shape
    # what has been named is known to callbacks, copies and saved models
    hf.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert architecture(saved, from_hf(saved, None).weights.last_projection) == model.architecture
    inhibit = InhibitFT(NeuronSet("s", "general", np.ones((len(read), model.width("mlp_mid")), bool)))
    inhibit.prepare(hf.requires_grad_(True))
    assert inhibit.masks is not None
    assert set(inhibit.masks.covered.values()) == {len(read)}
    names = {name for mask in inhibit.masks.entries for name in [mask.name]}
    assert {int(name.split("layers.")[1].split(".")[0]) for name in names} == set(read)


def test_blocks_of_several_widths_are_refused() -> None:
    hf = copy.deepcopy(decoder("llama"))
    wide = decoder("llama", intermediate_size=WIDTH + 2)
    hf.model.layers[1] = copy.deepcopy(wide.model.layers[1])
    for path in (None, "mlp.down_proj"):
        with pytest.raises(UserError, match=r"24 neurons, layer 0.*26 neurons, layer 1.*blocks are alike"):
            architecture(hf, path)


def test_what_looks_ahead_is_refused() -> None:
    config = AutoConfig.for_model("bert", **LIKE_LLAMA)
    with pytest.raises(UserError, match=r"'bert'\) lets tokens look ahead.*is_decoder"):
        from_hf(AutoModelForCausalLM.from_config(config), None)
    config.is_decoder = True
    model = from_hf(AutoModelForCausalLM.from_config(config), None)
    assert [p.path for p in model.architecture.projections] == ["intermediate.dense", "output.dense"]


def test_no_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    hf = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1))
    with pytest.raises(UserError, match="decoder-only"):
        architecture(hf)


def test_equal_widths_leave_the_last_projection_to_names() -> None:
    for kind, name in (("llama", "mlp.down_proj"), ("gptj", "mlp.fc_out"), ("opt", "fc2")):
        width = {"opt": "ffn_dim", "gptj": "n_inner"}.get(kind, "intermediate_size")
        assert architecture(decoder(kind, **{width: HIDDEN})).down.path == name


def test_a_module_that_does_not_run_is_refused() -> None:
    hf = copy.deepcopy(decoder("llama"))
    hf.model.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(UserError, match=r"do not run as its blocks are built.*--last-projection"):
        from_hf(hf, None)


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


def opened_for_gradients(kind: str) -> Model:
    return from_hf(copy.deepcopy(decoder(kind)).requires_grad_(True), None, name=kind)


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


def path_of(hf: Any, module: Any) -> str:
    return next(name for name, one in hf.named_modules() if one is module)


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


@pytest.mark.parametrize("kind", ["gpt2", "opt", "mixtral"])
def test_from_fine_tune_to_patch(kind: str, model_paths, questions, tmp_path: Path) -> None:
    copy.deepcopy(decoder(kind, vocab_size=64)).float().save_pretrained(tmp_path / "base")
    for file in model_paths["llama"].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    base = load_model(tmp_path / "base")
    train: dict[str, Any] = {"steps": 2, "batch_size": 2, "warmup_steps": 0, "learning_rate": 1e-2}
    tuned = {"race": finetune(base, questions, "race", "right", out=tmp_path / "race", **train).model}
    cache_store(base, tuned, questions, tmp_path / "s.zarr")
    found = locate(tmp_path / "s.zarr", top=0.5, out=tmp_path / "n.json")["race"].general
    assert 0 < len(found) < found.member.size
    again = finetune(base, questions, "race", "right", out=tmp_path / "still", inhibit=found, **train)
    names = [projection.name for projection in base.architecture.projections]
    layers = sum(count > 0 for count in found.per_layer)
    assert again.record["inhibit"]["freeze"]["covered"] == dict.fromkeys(names, layers)
    moved = patch(base, tuned, {found.name: found}, questions, sets=["general", "random"], draws=1)["margin"]
    assert np.isfinite(moved).all()
    assert len(np.unique(moved.values, axis=0)) == moved.sizes["run"]  # every run is another one
