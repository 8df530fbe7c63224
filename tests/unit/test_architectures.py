"""Every architecture: sites and patches against computations by hand, and batches against single texts."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import INTERFACELESS, KINDS, LAYERS, SITES, TEXTS, decoder, inputs_of, opened, some, states
from torch import Tensor

from pnlac_fast import cache as cache_store
from pnlac_fast import finetune, locate, patch
from pnlac_fast.capture import accumulate
from pnlac_fast.loading import from_hf, load_model
from pnlac_fast.passes import SHORTCUTS, usable
from pnlac_fast.patching import patched
from pnlac_fast.prompts import Text


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
