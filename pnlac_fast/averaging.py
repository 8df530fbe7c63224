"""Tail averaging: a fine-tune ends with the mean of the weights after its last steps, not with the last of them.

At a constant learning rate the weights of the last steps scatter around something; their mean is nearer to it. Frozen
weights stay what they are to the bit, and what a null space holds stays held, since the mean is linear.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from pnlac_fast.errors import UserError
from pnlac_fast.penalties import require_whole

PREFIX = "averages-"  # and the step, beside the Trainer's checkpoints


class TailAverage(TrainerCallback):
    """Puts the mean of what trains after each of the last steps in its place, as a callback of a Trainer.

    Of ``transformers.Trainer`` or TRL's ``SFTTrainer``. Until the last step the weights are what they would be anyway.
    During these it keeps a copy of what trains, in float32 at least, and writes it beside a checkpoint that falls among
    them, so that a resumed run ends with the same bits.

    Parameters
    ----------
    last
        How many steps, above 0; 1 changes nothing.

    Notes
    -----
    After Polyak and Juditsky (1992) and arXiv 1803.05407, over steps instead of epochs.
    """

    def __init__(self, last: int) -> None:
        if last < 1:
            raise UserError(f"The mean of {last} steps is none: average 1 or more.")
        self.last = last
        self._means: dict[str, Tensor] = {}
        self._first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Find the first step that counts, and take up what was averaged before a checkpoint."""
        require_whole(model, args, "the average")
        self._first, self._means = state.max_steps - self.last, {}
        if self._first < 0:
            raise UserError(f"{state.max_steps} steps have no mean of their last {self.last}: average fewer.")
        if self._first < state.global_step < state.max_steps:
            file = _file(args, state)
            if not file.is_file():
                raise UserError(f"'{file}' is missing, without which the mean is not known: start the training anew.")
            self._means = load_file(file)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Count the weights of a step; put the mean into the model after the last, or keep it with a checkpoint."""
        count = state.global_step - self._first
        if count < 1:
            return
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in trained.items():
            now = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
            # Written so that the mean of equal values has their bits.
            self._means[name] = now.clone() if count == 1 else self._means[name].to(now.device).lerp(now, 1 / count)
        if count == self.last:
            for name, parameter in trained.items():
                parameter.copy_(self._means[name])
            self._means = {}
        elif control.should_save and state.is_world_process_zero:
            before = list(Path(args.output_dir).glob(f"{PREFIX}*"))
            file = _file(args, state)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: mean.cpu().contiguous() for name, mean in self._means.items()},
                draft := file.with_suffix(".draft"),
            )
            os.replace(draft, file)
            kept = {f"{PREFIX}{p.name.rpartition('-')[2]}" for p in Path(args.output_dir).glob("checkpoint-*")}
            for old in before:
                if old.stem not in kept and old != file:
                    old.unlink()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Verify that the last step was reached."""
        if state.global_step < state.max_steps:
            raise RuntimeError("The training ended before its last step, so that its weights are not averaged.")


def _file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX}{state.global_step}.safetensors"
