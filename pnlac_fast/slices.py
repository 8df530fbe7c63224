"""Neuron slices: MLP projections of which nothing trains but the rows and columns of chosen neurons.

The forward pass costs what the plain one costs. In the backward pass only the slices get a gradient, and so an
optimizer keeps state for them alone. A model with slices saves and loads ordinary checkpoints.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pnlac_fast.adapters import Weights
from pnlac_fast.architecture import SITES
from pnlac_fast.errors import UserError
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.places import Place, places
from pnlac_fast.sliced import class_of, computes_plainly


@dataclass(frozen=True, eq=False)
class Slice:
    """The slice of one projection: where it is, and its parameters, which are filled when it is installed.

    Attributes
    ----------
    name
        Path of the projection in the model.
    module
        The linear layer, or the experts.
    places
        By name of each of the module's tensors that it is of: the weight, and the bias where there is one.
    weight, bias
        The parameters.
    """

    layer: int
    part: str
    name: str
    module: Any
    places: dict[str, Place]
    weight: nn.Parameter
    bias: nn.Parameter | None

    def install(self) -> None:
        """Make the module a sliced one, if it is none yet, and put the parameters into it."""
        sliced = self.module
        if "places" not in vars(sliced):
            sliced.places = {}
            sliced.__class__ = class_of(sliced)
        for (name, place), parameter in zip(self.places.items(), (self.weight, self.bias), strict=False):
            sliced.places[name] = place
            sliced.register_parameter(f"slice_{name}", parameter)
        sliced.read()

    def restore(self, plain: type) -> None:
        """Write the slice into the module, and make that plain again, of its own class, when it was the last one."""
        sliced = self.module
        sliced.write()
        for name in self.places:
            del sliced.places[name]
            delattr(sliced, f"slice_{name}")
        if not sliced.places:
            del sliced.places
            sliced.__class__ = plain


class Slices:
    """The neuron slices of a model: its only parameters that train, while they are installed.

    Made by :func:`slice_neurons`.

    Attributes
    ----------
    model
        The Hugging Face model.
    neurons
        Whose rows and columns they are.
    parts
        One slice for each projection, by layer.
    covered
        In how many layers each projection has a slice, such as ``{"down_proj": 32}``.
    installed
        Whether the model has them now.
    base_sha256
        Fingerprint of the values that they had at first; see :func:`fingerprint`.
    """

    def __init__(self, model: nn.Module, neurons: NeuronSet, parts: Sequence[Slice]) -> None:
        self.model, self.neurons, self.parts = model, neurons, tuple(parts)
        self.covered = dict(Counter(part.part for part in parts))
        self.installed = False
        self.base_sha256 = ""
        self._trained: list[nn.Parameter] = []
        self._classes = [type(part.module) for part in self.parts]

    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        return [p for part in self.parts for p in (part.weight, part.bias) if p is not None]

    def tensors(self) -> dict[str, Tensor]:
        """Their values by name, such as "layers.0.gate_proj.weight" [slice, input]; they stay after a merge."""
        return {
            f"layers.{part.layer}.{part.part}.{kind}": parameter.detach()
            for part in self.parts
            for kind, parameter in (("weight", part.weight), ("bias", part.bias))
            if parameter is not None
        }

    def install(self) -> None:
        """Put them into the model with its present weights, and freeze everything else."""
        if not self.installed:
            self._trained = [p for p in self.model.parameters() if p.requires_grad]
            self.model.requires_grad_(False)
            for part in self.parts:
                part.install()
            self.installed = True

    def merge(self) -> None:
        """Write them into the weights and make the model plain again, with the flags that it had."""
        if self.installed:
            for part, plain in zip(self.parts, self._classes, strict=True):
                part.restore(plain)
            for parameter in self._trained:
                parameter.requires_grad_(True)
            self.installed = False


def slice_neurons(model: Model | nn.Module, neurons: NeuronSet) -> Slices:
    """Make the rows and columns of chosen neurons a model's only trainable parameters (ours).

    Neuron j of ``mlp_mid`` is row j of gate and up, weights and biases, and column j of down; coordinate i of
    ``mlp_out`` is row i of down and its bias. Projections that are frozen already stay so. Make the optimizer
    afterwards, from ``Slices.parameters()`` or from the parameters of the model that require a gradient, and call
    ``Slices.merge()`` at the end.

    Parameters
    ----------
    model
        A Hugging Face decoder without adapters, whose projections are ``nn.Linear``, transformers' ``Conv1D`` or
        experts behind its interface. It is changed in place.
    neurons
        Neurons of site ``mlp_mid`` or ``mlp_out``.

    Returns
    -------
    Slices
        The new parameters, and the way back: ``merge()``.

    Raises
    ------
    UserError
        The neurons are of another model or site, or their weights are frozen, shared, quantised or of another kind.

    Examples
    --------
    >>> slices = slice_neurons(model, neurons)  # doctest: +SKIP
    >>> optimizer = torch.optim.AdamW(slices.parameters(), fused=True)  # doctest: +SKIP
    >>> slices.merge()  # doctest: +SKIP
    """
    decoder = model
    if not isinstance(decoder, Model):
        decoder = Model(Weights(model, last_projection=neurons.last_projection), None, "given", {})
    if neurons.site not in SITES[:2]:
        raise UserError(
            f"Neurons of site '{neurons.site}' have no weights of their own to train: locate neurons of "
            f"{' or '.join(SITES[:2])}."
        )
    neurons.check(decoder)
    projections = decoder.architecture.of(neurons.site)
    names: dict[int, list[str]] = {}
    for name, parameter in decoder.hf.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parts: list[Slice] = []
    for layer in range(len(decoder.blocks)):
        if not neurons.member[layer].any():
            continue
        before = len(parts)
        for projection in projections:
            part, module = projection.name, decoder.projection(layer, projection.name)
            if not computes_plainly(module):
                raise UserError(
                    f"{part} of layer {layer} is {type(module).__name__}, not a plain linear layer: give a model "
                    f"without adapters, quantisation or slices, or tune it with LoRA or with mode freeze."
                )
            chosen = torch.tensor(neurons.layer(layer), device=next(module.parameters()).device)
            found = places(module, projection, chosen, decoder.architecture.width)
            weight = getattr(module, found["weight"][0])
            if not weight.requires_grad:
                continue
            known = names[id(weight)]
            if len(known) > 1:
                raise UserError(
                    f"{' and '.join(known)} are one shared parameter, of which no neuron can train alone: "
                    f"choose neurons of other layers."
                )
            own = [nn.Parameter(getattr(module, name).new_empty(0)) for name, _ in found.values()]
            name = known[0].removesuffix(".weight")
            parts.append(Slice(layer, part, name, module, dict(found.values()), own[0], [*own, None][1]))
        if len(parts) == before:
            raise UserError(
                f"Nothing trains in the MLP of layer {layer}, which has chosen neurons: set requires_grad on "
                f"{', '.join(projection.name for projection in projections)}."
            )
    slices = Slices(decoder.hf, neurons, parts)
    slices.install()
    slices.base_sha256 = fingerprint(slices.tensors())
    return slices


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over slices by name, in float32: that of a half-precision model and of its float32 copy are the same."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
