"""The contrast sums: compiled library against the torch reference and against numpy in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from pnlac_fast.ops import contrast, engines

ROWS, NEURONS, GROUPS = 1024, 14336, 4  # the width of Llama-3.1-8B's MLP
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Sums = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def by_engine(engine: str) -> Sums:
    def sums(base: Tensor, tuned: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        total = torch.zeros(GROUPS, 5, NEURONS, dtype=torch.float64)
        contrast(base, tuned, rows, offsets, total, engine=engine)
        return total

    return sums


def by_numpy(base: Tensor, tuned: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    total = np.empty((GROUPS, 5, NEURONS))
    for group in range(GROUPS):
        chosen = rows[offsets[group] : offsets[group + 1]]
        # numpy has no bfloat16, and float32 holds all its values.
        a, b = (x[chosen].float().numpy().astype(np.float64) for x in (base, tuned))
        d = b - a
        total[group] = a.sum(0), b.sum(0), (a * a).sum(0), (b * b).sum(0), (d * d).sum(0)
    return torch.from_numpy(total)


WAYS: dict[str, Sums] = {"cpp": by_engine("cpp"), "torch": by_engine("torch"), "numpy": by_numpy}


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("one_thread")
def test_contrast(benchmark: BenchmarkFixture, dtype: str, way: str) -> None:
    if way == "cpp" and engines()["cpp"] != "available":
        pytest.skip(engines()["cpp"])
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(ROWS, NEURONS, generator=generator).to(DTYPES[dtype])
    tuned = (base + 0.1 * torch.randn(ROWS, NEURONS, generator=generator)).to(DTYPES[dtype])
    rows, offsets = torch.arange(ROWS), torch.linspace(0, ROWS, GROUPS + 1).long()

    exact = by_numpy(base, tuned, rows, offsets)
    found = WAYS[way](base, tuned, rows, offsets)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-4)

    benchmark.group = f"contrast, {ROWS} x {NEURONS} {dtype}, one thread"
    benchmark.extra_info["gigabytes_read"] = 2 * base.nbytes / 1e9
    benchmark.pedantic(WAYS[way], (base, tuned, rows, offsets), warmup_rounds=1, rounds=5)
