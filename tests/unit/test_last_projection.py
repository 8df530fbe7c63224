"""Which MLP of a model is read: found where there is one, named by the user where there are several, or refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import HIDDEN, LIKE_LLAMA, MIXED, MIXED_BLOCKS, TEXTS, WIDTH, decoder, inputs_of, states
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pnlac_fast.architecture import architecture
from pnlac_fast.checkup import self_check
from pnlac_fast.errors import UserError
from pnlac_fast.inhibition import InhibitFT
from pnlac_fast.loading import from_hf
from pnlac_fast.neurons import NeuronSet


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


@pytest.mark.parametrize("kind", MIXED_BLOCKS)
def test_of_blocks_that_differ_those_with_one_kind_of_mlp_are_read(kind: str, tmp_path: Path) -> None:
    changes, path, read = MIXED_BLOCKS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **MIXED | {"num_hidden_layers": 4, "initializer_range": 0.3} | changes)
    hf: Any = AutoModelForCausalLM.from_config(config).double().eval()
    if hasattr(hf, "set_experts_implementation"):
        hf.set_experts_implementation("eager")
    with pytest.raises(
        UserError, match=r"neurons, layers? [0-9, ]+\) and .*blocks without it, and neurons of the others, are left out"
    ):
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
