"""An inhibit factor scales what its neurons learn, in full tuning and LoRA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from inhibited import MLP, WIDTH, belongs, chosen, decoder, lora, trainer, weights

from pnlac_fast.errors import UserError
from pnlac_fast.inhibition import InhibitFT


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_a_factor_scales_the_first_step_of_its_neurons(optimizer: str, tmp_path: Any) -> None:
    neurons = chosen()
    before, after = weights(decoder()), {}
    for factor in (0.25, 1.0):
        model = decoder()
        changes_ = {"max_steps": 1, "optim": optimizer, "max_grad_norm": 0.0}
        trainer(model, [InhibitFT(neurons, factor=factor)], tmp_path, **changes_).train()
        after[factor] = weights(model)
    plain = decoder()
    trainer(plain, [], tmp_path, max_steps=1, optim=optimizer, max_grad_norm=0.0).train()
    for name, whole in weights(plain).items():
        mine = belongs(name, whole.shape, neurons)
        change = whole - before[name]
        torch.testing.assert_close(after[1.0][name], whole, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(after[0.25][name][~mine], whole[~mine], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close((after[0.25][name] - before[name])[mine], 0.25 * change[mine], rtol=0, atol=1e-6)
        assert not mine.any() or change[mine].any()


def test_a_factor_scales_what_lora_adds(tmp_path: Any) -> None:
    """In the first step B becomes what it becomes without a factor, times it; columns of A begin with it."""
    neurons, found = chosen(), {}
    for factor in (0.5, 1.0):
        model = lora(decoder(), MLP)
        made = trainer(model, [InhibitFT(neurons, factor=factor)], tmp_path, max_steps=1, max_grad_norm=0.0)
        start = model.get_base_model().model.layers[0].mlp.down_proj.lora_A["default"].weight.detach().clone()
        made.train()
        mlp = model.get_base_model().model.layers[0].mlp
        found[factor] = (start, mlp.gate_proj.get_delta_weight("default"), mlp.up_proj.get_delta_weight("default"))
    mine = neurons.layer(0)
    others = np.setdiff1d(np.arange(WIDTH), mine)
    for i, (part, whole) in enumerate(zip(found[0.5], found[1.0], strict=True)):
        at: Any = (lambda x, j: x[:, j]) if i == 0 else (lambda x, j: x[j])
        assert at(whole, mine).any()
        torch.testing.assert_close(at(part, mine), 0.5 * at(whole, mine), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(at(part, others), at(whole, others), rtol=1e-5, atol=1e-8)


def test_a_factor_needs_a_step_that_can_be_masked(tmp_path: Any) -> None:
    made = trainer(decoder(), [InhibitFT(chosen(), factor=0.5)], tmp_path, optim="adafactor")
    with pytest.raises(UserError, match="above 0 needs AdamW or SGD, Adafactor is neither"):
        made.train()
    with pytest.raises(UserError, match="knows no inhibit factor"):
        InhibitFT(chosen(), "specific", 0.5)
    with pytest.raises(UserError, match="outside"):
        InhibitFT(chosen(), factor=1.5)


def test_a_resumed_factor_gives_the_bits_of_the_uninterrupted_run(tmp_path: Any) -> None:
    whole, resumed = lora(decoder()), lora(decoder())
    trainer(whole, [InhibitFT(chosen(), factor=0.5)], tmp_path, save_strategy="steps", save_steps=3).train()
    again = trainer(resumed, [InhibitFT(chosen(), factor=0.5)], tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
