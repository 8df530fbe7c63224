"""A patch: activations of chosen neurons replaced in every forward pass, and its file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from pnlac_fast.adapters import Weights
from pnlac_fast.architecture import backbone
from pnlac_fast.errors import UserError
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet, from_record, to_record
from pnlac_fast.profiling import staged

FORMAT, VERSION = "pnlac-patch", 1


@dataclass(frozen=True, eq=False)
class Patch:
    """A patch that needs no second model (ours): own activations times ``scale``, plus ``add``.

    Attributes
    ----------
    neurons
        Where; ``base`` is the origin of the model that is patched.
    scale
        What the own activation is multiplied by: 0 to forget it (a zero or mean patch), 1 to keep it (a shift).
    add
        float32 [layer, neuron], in units of the activation; 0 outside of the neurons.
    """

    neurons: NeuronSet
    scale: float
    add: np.ndarray


@contextmanager
def patched(
    model: Model,
    neurons: NeuronSet,
    *,
    source: Model | None = None,
    recorded: Mapping[int, Tensor] | None = None,
    values: np.ndarray | None = None,
    scale: float | None = None,
    shift: np.ndarray | None = None,
) -> Iterator[None]:
    """Patch every forward pass of ``model`` inside the block, with or without a key/value cache (arXiv 2508.02360).

    Give exactly one, or the last two together:

    source
        Another model. Before each pass it reads the same tokens, with a key/value cache of its own, and its
        activations take the place of the model's. Under ``generate`` it hence reads what the *patched* model chose.
    recorded
        By layer, [sequence, position, neuron] of all neurons of the site: the same, where the other model has read the
        tokens already. All passes inside the block must be over these tokens.
    values
        float [layer, neuron]: constants, such as means from a store, written at every position.
    scale
        Factor on the model's own activations; 0 ablates. Default: 1.
    shift
        float [layer, neuron]: added to these.

    Raises
    ------
    UserError
        The set is empty, or its shape is not the model's.
    RuntimeError
        On leaving: a patched layer did not run in every pass, so the result would not be what it says.
    """
    own = scale is not None or shift is not None
    if sum((source is not None, recorded is not None, values is not None, own)) != 1:
        raise ValueError("give exactly one of source, recorded, values, and scale or shift or both")
    neurons.fits(model)
    layers = [layer for layer, count in enumerate(neurons.per_layer) if count]
    index = {layer: torch.tensor(neurons.layer(layer), device=model.device) for layer in layers}
    given = values if values is not None else shift
    constant = {} if given is None else {n: torch.as_tensor(given[n][neurons.layer(n)]) for n in layers}
    seen: dict[int, Tensor] = {}
    recording, passes, writes = False, 0, 0
    cache: Any = None

    def record(layer: int, activation: Tensor) -> None:
        if recording:
            seen[layer] = activation.index_select(-1, index[layer].to(activation.device))

    @staged("patch")
    def write(layer: int, activation: Tensor) -> Tensor | None:
        nonlocal writes
        if recording:
            return None
        writes += 1
        at = index[layer].to(activation.device)
        if source is not None:
            new = seen.pop(layer).to(activation)
        elif recorded is not None:
            new = recorded[layer].index_select(-1, at.to(recorded[layer].device)).to(activation)
        elif values is not None:
            new = constant[layer].to(activation).expand(*activation.shape[:-1], -1)
        else:
            new = activation.index_select(-1, at) * (1.0 if scale is None else scale)
            if shift is not None:
                new = new + constant[layer].to(activation)
        return activation.index_copy(-1, at, new)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal passes, recording, cache
        passes += 1
        if source is None:
            return
        if args:
            raise RuntimeError("a patched model must be called with keyword arguments")
        past = kwargs.get("past_key_values")
        if past is None:
            cache = None
        elif past.get_seq_length() == 0:
            from transformers import DynamicCache

            cache = DynamicCache(config=source.hf.config)
        elif cache is None or cache.get_seq_length() != past.get_seq_length():
            raise RuntimeError("the key/value cache of the patched model was not started inside the patch")
        recording = True
        try:
            with source.active() as hf:
                inputs = {name: kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids")}
                backbone(hf)(**inputs, past_key_values=cache, use_cache=cache is not None)
        finally:
            recording = False

    gate = model.hf.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with model.tapped(neurons.site, write, layers):
            if source is None:
                yield
            else:
                with source.tapped(neurons.site, record, layers):
                    yield
    finally:
        gate.remove()
    if passes == 0 or writes != passes * len(layers):
        raise RuntimeError(
            f"the patch of '{neurons.name}' was written {writes} times in {passes} passes over {len(layers)} layers: "
            f"it did not happen as asked"
        )


def save_patch(patch: Patch, path: str | Path, *, base: Mapping[str, Any] | None = None) -> None:
    """Write a patch to a safetensors file that needs nothing of this package to be applied.

    For each layer with neurons it holds ``layers.N.index`` int64 [neuron] and ``layers.N.add`` float32 [neuron]; its
    metadata hold ``site``, ``scale``, ``format``, ``version`` and ``neurons``, the set as JSON. To apply it, replace
    the activation a at these neurons of the site by scale * a + add.

    Parameters
    ----------
    patch, path
        What to write, and the file.
    base
        Origin of the model to patch (see :class:`pnlac_fast.models.Model`); default: that of the neurons.
    """
    neurons = patch.neurons if base is None else replace(patch.neurons, base=base)
    tensors = {}
    for layer, count in enumerate(neurons.per_layer):
        if count:
            index = np.array(neurons.layer(layer), np.int64)
            tensors[f"layers.{layer}.index"] = index
            tensors[f"layers.{layer}.add"] = np.ascontiguousarray(patch.add[layer, index], np.float32)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "site": neurons.site,
        "scale": repr(float(patch.scale)),
        "neurons": json.dumps(to_record(neurons)),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)


def load_patch(path: str | Path) -> Patch:
    """Read a patch.

    Raises
    ------
    UserError
        The file does not exist, is not of this format, or is damaged.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no patch file '{path}': make one with pnlac-fast patch --save.")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or int(metadata["version"]) > VERSION:
                raise UserError(f"'{path}' is not a {FORMAT} file of version {VERSION}: give one of patch --save.")
            neurons = from_record(json.loads(metadata["neurons"]))
            add = np.zeros(neurons.member.shape, np.float32)
            for layer, count in enumerate(neurons.per_layer):
                if count:
                    if file.get_tensor(f"layers.{layer}.index").tolist() != neurons.layer(layer):
                        raise ValueError(f"its neurons of layer {layer} disagree")
                    add[layer, neurons.member[layer]] = file.get_tensor(f"layers.{layer}.add")
        return Patch(neurons, float(metadata["scale"]), add)
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"The patch file '{path}' is damaged ({error}): make it again.") from error


