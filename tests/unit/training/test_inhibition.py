"""InhibitFT as a user of transformers.Trainer meets it: what must not move has the same bits afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inhibited import MLP, WIDTH, changes, chosen, decoder, lora, rows, trainer, weights
from transformers import (
    LlamaForCausalLM,
    TrainerCallback,
)

from pnlac_fast.inhibition import InhibitFT
from pnlac_fast.masks import find_masks
from pnlac_fast.optimizers import mask_step


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("mode", ["freeze", "specific"])
@pytest.mark.parametrize("site", ["mlp_mid", "mlp_out"])
def test_only_what_may_move_moves(kind: str, tuning: str, mode: str, site: str, tmp_path: Any) -> None:
    base, neurons = decoder(kind), chosen(site)
    before = weights(base)
    model = lora(base) if tuning == "lora" else base
    callback = InhibitFT(neurons, mode)
    trainer(model, [callback], tmp_path).train()
    own, others = changes(before, weights(model), neurons)
    assert callback.steps == 6
    if mode == "freeze":
        assert own == 0
        assert others > (0.9 if tuning == "full" else 0.5)
    else:
        assert others == 0
        assert own > (0.9 if tuning == "full" or kind == "qwen2" else 0.5)  # LoRA leaves the Llama's MLP biases


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_any_optimizer(optimizer: str, clip: float, tmp_path: Any) -> None:
    model, neurons = decoder(), chosen()
    before = weights(model)
    options = {"optim_args": "momentum=0.9"} if optimizer == "sgd" else {}
    callback = InhibitFT(neurons)
    trainer(model, [callback], tmp_path, optim=optimizer, max_grad_norm=clip, **options).train()
    own, others = changes(before, weights(model), neurons)
    assert own == 0
    assert others > 0.9
    assert (callback._step is None) == (optimizer == "adafactor")  # the others skip what is masked
    assert callback.steps == 6


def test_clipping_measures_no_inhibited_gradient(tmp_path: Any) -> None:
    """The norm that the Trainer logs is that of a model whose inhibited rows get no gradient."""
    norms = []
    for inhibited in (True, False):
        model = decoder()
        entries = find_masks(model, chosen()).entries
        callbacks: list[TrainerCallback] = [InhibitFT(chosen())] if inhibited else []
        made = trainer(model, callbacks, tmp_path, max_steps=1, logging_strategy="steps", logging_steps=1)
        if not inhibited:
            for mask in entries:
                mask.parameter.register_post_accumulate_grad_hook(mask.zero_gradient)
        made.train()
        norms.append(made.state.log_history[0]["grad_norm"])
    assert norms[0] == norms[1] > 0


def test_a_loop_of_ones_own_freezes_neurons_by_a_masked_optimizer() -> None:
    model, neurons = decoder(), chosen()
    before = weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    mask_step(optimizer, [mask.on_step(0.0) for mask in find_masks(model, neurons).entries])
    ids = torch.tensor([row["input_ids"] for row in rows()])
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    own, others = changes(before, weights(model), neurons)
    assert own == 0
    assert others > 0.9


def test_the_check_fails_where_gradients_alone_are_zeroed(tmp_path: Any) -> None:
    model, neurons = decoder(), chosen()
    before = weights(model)
    for mask in find_masks(model, neurons).entries:
        mask.parameter.register_post_accumulate_grad_hook(mask.zero_gradient)
    trainer(model, [], tmp_path).train()
    assert changes(before, weights(model), neurons)[0] > 0.5


class Watch(TrainerCallback):
    """Looks at gradients and weights of inhibited entries at every step."""

    def __init__(self, inhibition: InhibitFT) -> None:
        self.inhibition, self.seen = inhibition, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.inhibition.masks is not None
        for mask in self.inhibition.masks.entries:
            assert mask.parameter.grad is not None
            assert not mask.parameter.grad.index_select(mask.dim, mask.still).any()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert not self.inhibition._moved()
        self.seen += 1


def test_gradients_and_moments_of_inhibited_entries_are_zero_at_every_step(tmp_path: Any) -> None:
    callback = InhibitFT(chosen())
    made = trainer(decoder(), [callback, watch := Watch(callback)], tmp_path)
    made.train()
    assert watch.seen == 6
    assert callback.masks is not None
    optimizer: Any = made.optimizer
    for mask in callback.masks.entries:
        for moment in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[mask.parameter][moment]
            assert not state.index_select(mask.dim, mask.still).any()
            assert state.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype, tmp_path: Any) -> None:
    model, neurons = decoder().to(dtype), chosen()
    before = weights(model)
    trainer(model, [InhibitFT(neurons)], tmp_path, optim="sgd", max_grad_norm=1.0).train()
    own, others = changes(before, weights(model), neurons)
    assert own == 0
    assert others > 0.1


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_activation_checkpointing_gives_the_same_bits(tuning: str, tmp_path: Any) -> None:
    found = []
    for checkpointing in (False, True):
        model: Any = lora(decoder()) if tuning == "lora" else decoder()
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable() if tuning == "lora" else (
                model.activation_checkpointing_enable()
            )
        trainer(model, [InhibitFT(chosen(), "specific")], tmp_path).train()
        found.append(weights(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("mode", ["freeze", "specific"])
def test_resuming_gives_the_bits_of_the_uninterrupted_run(mode: str, tuning: str, tmp_path: Any) -> None:
    neurons = chosen()

    def fresh() -> Any:
        return lora(decoder(), lora_dropout=0.2) if tuning == "lora" else decoder()

    before = weights(fresh())
    whole = fresh()
    trainer(whole, [InhibitFT(neurons, mode)], tmp_path, save_strategy="steps", save_steps=3).train()
    resumed = fresh()
    again = trainer(resumed, [InhibitFT(neurons, mode)], tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert changes(before, other, neurons)[mode == "specific"] == 0
    if tuning == "full":  # a checkpoint on the way is an ordinary one
        assert one.keys() == other.keys() == before.keys()
        loaded = weights(LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-6"))
        assert all(torch.equal(one[name], loaded[name]) for name in one)


def test_the_best_checkpoint_comes_back_into_the_slices(tmp_path: Any) -> None:
    model, neurons = decoder(), chosen()
    before = weights(model)
    made = trainer(
        model,
        [InhibitFT(neurons, "specific")],
        tmp_path,
        greater_is_better=True,  # the highest loss, the first checkpoint
        **{"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2},
        load_best_model_at_end=True,
        eval_dataset=rows(),
    )
    made.train()
    assert made.state.best_global_step == 2
    best = weights(LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2"))
    after = weights(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], best[name]) for name in after)
    assert changes(before, after, neurons)[1] == 0


def test_lora_delta_is_exactly_zero_and_down_columns_start_at_zero(tmp_path: Any) -> None:
    neurons = chosen()
    model = lora(decoder(), MLP, lora_bias=True)
    callback = InhibitFT(neurons)
    made = trainer(model, [callback], tmp_path)
    down = model.get_base_model().model.layers[0].mlp.down_proj
    assert not down.lora_A["default"].weight[:, neurons.layer(0)].any()
    made.train()
    gate = model.get_base_model().model.layers[0].mlp.gate_proj
    assert not gate.get_delta_weight("default")[neurons.layer(0)].any()
    assert not gate.lora_B["default"].bias[neurons.layer(0)].any()
    assert not down.get_delta_weight("default")[:, neurons.layer(0)].any()
    assert gate.get_delta_weight("default").any(1).sum() == WIDTH - 3
    assert down.get_delta_weight("default").any(0).sum() == WIDTH - 3


def test_what_is_covered_is_said() -> None:
    assert find_masks(decoder(), chosen()).covered == {"gate_proj": 2, "up_proj": 2, "down_proj": 2}
    assert find_masks(lora(decoder(), ["down_proj"]), chosen()).covered == {"down_proj": 2}
    assert find_masks(lora(decoder(), MLP, layers_to_transform=[1]), chosen()).covered == dict.fromkeys(MLP, 1)


def test_partly_covered_mlp_is_exact(tmp_path: Any) -> None:
    model, neurons = lora(decoder(), ["q_proj", "down_proj"]), chosen()
    before = weights(model)
    trainer(model, [InhibitFT(neurons)], tmp_path).train()
    own, others = changes(before, weights(model), neurons)
    assert own == 0
    assert others > 0.1


def test_specific_trains_nothing_else() -> None:
    model = lora(decoder())
    callback = InhibitFT(chosen(), "specific")
    callback.prepare(model)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains
    assert all(".mlp." in name and ".lora_" in name for name in trains)


@pytest.mark.parametrize("mode", ["freeze", "specific"])
def test_train_may_be_called_again_and_leaves_no_hooks(mode: str, tmp_path: Any) -> None:
    model, neurons = decoder(), chosen()
    before = weights(model)
    callback = InhibitFT(neurons, mode)
    made = trainer(model, [callback], tmp_path)
    made.train()
    once = weights(model)
    made.train()
    own, others = changes(before, weights(model), neurons)
    assert (own if mode == "freeze" else others) == 0
    assert changes(once, weights(model), neurons)[mode == "freeze"] > 0.9
    assert not callback._hooks
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    optimizer: Any = made.optimizer
    assert not optimizer.optimizer._optimizer_step_pre_hooks
    assert not optimizer.optimizer._optimizer_step_post_hooks
