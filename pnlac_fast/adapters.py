"""One copy of a decoder's weights, and the adapters attached to it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from pnlac_fast.architecture import Architecture, architecture
from pnlac_fast.errors import UserError, first_line
from pnlac_fast.tensor_parallel import WHOLE, Part

FIELD = "pnlac_last_projection"  # of a configuration: what the user has named


@dataclass(eq=False)
class Weights:
    """One copy of a decoder's weights, shared by the base model and every adapter attached to it.

    Attributes
    ----------
    last_projection
        Path of the MLP's last projection in a block, where :func:`pnlac_fast.architecture.architecture` must be told.
        It is written into the model's configuration, so that callbacks, copies and saved models know it too.
    """

    hf: Any
    peft: Any = None
    attached: list[str] = field(default_factory=list)
    on: str | None = None
    part: Part = WHOLE
    last_projection: str | None = None
    _loras: list[Any] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        config = getattr(self.hf, "config", None)
        if self.last_projection is None:
            self.last_projection = getattr(config, FIELD, None)
        else:
            setattr(config, FIELD, self.last_projection)

    @cached_property
    def architecture(self) -> Architecture:
        """Where the parts of the decoder are."""
        return architecture(self.hf, self.last_projection)

    def switch(self, adapter: str | None) -> None:
        """Switch one adapter on, or all of them off."""
        if self.peft is None or adapter == self.on:
            return
        if self._loras is None:
            self._loras = _lora_layers(self.peft)
        # PEFT itself walks over all modules and sets what trains: 70 ms with six adapters on 32 layers, more than a
        # pass on a GPU takes.
        if self._loras:
            for layer in self._loras:
                layer._disable_adapters = adapter is None
                if adapter is not None:
                    layer._active_adapter = [adapter]
        elif adapter is None:
            self.peft.base_model.disable_adapter_layers()
        else:
            self.peft.base_model.enable_adapter_layers()
            self.peft.set_adapter(adapter)
        self.on = adapter


def attach(weights: Weights, source: str, name: str) -> tuple[Weights, str]:
    """Put an adapter on a model: the weights that carry it now, and what it is called there.

    LoRA, DoRA and the like go on ``weights`` themselves. PEFT does not hold every mixture of kinds on one model, and
    what an adapter brings along as a whole (modules_to_save, biases, embeddings) would overwrite the base's. So every
    other one gets a model of its own, which shares all parameters but those. PEFT's silence about weights that found no
    place becomes an error.
    """
    from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
    from safetensors import safe_open

    if name in weights.attached:
        raise UserError(f"Two tuned models are called '{name}': name them apart with --tuned NAME=PATH.")
    with safe_open(Path(source) / "adapter_model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    try:
        config = PeftConfig.from_pretrained(source)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"The adapter '{source}' cannot be read: {first_line(error)}") from error
    if config.is_prompt_learning:
        raise UserError(f"The adapter '{source}' is {config.peft_type.value}, which changes no weights: give a LoRA.")
    brought = {_base_name(key) for key in stored} & {_base_name(n) for n, _ in weights.hf.named_parameters()}
    extras = ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters")
    alone = config.peft_type != PeftType.LORA or brought or any(getattr(config, extra, None) for extra in extras)
    if alone and weights.part != WHOLE:
        what = "a LoRA that brings weights as a whole" if config.peft_type == PeftType.LORA else config.peft_type.value
        raise UserError(f"The adapter '{source}' is {what}, which cannot be divided: leave --tp out.")
    carrier = sharing(weights, brought) if alone else weights
    called = f"tuned_{len(weights.attached)}"  # PEFT finds adapters by name among modules' names
    try:
        with quiet():
            if carrier.peft is None:
                peft = PeftModel.from_pretrained(carrier.hf, source, adapter_name=called)
            else:
                peft = carrier.peft
                peft.load_adapter(source, adapter_name=called)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        what = "this base model" if weights.part == WHOLE else "a tensor-parallel model, though it may fit a whole one"
        raise UserError(f"The adapter '{source}' does not fit {what}: {first_line(error)}") from error
    placed = set(get_peft_model_state_dict(peft, adapter_name=called, save_embedding_layers=False))
    lost = {key for key in stored ^ placed if _base_name(key) not in brought}
    if lost:
        raise UserError(
            f"The adapter '{source}' holds {len(stored)} tensors, but {len(lost)} have a place in only one of it and "
            f"this base model, such as {min(lost)}: give the base that it was trained on."
        )
    peft.eval()
    peft.requires_grad_(False)
    carrier.peft, carrier.on, carrier._loras = peft, called, None
    if carrier is weights:
        carrier.switch(None)
    weights.attached.append(name)
    return carrier, called


def _lora_layers(peft: Any) -> list[Any]:
    """The LoRA layers of a model; none where adapters of other kinds or whole modules lie beside them."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [m for m in peft.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    plain = all(isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper) for layer in layers)
    return layers if plain else []


def sharing(weights: Weights, brought: Collection[str]) -> Weights:
    """A model without adapters on the same parameters, but for copies of those in ``brought``."""
    memo: dict[int, Any] = {}
    for name, parameter in weights.hf.named_parameters():
        if _base_name(name) in brought:
            memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        elif type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        else:  # quantised
            memo[id(parameter)] = parameter
    hf = copy.deepcopy(weights.hf, memo) if weights.peft is None else copy.deepcopy(weights.peft, memo).unload()
    return Weights(hf, part=weights.part, last_projection=weights.last_projection)


def _base_name(name: str) -> str:
    """The name that a parameter of the base model has without adapters, of its name under PEFT or in a file of it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


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
