"""Which entries of a model's trainable parameters belong to chosen neurons, and are to be held still.

Neuron j of ``mlp_mid`` is row j of gate and up, weights and biases, and column j of down. Coordinate i of ``mlp_out``
is row i of down and its bias. With LoRA (W + B A) these are the same rows of B and columns of A.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pnlac_fast.adapters import Weights
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.optimizers import StepMask
from pnlac_fast.slices import PARTS

MODES = ("freeze", "specific")


@dataclass(frozen=True, eq=False)
class Mask:
    """Entries of one trainable parameter that must not move: ``parameter.index_select(dim, still)``.

    Attributes
    ----------
    name
        The parameter's name in the model.
    still
        int64 [index], on the parameter's device.
    low_rank
        Whether the parameter is a LoRA factor, whose still entries are zero; else they are the base model's weights.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    still: Tensor
    low_rank: bool

    def values(self) -> Tensor:
        """A copy of the entries."""
        return self.parameter.detach().index_select(self.dim, self.still)

    def put(self, values: Tensor | float) -> None:
        """Overwrite the entries."""
        with torch.no_grad():
            if isinstance(values, Tensor):
                self.parameter.index_copy_(self.dim, self.still, values)
            else:
                self.parameter.index_fill_(self.dim, self.still, values)

    def zero_gradient(self, *_: Any) -> None:
        """Zero these entries of the gradient, in place; filled, not multiplied, so that infinities go too."""
        if self.parameter.grad is not None:
            self.parameter.grad.index_fill_(self.dim, self.still, 0)

    def on_step(self, factor: float) -> StepMask:
        """The mask by which an optimizer's step moves these entries by ``factor`` of what it moves the others."""
        keep = torch.ones(self.parameter.shape[self.dim], device=self.still.device)
        return StepMask(self.parameter, self.dim, keep.index_fill_(0, self.still, factor))


@dataclass(frozen=True, eq=False)
class Masks:
    """What InhibitFT does to a model's parameters.

    Attributes
    ----------
    entries
        Trainable parameters with the entries to keep still.
    whole
        Parameters without a mask of their own that train in the mode "specific": the other LoRA factor.
    covered
        In how many layers each projection is trained and masked, such as ``{"down_proj": 32}``; what is not listed does
        not train at all.
    """

    entries: tuple[Mask, ...]
    whole: tuple[nn.Parameter, ...]
    covered: dict[str, int]


def find_masks(model: nn.Module, neurons: NeuronSet, mode: str = "freeze") -> Masks:
    """Find the trainable parameters that belong to neurons, and which of their entries must not move.

    Parameters
    ----------
    model
        A Hugging Face decoder with gated MLPs, or a PEFT model with LoRA on one. It is not changed.
    mode
        "freeze": the chosen neurons stay as they are. "specific": all others do.

    Raises
    ------
    UserError
        The neurons are of another model or site, no trainable weight belongs to them, or it cannot be masked exactly.
    """
    if mode not in MODES:
        raise unknown("inhibit mode", mode, MODES)
    if neurons.site not in PARTS:
        raise UserError(
            f"Neurons of site '{neurons.site}' have no weights of their own to inhibit: locate neurons of "
            f"{' or '.join(PARTS)}."
        )
    hf = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = Model(Weights(hf), None, getattr(hf, "name_or_path", "") or "given", {})
    neurons.check(decoder)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    entries: list[Mask] = []
    whole: list[nn.Parameter] = []
    covered = Counter[str]()
    for layer in range(len(decoder.blocks)):
        chosen = neurons.member[layer]
        if not chosen.any():
            continue
        still = torch.from_numpy(chosen if mode == "freeze" else ~chosen).nonzero()[:, 0]
        before = len(entries)
        for part, dim in PARTS[neurons.site].items():
            own, shared = _tensors(decoder.projection(layer, part), dim)
            whole += shared
            for parameter, at, low_rank in own:
                known = names[id(parameter)]
                if len(known) > 1:
                    raise UserError(
                        f"{' and '.join(known)} are one shared parameter, of which no neuron can be inhibited alone: "
                        f"choose neurons of other layers."
                    )
                entries.append(Mask(known[0], parameter, at, still.to(parameter.device), low_rank))
            covered[part] += bool(own)
        if mode == "specific" and len(entries) == before:
            raise UserError(f"Nothing trains in the MLP of layer {layer}, which has chosen neurons: {_remedy(model)}.")
    if not entries:
        raise UserError(f"{_found(model)} leaves nothing to inhibit: {_remedy(model)}.")
    return Masks(tuple(entries), tuple(whole), {part: n for part, n in covered.items() if n})


def _tensors(module: Any, dim: int) -> tuple[list[tuple[nn.Parameter, int, bool]], list[nn.Parameter]]:
    """Trainable parameters of a projection whose neurons are its outputs (``dim`` 0) or its inputs (1).

    First those with a row or column for each neuron: parameter, dimension, whether it is a LoRA factor. Then the LoRA
    factors that all neurons share.
    """
    linear = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not isinstance(linear, nn.Linear) or not isinstance(module, (nn.Linear, LoraLayer)):
        raise UserError(f"InhibitFT masks linear layers and LoRA, not {type(module).__name__}: tune with one of those.")
    own: list[tuple[Any, int, bool]] = [(linear.weight, dim, False)]
    shared: list[Any] = []
    if dim == 0:
        own.append((linear.bias, 0, False))
    lora: Any = module
    for name in getattr(lora, "lora_A", ()):
        a, b, bias = lora.lora_A[name].weight, lora.lora_B[name].weight, lora.lora_B[name].bias
        if name in lora.lora_variant and (a.requires_grad or b.requires_grad):
            variant = type(lora.lora_variant[name]).__name__.removesuffix("LinearVariant")
            raise UserError(f"The LoRA variant {variant} moves every neuron of a layer together: use LoRA without it.")
        if dim == 1 and b.requires_grad and not a.requires_grad:
            raise UserError("A of a down_proj LoRA is frozen, its B trains: let both train, so that A can be masked.")
        own += [(b, 0, True), (bias, 0, True)] if dim == 0 else [(a, 1, True)]
        shared.append(a if dim == 0 else b)
    return [t for t in own if t[0] is not None and t[0].requires_grad], [p for p in shared if p.requires_grad]


def _found(model: nn.Module) -> str:
    if isinstance(model, PeftModel):
        targets = {t.rsplit(".", 1)[-1] for t in model.targeted_module_names}
        return f"LoRA on {' and '.join(sorted(targets))} only"
    return "A model whose MLP projections are all frozen"


def _remedy(model: nn.Module) -> str:
    if isinstance(model, PeftModel):
        return "add gate_proj, up_proj and down_proj to target_modules"
    return "set requires_grad on gate_proj, up_proj and down_proj"
