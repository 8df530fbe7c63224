"""Packs hold every text once, what texts share only once, and a model reads them as it reads each text alone."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pnlac_fast.adapters import Weights
from pnlac_fast.models import Model
from pnlac_fast.packing import Pack, attending, packs
from pnlac_fast.passes import SHORTCUTS, agrees, usable

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 1.0},
    "Gemma3": {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "Phi3": {"sliding_window": 6},
    "Olmo2": {},
    "Starcoder2": {"sliding_window": 6},
    "GPTNeoX": {"rotary_pct": 1.0},
    "GPT2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
}


def decoder(name: str) -> Any:
    """A random model in float64; its attention is that of the released class."""
    transformers = importlib.import_module("transformers")
    shape = SHAPE | ARCHITECTURES[name] | ({"num_hidden_layers": 4} if name == "Gemma3" else {})
    kind = f"{name}Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{kind}Config")(**shape)
    torch.manual_seed(0)
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return getattr(transformers, f"{name}{suffix}")(config).double().eval()


def texts(seed: int = 0, count: int = 9) -> list[list[int]]:
    """Texts that share a front of 11 tokens, some of them 15, and two that share nothing or everything."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, 64, (n,), generator=draw).tolist()

    front, second = tokens(11), tokens(4)
    found = [[*front, *(second if i % 2 else []), *tokens(1 + 3 * i % 23)] for i in range(count)]
    return [*found, tokens(7), found[3], found[4][:-1]]


def check(sequences: list[list[int]], made: list[Pack], *, share: bool) -> None:
    assert sorted(i for pack in made for i in pack.index) == list(range(len(sequences)))
    for pack in made:
        computed = [row for part in pack.segments for row in part.rows.tolist()]
        assert sorted(computed) == list(range(pack.ids.numel()))
        for i, rows in zip(pack.index, pack.rows, strict=True):
            assert pack.ids[0, list(rows)].tolist() == sequences[i]
            assert pack.positions[0, list(rows)].tolist() == list(range(len(sequences[i])))
        inside = [tuple(sequences[i]) for i in pack.index]
        distinct = {text[: n + 1] for text in inside for n in range(len(text))}
        assert pack.ids.numel() == (len(distinct) if share else sum(map(len, inside)))


sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=25)


@settings(deadline=None, max_examples=150)
@given(sequences, st.integers(1, 60), st.booleans())
def test_every_text_is_there_and_what_is_shared_is_there_once(found: list[list[int]], budget: int, share: bool) -> None:
    made = list(packs(found, budget, share=share))
    check(found, made, share=share)
    assert all(pack.ids.numel() <= budget or len(pack.index) == 1 for pack in made)


def test_packs_are_of_about_one_size() -> None:
    many = [[1, 2, 3, *range(10 + i, 40 + i)] for i in range(100)]
    sizes = [pack.ids.numel() for pack in packs(many, 1000)]
    assert len(sizes) == 4
    assert min(sizes) > 600


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_reads_a_pack_as_it_reads_each_text(name: str, implementation: str) -> None:
    hf = decoder(name)
    if implementation == "sdpa" and not hf._supports_sdpa:
        pytest.skip(f"{name} has eager attention only")
    hf.set_attn_implementation(implementation)
    found = texts()
    rounding = 1e-12 if implementation == "sdpa" else 2e-6  # the softmax of eager attention is in float32
    with torch.inference_mode():
        alone = [hf.get_decoder()(input_ids=torch.tensor([t]), use_cache=False).last_hidden_state[0] for t in found]
        for share in (True, False):
            made = list(packs(found, 60, share=share))
            assert len(made) > 1
            for pack in made:
                with attending(hf, pack):
                    states = hf.get_decoder()(**pack.inputs(), use_cache=False).last_hidden_state[0]
                for i, rows in zip(pack.index, pack.rows, strict=True):
                    torch.testing.assert_close(states[list(rows)], alone[i], rtol=0, atol=rounding)
    assert hf.config._attn_implementation == implementation


def test_an_exception_inside_leaves_the_model_as_it_was() -> None:
    hf = decoder("Llama")
    (pack,) = packs([[1, 2, 3]], 10)
    before = hf.config._attn_implementation
    with pytest.raises(ZeroDivisionError), attending(hf, pack):
        raise ZeroDivisionError
    assert hf.config._attn_implementation == before


def test_models_that_do_not_bear_a_shortcut_go_without() -> None:
    hf = decoder("Llama")
    model = Model(Weights(hf), None, "plain", {})
    everything = usable(model, SHORTCUTS, longest=20)
    assert set(everything) >= {"share", "pack", "stop", "base", "overlap"}
    assert usable(model, ["stop"], longest=20) == ["stop"]

    hf.config.attention_chunk_size = 16
    assert not {"pack", "share"} & set(usable(model, SHORTCUTS, longest=17))
    assert usable(model, SHORTCUTS, longest=16) == everything

    real = hf.model.layers[1].forward  # tokens mixed by other means than attention
    hf.model.layers[1].forward = lambda x, **kwargs: real(x, **kwargs) + 0.1 * x.cumsum(1)
    assert [name for name in everything if name not in ("pack", "share")] == usable(model, SHORTCUTS, longest=8)


def test_an_mlp_that_is_not_what_it_looks_is_not_fused() -> None:
    hf = decoder("Llama")
    model = Model(Weights(hf), None, "odd", {})

    class Odd(type(hf.model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.5

    assert model.activation == "silu"
    assert agrees(model, "fuse")
    hf.model.layers[2].mlp.__class__ = Odd
    assert not agrees(model, "fuse")
    hf.model.layers[2].mlp.act_fn = torch.nn.ReLU()
    assert model.activation is None
