"""Fine-tuning on one topic and side, plainly or by InhibitFT, with the stance measured along the way."""

from __future__ import annotations

import copy
import gc
import hashlib
import math
import os
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from pnlac_fast.adapters import Weights
from pnlac_fast.datasets import SIDES, Question, as_questions, by_topic, fingerprint
from pnlac_fast.errors import Interrupted, UserError, unknown
from pnlac_fast.inhibition import InhibitFT
from pnlac_fast.loading import FINETUNE_FILE, SLICES_FILE, load_model, weights_sha256
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.prompts import DEFAULT_TEMPLATE, encode_completion, encode_prompt
from pnlac_fast.provenance import provenance
from pnlac_fast.slice_file import save_slices
from pnlac_fast.slices import Slices
from pnlac_fast.trajectory import TRAJECTORY_FILE, Trajectory
from pnlac_fast.workplace import CHECKPOINTS, last_checkpoint, workplace, write_json

METHODS = ("lora", "full")
LEARNING_RATE = {"lora": 1e-4, "full": 1e-5}
EPOCHS = 3.0
IGNORED = -100  # a label that the loss of Hugging Face models skips


@dataclass(frozen=True, eq=False)
class FineTune:
    """A finished fine-tune.

    Attributes
    ----------
    path
        Directory of the checkpoint or adapter; None where nothing was written.
    model
        The tuned model, in evaluation mode.
    trajectory
        (point, question): ``margin`` float64 in nats and ``step`` int64 (point), coordinates ``topic`` and ``key`` on
        question; None without probe questions.
    record
        Settings, origin and losses, as written to ``pnlac.json``.
    """

    path: Path | None
    model: Model
    trajectory: xr.Dataset | None
    record: dict[str, Any]


