"""Terms of anchoring and KL as written down, one text at a time, and a Trainer that takes a step with them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
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
from pnlac_fast.references import Reference

LAYERS, WIDTH, HIDDEN, WORDS = 2, 24, 16, 32
RATE, WEIGHT = 0.05, 0.7


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
