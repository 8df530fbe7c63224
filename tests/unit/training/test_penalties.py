"""Anchoring and KL to base: their gradient is that of the term as written down, in any trainer, and nothing stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from penalised import (
    TEXTS,
    WEIGHT,
    anchor_term,
    chosen,
    decoder,
    kl_term,
    lora,
    loss_of,
    models,
    pad,
    rows,
    step,
    trained,
)
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pnlac_fast.anchoring import Anchor
from pnlac_fast.base_activations import base_activations
from pnlac_fast.divergence import KLToBase
from pnlac_fast.errors import UserError
from pnlac_fast.inhibition import InhibitFT


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("kind", "site"), [("llama", "mlp_mid"), ("qwen2", "mlp_mid"), ("llama", "resid")])
def test_the_anchor_adds_the_gradient_of_its_term(kind: str, site: str, method: str, tmp_path: Any) -> None:
    base, model, copied = models(kind, method)
    held = base_activations(base, rows(8), chosen(site))
    term = anchor_term(copied, base, rows(), rows(8), site)
    wanted = step(copied, loss_of(copied, rows()) + WEIGHT * term)
    plain = step(copied, loss_of(copied, rows()))
    anchor = Anchor(chosen(site), WEIGHT, held)
    log = trained(model, [anchor], tmp_path).state.log_history[0]
    assert float(term.detach()) > 0.01
    assert log["anchor"] == pytest.approx(float(term.detach()), rel=1e-5)
    assert log["loss"] == pytest.approx(float(loss_of(copied, rows()).detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.detach(), wanted[name], atol=1e-6, rtol=1e-6)
    assert any((plain[name] - wanted[name]).abs().max() > 1e-3 for name in wanted)
    assert anchor.steps == 1


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_kl_adds_the_gradient_of_its_term(kind: str, method: str, tmp_path: Any) -> None:
    base, model, copied = models(kind, method)
    penalty = KLToBase(TEXTS, WEIGHT, batch_size=len(TEXTS))
    if method == "full":
        penalty.prepare(base)  # as it would have been while the model still was its base
        penalty._model = model
    term = kl_term(copied, base, TEXTS)
    wanted = step(copied, loss_of(copied, rows()) + WEIGHT * term)
    log = trained(model, [penalty], tmp_path).state.log_history[0]
    assert float(term.detach()) > 0.01
    assert log["kl"] == pytest.approx(float(term.detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.detach(), wanted[name], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("accumulation", "recompute"), [(2, False), (1, True), (2, True)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_batch_may_be_run_in_parts_or_recomputed(
    accumulation: int, recompute: bool, method: str, tmp_path: Any
) -> None:
    base, model, copied = models("llama", method)
    same = [ids[:5] for ids in rows() if len(ids) >= 5] * 2  # of one length, so that parts weigh the same in the loss
    same = [[i + 1, *ids[1:]] for i, ids in enumerate(same[:4])]
    size = 4 // accumulation
    kl = KLToBase(TEXTS[:2] * 2, WEIGHT, batch_size=size)
    if method == "full":
        kl.prepare(base)
        kl._model = model
    anchor = Anchor(chosen(), WEIGHT, base_activations(base, same, chosen()))
    texts = TEXTS[:2] * 2
    parts = [kl_term(copied, base, [texts[i] for i in kl._next()]) for _ in range(4 // size)]
    kl._turn = 0
    both = anchor_term(copied, base, same, same, "mlp_mid") + sum(parts) / len(parts)
    wanted = step(copied, loss_of(copied, same) + WEIGHT * both)
    if recompute:
        hf = model.get_base_model() if method == "lora" else model
        getattr(hf, "activation_checkpointing_enable", hf.gradient_checkpointing_enable)()
    parted = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    made = trained(model, [anchor, kl], tmp_path, rows=same, **parted)
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.detach(), wanted[name], atol=1e-6, rtol=1e-6)
    assert made.state.log_history[0]["kl"] == pytest.approx(float(torch.stack(parts).mean().detach()), rel=1e-6)


def hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_nothing_stays_in_the_model_and_evaluation_is_plain(tmp_path: Any) -> None:
    model = decoder()
    before, seen = hooks(model), []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.eval()
            seen.append(model(input_ids=torch.tensor([[3, 4, 5]])).logits.requires_grad)  # a row without activations
            model.train()

    held = base_activations(model, rows(), chosen())
    trained(model, [Anchor(chosen(), 1.0, held), KLToBase(TEXTS), Watch()], tmp_path, max_steps=2)
    assert len(seen) == 2
    assert hooks(model) == before


def test_penalties_leave_frozen_neurons_and_slices_alone(tmp_path: Any) -> None:
    """Modes together: what InhibitFT keeps still has the same bits, and the penalties still matter."""
    for mode in ("freeze", "specific"):
        after = []
        for penalised in (True, False):
            model = decoder()
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            held = replace(chosen(), member=np.roll(chosen().member, 1, axis=1))
            terms = [Anchor(held, 3.0, base_activations(model, rows(), held)), KLToBase(TEXTS)] if penalised else []
            trained(model, [InhibitFT(chosen(), mode), *terms], tmp_path, max_steps=4, max_grad_norm=0.5)
            gate = model.model.layers[0].mlp.gate_proj.weight
            changed = (gate != before["model.layers.0.mlp.gate_proj.weight"]).any(1)
            own = torch.from_numpy(chosen().member[0])
            assert (changed == (own if mode == "specific" else ~own)).all()
            after.append(gate.detach().clone())
        assert not torch.equal(*after)


def test_lora_flags_survive_the_passes_of_base(tmp_path: Any) -> None:
    """PEFT makes all of an adapter train again when it is switched on; what InhibitFT froze must stay frozen."""
    model = lora(decoder())
    inhibit = InhibitFT(chosen(), "specific")
    others = replace(chosen(), member=~chosen().member)
    trained(model, [inhibit, KLToBase(TEXTS), Anchor(others)], tmp_path, max_steps=3)
    attention = model.get_base_model().model.layers[0].self_attn.q_proj
    assert not attention.lora_B["default"].weight.any()
    assert not attention.lora_B["default"].weight.requires_grad
    assert attention.lora_B["default"].weight.grad is None


def test_settings_without_effect_are_refused(tmp_path: Any) -> None:
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="above 0"):
            Anchor(chosen(), weight)
    with pytest.raises(UserError, match="0 texts"):
        KLToBase([])
    held = base_activations(decoder(), rows(), chosen())
    other = replace(chosen(), name="other", member=np.roll(chosen().member, 1, axis=1))
    with pytest.raises(UserError, match="make them for 'other'"):
        Anchor(other, 1.0, held)
    with pytest.raises(UserError, match="no training rows"):
        base_activations(decoder(), [], chosen())
    with pytest.raises(UserError, match="never vary"):
        base_activations(decoder(), [[3, 4]], chosen())
    with pytest.raises(UserError, match="no base activations"):
        trained(decoder(), [Anchor(chosen(), 1.0, held)], tmp_path, rows=rows(8), per_device_train_batch_size=8)
    late = trained(decoder(), [], tmp_path)
    late.add_callback(KLToBase(TEXTS))
    with pytest.raises(UserError, match="has not seen this model"):
        late.train()
    alone = decoder().requires_grad_(False)
    alone.lm_head.requires_grad_(True)
    with pytest.raises(RuntimeError, match="anchor had no effect"):
        trained(alone, [Anchor(chosen(), 1.0, held)], tmp_path)


def test_a_resumed_full_run_says_that_base_is_gone(tmp_path: Any) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_only_model": False}
    trained(decoder(), [Anchor(chosen())], tmp_path, max_steps=2, **settings)
    args = TrainingArguments(str(tmp_path), max_steps=4, report_to="none", use_cpu=True, disable_tqdm=True)
    data = [{"input_ids": ids} for ids in rows()]
    again = Trainer(decoder(), args, data_collator=pad, train_dataset=data, callbacks=[Anchor(chosen())])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="gone once its weights"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
