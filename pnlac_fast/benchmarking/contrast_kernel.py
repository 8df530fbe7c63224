"""The contrast sums alone: this package's kernel against plain torch and against numpy in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pnlac_fast.benchmarking.ceiling import readers
from pnlac_fast.benchmarking.timing import interleaved, ratio
from pnlac_fast.benchmarking.workloads import DTYPES
from pnlac_fast.loading import resolve_device
from pnlac_fast.ops import contrast, engines

ROWS, NEURONS, GROUPS = 4096, 14336, 4  # the width of Llama-3.1-8B's MLP; no cache holds so much

Sums = Callable[[], Tensor]


def ways(base: Tensor, tuned: Tensor, groups: int = GROUPS) -> dict[str, Sums]:
    """Ways to compute the sums over all rows, in equal groups; each returns [group, 5, neuron] float64.

    "ours" is the fastest engine on the device of the tensors, "torch" what one writes without thinking of a kernel,
    "numpy" the float64 arithmetic of the paper's released code; the last only on the CPU.
    """
    rows = torch.arange(len(base), device=base.device)
    bounds = torch.linspace(0, len(base), groups + 1).long()
    offsets = bounds.to(base.device)

    def ours() -> Tensor:
        total = torch.zeros(groups, 5, base.shape[1], dtype=torch.float64, device=base.device)
        contrast(base, tuned, rows, offsets, total)
        return total

    def eager() -> Tensor:
        found = []
        for start, stop in pairwise(bounds.tolist()):
            a, b = base[start:stop].double(), tuned[start:stop].double()
            d = b - a
            found.append(torch.stack([a.sum(0), b.sum(0), (a * a).sum(0), (b * b).sum(0), (d * d).sum(0)]))
        return torch.stack(found)

    def in_numpy() -> Tensor:
        found = []
        for start, stop in pairwise(bounds.tolist()):
            # numpy has no bfloat16, and float32 holds all its values.
            a, b = (x[start:stop].float().numpy().astype(np.float64) for x in (base, tuned))
            d = b - a
            found.append(np.stack([a.sum(0), b.sum(0), (a * a).sum(0), (b * b).sum(0), (d * d).sum(0)]))
        return torch.from_numpy(np.stack(found))

    return {"ours": ours, "torch": eager} | ({"numpy": in_numpy} if base.device.type == "cpu" else {})


def measure(
    *, repeats: int = 5, device: str = "auto", rows: int = ROWS, neurons: int = NEURONS, groups: int = GROUPS
) -> dict[str, Any]:
    """Check, then time the ways side by side, in float32 and bfloat16.

    Returns
    -------
    dict
        By dtype: ``torch_vs_ours`` and, on the CPU, ``numpy_vs_ours``, how many times longer they take, and with the
        compiled library ``read_vs_ours``, the share of the read ceiling that the kernel reaches: the time to read the
        same bytes and do nothing (:func:`pnlac_fast.benchmarking.ceiling.readers`, the fastest of a round) over ours.
        Besides: ``rows``, ``neurons``, ``groups``.

    Raises
    ------
    RuntimeError
        Two ways do not find the same.
    """
    place = resolve_device(device)
    generator = torch.Generator(place).manual_seed(0)
    result: dict[str, Any] = {"rows": rows, "neurons": neurons, "groups": groups}
    for name, dtype in DTYPES.items():
        base = torch.randn(rows, neurons, generator=generator, device=place)
        noise = torch.randn(rows, neurons, generator=generator, device=place)
        found = ways(base.to(dtype), (base + 0.1 * noise).to(dtype), groups)
        exact = found["torch"]()
        for way, run in found.items():
            if not torch.allclose(run(), exact, rtol=1e-6, atol=1e-4):
                raise RuntimeError(f"The contrast of '{way}' in {name} is not that of float64: no timing")
        bare: dict[str, Callable[[], Any]] = {}
        if place.type == "cpu" and engines()["cpp"] == "available":
            bare = readers(2 * base.numel() * dtype.itemsize)
        seconds = interleaved({**found, **bare}, repeats, place)
        result[name] = {f"{way}_vs_ours": ratio(seconds[way], seconds["ours"]) for way in found if way != "ours"}
        if bare:
            fastest = [min(round_) for round_ in zip(*(seconds[way] for way in bare), strict=True)]
            result[name]["read_vs_ours"] = ratio(fastest, seconds["ours"])
    return result
