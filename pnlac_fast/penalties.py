"""Penalties: callbacks that add a term to what a fine-tune minimises, whoever computes its loss.

``transformers.Trainer`` takes the loss from the model's output, TRL's ``SFTTrainer`` computes its own from hidden
states, others do otherwise. So a penalty never touches the loss: in the forward pass it takes its place in the graph,
and in the backward pass it adds the gradient of its term. Clipping, accumulation and checkpoints see one gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from pnlac_fast.adapters import Weights
from pnlac_fast.errors import UserError
from pnlac_fast.models import Model


class Penalty(TrainerCallback, ABC):
    """What all penalties share: their weight, their place in the model while it trains, and what they amounted to.

    The gradient of ``weight`` times the term's mean over the batch is added. Parts of an accumulated batch count
    equally, hence a last, shorter group of an epoch for less; so do the processes of ``accelerate launch``.

    Attributes
    ----------
    name
        What the term is called in the Trainer's log, where its mean since the entry before stands beside the loss.
    weight
        Factor of the term, above 0.
    steps
        Optimizer steps that the term took part in.
    """

    name = "penalty"
    last_projection: str | None = None  # of the models it goes into, as decoder_of takes it

    def __init__(self, weight: float) -> None:
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"A weight of {weight:g} for {self.name} has no effect or no end: give one above 0.")
        self.weight = weight
        self.steps = 0
        self._place = ExitStack()
        self._values: list[Tensor] = []
        self._share = 1.0
        self._scaler: Any = None
        self._backward = 0

    @abstractmethod
    def install(self, model: Model, module: nn.Module, place: ExitStack) -> None:
        """Put the hooks of the term into a model, and on ``place`` what removes them."""

    @property
    def scale(self) -> float:
        """By what the gradient of the term's mean is multiplied: weight, share of the batch, scale of the loss."""
        return self.weight * self._share * (1.0 if self._scaler is None else float(self._scaler.get_scale()))

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Put the term in its place."""
        require_whole(model, args, self.name)
        self._place.close()
        self.steps, self._backward, self._values = 0, 0, []
        self._first = state.global_step
        self._share = 1 / args.gradient_accumulation_steps
        self._scaler = getattr(optimizer, "scaler", None)  # accelerate's, of a Trainer with fp16
        self.install(decoder_of(model, self.last_projection), model, self._place)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step."""
        self.steps += 1

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the term's mean since the last entry, over all processes, into the Trainer's log."""
        if self._values and "loss" in state.log_history[-1]:
            mean = torch.stack(self._values).mean()
            if args.world_size > 1:
                torch.distributed.all_reduce(mean)
            state.log_history[-1][self.name] = float(mean) / args.world_size
            self._values = []

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the term, and verify that its gradient was used."""
        self._place.close()
        if state.global_step > self._first and not self._backward:
            raise RuntimeError(f"The penalty {self.name} had no effect: no backward pass reached it.")

    def remove(self) -> None:
        """Take the hooks out of the model. The end of training does it by itself; an interruption does not."""
        self._place.close()

    def add(self, value: Tensor) -> None:
        """Note the term's value of one part of a batch, without its weight."""
        self._values.append(value.detach())

    def reached(self) -> None:
        """Note that a backward pass has used the term."""
        self._backward += 1


def decoder_of(module: Any, last_projection: str | None = None) -> Model:
    """A module as a Trainer's callbacks get it, with LoRA or without, as a decoder of this package.

    Parameters
    ----------
    last_projection
        As for :func:`pnlac_fast.load_model`; neurons know it (:attr:`pnlac_fast.neurons.NeuronSet.last_projection`).
    """
    from peft import PeftModel

    hf = module.get_base_model() if isinstance(module, PeftModel) else module
    weights = Weights(hf, last_projection=last_projection)
    return Model(weights, None, getattr(hf, "name_or_path", "") or "given", {})


def require_whole(module: nn.Module, args: Any, name: str) -> None:
    """Refuse a model that is not whole in this process, or that one process runs on several devices at once."""
    if args.n_gpu > 1:
        raise UserError(
            f"The Trainer would run one batch on {args.n_gpu} GPUs in one process, where {name} cannot follow: start "
            f"it with accelerate launch, or set CUDA_VISIBLE_DEVICES to one of them."
        )
    shared = any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in module.parameters())
    if shared or any(isinstance(m, FullyShardedDataParallel) for m in module.modules()):
        raise UserError(
            f"The weights are sharded over processes (FSDP or DeepSpeed), and {name} needs them whole: train with LoRA "
            f"or neuron slices under plain accelerate launch, which keeps one copy in each process."
        )


@contextmanager
def adapter_off(module: Any) -> Iterator[None]:
    """Switch a PEFT model's adapter off; any other module is as it is.

    PEFT lets all of an adapter train when it is switched on again, also what was frozen: here it stays frozen.
    """
    from peft import PeftModel

    if not isinstance(module, PeftModel):
        yield
        return
    flags = [(p, p.requires_grad) for p in module.parameters()]
    with module.disable_adapter():
        yield
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
