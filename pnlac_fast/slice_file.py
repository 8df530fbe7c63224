"""The file of neuron slices: what a fine-tune of a few neurons has learned, small, for any copy of its base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pnlac_fast.errors import UserError, unknown
from pnlac_fast.hub import local
from pnlac_fast.loading import SLICES_FILE
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet, from_record, to_record
from pnlac_fast.penalties import decoder_of
from pnlac_fast.places import Place, places
from pnlac_fast.sliced import computes_plainly
from pnlac_fast.slices import Slices, fingerprint

FORMAT, VERSION = "pnlac-neuron-slices", 1
OVERLAP = ("refuse", "sum")


@dataclass(frozen=True, eq=False)
class SliceFile:
    """What a file of slices holds.

    Attributes
    ----------
    neurons
        Whose weights they are; ``base`` is the origin of the model that they were trained from.
    base_sha256
        Fingerprint of the same weights before training.
    tensors
        By name, such as "layers.0.gate_proj.weight" [slice, input], "layers.0.gate_proj.bias" [slice] or
        "layers.0.down_proj.weight" [output, slice]. Where gate and up are one weight, a slice has two rows for each
        neuron, all gates first.
    """

    neurons: NeuronSet
    base_sha256: str
    tensors: dict[str, Tensor]


def save_slices(slices: Slices, path: str | Path, base: Mapping[str, Any] | None = None) -> None:
    """Write slices, merged or not, to a safetensors file.

    ``base`` is the origin of the model (see :class:`pnlac_fast.models.Model`); default: that of the neurons.
    """
    neurons = slices.neurons if base is None else replace(slices.neurons, base=base)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "base_sha256": slices.base_sha256,
        "neurons": json.dumps(to_record(neurons)),
        "dims": json.dumps(
            {
                part.part + suffix: place.along
                for part in slices.parts
                for suffix, place in zip(("", ".bias"), part.places.values(), strict=False)
            }
        ),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in slices.tensors().items()}, path, metadata)


def load_slices(path: str | Path) -> SliceFile:
    """Read a file of slices, or that of a repository on the hub, ``hf://USER/NAME``.

    Raises
    ------
    UserError
        The file does not exist, is not of this format, or is damaged.
    """
    path = local(path, SLICES_FILE)
    if not path.is_file():
        raise UserError(f"There is no file of neuron slices '{path}': fine-tune with method full and mode specific.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or int(metadata["version"]) > VERSION:
                raise UserError(
                    f"'{path}' is not a {FORMAT} file of version {VERSION}: give the {FORMAT} file of a fine-tune."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = SliceFile(from_record(json.loads(metadata["neurons"])), metadata["base_sha256"], tensors)
        dims = json.loads(metadata["dims"])
        for name, tensor in tensors.items():
            _, layer, part, kind = name.split(".")
            if tensor.shape[dims.get(f"{part}.{kind}", dims[part])] % found.neurons.per_layer[int(layer)]:
                raise ValueError(f"{name} is {list(tensor.shape)}")
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"The file of neuron slices '{path}' is damaged ({error}): fine-tune again.") from error
    return found


def merge_slices(model: Model | nn.Module, path: str | Path) -> NeuronSet:
    """Write the slices of a file into a copy of their base model, in place.

    Files with disjoint neurons can be merged one after another; :func:`stack_slices` also adds up others.

    Parameters
    ----------
    model
        A Hugging Face decoder without adapters. Values are rounded to its dtype.

    Returns
    -------
    NeuronSet
        Whose weights have changed.

    Raises
    ------
    UserError
        The model is of another shape, or its weights of these neurons are not those that training began with; then
        nothing has changed.
    """
    return stack_slices(model, [path])[0]


def stack_slices(
    model: Model | nn.Module, paths: Sequence[str | Path], *, overlap: str = "refuse"
) -> tuple[NeuronSet, ...]:
    """Write the slices of several files, trained apart, into a copy of their common base, in place.

    Parameters
    ----------
    model
        As for :func:`merge_slices`; none of the files may have been merged into it yet.
    overlap
        What happens to neurons that several files have: "refuse" them, or "sum" the changes that each file makes to
        the base's weights. What the sum does to the model is not what either file does: measure it.

    Returns
    -------
    tuple of NeuronSet
        Whose weights have changed, by file.

    Raises
    ------
    UserError
        As for :func:`merge_slices`; or files have neurons in common. Nothing has changed then.
    """
    if overlap not in OVERLAP:
        raise unknown("kind of overlap", overlap, OVERLAP)
    if not paths:
        raise UserError("There are no files of neuron slices to merge: give at least one.")
    files = [load_slices(path) for path in paths]
    decoder = model if isinstance(model, Model) else decoder_of(model, files[0].neurons.last_projection)
    placed = [_places(decoder, found, path) for found, path in zip(files, paths, strict=True)]
    for i, (one, first) in enumerate(zip(files, paths, strict=True)):
        for other, second in zip(files[i + 1 :], paths[i + 1 :], strict=True):
            same_site = one.neurons.site == other.neurons.site
            if overlap == "refuse" and (not same_site or (one.neurons.member & other.neurons.member).any()):
                count = f"{int((one.neurons.member & other.neurons.member).sum())} neurons" if same_site else "weights"
                raise UserError(
                    f"'{first}' and '{second}' both change {count}: give one of them, or add their changes up (sum:, "
                    f"or overlap='sum')."
                )
    before = [{name: place.take(tensor) for name, (tensor, place) in of_file.items()} for of_file in placed]
    for number, (found, of_file) in enumerate(zip(files, placed, strict=True)):
        for name, (tensor, place) in of_file.items():
            value = found.tensors[name].to(tensor)
            if number:  # what earlier files have changed keeps their change
                now = place.take(tensor)
                value = torch.where(now == before[number][name], value, now + (value - before[number][name]))
            place.put(tensor, value)
    return tuple(found.neurons for found in files)


_Places = dict[str, tuple[Tensor, Place]]  # a tensor of the model, and where the entries of a slice are in it


def _places(decoder: Model, found: SliceFile, path: str | Path) -> _Places:
    """Where each tensor of a file belongs in a model; refused where its values there are not the base's."""
    found.neurons.fits(decoder)
    placed: _Places = {}
    projections = {p.name: p for p in decoder.architecture.of(found.neurons.site)}
    for name in found.tensors:
        _, layer, part, kind = name.split(".")
        if part not in projections:
            raise UserError(f"'{decoder.name}' has no {part}, which '{path}' changes: give a copy of its base.")
        module = decoder.projection(int(layer), part)
        if not computes_plainly(module):
            raise UserError(f"{part} of layer {layer} is {type(module).__name__}: give a model without adapters.")
        chosen = torch.tensor(found.neurons.layer(int(layer)))
        there = places(module, projections[part], chosen, decoder.architecture.width)
        if kind not in there:
            raise UserError(
                f"'{decoder.name}' has no {kind} in {part}, which '{path}' changes: give a copy of its base."
            )
        placed[name] = getattr(module, there[kind][0]).data, there[kind][1]
    now = {name: place.take(tensor) for name, (tensor, place) in placed.items()}
    same_shape = all(now[name].shape == tensor.shape for name, tensor in found.tensors.items())
    if not same_shape or fingerprint(now) != found.base_sha256:
        known = {
            key: found.neurons.base[key] for key in ("source", "revision", "sha256") if found.neurons.base.get(key)
        }
        raise UserError(
            f"'{decoder.name}' is not the base of '{path}', or these neurons of it were tuned before or rounded: give "
            f"a copy of {known or 'its base'} in its own dtype."
        )
    return placed
