"""A small decoder in a Trainer, and which of its weights moved: those of the chosen neurons, or others."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
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

from pnlac_fast.neurons import NeuronSet

LAYERS, WIDTH, HIDDEN = 2, 24, 16
MLP = ["gate_proj", "up_proj", "down_proj"]


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
