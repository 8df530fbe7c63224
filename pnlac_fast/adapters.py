"""One copy of a decoder's weights, and the adapters attached to it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pnlac_fast.architecture import Architecture, architecture
from pnlac_fast.errors import UserError, first_line
from pnlac_fast.tensor_parallel import WHOLE, Part


@dataclass(eq=False)
class Weights:
    """One copy of a decoder's weights, shared by the base model and every adapter attached to it.

    Attributes
    ----------
    last_projection
        Path of the MLP's last projection in a block, where :func:`pnlac_fast.architecture.architecture` must be told.
    """

    hf: Any
    peft: Any = None
    attached: list[str] = field(default_factory=list)
    on: str | None = None
    part: Part = WHOLE
    last_projection: str | None = None

    @cached_property
    def architecture(self) -> Architecture:
        """Where the parts of the decoder are."""
        return architecture(self.hf, self.last_projection)

    def switch(self, adapter: str | None) -> None:
        """Switch one adapter on, or all of them off."""
        if self.peft is None or adapter == self.on:
            return
        if adapter is None:
            self.peft.base_model.disable_adapter_layers()
        else:
            self.peft.base_model.enable_adapter_layers()
            self.peft.set_adapter(adapter)
        self.on = adapter


def attach(weights: Weights, source: str, name: str) -> None:
    """Put an adapter on shared weights; PEFT's silence about weights that found no place becomes an error."""
    from peft import PeftModel
    from safetensors import safe_open

    if name in weights.attached:
        raise UserError(f"Two tuned models are called '{name}': name them apart with --tuned NAME=PATH.")
    with safe_open(Path(source) / "adapter_model.safetensors", framework="pt") as file:
        stored = {key for key in sorted(file.keys()) if ".lora_" in key or ".ia3_" in key}
    if weights.part != WHOLE and any(".ia3_" in key for key in stored):  # PEFT divides LoRA only
        raise UserError(f"The adapter '{source}' is IA3, which cannot be divided: leave --tp out.")
    try:
        with quiet():
            if weights.peft is None:
                peft = PeftModel.from_pretrained(weights.hf, source, adapter_name=name)
            else:
                peft = weights.peft
                peft.load_adapter(source, adapter_name=name)
    except (RuntimeError, ValueError) as error:
        what = "this base model" if weights.part == WHOLE else "a tensor-parallel model, though it may fit a whole one"
        raise UserError(f"The adapter '{source}' does not fit {what}: {first_line(error)}") from error
    placed = sum(f".{name}." in f"{key}." and (".lora_" in key or ".ia3_" in key) for key in peft.state_dict())
    if placed != len(stored):
        raise UserError(
            f"The adapter '{source}' holds {len(stored)} tensors but {placed} have a place in this base model: "
            f"give the base that it was trained on."
        )
    peft.eval()
    peft.requires_grad_(False)
    weights.peft, weights.on = peft, name
    weights.attached.append(name)
    weights.switch(None)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence two libraries on the normal path: a bar per load, and PEFT using a name that transformers renamed."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            yield
    finally:
        if bars:
            logging.enable_progress_bar()
