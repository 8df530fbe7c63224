"""Localising one tuned model: two bare padded passes, this package, the way of the paper's code, other packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from pnlac_fast.benchmarking import baselines, localise, peers
from pnlac_fast.benchmarking.agreement import Statistics
from pnlac_fast.benchmarking.workloads import Workload, make_workload

WAYS = ("floor", "ours", "command", "released", *peers.PACKAGES)


@pytest.fixture(scope="module")
def workload(shape: str) -> Iterator[Workload]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_workload(shape, tuned=1)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exact(workload: Workload) -> Statistics:
    """What the paper's way finds, prompt by prompt in float64."""
    return baselines.released(workload)()


@pytest.mark.parametrize("way", WAYS)
def test_localise(benchmark: BenchmarkFixture, workload: Workload, exact: Statistics, tmp_path: Path, way: str) -> None:
    installed, absent = peers.prepare(workload) if way in peers.PACKAGES else ({}, {})
    if way in absent:
        pytest.skip(f"{way}: {absent[way]}")
    ways: dict[str, Callable[[], Any]] = {
        "floor": baselines.floor(workload),
        "ours": localise.ours(workload),
        "command": localise.command(workload, tmp_path),
        "released": baselines.released(workload),
        **installed,
    }
    if way == "command":
        localise.check_store(workload, ways[way](), against=exact)
    elif way != "floor":  # which computes no statistics
        localise.check(workload, {way: ways[way]}, against=exact)
    benchmark.group = f"localise, {workload.shape}, one tuned model, {workload.tokens} tokens, one thread"
    benchmark.pedantic(ways[way], warmup_rounds=int(way == "floor"), rounds=3)
