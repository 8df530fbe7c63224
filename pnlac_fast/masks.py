"""Which entries of a model's trainable parameters belong to chosen neurons, and are to be held still.

Neuron j of ``mlp_mid`` is row j of gate and up, weights and biases, and column j of down. Coordinate i of ``mlp_out``
is row i of down and its bias. With LoRA (W + B A) these are the same rows of B and columns of A. Of a mixture, neuron
e * width + i is neuron i of expert e, and coordinate i of ``mlp_out`` is row i of down in every expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pnlac_fast.architecture import SITES, Projection, plain
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.optimizers import StepMask
from pnlac_fast.penalties import decoder_of
from pnlac_fast.places import Place, places

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
    first
        int64 [index]: where each still entry stands in the first dimension, for weights of experts, of which not all
        have the same; else None.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    still: Tensor
    low_rank: bool
    first: Tensor | None = None

    @property
    def place(self) -> Place:
        """Where the entries are."""
        return Place(self.dim, self.still, self.first)

    def values(self) -> Tensor:
        """A copy of the entries."""
        return self.place.take(self.parameter.detach())

    def put(self, values: Tensor | float) -> None:
        """Overwrite the entries."""
        self.place.put(self.parameter.detach(), values)

    def zero_gradient(self, *_: Any) -> None:
        """Zero these entries of the gradient, in place; filled, not multiplied, so that infinities go too."""
        if self.parameter.grad is not None:
            self.place.put(self.parameter.grad, 0.0)

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
        A Hugging Face decoder, or a PEFT model with LoRA on one. It is not changed.
    mode
        "freeze": the chosen neurons stay as they are. "specific": all others do.

    Raises
    ------
    UserError
        The neurons are of another model or site, no trainable weight belongs to them, or it cannot be masked exactly.
    """
    if mode not in MODES:
        raise unknown("inhibit mode", mode, MODES)
    if neurons.site not in SITES[:2]:
        raise UserError(
            f"Neurons of site '{neurons.site}' have no weights of their own to inhibit: locate neurons of "
            f"{' or '.join(SITES[:2])}."
        )
    decoder = decoder_of(model, neurons.last_projection)
    neurons.check(decoder)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    entries: list[Mask] = []
    whole: list[nn.Parameter] = []
    covered = Counter[str]()
    projections = decoder.architecture.of(neurons.site)
    for layer, block in enumerate(decoder.blocks):
        chosen = neurons.member[layer]
        if not chosen.any():
            continue
        still = torch.from_numpy(chosen if mode == "freeze" else ~chosen).nonzero()[:, 0]
        before = len(entries)
        for projection in projections:
            module = block.get_submodule(projection.path)
            find = _of_experts if decoder.architecture.experts else _of_linear
            own, shared = find(module, projection, still, decoder.architecture.width)
            whole += shared
            for parameter, dim, index, low_rank, first in own:
                known = names[id(parameter)]
                if len(known) > 1:
                    raise UserError(
                        f"{' and '.join(known)} are one shared parameter, of which no neuron can be inhibited alone: "
                        f"choose neurons of other layers."
                    )
                at = parameter.device
                first = first if first is None else first.to(at)
                entries.append(Mask(known[0], parameter, dim, index.to(at), low_rank, first))
            covered[projection.name] += bool(own)
        if mode == "specific" and len(entries) == before:
            remedy = _remedy(model, projections)
            raise UserError(f"Nothing trains in the MLP of layer {layer}, which has chosen neurons: {remedy}.")
    if not entries:
        raise UserError(f"{_found(model)} leaves nothing to inhibit: {_remedy(model, projections)}.")
    return Masks(tuple(entries), tuple(whole), {part: n for part, n in covered.items() if n})


# Trainable parameter, dimension and index of its entries, whether it is a LoRA factor, index in the first dimension.
_Entries = tuple[Any, int, Tensor, bool, Tensor | None]