def finetune(
    model: Model | str | Path,
    data: str | Path | Sequence[Question],
    topic: str | Sequence[str],
    side: str,
    out: str | Path | None = None,
    *,
    method: str = "lora",
    steps: int | None = None,
    epochs: float | None = None,
    learning_rate: float | None = None,
    batch_size: int = 16,
    accumulation: int = 1,
    warmup_steps: int = 5,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    inhibit: NeuronSet | None = None,
    inhibit_mode: str = "freeze",
    inhibit_factor: float = 0.0,
    lora_rank: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    template: str = DEFAULT_TEMPLATE,
    probe: str | Path | Sequence[Question] | None = None,
    points: int = 10,
    normalise: str = "token",
    gradient_checkpointing: bool = False,
    keep_base: bool = True,
    save_steps: int | None = None,
    overwrite: bool = False,
) -> FineTune:
    """Teach a model one side's completions of a topic, with ``transformers.Trainer``.

    The loss is on the completion and the end-of-sequence token. AdamW, constant learning rate after a linear warm-up.
    The same seed gives the same bits on the same machine and number of threads.

    Parameters
    ----------
    model
        The base. A loaded one is not changed, unless ``keep_base`` is off; LoRA shares its weights, a full fine-tune
        copies them.
    topic, side
        Whose completions to learn: one topic or several, "right" or "left".
    out
        Directory for an ordinary checkpoint or PEFT adapter, with ``pnlac.json`` and, where there are probes,
        ``trajectory.json``; with ``method`` "full" and ``inhibit_mode`` "specific" also ``neuron_slices.safetensors``,
        which any copy of the base takes (:func:`pnlac_fast.slice_file.merge_slices`). It appears complete or not at
        all. None writes nothing.
    method
        "lora", or "full". A full fine-tune of half-precision weights is done in float32, in which small steps are not
        rounded away, and rounded once at the end.
    steps, epochs
        Optimizer steps, or passes over the data. Default: 3 epochs.
    learning_rate
        Default: 1e-4 for LoRA, 1e-5 for full.
    batch_size, accumulation
        Completions per optimizer step, and in how many parts they are run.
    inhibit, inhibit_mode, inhibit_factor
        Neurons to "freeze", or the only ("specific") ones to train; with "freeze", the share of each step that they
        still take, 0 unless given. See :class:`pnlac_fast.inhibition.InhibitFT`.
    probe, points
        Held-out questions whose margin is measured before, after, and in between, about ``points`` times, more often
        early; ``normalise`` as in :func:`pnlac_fast.stance.margins`.
    keep_base
        Leave a loaded ``model`` as it is. Without, a full fine-tune trains its weights in place, in half the memory.
    save_steps
        Keep a checkpoint every so many steps in ``<out>.partial``, from which the same call resumes.
    overwrite
        Replace ``out``, and drop an interrupted run with other settings.

    Raises
    ------
    UserError
        Settings, data, neurons or directories do not fit; the loss became infinite.
    Interrupted
        Ctrl-C; it says from where the same call would go on.
    """
    for kind, value, known in (("method", method, METHODS), ("side", side, SIDES)):
        if value not in known:
            raise unknown(kind, value, known)
    if steps is not None and epochs is not None:
        raise UserError("Both steps and epochs are given: choose one.")
    if batch_size < 1 or accumulation < 1 or batch_size % accumulation:
        raise UserError(f"A batch of {batch_size} cannot be run in {accumulation} equal parts: change one of them.")
    base = model if isinstance(model, Model) else load_model(model)
    if base.weights.peft is not None:
        raise UserError(f"Adapters are attached to the weights of '{base.name}': load the base afresh to tune it.")
    topics = (topic,) if isinstance(topic, str) else tuple(topic)
    questions = _questions(as_questions(data), topics, side)
    rows = _rows(base, questions, side, template)
    if steps is None:
        steps = math.ceil(math.ceil(len(rows) / batch_size) * (EPOCHS if epochs is None else epochs))
    if steps < 1:
        raise UserError(f"{steps} optimizer steps train nothing: give 1 or more.")
    probes = () if probe is None else as_questions(probe)
    if shared := {q.key for q in probes} & {q.key for q in questions}:
        raise UserError(f"{len(shared)} of the probe questions are trained on: probe with held-out questions.")
    inhibition = None
    if inhibit is not None:
        inhibit.check(base)
        inhibition = InhibitFT(inhibit, inhibit_mode, inhibit_factor)
    settings: dict[str, Any] = {
        "tuned_topic": "+".join(topics),
        "side": side,
        "method": "plain" if inhibit is None else inhibit_mode,
        "parameters": method,
        "steps": steps,
        "learning_rate": LEARNING_RATE[method] if learning_rate is None else learning_rate,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "warmup_steps": warmup_steps,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "seed": seed,
        "template": template,
        "base": base.origin,
        "data": {"sha256": fingerprint(questions), "questions": len(questions), "completions": len(rows)},
        "inhibit": None if inhibit is None else _inhibited(inhibit, inhibit_mode, inhibit_factor),
        "probe": {"sha256": fingerprint(probes), "points": points, "normalise": normalise} if probes else None,
    }
    if method == "lora":
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        settings["lora"] = {"r": lora_rank, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
        settings["lora"]["target_modules"] = targets
    with workplace(out, settings, overwrite) as work, _contained(base.device):
        run = _Run(base, keep_base and isinstance(model, Model), settings, work)
        if gradient_checkpointing:
            run.checkpoint_activations()
        callbacks: list[TrainerCallback] = []
        slices: Slices | None = None
        if inhibition is not None:
            callbacks.append(inhibition)
            settings["inhibit"]["covered"] = inhibition.prepare(run.module).covered
            slices = inhibition.slices
        at = sorted({round(steps * (i / max(points - 1, 1)) ** 2) for i in range(points)} | {0, steps})
        if probes:
            callbacks.append(watch := Trajectory(run.view, probes, at, work / TRAJECTORY_FILE, template, normalise))
        try:
            losses = run.train(rows, callbacks, save_steps if out is not None else None)
        finally:
            if slices is not None:
                slices.merge()
        record = {**settings, "loss": losses, "provenance": provenance()}
        trajectory = watch.dataset() if probes else None
        path = None if out is None else run.publish(Path(out), record, slices)
        return FineTune(path, run.result(path, record), trajectory, record)


class _Run:
    """One fine-tune: what trains, as whom it is measured, and where it goes."""

    def __init__(self, base: Model, keep: bool, settings: Mapping[str, Any], work: Path) -> None:
        self.base, self.settings, self.work = base, settings, work
        lora = settings.get("lora")
        self.hf = _copy(base.hf, share=lora is not None) if keep else base.hf
        self.use_cache = self.hf.config.use_cache
        self.view = Model(Weights(self.hf), base.tokenizer, base.name, base.origin)
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

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass, which needs less memory."""
        enable = getattr(self.hf, "activation_checkpointing_enable", None) or self.hf.gradient_checkpointing_enable
        enable()

    def train(
        self, rows: list[tuple[list[int], int]], callbacks: list[TrainerCallback], save_steps: int | None
    ) -> list[list[float]]:
        """Train; the mean losses since the point before, as [step, loss] at about ten points."""
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
        trainer = Trainer(self.module, arguments, data_collator=_collate, train_dataset=rows, callbacks=callbacks)
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
        losses = [[h["step"], h["loss"]] for h in trainer.state.log_history if "loss" in h]
        if losses and not math.isfinite(losses[-1][1]):
            raise UserError(f"The loss became {losses[-1][1]}: lower the learning rate ({chosen['learning_rate']:g}).")
        self.module.zero_grad(set_to_none=True)
        self.module.requires_grad_(False).eval()
        self.hf.config.use_cache = self.use_cache
        if "lora" not in chosen:
            self._cast(self.dtypes)
        return losses

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
            return Model(Weights(self.hf), self.base.tokenizer, name, origin)
        weights = Weights(self.hf, self.module, ["default"], "default")
        weights.switch(None)
        return Model(weights, self.base.tokenizer, name, origin, adapter="default")


def _questions(questions: Sequence[Question], topics: Sequence[str], side: str) -> tuple[Question, ...]:
    groups = by_topic(questions)
    for topic in topics:
        if topic not in groups:
            raise unknown("topic", topic, groups)
    chosen = tuple(q for topic in topics for q in groups[topic])
    if missing := [q for q in chosen if not q.completions(side)]:
        raise UserError(
            f"{len(missing)} of {len(chosen)} questions on {' and '.join(topics)} have no {side} completion, such as "
            f"'{missing[0].instruction[:60]}': add completions or remove these questions."
        )
    if not chosen:
        raise UserError("No topic is given to tune on: name one.")
    return chosen


def _rows(model: Model, questions: Sequence[Question], side: str, template: str) -> list[tuple[list[int], int]]:
    """Token ids with end-of-sequence token, and how many of them are the prompt's, for every completion."""
    rows = []
    for question in questions:
        prompt = encode_prompt(model.tokenizer, question, template).ids
        for text in question.completions(side):
            ids = [*prompt, *encode_completion(model.tokenizer, text, template, end=True)]
            if len(ids) > model.context:
                raise UserError(
                    f"The question '{question.instruction[:60]}' ({question.topic}) needs {len(ids)} tokens with its "
                    f"completion, the model's context is {model.context}: shorten or remove it."
                )
            rows.append((ids, len(prompt)))
    return rows


def _collate(rows: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
    """Right-padded batch with labels on the completions only, each int64 [row, position]."""
    shape = (len(rows), max(len(ids) for ids, _ in rows))
    batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full(shape, IGNORED)
    for i, (ids, prompt) in enumerate(rows):
        batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][i, : len(ids)] = 1
        batch["labels"][i, prompt : len(ids)] = torch.tensor(ids[prompt:])
    return batch


def _copy(hf: Any, share: bool) -> Any:
    """A copy of a model; with ``share``, one that has its own modules and flags on the same weights."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in hf.parameters()} if share else {}
    return copy.deepcopy(hf, memo)


def _with_lora(hf: Any, settings: Mapping[str, Any], seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():  # peft 0.21 reads a name that transformers 5.23 has deprecated
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
            return get_peft_model(hf, LoraConfig(task_type="CAUSAL_LM", **settings))
    except ValueError as error:
        raise UserError(f"LoRA cannot be put on this model: {str(error).splitlines()[0]}") from error


def _inhibited(neurons: NeuronSet, mode: str, factor: float) -> dict[str, Any]:
    return {
        "mode": mode,
        "factor": factor,
        "set": neurons.name,
        "kind": neurons.kind,
        "site": neurons.site,
        "count": len(neurons),
        "share": neurons.share,
        "denominator": "all neurons of the site",
        "sha256": hashlib.sha256(np.packbits(neurons.member).tobytes()).hexdigest(),
        "found": dict(neurons.found),
    }


@contextmanager
def _contained(device: torch.device) -> Iterator[None]:
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
