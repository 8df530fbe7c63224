"""The contrast sums: every engine against numpy in float64, over shapes, dtypes and layouts."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from pnlac_fast.ops import contrast, engines
from pnlac_fast.ops import sums as module

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
needs_library = pytest.mark.skipif(engines()["cpp"] != "available", reason=f"no compiled library: {engines()['cpp']}")
ENGINES = ["torch", pytest.param("cpp", marks=needs_library)]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pair(rows: int, neurons: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, neurons, generator=generator, dtype=torch.float64)
    tuned = base + 0.1 * torch.randn(rows, neurons, generator=generator, dtype=torch.float64)
    return base.to(dtype), tuned.to(dtype)


def grouped(*groups: list[int]) -> tuple[Tensor, Tensor]:
    rows = torch.tensor([row for group in groups for row in group], dtype=torch.int64)
    return rows, torch.tensor(np.cumsum([0, *map(len, groups)]), dtype=torch.int64)


def zeros(groups: int, neurons: int) -> Tensor:
    return torch.zeros(groups, 5, neurons, dtype=torch.float64)


def expected(base: Tensor, tuned: Tensor, rows: Tensor, offsets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The sums in numpy, and the sums of magnitudes that bound what rounding can do to them."""
    # numpy has no bfloat16; float64 holds every value of every dtype.
    a, b = base.double().numpy(), tuned.double().numpy()
    terms = np.stack([a, b, a**2, b**2, (b - a) ** 2])
    chosen = [terms[:, rows.numpy()[start:stop]] for start, stop in pairwise(offsets.tolist())]
    return np.stack([c.sum(1) for c in chosen]), np.stack([np.abs(c).sum(1) for c in chosen])


def agree(sums: Tensor, base: Tensor, tuned: Tensor, rows: Tensor, offsets: Tensor) -> None:
    exact, magnitude = expected(base, tuned, rows, offsets)
    # bfloat16 is added in float32 over at most 64 rows; each addition rounds by at most 2**-24.
    tolerance = 64 * 2.0**-24 if base.dtype == torch.bfloat16 else 1e-13
    assert sums.shape == exact.shape
    assert np.isfinite(sums.numpy()).all()
    assert (np.abs(sums.numpy() - exact) <= tolerance * magnitude).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "neurons"), [(1, 1), (1, 257), (3, 17), (65, 1025), (130, 33), (200, 64), (9, 14336)])
