"""The contrast sums against the read ceiling of the same bytes, plain torch and numpy; and SwiGLU, apart and fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional

from pnlac_fast.benchmarking.ceiling import STREAMS, readers
from pnlac_fast.benchmarking.contrast_kernel import GROUPS, NEURONS, ROWS, ways
from pnlac_fast.benchmarking.timing import threads
from pnlac_fast.benchmarking.workloads import DTYPES
from pnlac_fast.ops import contrast, engines, swiglu, swiglu_contrast

needs_library = pytest.mark.skipif(engines()["cpp"] != "available", reason=f"no compiled library: {engines()['cpp']}")


def pair(dtype: str, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(rows, NEURONS, generator=generator)
    return base.to(DTYPES[dtype]), (base + 0.1 * torch.randn(rows, NEURONS, generator=generator)).to(DTYPES[dtype])


@pytest.mark.parametrize("way", ["ours", "torch", "numpy", *(f"read, {n} streams" for n in STREAMS)])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@needs_library
def test_contrast(benchmark: BenchmarkFixture, dtype: str, number: int, way: str) -> None:
    """The fastest reader is the ceiling: its time over that of "ours" is the share of it that the kernel reaches."""
    base, tuned = pair(dtype)
    runs: dict[str, Callable[[], Any]] = {**ways(base, tuned), **readers(2 * base.nbytes)}
    with threads(number):
        if not way.startswith("read"):
            torch.testing.assert_close(runs[way](), ways(base, tuned)["torch"](), rtol=1e-6, atol=1e-4)
        benchmark.group = f"contrast, {ROWS} x {NEURONS} {dtype} in {GROUPS} groups, {number} threads"
        benchmark.extra_info["gigabytes_read"] = 2 * base.nbytes / 1e9
        benchmark.pedantic(runs[way], warmup_rounds=1, rounds=5 if way in ("torch", "numpy") else 15)


def swiglu_ways(gate: Tensor, up: Tensor, base: Tensor) -> dict[str, Callable[[], tuple[Tensor, Tensor | None]]]:
    """The result, and where they are formed the contrast sums of it against ``base``."""
    rows, offsets = torch.arange(len(gate)), torch.tensor([0, len(gate)])
    counts = torch.ones(1, len(gate))

    def sums() -> Tensor:
        return torch.zeros(1, 5, gate.shape[1], dtype=torch.float64)

    def apart(mid: Tensor) -> tuple[Tensor, Tensor]:
        contrast(base, mid, rows, offsets, total := sums())
        return mid, total

    def fused() -> tuple[Tensor, Tensor]:
        mid = swiglu_contrast(gate, up, base, rows, counts, total := sums())
        return mid, total

    return {
        "eager": lambda: (functional.silu(gate) * up, None),
        "swiglu": lambda: (swiglu(gate, up), None),
        "eager, then contrast": lambda: apart(functional.silu(gate) * up),
        "swiglu, then contrast": lambda: apart(swiglu(gate, up)),
        "fused": fused,
    }


@pytest.mark.parametrize("way", ["eager", "swiglu", "eager, then contrast", "swiglu, then contrast", "fused"])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@needs_library
def test_swiglu(benchmark: BenchmarkFixture, dtype: str, number: int, way: str) -> None:
    gate, up = pair(dtype)
    runs = swiglu_ways(gate, up, gate.flip(0))
    with threads(number), torch.inference_mode():
        found, wanted = runs[way](), runs["eager, then contrast"]()
        torch.testing.assert_close(found[0], wanted[0])
        if found[1] is not None:
            torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-2)
        benchmark.group = f"swiglu, {ROWS} x {NEURONS} {dtype}, {number} threads"
        benchmark.pedantic(runs[way], warmup_rounds=1, rounds=7)
