"""A whole fine-tuning step, by what trains."""

from __future__ import annotations

from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pnlac_fast.benchmarking import mixture_step
from pnlac_fast.benchmarking.timing import threads
from pnlac_fast.benchmarking.training_step import WAYS, check, make_setting, prepare


@pytest.fixture(scope="module")
def setting() -> Any:
    made = make_setting("small", device="cpu")
    with threads(1):
        check(*made)
    return made


@pytest.mark.parametrize("way", WAYS)
def test_training_step(benchmark: BenchmarkFixture, setting: Any, way: str) -> None:
    step = prepare(*setting, way)
    benchmark.group = "one step on 1024 tokens, hidden 512, 6 layers, float32, one thread"
    with threads(1):
        benchmark.pedantic(step, warmup_rounds=1, rounds=5)
    benchmark.extra_info["gradient_and_optimizer_megabytes"] = step.bytes() / 1e6


@pytest.fixture(scope="module")
def mixture() -> Any:
    made = mixture_step.make_mixture("small", device="cpu")
    with threads(1):
        mixture_step.check(*made)
    return made


@pytest.mark.parametrize("way", mixture_step.WAYS)
def test_training_step_of_a_mixture(benchmark: BenchmarkFixture, mixture: Any, way: str) -> None:
    step = prepare(*mixture, way)
    benchmark.group = "one step on 1024 tokens, hidden 512, 6 layers of 8 experts, float32, one thread"
    with threads(1):
        benchmark.pedantic(step, warmup_rounds=1, rounds=5)
    benchmark.extra_info["gradient_and_optimizer_megabytes"] = step.bytes() / 1e6