def test_matches_numpy(engine: str, dtype: torch.dtype, rows: int, neurons: int) -> None:
    base, tuned = pair(rows, neurons, dtype)
    index, offsets = grouped(list(range(rows)))
    sums = zeros(1, neurons)
    contrast(base, tuned, index, offsets, sums, engine=engine)
    agree(sums, base, tuned, index, offsets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_may_overlap_be_empty_and_repeat_rows(engine: str, dtype: torch.dtype) -> None:
    base, tuned = pair(150, 70, dtype)
    index, offsets = grouped([], list(range(0, 150, 2)), list(range(100)), [], [7], [149, 3, 3], [])
    sums = zeros(7, 70)
    contrast(base, tuned, index, offsets, sums, engine=engine)
    agree(sums, base, tuned, index, offsets)
    assert not sums[[0, 3, 6]].any()


@pytest.mark.parametrize(("rows", "neurons", "groups"), [(0, 5, 1), (4, 0, 1), (4, 5, 0), (4, 5, 3)])
def test_nothing_selected_changes_nothing(engine: str, rows: int, neurons: int, groups: int) -> None:
    base, tuned = pair(rows, neurons, torch.float32)
    index, offsets = grouped(*[[] for _ in range(groups)])
    sums = zeros(groups, neurons) + 3
    contrast(base, tuned, index, offsets, sums, engine=engine)
    assert torch.equal(sums, zeros(groups, neurons) + 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_only_the_selected_rows_of_any_layout(engine: str, dtype: torch.dtype) -> None:
    """Slices of larger buffers, with NaN in every row and column that does not belong."""
    base, tuned = pair(90, 40, dtype)
    index, offsets = grouped(list(range(0, 90, 3)), list(range(1, 90, 3)))
    wanted = torch.zeros(90, dtype=torch.bool)
    wanted[index] = True

    def poisoned(x: Tensor, *, columns: int, transposed: bool = False) -> Tensor:
        shape = (90 * 2, 40 * columns + 7)
        buffer = torch.full(shape[::-1] if transposed else shape, torch.nan, dtype=dtype)
        view = (buffer.T if transposed else buffer)[::2, 7::columns]
        view[wanted] = x[wanted]
        return view

    for view in ({"columns": 1}, {"columns": 3}, {"columns": 1, "transposed": True}):
        sums = zeros(2, 40)
        contrast(poisoned(base, **view), poisoned(tuned, **view), index, offsets, sums, engine=engine)
        agree(sums, base, tuned, index, offsets)


def test_writes_only_the_sums_of_any_layout(engine: str) -> None:
    base, tuned = pair(20, 6, torch.float32)
    index, offsets = grouped([1, 2, 3], [4, 19])
    buffer = torch.full((4, 5, 13), torch.nan, dtype=torch.float64)
    sums = buffer[::2, :, :12:2]
    sums.zero_()
    index = torch.stack([index, index + 1000], dim=1)[:, 0]
    contrast(base, tuned, index, offsets, sums, engine=engine)
    agree(sums, base, tuned, index, offsets)
    assert int(buffer.isnan().sum()) == buffer.numel() - sums.numel()


def test_nan_in_a_selected_row_shows(engine: str) -> None:
    base, tuned = pair(5, 3, torch.float32)
    tuned[2, 1] = torch.nan
    sums = zeros(2, 3)
    contrast(base, tuned, *grouped([0, 1, 2], [3, 4]), sums, engine=engine)
    nan = torch.zeros_like(sums, dtype=torch.bool)
    nan[0, [1, 3, 4], 1] = True
    assert torch.equal(sums.isnan(), nan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_base_may_keep_only_its_selected_rows(engine: str, dtype: torch.dtype) -> None:
    """``base_rows`` into the kept rows gives the bits of the same rows read where they were."""
    base, tuned = pair(90, 40, dtype)
    index, offsets = grouped([1, 5, 89, 30], [5, 5, 2])
    kept, place = index.unique(return_inverse=True)
    sums, in_place = zeros(2, 40), zeros(2, 40)
    contrast(base[kept], tuned, index, offsets, sums, base_rows=place, engine=engine)
    contrast(base, tuned, index, offsets, in_place, engine=engine)
    agree(sums, base, tuned, index, offsets)
    assert torch.equal(sums, in_place)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [10.0, 100.0])
def test_keeps_the_spread_where_the_mean_is_much_larger(engine: str, dtype: torch.dtype, mean: float) -> None:
    """The standard deviation, found by subtracting two nearly equal numbers, keeps five digits."""
    count = 2048
    base, tuned = (x.double() * 0.1 + mean for x in pair(count, 64, torch.float64))
    base, tuned = base.to(dtype), tuned.to(dtype)
    sums = zeros(1, 64)
    contrast(base, tuned, torch.arange(count), torch.tensor([0, count]), sums, engine=engine)
    exact = base.double().var(0, unbiased=False)
    found = sums[0, 2] / count - (sums[0, 0] / count) ** 2
    assert exact.min() > 0
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_sorted_by_topic_with_different_means(engine: str, dtype: torch.dtype) -> None:
    base, tuned = pair(300, 48, dtype)
    topic = torch.arange(300) * 3 // 300
    base += (50.0 * (topic - 1)).to(dtype)[:, None]
    tuned -= (50.0 * (topic - 1)).to(dtype)[:, None]
    index, offsets = grouped(*(torch.nonzero(topic == t)[:, 0].tolist() for t in range(3)), list(range(300)))
    sums = zeros(4, 48)
    contrast(base, tuned, index, offsets, sums, engine=engine)
    agree(sums, base, tuned, index, offsets)
    torch.testing.assert_close(sums[:3].sum(0), sums[3], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_additive_over_splits(engine: str, dtype: torch.dtype) -> None:
    """A split at a multiple of 64 rows gives the very bits of the whole where an engine adds row by row."""
    base, tuned = pair(300, 30, dtype)
    whole, split = zeros(1, 30), zeros(1, 30)
    contrast(base, tuned, torch.arange(300), torch.tensor([0, 300]), whole, engine=engine)
    for start, stop in pairwise([0, 64, 256, 300]):
        part = base[start:stop], tuned[start:stop], torch.arange(stop - start), torch.tensor([0, stop - start])
        contrast(*part, split, engine=engine)
    if engine == "cpp":
        assert torch.equal(split, whole)
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("two_threads")
def test_bits_do_not_depend_on_threads(engine: str, dtype: torch.dtype) -> None:
    base, tuned = pair(200, 3001, dtype)
    index, offsets = grouped(list(range(0, 200, 3)), list(range(200)))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        sums = zeros(2, 3001)
        contrast(base, tuned, index, offsets, sums, engine=engine)
        results.append(sums)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_every_float16_is_read_right(engine: str) -> None:
    bits = torch.arange(2**16).to(torch.int32).to(torch.int16)
    every = bits.view(torch.float16)[None]
    sums = zeros(1, 2**16)
    contrast(every, every, torch.tensor([0]), torch.tensor([0, 1]), sums, engine=engine)
    torch.testing.assert_close(sums[0, 0], every[0].double(), rtol=0, atol=0, equal_nan=True)


def test_no_gradient_flows(engine: str) -> None:
    base, tuned = (x.requires_grad_() for x in pair(4, 3, torch.float32))
    sums = zeros(1, 3)
    contrast(base, tuned, torch.arange(4), torch.tensor([0, 4]), sums, engine=engine)
    assert not sums.requires_grad
    assert sums.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(engine: str, dtype: torch.dtype) -> None:
    base, tuned = pair(20, 9, dtype)
    rows, offsets = grouped([1, 5, 19], [2])
    operation = getattr(torch.ops.pnlac_fast, f"contrast_{engine}").default
    results = torch.library.opcheck(operation, (base, tuned, rows, rows, offsets, zeros(2, 9)))
    assert set(results.values()) == {"SUCCESS"}


def test_compiles_into_one_graph(engine: str) -> None:
    def mean_difference(base: Tensor, tuned: Tensor, rows: Tensor, offsets: Tensor, sums: Tensor) -> Tensor:
        contrast(base * 2, tuned * 2, rows, offsets, sums, engine=engine)
        return sums[:, 1] - sums[:, 0]

    base, tuned = pair(20, 9, torch.float32)
    index, offsets = grouped([1, 5, 19], [2])
    eager, compiled = zeros(2, 9), zeros(2, 9)
    graph = torch.compile(mean_difference, fullgraph=True, backend="aot_eager")
    out = graph(base, tuned, index, offsets, compiled)
    assert torch.equal(out, mean_difference(base, tuned, index, offsets, eager))
    assert torch.equal(compiled, eager)


def test_the_example_in_the_documentation() -> None:
    assert doctest.testmod(module) == (0, 9)
