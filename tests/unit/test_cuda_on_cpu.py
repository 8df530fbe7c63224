"""The kernels for CUDA give the reference's sums, run on the CPU, thread by thread: a GPU is seldom at hand."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pnlac_fast.ops import contrast

ROOT = Path(__file__).parents[2]
CXX = shutil.which("g++")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # as in csrc/dtype.h
LAUNCH = re.compile(r"(\w+(?:<[^;<>]*>)?)<<<([^;]*?)>>>\(([^;]*?)\);")
ENTRY = """
extern "C" void run(const void* base, const void* tuned, int64_t base_stride, int64_t stride, const int64_t* rows,
                    const int64_t* base_rows, const int64_t* offsets, double* sums, int64_t groups, int64_t neurons,
                    int64_t base_count, int64_t count, int64_t selected, int dtype) {
  const pnlac::ContrastParams p{base, tuned, base_stride, stride, rows, base_rows, offsets, sums, groups, neurons};
  const pnlac::cuda::Extent extent{base_count, count, selected};
  std::vector<double> scratch(pnlac::cuda::contrast_scratch(p, extent, pnlac::DType(dtype)), 1e300);
  pnlac::cuda::contrast(p, extent, pnlac::DType(dtype), scratch.data(), 0, nullptr);
}
"""

pytestmark = pytest.mark.skipif(CXX is None, reason="there is no g++ on PATH")


def build(folder: Path, blocks: int = 512) -> ctypes.CDLL:
    """The library, with chunks long enough for so many blocks to have one."""
    source = (ROOT / "csrc/cuda/contrast.cu").read_text(encoding="utf-8")
    source, launches = LAUNCH.subn(r"run_on_cpu(\2, [&] { \1(\3); });", source)
    source, chosen = re.subn(r"kBlocks = 512;", f"kBlocks = {blocks};", source)
    assert (launches, chosen) == (3, 1)
    (folder / "contrast.cpp").write_text(source + ENTRY, encoding="utf-8")
    options = ["-std=c++20", "-O2", "-shared", "-fPIC", "-pthread"]
    options += [f"-I{ROOT / path}" for path in ("tests/cuda_on_cpu", "csrc/cuda", "csrc")]
    target = str(folder / "contrast.so")
    subprocess.run([str(CXX), *options, str(folder / "contrast.cpp"), "-o", target], check=True)
    return ctypes.CDLL(target)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("cuda"))


def on_cpu(
    library: ctypes.CDLL, base: Tensor, tuned: Tensor, rows: Tensor, offsets: Tensor, sums: Tensor, base_rows: Tensor
) -> None:
    tensors = [ctypes.c_void_p(t.data_ptr()) for t in (base, tuned, rows, base_rows, offsets, sums)]
    numbers = (len(sums), base.shape[1], len(base), len(tuned), len(rows))
    library.run(
        *tensors[:2],
        *(ctypes.c_int64(t.stride(0)) for t in (base, tuned)),
        *tensors[2:],
        *map(ctypes.c_int64, numbers),
        DTYPES.index(base.dtype),
    )


def streams(rows: int, neurons: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(rows, neurons, generator=draw, dtype=torch.float64)
    return base.to(dtype), (base + 0.1 * torch.randn(rows, neurons, generator=draw, dtype=torch.float64)).to(dtype)


def agree(found: Tensor, base: Tensor, tuned: Tensor, rows: Tensor, offsets: Tensor, base_rows: Tensor) -> None:
    """Within what rounding can do: bfloat16 is added in float32 over at most 64 rows, all else in float64."""
    expected, magnitude = torch.ones_like(found), torch.ones_like(found)
    contrast(base, tuned, rows, offsets, expected, base_rows=base_rows, engine="torch")
    contrast(base.abs(), tuned.abs(), rows, offsets, magnitude, base_rows=base_rows, engine="torch")
    magnitude[:, 4] = expected[:, 4]
    bound = (64 * 2.0**-24 if base.dtype == torch.bfloat16 else 1e-13) * magnitude
    assert bool(((found - expected).abs() <= bound).all())


# One block and several, a vector at a time and a number at a time, rows that fill no turn.
@pytest.mark.parametrize(("rows", "neurons"), [(3, 8), (70, 264), (130, 33)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_the_references(library: ctypes.CDLL, dtype: torch.dtype, rows: int, neurons: int) -> None:
    """Rows in any order and more than once, of base others than of tuned; groups of different sizes, some empty."""
    base, tuned = streams(rows, neurons, dtype)
    draw = torch.Generator().manual_seed(1)
    chosen, of_base = (torch.randint(0, rows, (2 * rows,), generator=draw) for _ in range(2))
    offsets = torch.tensor([0, 0, 2 * rows // 3, 2 * rows // 3, 2 * rows // 3 + 1, 2 * rows, 2 * rows])
    found = torch.ones(6, 5, neurons, dtype=torch.float64)
    on_cpu(library, base, tuned, chosen, offsets, found, of_base)
    agree(found, base, tuned, chosen, offsets, of_base)


def test_bfloat16_is_added_over_few_rows(tmp_path: Path) -> None:
    """In one block, whose lanes add 4096 rows each; of squares such as these float32 loses bits from 2048 on."""
    base, rows = torch.full((33_000, 8), 1 + 2**-7, dtype=torch.bfloat16), torch.arange(33_000)
    found, offsets = torch.ones(1, 5, 8, dtype=torch.float64), torch.tensor([0, 33_000])
    on_cpu(build(tmp_path, blocks=1), base, -base, rows, offsets, found, rows)
    agree(found, base, -base, rows, offsets, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neurons", [8, 9])
def test_only_listed_rows_are_read(library: ctypes.CDLL, dtype: torch.dtype, neurons: int) -> None:
    base, tuned = streams(20, neurons, dtype)
    rows, offsets = torch.arange(0, 20, 2), torch.tensor([0, 4, 10])
    for stream in (base, tuned):
        stream[1::2] = torch.nan
    found = torch.ones(2, 5, neurons, dtype=torch.float64)
    on_cpu(library, base, tuned, rows, offsets, found, rows.flip(0))
    agree(found, base, tuned, rows, offsets, rows.flip(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neurons", [8, 9])
def test_what_does_not_exist_is_not_read_and_shows(library: ctypes.CDLL, dtype: torch.dtype, neurons: int) -> None:
    base, tuned = streams(6, neurons, dtype)
    rows = torch.tensor([0, 5, 2**62, 3, -1])
    found = torch.ones(3, 5, neurons, dtype=torch.float64)
    on_cpu(library, base, tuned, rows, torch.tensor([0, 2, 4, 5]), found, rows)
    agree(found[:1], base, tuned, rows[:2], torch.tensor([0, 2]), rows[:2])
    assert bool(found[1:].isnan().all())
    of_base = torch.tensor([0, 6, 0])
    found = torch.ones(1, 5, neurons, dtype=torch.float64)
    on_cpu(library, base, tuned, torch.tensor([0, 1, 2]), torch.tensor([0, 3]), found, of_base)
    assert [bool(kind.isnan().all()) for kind in found[0]] == [True, False, True, False, True]
    for offsets in ([1, 2, 3], [0, 2, 2], [0, 9, 3], [-5, 2, 3]):
        found = torch.ones(2, 5, neurons, dtype=torch.float64)
        on_cpu(library, base, tuned, torch.tensor([0, 5, 2]), torch.tensor(offsets), found, torch.tensor([0, 5, 2]))
        assert bool(found.isnan().any())


def test_nothing_selected_changes_nothing(library: ctypes.CDLL) -> None:
    base, tuned = streams(4, 5, torch.float32)
    none, found = torch.zeros(0, dtype=torch.int64), torch.ones(3, 5, 5, dtype=torch.float64)
    on_cpu(library, base, tuned, none, torch.zeros(4, dtype=torch.int64), found, none)
    assert torch.equal(found, torch.ones_like(found))
