"""An optimizer step with 5 % of the rows or columns inhibited, masked and by the ways around it."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pnlac_fast.benchmarking.masked import DIMS, WAYS, check, make_weights
from pnlac_fast.benchmarking.timing import threads


@pytest.fixture(scope="module", autouse=True)
def _checked() -> None:
    check()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inhibited", DIMS)
@pytest.mark.parametrize("number", [1, 2])
def test_masked_step(benchmark: BenchmarkFixture, number: int, inhibited: str, way: str) -> None:
    step = WAYS[way](make_weights(DIMS[inhibited]))
    benchmark.group = f"AdamW, 33.6 M float32 weights, 5 % of {inhibited} inhibited, threads: {number}"
    with threads(number):
        benchmark.pedantic(step, warmup_rounds=1, rounds=7)