def _of_linear(
    module: Any, projection: Projection, neurons: Tensor, width: int
) -> tuple[list[_Entries], list[nn.Parameter]]:
    """Entries of neurons in a linear projection, and the LoRA factors that all neurons share."""
    linear = plain(module)
    if not isinstance(linear, nn.Linear | Conv1D) or not (module is linear or isinstance(module, LoraLayer)):
        raise UserError(f"InhibitFT masks linear layers and LoRA, not {type(module).__name__}: tune with one of those.")
    (index, _), outputs = projection.place(neurons, width), projection.inward
    found = _own(linear, projection, neurons, width)
    shared: list[Any] = []
    lora: Any = module
    for name in getattr(lora, "lora_A", ()):
        a, b, bias = lora.lora_A[name].weight, lora.lora_B[name].weight, lora.lora_B[name].bias
        if name in lora.lora_variant and (a.requires_grad or b.requires_grad):
            variant = type(lora.lora_variant[name]).__name__.removesuffix("LinearVariant")
            raise UserError(f"The LoRA variant {variant} moves every neuron of a layer together: use LoRA without it.")
        if not outputs and b.requires_grad and not a.requires_grad:
            raise UserError(
                f"A of a {projection.name} LoRA is frozen, its B trains: let both train, so that A can be masked."
            )
        if outputs:
            found += [(b, 0, index, True, None), (bias, 0, index, True, None)]
        else:
            found.append((a, 1, index, True, None))
        shared.append(a if outputs else b)
    return [t for t in found if t[0] is not None and t[0].requires_grad], [p for p in shared if p.requires_grad]


def _of_experts(
    module: Any, projection: Projection, neurons: Tensor, width: int
) -> tuple[list[_Entries], list[nn.Parameter]]:
    """Entries of neurons in a projection of experts, whose weights are [expert, output, input] or transposed.

    A LoRA on such a weight is one factor A and one B for all experts together.
    """
    experts, lora = plain(module), module
    while lora is not experts and not (isinstance(lora, ParamWrapper) and lora.parameter_name == projection.name):
        if not isinstance(lora, ParamWrapper):
            raise UserError(
                f"InhibitFT masks experts and LoRA on them, not {type(lora).__name__}: tune with one of those."
            )
        lora = lora.base_layer
    index, expert = projection.place(neurons, width)
    found = _own(experts, projection, neurons, width)
    shared: list[Any] = []
    for name in getattr(lora, "lora_A", ()):
        a, b, rank = lora.lora_A[name].weight, lora.lora_B[name].weight, lora.r[name]
        each = torch.arange(rank)
        if not projection.inward and b.requires_grad and not a.requires_grad:
            raise UserError(
                f"A of a {projection.name} LoRA is frozen, its B trains: let both train, so that A can be masked."
            )
        if expert is None:  # a row of B, the same for all experts
            found.append((b, 0, index, True, None))
        elif projection.inward:  # B is [output, rank and expert]
            columns = (each * lora.num_experts + expert[:, None]).flatten()
            found.append((b, 1, columns, True, index.repeat_interleave(rank)))
        else:  # A is [expert and rank, input]
            found.append((a, 1, index.repeat_interleave(rank), True, (expert[:, None] * rank + each).flatten()))
        shared.append(a if projection.inward else b)
    return [t for t in found if t[0] is not None and t[0].requires_grad], [p for p in shared if p.requires_grad]


def _own(module: Any, projection: Projection, neurons: Tensor, width: int) -> list[_Entries]:
    """Entries of neurons in the weights themselves."""
    found = places(module, projection, neurons, width).values()
    return [(getattr(module, name), place.dim, place.index, False, place.first) for name, place in found]


def _found(model: nn.Module) -> str:
    if isinstance(model, PeftModel):
        targets = {t.rsplit(".", 1)[-1] for t in model.targeted_module_names}
        return f"LoRA on {' and '.join(sorted(targets))} only"
    return "A model whose MLP projections are all frozen"


def _remedy(model: nn.Module, projections: Sequence[Projection]) -> str:
    *others, last = (projection.name for projection in projections)
    names = f"{', '.join(others)} and {last}" if others else last
    return f"add {names} to target_modules" if isinstance(model, PeftModel) else f"set requires_grad on {names}"
