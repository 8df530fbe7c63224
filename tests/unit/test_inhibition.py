"""InhibitFT as a user of transformers.Trainer meets it: what must not move has the same bits afterwards."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from pnlac_fast.errors import UserError
from pnlac_fast.inhibition import InhibitFT
from pnlac_fast.masks import find_masks
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.optimizers import mask_step

LAYERS, WIDTH, HIDDEN = 2, 24, 16
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _fast() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # each Trainer collects garbage, which otherwise takes longer than the training
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def decoder(kind: str = "llama") -> Any:
    """Random weights; the Llama has biases in its MLP, the Qwen2 in its attention."""
    shape: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model: Any
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape, mlp_bias=True, tie_word_embeddings=True))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def lora(model: Any, targets: list[str] | str = "all-linear", **settings: Any) -> Any:
    torch.manual_seed(1)
    with warnings.catch_warnings():  # peft reads a name that transformers has deprecated
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        return get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **settings))


def chosen(site: str = "mlp_mid", layers: int = LAYERS) -> NeuronSet:
    member = np.zeros((layers, WIDTH if site == "mlp_mid" else HIDDEN), bool)
    member[0, [0, 3, 7]] = True
    member[-1, [1, 3]] = True
    return NeuronSet("some", "general", member, site=site)


def rows() -> list[dict[str, list[int]]]:
    ids = np.random.default_rng(0).integers(0, 32, (32, 8)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model: Any, callbacks: list[TrainerCallback], folder: Any, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.1,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    data = {"train_dataset": rows(), "eval_dataset": changes.pop("eval_dataset", None)}
    made = Trainer(model, TrainingArguments(str(folder), **settings | changes), callbacks=callbacks, **data)
    made.remove_callback(PrinterCallback)
    return made


def weights(model: Any) -> dict[str, Tensor]:
    """Weights as they would be used: with LoRA, merged into the base model's."""
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def belongs(name: str, shape: torch.Size, neurons: NeuronSet) -> Tensor:
    """Which entries of a parameter are the chosen neurons' own, bool, worked out from the parameter's name alone."""
    mine = torch.zeros(shape, dtype=torch.bool)
    if ".mlp." not in name:
        return mine
    rows_ = torch.from_numpy(neurons.member[int(name.split("layers.")[1].split(".")[0])])
    if neurons.site == "mlp_mid" and ("gate_proj" in name or "up_proj" in name):
        mine[rows_] = True
    elif neurons.site == "mlp_mid" and name.endswith("down_proj.weight"):
        mine[:, rows_] = True
    elif neurons.site == "mlp_out" and "down_proj" in name:
        mine[rows_] = True
    return mine


def changes(before: dict[str, Tensor], after: dict[str, Tensor], neurons: NeuronSet) -> tuple[float, float]:
    """Shares of entries whose bits differ, of those that belong to the neurons and of all others."""
    counts = {True: [0, 0], False: [0, 0]}
    for name, old in before.items():
        mine, moved = belongs(name, old.shape, neurons), old.ne(after[name])
        for own in (True, False):
            counts[own][0] += int(moved[mine == own].sum())
            counts[own][1] += int((mine == own).sum())
    return counts[True][0] / counts[True][1], counts[False][0] / counts[False][1]


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


