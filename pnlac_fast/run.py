"""One fine-tune while it runs: what trains, as whom it is measured, and where it goes."""

from __future__ import annotations

import copy
import gc
import math
import os
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from pnlac_fast.adapters import Weights
from pnlac_fast.completions import collate
from pnlac_fast.errors import Interrupted, UserError
from pnlac_fast.loading import FINETUNE_FILE, SLICES_FILE, weights_sha256
from pnlac_fast.models import Model
from pnlac_fast.penalties import Penalty
from pnlac_fast.slice_file import save_slices
from pnlac_fast.slices import Slices
from pnlac_fast.trajectory import TRAJECTORY_FILE
from pnlac_fast.workplace import CHECKPOINTS, last_checkpoint, write_json


class Run:
    """One fine-tune: what trains, as whom it is measured, and where it goes."""

    def __init__(self, base: Model, keep: bool, settings: Mapping[str, Any], work: Path) -> None:
        self.base, self.settings, self.work = base, settings, work
        lora = settings.get("lora")
        self.hf = _copy(base.hf, share=lora is not None) if keep else base.hf
        self.use_cache = self.hf.config.use_cache
        weights = Weights(self.hf, last_projection=base.weights.last_projection)
        self.view = Model(weights, base.tokenizer, base.name, base.origin)
        self.dtypes = {name: p.dtype for name, p in self.hf.named_parameters()}
        self.module: nn.Module = self.hf
        if lora is None:
            self.hf.requires_grad_(True)
            self._cast({name: torch.promote_types(dtype, torch.float32) for name, dtype in self.dtypes.items()})
        else:
            self.module = _with_lora(self.hf, lora, settings["seed"])

    def _cast(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """Parameters only: buffers such as rotary frequencies have their own precision."""
        for name, parameter in self.hf.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])

    def train_only(self, parts: Sequence[str]) -> None:
        """Freeze all parameters but those of modules whose path ends in, or goes through, one of ``parts``."""
        for name, parameter in self.hf.named_parameters():
            parameter.requires_grad_(any(f".{part}." in name for part in parts))

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass, which needs less memory."""
        enable = getattr(self.hf, "activation_checkpointing_enable", None) or self.hf.gradient_checkpointing_enable
        enable()

    def train(
        self, rows: list[tuple[list[int], int]], callbacks: list[TrainerCallback], save_steps: int | None
    ) -> dict[str, list[list[float]]]:
        """Train; means since the point before of ``loss`` and each penalty, as [step, value] at about ten points."""
        chosen, checkpoints = self.settings, self.work / CHECKPOINTS
        arguments = TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=chosen["steps"],
            learning_rate=chosen["learning_rate"],
            per_device_train_batch_size=chosen["batch_size"] // chosen["accumulation"],
            gradient_accumulation_steps=chosen["accumulation"],
            warmup_steps=chosen["warmup_steps"],
            weight_decay=chosen["weight_decay"],
            max_grad_norm=chosen["max_grad_norm"],
            seed=chosen["seed"],
            lr_scheduler_type="constant_with_warmup",
            optim="adamw_torch_fused",
            logging_steps=max(1, chosen["steps"] // 10),
            logging_nan_inf_filter=False,
            save_strategy="steps" if save_steps else "no",
            save_steps=save_steps or 1,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=self.base.device.type == "cpu",
            dataloader_pin_memory=self.base.device.type != "cpu",
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # data parallelism in one process would split a batch over devices without asking
        trainer = Trainer(self.module, arguments, data_collator=collate, train_dataset=rows, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        resume = last_checkpoint(checkpoints)
        try:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        except KeyboardInterrupt as stop:
            saved = last_checkpoint(checkpoints)
            raise Interrupted(
                f"The fine-tune was stopped at step {trainer.state.global_step} of {chosen['steps']}: the same command "
                + (
                    f"goes on from step {saved.name.rpartition('-')[2]}."
                    if saved
                    else "starts again; with --save-steps it could go on."
                )
            ) from stop
        logged = [h for h in trainer.state.log_history if "loss" in h]
        if logged and not math.isfinite(logged[-1]["loss"]):
            raise UserError(
                f"The loss became {logged[-1]['loss']}: lower the learning rate ({chosen['learning_rate']:g})."
            )
        self.module.zero_grad(set_to_none=True)
        self.module.requires_grad_(False).eval()
        self.hf.config.use_cache = self.use_cache
        if "lora" not in chosen:
            self._cast(self.dtypes)
        terms = ("loss", *(callback.name for callback in callbacks if isinstance(callback, Penalty)))
        return {name: [[h["step"], h[name]] for h in logged] for name in terms}

    def publish(self, out: Path, record: Mapping[str, Any], slices: Slices | None) -> Path:
        """Write the model into the workplace and move it to ``out`` in one step."""
        result = self.work / "result"
        if result.exists():
            shutil.rmtree(result)
        if "lora" in self.settings:
            self.module.save_pretrained(result, save_embedding_layers=False)  # type: ignore[operator]
        else:
            self.hf.save_pretrained(result)
            self.base.tokenizer.save_pretrained(result)
        if slices is not None:
            save_slices(slices, result / SLICES_FILE, base=self.base.origin)
        if (self.work / TRAJECTORY_FILE).exists():
            shutil.copy(self.work / TRAJECTORY_FILE, result)
        write_json(result / FINETUNE_FILE, record)
        if out.exists():
            os.replace(out, self.work / "replaced")
        os.replace(result, out)
        return out

    def result(self, path: Path | None, record: Mapping[str, Any]) -> Model:
        """The tuned model, as :func:`pnlac_fast.loading.load_tuned` would give it."""
        name = str(self.settings["tuned_topic"]) if path is None else path.name
        lora = "lora" in self.settings
        origin: dict[str, Any] = {
            "source": self.base.origin.get("source") if path is None else str(path),
            "sha256": None if path is None else weights_sha256(str(path)),
            "type": "adapter" if lora else self.hf.config.model_type,
        }
        if not lora:
            origin |= {"revision": None, "dtype": str(self.hf.dtype).removeprefix("torch.")}
        origin |= record
        if not lora:
            return Model(self.view.weights, self.base.tokenizer, name, origin)
        last = self.base.weights.last_projection
        weights = Weights(self.hf, self.module, ["default"], "default", last_projection=last)
        weights.switch(None)
        return Model(weights, self.base.tokenizer, name, origin, adapter="default")


def _copy(hf: Any, share: bool) -> Any:
    """A copy of a model; with ``share``, one that has its own modules and flags on the same weights."""
    memo: dict[int, Any] = {}
    for p in hf.parameters() if share else ():
        plain = type(p) is nn.Parameter  # what is quantised is more than its numbers, and trains in no case
        memo[id(p)] = nn.Parameter(p.detach(), requires_grad=False) if plain else p
    return copy.deepcopy(hf, memo)


def _with_lora(hf: Any, settings: Mapping[str, Any], seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            # peft 0.21 reads a name that transformers 5.23 has deprecated, and says what it does for GPT-2 and Mixtral
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
            return get_peft_model(hf, LoraConfig(task_type="CAUSAL_LM", **settings))
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, m in hf.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        what = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"LoRA cannot be put on this model: {what}. Several modules are a list of names; its linear ones are "
            f"{', '.join(sorted(linear))}."
        ) from error


@contextmanager
def contained(device: torch.device) -> Iterator[None]:
    """Keep what the Trainer does to the process inside: it seeds every generator, and draws progress bars."""
    python, legacy, bars = random.getstate(), np.random.get_state(), logging.is_progress_bar_enabled()  # noqa: NPY002
    frozen = gc.get_freeze_count() > 0
    if bars:
        logging.disable_progress_bar()
    if not frozen:
        gc.freeze()  # the Trainer collects garbage as it starts, which takes 0.2 s for what exists already
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        if not frozen:
            gc.unfreeze()
        if bars:
            logging.enable_progress_bar()
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
