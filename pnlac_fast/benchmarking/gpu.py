"""Kernels on a GPU against what its memory allows: the contrast sums by engine, and masked AdamW against torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pnlac_fast.benchmarking import masked
from pnlac_fast.benchmarking.timing import ratio
from pnlac_fast.errors import UserError
from pnlac_fast.ops import contrast, engines

NEURONS, GROUPS = 14336, 6  # the width of Llama-3.1-8B's MLP, six topics
ROWS = (2048, 8192)
REPLAYS = 20
# The MLP of one layer of that model, and adapters of rank 16 on those of all 32.
FULL = ((14336, 4096), (14336, 4096), (4096, 14336))
ADAPTERS = ((16, 4096), (14336, 16), (16, 4096), (14336, 16), (16, 14336), (4096, 16)) * 32


def measure(*, repeats: int = 5, device: str = "cuda") -> dict[str, Any]:
    """Check, then time.

    Returns
    -------
    dict
        ``copy``: bytes that ``Tensor.copy_`` reads and writes in a second. ``contrast``: by dtype, rows and engine,
        bytes read in a second over that. ``masked_step``: by kind of tensors, the masked step over torch's fused one.

    Raises
    ------
    UserError
        There is no CUDA device.
    RuntimeError
        An engine finds other sums than float64 in plain torch, or the masked step differs from its reference.
    """
    if not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device here: measure its kernels where there is one.")
    # Large enough that nothing of it stays in the cache.
    source = torch.empty(2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = [2 * source.nbytes / s for s in graph_seconds(lambda: target.copy_(source), repeats)]
    sums = {
        str(dtype).removeprefix("torch."): {str(rows): _contrast(rows, dtype, copy, device) for rows in ROWS}
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    masked.check(device)
    steps: dict[str, Any] = {}
    for name, shapes in (("full", FULL), ("lora", ADAPTERS)):
        seconds = masked.masked_step(repeats, device=device, shapes=shapes)
        steps[name] = {f"{way}_vs_torch": ratio(s, seconds["torch"]) for way, s in seconds.items() if way != "torch"}
    return {
        "neurons": NEURONS,
        "groups": GROUPS,
        "copy": {"unit": "bytes/s", "largest": max(copy), "smallest": min(copy)},
        "contrast": sums,
        "masked_step": steps,
    }


def graph_seconds(work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of the device for one run, from replays of a CUDA graph, so that launching from Python does not count."""
    # Compiles and allocates; a stream of its own, as capturing demands.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    found = []
    for _ in range(repeats + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / 1000 / REPLAYS)
    return found[1:]


def _contrast(rows: int, dtype: torch.dtype, copy: list[float], device: str) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    base = torch.randn(rows, NEURONS, generator=generator, device=device)
    tuned = (base + 0.1 * torch.randn(rows, NEURONS, generator=generator, device=device)).to(dtype)
    base = base.to(dtype)
    index = torch.arange(rows, device=device)
    offsets = torch.linspace(0, rows, GROUPS + 1).long().to(device)
    exact = torch.zeros(GROUPS, 5, NEURONS, dtype=torch.float64, device=device)
    contrast(base, tuned, index, offsets, exact, engine="torch")
    found: dict[str, Any] = {}
    for engine in ("triton", "cuda"):
        if engines()[engine] != "available":
            found[engine] = engines()[engine]
            continue
        sums = torch.zeros_like(exact)
        contrast(base, tuned, index, offsets, sums, engine=engine)
        if not torch.allclose(sums, exact, rtol=1e-6, atol=1e-4):
            raise RuntimeError(f"The contrast by '{engine}' in {dtype} is not that of float64: no timing")
        work = partial(contrast, base, tuned, index, offsets, sums, engine=engine)
        seconds = graph_seconds(work, len(copy))
        found[f"{engine}_vs_copy"] = ratio([2 * base.nbytes / s for s in seconds], copy)
    return found
