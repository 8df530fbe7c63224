"""Anchoring and KL to base: their gradient is that of the term as written down, in any trainer, and nothing stays."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from pnlac_fast.adapters import Weights
from pnlac_fast.anchoring import Anchor
from pnlac_fast.base_activations import BaseActivations, base_activations, stored_activations
from pnlac_fast.caching import cache
from pnlac_fast.completions import encode_rows
from pnlac_fast.datasets import Question
from pnlac_fast.divergence import KLToBase, Reference, references
from pnlac_fast.errors import UserError
from pnlac_fast.inhibition import InhibitFT
from pnlac_fast.loading import load_model
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.training import finetune

LAYERS, WIDTH, HIDDEN, WORDS = 2, 24, 16, 32
RATE, WEIGHT = 0.05, 0.7


@pytest.fixture(autouse=True)
def _fast() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # each Trainer collects garbage, which otherwise takes longer than the training
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def decoder(kind: str = "llama", seed: int = 0) -> Any:
    shape: dict[str, Any] = {
        "vocab_size": WORDS,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    made: Any = LlamaForCausalLM(LlamaConfig(**shape)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**shape))
    return made.double()


def lora(model: Any, **settings: Any) -> Any:
    torch.manual_seed(1)
    with warnings.catch_warnings():  # peft reads a name that transformers has deprecated
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings))
    return peft.double()


def moved(model: Any) -> Any:
    """The same model after some training, so that the penalties are not zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not isinstance(model, PeftModel) or "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def chosen(site: str = "mlp_mid") -> NeuronSet:
    member = np.zeros((LAYERS, WIDTH if site == "mlp_mid" else HIDDEN), bool)
    member[0, [0, 3, 7]] = True
    member[-1, [1, 3]] = True
    return NeuronSet("some", "general", member, site=site)


def rows(n: int = 4) -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(1, WORDS, length).tolist() for length in [7, 5, 9, 4, 6, 8, 7, 3][:n]]


def pad(parts: list[Any]) -> dict[str, Tensor]:
    ids = [part["input_ids"] for part in parts]
    longest = max(map(len, ids))
    padded = torch.tensor([[*i, *[0] * (longest - len(i))] for i in ids])
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids])
    return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}


def trained(model: Any, callbacks: list[TrainerCallback], folder: Any, **changes: Any) -> Trainer:
    """One plain step of gradient descent on all rows, in the order given."""
    settings: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    data = [{"input_ids": ids} for ids in changes.pop("rows", rows())]
    args = TrainingArguments(str(folder), **settings | changes)
    made = Trainer(model, args, data_collator=pad, train_dataset=data, callbacks=callbacks)  # type: ignore[arg-type]
    made.remove_callback(PrinterCallback)
    made.train()
    return made


def activations(model: Any, ids: list[int], site: str) -> Tensor:
    """Activations of one row by itself, [position, chosen], by plain hooks."""
    hf = model.get_base_model() if isinstance(model, PeftModel) else model
    neurons, found, hooks = chosen(site), [], []
    for layer, block in enumerate(hf.model.layers):
        index = neurons.layer(layer)
        if site == "mlp_mid":
            hook = block.mlp.down_proj.register_forward_pre_hook(lambda _, a, i=index: found.append(a[0][0][:, i]))
        else:
            hook = block.register_forward_hook(
                lambda _, a, out, i=index: found.append((out[0] if isinstance(out, tuple) else out)[0][:, i])
            )
        hooks.append(hook)
    hf.model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return torch.cat(found, -1)


def anchor_term(model: Any, base: Any, batch: list[list[int]], every: list[list[int]], site: str) -> Tensor:
    """Mean over tokens, but the last of a row, of the squared change over the base's standard deviation on all rows."""
    with torch.no_grad():
        std = torch.cat([activations(base, ids[:-1], site) for ids in every]).std(0, correction=0)
        before = torch.cat([activations(base, ids[:-1], site) for ids in batch])
    return (((torch.cat([activations(model, ids[:-1], site) for ids in batch]) - before) / std) ** 2).mean()


