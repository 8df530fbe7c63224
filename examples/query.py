"""Ask a store questions with plain xarray; neither torch nor this package is needed to open it.

It prints the neurons that change most, one neuron on all topics, how much of the change lies in each set of neurons
that ``pnlac-fast locate`` has found and, where ``score`` has written to the store, the questions that moved furthest.
``query.ipynb`` asks more, with the functions of this package. Run it on any store that cache and locate have written::

    python examples/query.py run.zarr --neurons 5
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import xarray as xr
import zarr


def top_neurons(rms: xr.DataArray, count: int) -> xr.DataArray:
    """The ``count`` neurons that change most, highest first: (place), with coordinates layer and neuron."""
    flat = rms.stack(place=("layer", "neuron")).dropna("place")
    return flat.sortby(flat, ascending=False)[:count]


def shifts(stance: xr.Dataset, examples: xr.Dataset, model: str) -> list[tuple[float, str]]:
    """Margin of a model minus that of base, and the text of each question; furthest first.

    Questions have a key; those that were scored but not cached have no text in the store.
    """
    texts = dict(zip(examples["key"].values.tolist(), examples["instruction"].values.tolist(), strict=True))
    margins = stance["margin"].set_index(run="model")
    found = (margins.sel(run=model) - margins.sel(run="base")).values.tolist()
    named = [(shift, texts.get(key, key)) for shift, key in zip(found, stance["key"].values.tolist(), strict=True)]
    return sorted(named, key=lambda pair: -abs(pair[0]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what the store says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--neurons", type=int, default=10, help="how many of the top neurons to print")
    given = parser.parse_args(arguments)

    contrast = xr.open_zarr(given.store, group="contrast")
    model, site, tokens = (str(contrast[dim].values[0]) for dim in ("model", "site", "tokens"))
    chosen = contrast.sel(model=model, site=site, tokens=tokens)
    print(f"{dict(contrast.sizes)}; now {model}, {site}, {tokens}")

    print("\nNeurons that change most, over all topics")
    top = top_neurons(chosen["rms"].mean("topic").load(), given.neurons)
    for layer, neuron, value in zip(top["layer"].values, top["neuron"].values, top.values, strict=True):
        print(f"  layer {layer:3d}  neuron {neuron:6d}  rms {value:.4g}")

    layer, neuron = int(top["layer"][0]), int(top["neuron"][0])
    print(f"\nLayer {layer}, neuron {neuron}, on each topic")
    one = chosen.sel(layer=layer, neuron=neuron).load()
    for topic in one["topic"].values:
        at = one.sel(topic=topic)
        print(f"  {topic:<24}  base {float(at['mean_base']):+.4g}  tuned {float(at['mean_tuned']):+.4g}")

    print("\nShare of all squared change that lies in each set")
    sets = xr.open_zarr(given.store, group="neuron_sets").load()
    sets = sets.isel(neuron_set=((sets["model"] == model) & (sets["site"] == site)).values)
    energy = (chosen["rms"].mean("topic") ** 2).load()
    inside = (energy * sets["member"]).sum(["layer", "neuron"]) / energy.sum()
    size = sets["member"].mean(["layer", "neuron"])
    for name, part, share in zip(sets["neuron_set"].values, inside.values, size.values, strict=True):
        print(f"  {name!s:<46}  {part:6.1%} of the change in {share:6.1%} of the neurons")

    if "results/stance" in zarr.open_group(given.store, mode="r"):
        stance = xr.open_zarr(given.store, group="results/stance").load()
        print("\nQuestions whose stance moved furthest from base, in nats")
        for shift, text in shifts(stance, xr.open_zarr(given.store, group="examples").load(), model)[: given.neurons]:
            print(f"  {shift:+.3f}  {text}")


if __name__ == "__main__":
    main()
