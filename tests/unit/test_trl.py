"""The callbacks in TRL's SFTTrainer, which computes its loss by itself: the same fine-tune as in the plain Trainer."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from pnlac_fast.anchoring import Anchor
from pnlac_fast.averaging import TailAverage
from pnlac_fast.base_activations import base_activations
from pnlac_fast.divergence import KLToBase
from pnlac_fast.inhibition import InhibitFT
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.null_space import NullSpace
from pnlac_fast.references import Reference

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets", reason="datasets, which SFTTrainer needs, is not installed")

LAYERS, WIDTH, WORDS = 2, 24, 32
TEXTS = [Reference((5, 6, 7, 8), 2), Reference((9, 3, 11, 4, 5, 6), 3), Reference((2, 30), 1)]


@pytest.fixture(autouse=True)
def _fast() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def decoder() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": WIDTH, "pad_token_id": 0}
    heads = {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, initializer_range=0.3, bos_token_id=1, eos_token_id=2))


def lora(model: Any) -> Any:
    torch.manual_seed(1)
    with warnings.catch_warnings():  # peft reads a name that transformers has deprecated
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def words() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, WORDS)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def rows() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(3, WORDS, 4 + i % 5).tolist() for i in range(16)]


def chosen(shift: int = 0) -> NeuronSet:
    member = np.zeros((LAYERS, WIDTH), bool)
    member[0, [0, 3, 7]] = True
    member[1, [1, 3]] = True
    return NeuronSet("some", "general", np.roll(member, shift, axis=1))


def pad(parts: list[Any]) -> dict[str, Tensor]:
    longest = max(len(part["input_ids"]) for part in parts)
    ids = torch.tensor([part["input_ids"] + [0] * (longest - len(part["input_ids"])) for part in parts])
    mask = torch.tensor([[1] * len(p["input_ids"]) + [0] * (longest - len(p["input_ids"])) for p in parts])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def settings(**changes: Any) -> dict[str, Any]:
    fixed: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "save_strategy": "no",
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return fixed | changes


def plain_trainer(model: Any, callbacks: list[Any], folder: Path, **changes: Any) -> Any:
    args = TrainingArguments(str(folder), remove_unused_columns=False, **settings(**changes))
    data = [{"input_ids": ids} for ids in rows()]
    return Trainer(model, args, data_collator=pad, train_dataset=data, callbacks=callbacks)  # type: ignore[arg-type]


def sft_trainer(model: Any, callbacks: list[Any], folder: Path, **changes: Any) -> Any:
    args = trl.SFTConfig(str(folder), packing=False, activation_checkpointing=False, **settings(**changes))
    data = datasets.Dataset.from_dict({"input_ids": rows()})
    return trl.SFTTrainer(model, args, train_dataset=data, processing_class=words(), callbacks=callbacks)


def callbacks(model: Any, mode: str) -> list[Any]:
    """Fresh ones for a model that has not been trained yet."""
    found: list[Any] = [InhibitFT(chosen(), mode)] if mode in ("freeze", "specific") else []
    held = base_activations(model, rows(), chosen(1))
    space = [NullSpace(TEXTS), TailAverage(2)] if mode == "specific" else []
    return [*found, *space, Anchor(chosen(1), 2.0, held), KLToBase(TEXTS, 0.5, batch_size=2)]


def run(made: Any, resume: str | None = None) -> dict[str, Tensor]:
    made.remove_callback(PrinterCallback)
    made.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("mode", ["freeze", "specific", "anchor"])
def test_sft_trainer_does_what_the_trainer_does(mode: str, method: str, tmp_path: Path) -> None:
    """With accumulation, clipping and decay; in two parts with a resume in between."""
    one = decoder() if method == "full" else lora(decoder())
    before = {name: p.detach().clone() for name, p in one.named_parameters()}
    again, third = copy.deepcopy(one), copy.deepcopy(one)
    wanted = run(plain_trainer(one, callbacks(one, mode), tmp_path / "plain"))
    made = sft_trainer(again, callbacks(again, mode), tmp_path / "sft", save_strategy="steps", save_steps=3)
    found = run(made)
    assert {"anchor", "kl"} <= made.state.log_history[0].keys()
    resumed = sft_trainer(third, callbacks(third, mode), tmp_path / "third")
    continued = run(resumed, str(tmp_path / "sft" / "checkpoint-3"))
    moved = [name for name in wanted if not torch.equal(wanted[name], before[name])]
    assert moved
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-4)
        assert torch.equal(continued[name], found[name]), name
        if name not in moved:
            assert torch.equal(found[name], before[name])
    if method == "full" and mode in ("freeze", "specific"):
        gate = "model.layers.0.mlp.gate_proj.weight"
        own = torch.from_numpy(chosen().member[0])
        assert ((found[gate] != before[gate]).any(1) == (own if mode == "specific" else ~own)).all()