def made_for(patch: Patch, models: Mapping[str, Model]) -> Model:
    """The one of several models that a patch was made for, by the hash or the revision of its weights.

    Raises
    ------
    UserError
        None of them is.
    """
    known = {what: patch.neurons.base[what] for what in ("sha256", "revision") if patch.neurons.base.get(what)}
    for model in models.values():
        if known and all(model.origin.get(what) == value for what, value in known.items()):
            return model
    origin = patch.neurons.base.get("source", "a model without origin")
    raise UserError(
        f"The patch of '{patch.neurons.name}' was made for '{origin}', not for {', '.join(models)}: give that model."
    )


@contextmanager
def load_patched(model: Model | nn.Module, path: str | Path) -> Iterator[NeuronSet]:
    """Patch every forward pass of ``model`` inside the block as a file says; ``generate`` included.

    It is what :func:`patched` does.

    Parameters
    ----------
    model
        Ours, which is checked against the origin that the file names, or a Hugging Face decoder, which is not.
    path
        What :func:`save_patch` wrote.

    Yields
    ------
    NeuronSet
        Whose activations are patched.

    Raises
    ------
    UserError
        The file cannot be read, or it was made for another model.
    RuntimeError
        See :func:`patched`.
    """
    decoder = model if isinstance(model, Model) else Model(Weights(model), None, "given", {})
    patch = load_patch(path)
    patch.neurons.check(decoder)
    with apply(decoder, patch):
        yield patch.neurons


def apply(model: Model, patch: Patch) -> AbstractContextManager[None]:
    """The context in which a patch is in force."""
    if patch.scale == 0:
        return patched(model, patch.neurons, values=patch.add)
    return patched(model, patch.neurons, scale=patch.scale, shift=patch.add)
