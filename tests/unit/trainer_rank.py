"""One process of a fine-tune by several, started by accelerate launch: every way to train, with a resume in between.

Writes what its copy of the model looks like before and after each, and what it was refused, to a directory.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from pnlac_fast.anchoring import Anchor
from pnlac_fast.averaging import TailAverage
from pnlac_fast.base_activations import base_activations
from pnlac_fast.divergence import KLToBase
from pnlac_fast.errors import UserError
from pnlac_fast.inhibition import InhibitFT
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.null_space import NullSpace
from pnlac_fast.references import Reference

LAYERS, WIDTH, WORDS = 2, 24, 32
WAYS = [("freeze", "full"), ("specific", "full"), ("freeze", "lora")]
STEPS, ROWS, PARTS = 4, 2, 2  # steps, rows of a pass of one process, passes of one step
TEXTS = [Reference((5, 6, 7, 8), 2), Reference((9, 3, 11, 4, 5, 6), 3), Reference((2, 30), 1), Reference((7, 8, 9), 1)]


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


def rows() -> list[list[int]]:
    """Of one length, so that parts of a batch weigh the same whoever runs them."""
    return np.random.default_rng(0).integers(3, WORDS, (32, 7)).tolist()


def chosen(shift: int = 0) -> NeuronSet:
    member = np.zeros((LAYERS, WIDTH), bool)
    member[0, [0, 3, 7]] = True
    member[-1, [1, 3]] = True
    return NeuronSet("some", "general", np.roll(member, shift, axis=1))


def callbacks(model: Any, mode: str) -> list[Any]:
    """Fresh ones for a model that has not been trained yet: one of each kind."""
    full = not hasattr(model, "peft_config")  # then base is gone when the run is resumed
    held = base_activations(model, rows(), chosen(1)) if full else None
    space = [NullSpace(TEXTS, 0.5), TailAverage(2)] if mode == "specific" else []
    return [InhibitFT(chosen(), mode), Anchor(chosen(1), 2.0, held), KLToBase(TEXTS, 0.5, batch_size=2), *space]


def trainer(model: Any, given: list[Any], folder: Path, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": PARTS,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_backend": "gloo" if "RANK" in os.environ else None,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "seed": 3,
    }
    args = TrainingArguments(str(folder), **settings | changes)
    data: Any = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)} for ids in rows()]
    made = Trainer(model, args, train_dataset=data, callbacks=given)
    made.remove_callback(PrinterCallback)
    return made


def weights(model: Any) -> dict[str, Tensor]:
    """Weights as they would be used: with LoRA, merged into the base model's."""
    hf = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return {name: p.detach().clone() for name, p in hf.named_parameters()}


def train(mode: str, method: str, folder: Path, **changes: Any) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The weights after a fine-tune, and the Trainer's log."""
    resume, count = changes.pop("resume", None), changes.pop("callbacks", None)
    model = decoder() if method == "full" else lora(decoder())
    made = trainer(model, callbacks(model, mode)[:count], folder, **changes)
    made.train(resume_from_checkpoint=resume)
    return weights(model), made.state.log_history


def main(out: Path) -> None:
    torch.set_num_threads(1)
    rank, said = int(os.environ["RANK"]), {}
    for mode, method in WAYS:
        folder = out / f"{mode}-{method}"
        after, log = train(mode, method, folder, save_strategy="steps", save_steps=STEPS // 2)
        checkpoint = str(folder / f"checkpoint-{STEPS // 2}")
        again, _ = train(mode, method, folder / "again", resume=checkpoint)
        torch.save({"after": after, "again": again, "log": log}, out / f"{mode}-{method}-{rank}.pt")
    made = trainer(decoder(), [InhibitFT(chosen(), "specific")], out / "twice", max_steps=1)
    made.train()
    try:
        made.train()
    except UserError as error:
        said["twice"] = str(error)
    sharded = decoder()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    try:
        arguments = trainer(decoder(), [], out / "sharded").args
        Anchor(chosen()).on_train_begin(arguments, TrainerState(), None, model=sharded, train_dataloader=None)
    except UserError as error:
        said["sharded"] = str(error)
    (out / f"said-{rank}.json").write_text(json.dumps(said))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
