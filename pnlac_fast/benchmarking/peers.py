"""The same statistics by other packages, each as its own documentation does it, on plain padded batches."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pnlac_fast.benchmarking.agreement import TOKENS, Statistics, of_tensors
from pnlac_fast.benchmarking.baselines import Padded, padded
from pnlac_fast.benchmarking.workloads import Workload
from pnlac_fast.models import Model

Way = Callable[[], Statistics]
Reader = Callable[[Padded], Sequence[Tensor]]  # the neurons of each layer, [sequence, position, neuron]


def nnsight(model: Model) -> Reader:
    """A trace that saves the input of every down projection."""
    from nnsight import save
    from nnsight.modeling.transformers import TransformersModel

    wrapped = TransformersModel(model.hf, task="text-generation", tokenizer=model.tokenizer)

    def read(batch: Padded) -> Sequence[Tensor]:
        with wrapped.trace(batch.inputs(), use_cache=False):
            found = save([layer.mlp.down_proj.input for layer in wrapped.model.layers])
        return found

    return read


def pyvene(model: Model) -> Reader:
    """A collecting intervention at every down projection, on all positions."""
    from pyvene import CollectIntervention, IntervenableModel

    sites = [f"model.layers[{layer}].mlp.down_proj.input" for layer in range(len(model.blocks))]
    wrapped = IntervenableModel(
        [{"component": site, "intervention": CollectIntervention()} for site in sites], model=model.hf
    )

    def read(batch: Padded) -> Sequence[Tensor]:
        (_, found), _ = wrapped(batch.inputs(), unit_locations=None)
        return found

    return read


def transformer_lens(model: Model) -> Reader:
    """A bridge with a hook before every down projection; it changes the model that it wraps, hence the copy."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf = copy.deepcopy(model.hf)
    wrapped = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config, dtype=hf.dtype, device=hf.device)

    def read(batch: Padded) -> Sequence[Tensor]:
        found: list[Tensor] = []
        hooks = [
            (f"blocks.{layer}.mlp.hook_post", lambda value, hook: found.append(value))
            for layer in range(len(model.blocks))
        ]
        wrapped.run_with_hooks(batch.ids, attention_mask=batch.mask, return_type=None, fwd_hooks=hooks)
        return found

    return read


PACKAGES: dict[str, Callable[[Model], Reader]] = {
    "nnsight": nnsight,
    "pyvene": pyvene,
    "transformer_lens": transformer_lens,
}


def prepare(workload: Workload) -> tuple[dict[str, Way], dict[str, str]]:
    """The peers that are installed, ready to run on base and the first tuned model; of the others, why they are not."""
    ready: dict[str, Way] = {}
    absent: dict[str, str] = {}
    for name, wrap in PACKAGES.items():
        if importlib.util.find_spec(name) is None:
            absent[name] = "not installed"
            continue
        try:
            ready[name] = _way(workload, wrap)
        except Exception as error:  # another package's: told in the result, and the rest is measured
            absent[name] = _reason(error)
    return ready, absent


def usable(ways: Mapping[str, Way], check: Callable[[str, Way], None]) -> tuple[dict[str, Way], dict[str, str]]:
    """The peers that pass ``check``; of the others, what it or they raised."""
    passed: dict[str, Way] = {}
    failed: dict[str, str] = {}
    for name, way in ways.items():
        try:
            check(name, way)
            passed[name] = way
        except Exception as error:  # as above
            failed[name] = _reason(error)
    return passed, failed


def _way(workload: Workload, wrap: Callable[[Model], Reader]) -> Way:
    pair = (workload.base, next(iter(workload.tuned.values())))
    batches = padded(workload)
    readers: list[Reader] = []
    with contextlib.redirect_stdout(io.StringIO()):  # remarks on being imported would end up in the JSON
        for model in pair:
            with model.active():
                readers.append(wrap(model))

    def run() -> Statistics:
        layers, width = len(workload.base.blocks), workload.base.width("mlp_mid")
        shape = (len(workload.texts), len(TOKENS), 5, layers, width)
        totals = torch.zeros(shape, dtype=torch.float64, device=workload.device)
        for batch in batches:
            seen: list[Sequence[Tensor]] = []
            with torch.no_grad():
                for model, read in zip(pair, readers, strict=True):
                    with model.active():
                        seen.append(read(batch))
                for layer, (base, tuned) in enumerate(zip(*seen, strict=True)):
                    _add(totals, batch, layer, base, tuned)
        return of_tensors(workload, totals)

    return run


def _add(totals: Tensor, batch: Padded, layer: int, base: Any, tuned: Any) -> None:
    """Add one layer of a batch to ``totals`` [topic, tokens, 5, layer, neuron], in float32 within the batch."""
    base, tuned = base.flatten(0, 1), tuned.flatten(0, 1)
    for topic, selector, rows in batch.counted:
        a, b = base[rows].float(), tuned[rows].float()
        d = b - a
        sums = (a.sum(0), b.sum(0), (a * a).sum(0), (b * b).sum(0), (d * d).sum(0))
        totals[topic, selector, :, layer] += torch.stack(sums)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
