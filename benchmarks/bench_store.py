"""Raw activations: writing them to the disk and reading them along both axes, in several formats; encoding bfloat16."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pnlac_fast.benchmarking.formats import FORMATS, Rows, installed, write_ours, write_plain
from pnlac_fast.benchmarking.store import BATCHES, FULL, check, encode, make_batches
from pnlac_fast.store.shards import to_stored


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("store")
    check(installed()[0], made)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def batches() -> list[Rows]:
    return make_batches(FULL)


def of_format(name: str) -> str:
    if name in installed()[1]:
        pytest.skip(f"{name}: {installed()[1][name]}")
    return name


@pytest.mark.parametrize("way", ["plain", *FORMATS, "ours, bfloat16"])
def test_write(benchmark: BenchmarkFixture, folder: Path, batches: list[Rows], way: str) -> None:
    """All ends on the disk; "ours, bfloat16" has half the bytes before it is compressed."""
    if way == "plain":
        write = write_plain
    elif way == "ours, bfloat16":
        batches = [to_stored(batch, "bfloat16") for batch in batches]

        def write(path: Path, given: list[Rows], shape: object) -> None:
            write_ours(path, given, FULL, "bfloat16")
    else:
        write = FORMATS[of_format(way)].write
    path = folder / "written"
    benchmark.group = f"write {BATCHES} x {FULL.rows} x {FULL.width} activations"
    benchmark.extra_info["gigabytes"] = sum(batch.nbytes for batch in batches) / 1e9
    benchmark.pedantic(write, (path, batches, FULL), setup=lambda: shutil.rmtree(path, ignore_errors=True), rounds=7)


@pytest.mark.parametrize("what", ["neuron", "token"])
@pytest.mark.parametrize("way", FORMATS)
def test_read(benchmark: BenchmarkFixture, folder: Path, batches: list[Rows], way: str, what: str) -> None:
    """One neuron of all tokens, or all neurons of one token, from the page cache."""
    path = folder / f"read-{of_format(way)}"
    if not path.exists():
        FORMATS[way].write(path, batches, FULL)
    middle = (BATCHES * FULL.rows // 2, FULL.width // 2)
    selection = (slice(None), middle[1]) if what == "neuron" else (middle[0], slice(None))
    select = FORMATS[way].open(path)
    np.testing.assert_array_equal(select(selection), np.concatenate(batches)[selection])
    benchmark.group = f"read one {what} of {BATCHES * FULL.rows} x {FULL.width}"
    benchmark.pedantic(select, (selection,), warmup_rounds=1, rounds=25)


def test_encode_bfloat16(benchmark: BenchmarkFixture, batches: list[Rows]) -> None:
    rounded = [to_stored(batch, "bfloat16") for batch in batches]
    benchmark.group = f"encode {BATCHES} x {FULL.rows} x {FULL.width} bfloat16, one thread"
    benchmark.extra_info["gigabytes"] = sum(batch.nbytes for batch in rounded) / 1e9
    benchmark.pedantic(encode(rounded, FULL), warmup_rounds=1, rounds=7)