@pytest.mark.parametrize("mode", ["freeze", "specific"])
def test_a_checkpoint_of_a_run_without_inhibition_is_refused(mode: str, tmp_path: Any) -> None:
    trainer(decoder(), [], tmp_path, save_strategy="steps", save_steps=3).train()
    made = trainer(decoder(), [InhibitFT(chosen(), mode)], tmp_path)
    with pytest.raises(UserError, match="resume with the same neurons"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


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


def frozen_mlp() -> Any:
    model = decoder()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." not in name)
    return model


def tied_layers() -> Any:
    model = decoder()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


def trained_adapter() -> Any:
    model = lora(decoder())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    return model


def frozen_factor() -> Any:
    model = lora(decoder())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "neurons", "mode", "message"),
    [
        (
            lambda: lora(decoder(), ["q_proj", "v_proj"]),
            chosen(),
            "freeze",
            "LoRA on q_proj and v_proj only leaves noth",
        ),
        (frozen_mlp, chosen(), "freeze", "set requires_grad on gate_proj"),
        (tied_layers, chosen(), "freeze", "one shared parameter"),
        (trained_adapter, chosen(), "freeze", "start from a fresh LoRA"),
        (frozen_factor, chosen(), "freeze", "A of a down_proj LoRA is frozen"),
        (lambda: lora(decoder(), use_dora=True), chosen(), "freeze", "LoRA variant Dora"),
        (
            lambda: lora(decoder(), MLP, layers_to_transform=[1]),
            chosen(),
            "specific",
            "Nothing trains in the MLP of lay",
        ),
        (decoder, NeuronSet("r", "general", np.ones((LAYERS, HIDDEN), bool), site="resid"), "freeze", "no weights of"),
        (decoder, chosen(layers=3), "freeze", "locate them again"),
        (decoder, NeuronSet("e", "general", np.zeros((LAYERS, WIDTH), bool)), "freeze", "is empty"),
        (decoder, chosen(), "frozen", "Did you mean 'freeze'"),
    ],
)
def test_what_cannot_be_exact_is_refused(
    model: Any, neurons: NeuronSet, mode: str, message: str, tmp_path: Any
) -> None:
    with pytest.raises(UserError, match=message):
        trainer(model(), [InhibitFT(neurons, mode)], tmp_path)


def test_a_callback_added_too_late_says_so(tmp_path: Any) -> None:
    late = trainer(decoder(), [], tmp_path)
    late.add_callback(InhibitFT(chosen(), "specific"))
    with pytest.raises(UserError, match="callbacks="):
        late.train()


def test_parameters_that_are_set_to_train_later_are_refused(tmp_path: Any) -> None:
    model = decoder()
    made = trainer(model, [InhibitFT(chosen(), "specific")], tmp_path)
    model.requires_grad_(True)
    with pytest.raises(UserError, match="do not change requires_grad"):
        made.train()


@pytest.mark.parametrize("mode", ["freeze", "specific"])
def test_an_optimizer_without_the_masked_weights_is_refused(mode: str, tmp_path: Any) -> None:
    model = decoder()
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    optimizer = torch.optim.SGD([model.model.embed_tokens.weight], lr=0.1)
    made = Trainer(
        model,
        arguments,
        train_dataset=rows(),
        callbacks=[InhibitFT(chosen(), mode)],
        optimizers=(optimizer, None),
    )
    with pytest.raises(UserError, match="The optimizer does not train"):
        made.train()


class Meddle(TrainerCallback):
    def __init__(self, row: int) -> None:
        self.row = row

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.gate_proj.weight[self.row, 0].add_(1e-6)


@pytest.mark.parametrize(("mode", "row"), [("freeze", 3), ("specific", 4)])
def test_weights_that_something_else_moves_are_an_error(mode: str, row: int, tmp_path: Any) -> None:
    with pytest.raises(RuntimeError, match=r"moved.*layers\.0\.mlp\.gate_proj"):
        trainer(decoder(), [InhibitFT(chosen(), mode), Meddle(row)], tmp_path).train()


class Silent(nn.Module):
    """An MLP that passes no gradient on to its weights."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("mode", ["freeze", "specific"])
def test_masks_and_slices_that_no_gradient_reaches_are_an_error(mode: str, tmp_path: Any) -> None:
    model = decoder()
    for block in model.model.layers[: 2 if mode == "freeze" else 1]:
        block.mlp = Silent(block.mlp)
    with pytest.raises(RuntimeError, match="had no effect"):
        trainer(model, [InhibitFT(chosen(), mode)], tmp_path).train()


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