def kl_term(model: Any, base: Any, texts: list[Reference]) -> Tensor:
    """Mean over counted tokens of KL(base || model), text by text."""
    terms = []
    for ids, first in texts:
        q = model(input_ids=torch.tensor([list(ids)])).logits[0, first - 1 : -1].log_softmax(-1)
        with torch.no_grad():
            p = base(input_ids=torch.tensor([list(ids)])).logits[0, first - 1 : -1].log_softmax(-1)
        terms.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(terms).mean()


def step(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Parameters after a step of gradient descent."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: (p if g is None else p - RATE * g).detach() for (name, p), g in zip(named.items(), gradients, strict=True)
    }


def loss_of(model: Any, batch: list[list[int]]) -> Tensor:
    return model(**pad([{"input_ids": ids} for ids in batch])).loss


def models(kind: str, method: str) -> tuple[Any, Any, Any]:
    """A base, what has been tuned from it, and a copy of the latter to work the answer out with."""
    base = decoder(kind)
    tuned = moved(lora(copy.deepcopy(base)) if method == "lora" else copy.deepcopy(base))
    return base, tuned, copy.deepcopy(tuned)


TEXTS = [Reference((5, 6, 7, 8), 2), Reference((9, 3, 11, 4, 5, 6), 3), Reference((2, 30), 1)]


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


@pytest.mark.parametrize("batch_tokens", [9, 20, 4096])
def test_base_activations_are_those_of_each_row_alone(batch_tokens: int) -> None:
    model = decoder()
    model.train()
    held = base_activations(model, [*rows(), rows()[1]], chosen(), batch_tokens=batch_tokens)
    assert model.training
    assert len(held.values) == sum(len(ids) - 1 for ids in rows())
    for ids in rows():
        batch = torch.tensor([ids])
        mine = held.values[held.places(batch, torch.ones_like(batch))[0, :-1]]
        torch.testing.assert_close(mine, activations(model, ids[:-1], "mlp_mid").detach())
    everything = torch.cat([activations(model, ids[:-1], "mlp_mid") for ids in rows()]).detach()
    torch.testing.assert_close(held.std.double(), everything.std(0, correction=0), atol=1e-6, rtol=1e-6)


def test_places_know_either_padding(tmp_path: Any) -> None:
    held = base_activations(decoder(), rows(), chosen())
    ids = torch.tensor([[0, 0, *rows()[0]], [*rows()[1], 0, 0, 0, 0]])
    mask = torch.tensor([[0, 0] + [1] * 7, [1] * 5 + [0] * 4])
    assert held.places(ids, mask).tolist() == [[-1, -1, *range(6), -1], [*range(6, 10), *[-1] * 5]]


