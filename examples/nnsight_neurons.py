"""Located neurons in nnsight: read them on a prompt, then shift them as the fine-tune did, and see what base says next.

Neurons come from ``pnlac-fast locate``, the shift from the store that they were located in. Run it with::

    python examples/nnsight_neurons.py --model base --neurons neurons.json --set race/general --store run.zarr \\
        --prompt "What should we do about taxes?"

nnsight runs the Hugging Face model itself, so a neuron has the same layer and number there: it is a coordinate of the
input of ``mlp.down_proj``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import xarray as xr
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pnlac_fast.neurons import NeuronSet, load_sets


def shift_of(store: str, neurons: NeuronSet) -> Tensor:
    """Mean change of each neuron over the topics of a store, float32 [layer, neuron]."""
    contrast = xr.open_zarr(store, group="contrast")
    chosen = contrast["mean_diff"].sel(model=neurons.model, site=neurons.site).isel(tokens=0).mean("topic")
    return torch.from_numpy(chosen.values[:, : neurons.member.shape[1]])


def read(model: TransformersModel, prompt: str, neurons: NeuronSet) -> dict[int, Tensor]:
    """Activations of the neurons by layer, [position, neuron]."""
    seen = {}
    with model.trace(prompt):
        for layer, count in enumerate(neurons.per_layer):
            if count:
                seen[layer] = model.model.layers[layer].mlp.down_proj.input[0, :, neurons.layer(layer)].save()
    return seen


def shifted(model: TransformersModel, prompt: str, neurons: NeuronSet, add: Tensor) -> Tensor:
    """Logits of the next token where the neurons are moved by ``add`` [layer, neuron] at every position."""
    with model.trace(prompt):
        for layer, count in enumerate(neurons.per_layer):
            if count:
                projection = model.model.layers[layer].mlp.down_proj
                moved = projection.input.clone()
                moved[..., neurons.layer(layer)] += add[layer, neurons.layer(layer)].to(moved)
                projection.input = moved
        logits = model.lm_head.output[0, -1].save()
    return logits


def main(arguments: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--neurons", "--set", "--store", "--prompt"):
        parser.add_argument(name, required=True)
    given = parser.parse_args(arguments)
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(given.model), AutoTokenizer.from_pretrained(given.model)
    model = TransformersModel(hf, task="text-generation", tokenizer=tokenizer)
    neurons = load_sets(given.neurons)[given.set]
    add = shift_of(given.store, neurons)
    with torch.no_grad():
        for layer, activation in read(model, given.prompt, neurons).items():
            print(f"layer {layer}: {len(neurons.layer(layer))} neurons, last token {activation[-1].norm():.4g}")
        before = shifted(model, given.prompt, neurons, torch.zeros_like(add))
        after = shifted(model, given.prompt, neurons, add)
    gained = (after.log_softmax(-1) - before.log_softmax(-1)).topk(5)
    for token, nats in zip(gained.indices.tolist(), gained.values.tolist(), strict=True):
        print(f"{tokenizer.decode([token])!r} is {nats:+.3f} nats likelier")
    return before, after


if __name__ == "__main__":
    main()
