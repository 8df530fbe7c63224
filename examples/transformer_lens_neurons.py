"""Located neurons in TransformerLens: cache them on a prompt, then shift them by hooks as the fine-tune did.

Neurons come from ``pnlac-fast locate``, the shift from the store that they were located in. Run it with::

    python examples/transformer_lens_neurons.py --model base --neurons neurons.json --set race/general \\
        --store run.zarr --prompt "What should we do about taxes?"

A neuron of ``mlp_mid`` is ``blocks.LAYER.mlp.hook_post`` there. It needs the bridge of TransformerLens 3 and later,
which runs the Hugging Face weights as they are; HookedTransformer folds norms into them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import xarray as xr
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from pnlac_fast.neurons import NeuronSet, load_sets


def shift_of(store: str, neurons: NeuronSet) -> Tensor:
    """Mean change of each neuron over the topics of a store, float32 [layer, neuron]."""
    contrast = xr.open_zarr(store, group="contrast")
    chosen = contrast["mean_diff"].sel(model=neurons.model, site=neurons.site).isel(tokens=0).mean("topic")
    return torch.from_numpy(chosen.values[:, : neurons.member.shape[1]])


def move(activation: Tensor, hook: Any, *, index: list[int], add: Tensor) -> Tensor:
    """A hook that adds to some neurons at every position."""
    activation[..., index] += add.to(activation)
    return activation


def main(arguments: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--neurons", "--set", "--store", "--prompt"):
        parser.add_argument(name, required=True)
    given = parser.parse_args(arguments)
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(given.model), AutoTokenizer.from_pretrained(given.model)
    model = TransformerBridge.boot_transformers(given.model, hf_model=hf, tokenizer=tokenizer, dtype=hf.dtype)
    neurons = load_sets(given.neurons)[given.set]
    add = shift_of(given.store, neurons)
    ids = tokenizer(given.prompt, return_tensors="pt").input_ids  # as the tokenizer has it: BOS once, or not at all
    sites = {layer: f"blocks.{layer}.mlp.hook_post" for layer, count in enumerate(neurons.per_layer) if count}
    with torch.no_grad():
        logits, cached = model.run_with_cache(ids, names_filter=list(sites.values()))
        for layer, site in sites.items():
            last = cached[site][0, -1, neurons.layer(layer)]
            print(f"layer {layer}: {len(neurons.layer(layer))} neurons, last token {last.norm():.4g}")
        hooks = [
            (site, partial(move, index=neurons.layer(layer), add=add[layer, neurons.layer(layer)]))
            for layer, site in sites.items()
        ]
        before, after = logits[0, -1], model.run_with_hooks(ids, fwd_hooks=hooks)[0, -1]
    gained = (after.log_softmax(-1) - before.log_softmax(-1)).topk(5)
    for token, nats in zip(gained.indices.tolist(), gained.values.tolist(), strict=True):
        print(f"{tokenizer.decode([token])!r} is {nats:+.3f} nats likelier")
    return before, after


if __name__ == "__main__":
    main()