@pytest.mark.parametrize("chosen_only", [True, False])
def test_a_store_holds_what_the_model_would_give(
    chosen_only: bool, model_paths: dict[str, Any], questions: Any, tmp_path: Any
) -> None:
    """Read from a store or with the model, the fine-tune is the same."""
    questions = [q for q in questions if q.topic == "race"]
    base = load_model(model_paths["llama"], dtype="float32", device="cpu")
    member = np.zeros((3, 48), bool)
    member[0, [2, 9]] = member[2, [0, 40, 47]] = True
    neurons = NeuronSet("some", "general", member, base=base.origin)
    raw: dict[str, Any] = {"raw": "full", "tokens": ("all",), "side": "right", "progress": False}
    if chosen_only:
        raw["raw_neurons"] = [neurons]
    cache(base, {"tuned": model_paths["llama_tuned"]}, questions, tmp_path / "run.zarr", **raw)
    ids = [ids for ids, _ in encode_rows(base, questions, "right", "{instruction}")]
    mine, stored = base_activations(base, ids, neurons), stored_activations(tmp_path / "run.zarr", neurons)
    assert mine.starts.keys() == stored.starts.keys()
    for key, start in mine.starts.items():
        at, size = stored.starts[key], len(key) // 8
        torch.testing.assert_close(stored.values[at : at + size], mine.values[start : start + size])
    torch.testing.assert_close(stored.std, mine.std)
    settings: dict[str, Any] = {"method": "full", "steps": 3, "learning_rate": 3e-3, "inhibit_mode": "anchor"}
    one, other = (
        finetune(base, questions, "race", "right", inhibit=neurons, anchor_store=store, **settings)
        for store in (None, tmp_path / "run.zarr")
    )
    for a, b in zip(one.model.hf.parameters(), other.model.hf.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert one.record["anchor"][-1][1] == pytest.approx(other.record["anchor"][-1][1], rel=1e-2)
    with pytest.raises(UserError, match="no base activations"):
        finetune(base, questions, "race", "left", inhibit=neurons, anchor_store=tmp_path / "run.zarr", **settings)
    with pytest.raises(UserError, match="another base model"):
        stored_activations(tmp_path / "run.zarr", replace(neurons, base={"sha256": "0" * 64}))
    if chosen_only:
        more = replace(neurons, member=np.roll(member, 1, axis=1))
        with pytest.raises(UserError, match="keeps not all neurons"):
            stored_activations(tmp_path / "run.zarr", more)


def test_adapters_are_off_while_base_is_read() -> None:
    base, tuned, _ = models("llama", "lora")
    one, other = (base_activations(model, rows(), chosen()) for model in (base, tuned))
    torch.testing.assert_close(one.values, other.values)
    torch.testing.assert_close(one.std, other.std)


def test_base_is_read_from_the_data_where_it_is_not_given(tmp_path: Any) -> None:
    made = []
    for given in (True, False):
        model = decoder()
        held = base_activations(model, rows(), chosen()) if given else None
        trained(model, [anchor := Anchor(chosen(), 1.0, held)], tmp_path, max_steps=3)
        made.append(dict(model.named_parameters()))
        assert isinstance(anchor.base, BaseActivations)
    assert all(torch.allclose(made[0][name], made[1][name], atol=1e-12) for name in made[0])


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


def words() -> PreTrainedTokenizerFast:
    """A tokenizer whose word "w05" is 5."""
    inner = Tokenizer(tokenizer_models.WordLevel({f"w{i:02}": i for i in range(WORDS)}, unk_token="w00"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w00", eos_token="w02", unk_token="w00")


def test_references_are_prompts_or_answers_of_the_base() -> None:
    model = Model(Weights(decoder().float()), words(), "words", {})
    asked = [Question("race", "w05 w06 w07"), Question("race", "w08 w09")]
    assert references(model, asked, on="prompts", template="w03 {instruction}") == [
        Reference((3, 5, 6, 7), 1),
        Reference((3, 8, 9), 1),
    ]
    one, again, other = (references(model, asked, max_new_tokens=5, seed=seed) for seed in (0, 0, 1))
    assert one == again != other
    for text, question in zip(one, asked, strict=True):
        prompt = [int(word[1:]) for word in question.instruction.split()]
        assert list(text.ids[: text.first]) == prompt
        assert text.ids[-1] == 2
        assert len(text.ids) <= len(prompt) + 6
    with pytest.raises(UserError, match="Did you mean 'answers'"):
        references(model, asked, on="answer")
    with pytest.raises(UserError, match="no questions"):
        references(model, [])


def test_texts_come_in_turn_and_a_resumed_run_goes_on_with_the_next() -> None:
    penalty = KLToBase([Reference((i, i + 1), 1) for i in range(5)], batch_size=2)
    turns = [penalty._next() for _ in range(5)]
    assert sorted(i for turn in turns for i in turn) == sorted([*range(5)] * 2)
    penalty._turn = 3
    assert penalty._next() == turns[3]


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
