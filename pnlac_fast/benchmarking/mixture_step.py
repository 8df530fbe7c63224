"""One step of a fine-tune of a small mixture of experts, timed with all its weights and with slices of few neurons."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pnlac_fast.benchmarking.timing import interleaved, ratio
from pnlac_fast.benchmarking.training_step import LENGTH, SEQUENCES, SHARE, place_of, prepare
from pnlac_fast.benchmarking.workloads import SHAPES
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.places import Place
from pnlac_fast.slices import slice_neurons

EXPERTS, CHOSEN = 8, 2  # in a block, and of these for each token
WAYS = ("full", "slices")


def make_mixture(
    shape: str, *, device: str = "auto", dtype: str = "auto", share: float = SHARE
) -> tuple[Any, NeuronSet, dict[str, Tensor]]:
    """A Mixtral with random weights and experts a quarter as wide as the shape's MLP, neurons of it, and a batch."""
    from transformers import MixtralConfig, MixtralForCausalLM

    place, kind = place_of(shape, device, dtype, share)
    size = SHAPES[shape]
    config = MixtralConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        vocab_size=size.vocabulary,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(place):
        hf = MixtralForCausalLM._from_config(config, dtype=kind)
    wide = EXPERTS * config.intermediate_size
    member = np.zeros((size.layers, wide), bool)
    generator = np.random.default_rng(0)
    for row in member:
        row[generator.permutation(wide)[: max(1, round(share * wide))]] = True
    ids = torch.randint(0, size.vocabulary, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0)).to(place)
    return hf.requires_grad_(True), NeuronSet("random", "random", member), {"input_ids": ids, "labels": ids}


def check(hf: Any, neurons: NeuronSet, batch: Mapping[str, Tensor]) -> None:
    """Make one step with slices of experts, and one of all weights, and compare.

    Raises
    ------
    RuntimeError
        A slice has another gradient than its entries in the full step, it has not moved, or something else has.
    """
    full, sliced = (prepare(hf, neurons, batch, way) for way in WAYS)
    full()
    sliced()
    gradients = {name: p.grad for name, p in sliced.model.named_parameters() if p.grad is not None}
    after = sliced.model.state_dict()
    places = _places(hf, neurons)
    for name, before in hf.state_dict().items():
        moved = after[name].ne(before)
        if (place := places.get(name)) is not None:
            module, _, last = name.rpartition(".")
            expected = place.take(full.model.get_parameter(name).grad)
            cosine = torch.cosine_similarity(
                expected.flatten().double(), gradients[f"{module}.slice_{last}"].flatten().double(), 0
            )
            if not cosine > (0.999 if hf.dtype == torch.float32 else 0.99):  # clipping scales them differently
                raise RuntimeError(f"The slice of {name} has another gradient than the full step ({cosine:.4f}).")
            if not place.take(moved).any():
                raise RuntimeError(f"The slice of {name} does not train.")
            place.put(moved, False)
        if moved.any():
            raise RuntimeError(f"{name} has moved outside the slices.")


def measure(
    *, shape: str = "small", repeats: int = 5, device: str = "auto", dtype: str = "auto", share: float = SHARE
) -> dict[str, Any]:
    """Check, then time a whole step of both ways, side by side.

    Returns
    -------
    dict
        ``slices_vs_full``: ratio of seconds within a round; ``bytes_slices_vs_full``: of gradients and optimizer state;
        ``shape``, ``dtype``, ``tokens``, ``experts``, ``share``.

    Raises
    ------
    UserError
        The shape or dtype is unknown, or the device cannot be used.
    RuntimeError
        See :func:`check`.
    """
    hf, neurons, batch = make_mixture(shape, device=device, dtype=dtype, share=share)
    check(hf, neurons, batch)
    steps = {way: prepare(hf, neurons, batch, way) for way in WAYS}
    seconds = interleaved(steps, repeats, hf.device)
    return {
        "shape": shape,
        "dtype": str(hf.dtype).removeprefix("torch."),
        "tokens": batch["input_ids"].numel(),
        "experts": EXPERTS,
        "share": share,
        "slices_vs_full": ratio(seconds["slices"], seconds["full"]),
        "bytes_slices_vs_full": steps["slices"].bytes() / steps["full"].bytes(),
    }


def _places(hf: Any, neurons: NeuronSet) -> dict[str, Place]:
    """Where the slices are, by the path of the tensor."""
    parts = slice_neurons(copy.deepcopy(hf), neurons).parts
    return {f"{part.name.rpartition('.')[0]}.{name}": place for part in parts for name, place in part.places.items()}
