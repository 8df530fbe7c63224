"""The sums of one stream; instruction sets; a million tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pnlac_fast.ops import contrast, engines, moments

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
needs_library = pytest.mark.skipif(engines()["cpp"] != "available", reason=f"no compiled library: {engines()['cpp']}")
ENGINES = ["torch", pytest.param("cpp", marks=needs_library)]


def some(rows: int, neurons: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, neurons, generator=torch.Generator().manual_seed(0)).to(dtype)


def agree(sums: Tensor, x: Tensor, rows: Tensor, offsets: Tensor) -> None:
    terms = torch.stack([x.double(), x.double() ** 2])
    chosen = [terms[:, rows[start:stop]] for start, stop in pairwise(offsets.tolist())]
    exact, magnitude = torch.stack([c.sum(1) for c in chosen]), torch.stack([c.abs().sum(1) for c in chosen])
    # bfloat16 is added in float32 over at most 64 rows; each addition rounds by at most 2**-24.
    tolerance = 64 * 2.0**-24 if x.dtype == torch.bfloat16 else 1e-13
    assert ((sums - exact).abs() <= tolerance * magnitude).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "neurons"), [(1, 1), (1, 257), (65, 1025), (200, 33), (9, 14336), (0, 4), (3, 0)])
def test_matches_float64(engine: str, dtype: torch.dtype, rows: int, neurons: int) -> None:
    """Selected rows of a slice; all that surrounds them is NaN."""
    x = some(rows, neurons, dtype)
    index = torch.cat([torch.arange(0, rows, 2), torch.arange(0, rows, 4)])
    offsets = torch.tensor([0, 0, len(range(0, rows, 2)), len(index)])
    buffer = torch.full((rows * 2, neurons + 7), torch.nan, dtype=dtype)
    view = buffer[::2, 3 : neurons + 3]
    view[::2] = x[::2]
    sums = torch.zeros(3, 2, neurons, dtype=torch.float64)
    moments(view, index, offsets, sums, engine=engine)
    agree(sums, x, index, offsets)
    moments(view.T.contiguous().T, index, offsets, again := torch.zeros_like(sums), engine=engine)
    assert torch.equal(sums, again)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads_and_are_those_of_contrast(engine: str, dtype: torch.dtype) -> None:
    x, rows, offsets = some(150, 3001, dtype), torch.arange(150), torch.tensor([0, 70, 150])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.zeros(2, 2, 3001, dtype=torch.float64))
            moments(x, rows, offsets, results[-1], engine=engine)
    finally:
        torch.set_num_threads(before)
    both = torch.zeros(2, 5, 3001, dtype=torch.float64)
    contrast(x, x + 1, rows, offsets, both, engine=engine)
    for found in results:
        assert torch.equal(found, both[:, [0, 2]])


BAD = {
    "row too large": ({"rows": torch.tensor([0, 6, 2])}, r"rows\[1\] is 6, but there are 6 rows"),
    "row negative": ({"rows": torch.tensor([0, 1, -1])}, r"rows\[2\] is -1, but there are 6 rows"),
    "offsets fall": ({"offsets": torch.tensor([0, 4, 3])}, r"must not decrease \(group 1\)"),
    "offsets start late": ({"offsets": torch.tensor([1, 2, 3])}, "start at 0 and end at 3"),
    "offsets empty": ({"offsets": torch.tensor([], dtype=torch.int64)}, "sums must be float64"),
    "rows int32": ({"rows": torch.tensor([0, 5, 2], dtype=torch.int32)}, "rows must be a vector of int64"),
    "three dims": ({"x": torch.zeros(1, 6, 4)}, r"x must be \[row, neuron\]"),
    "integers": ({"x": torch.zeros(6, 4).int()}, "not torch.int32"),
    "wider": ({"x": torch.zeros(6, 5)}, r"sums must be float64 \[2, 2, 5\]"),
    "another device": ({"x": torch.zeros(6, 4, device="meta")}, "rows must be on meta"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(engine: str, change: dict[str, Tensor], message: str) -> None:
    good = {"x": torch.ones(6, 4), "rows": torch.tensor([0, 5, 2]), "offsets": torch.tensor([0, 2, 3])}
    arguments = {**good, "sums": torch.zeros(2, 2, 4, dtype=torch.float64), **change}
    with pytest.raises(RuntimeError, match=f"^moments: .*{message}"):
        moments(**arguments, engine=engine)
    if engine == "cpp" and arguments["x"].device.type == "cpu":
        with pytest.raises(RuntimeError, match=r"^moments: "):
            torch.ops.pnlac_fast.moments_cpp(*arguments.values())
    assert not arguments["sums"].any()


@pytest.mark.parametrize("engine", ENGINES)
def test_opcheck_and_one_graph(engine: str) -> None:
    operation = getattr(torch.ops.pnlac_fast, f"moments_{engine}").default
    x, rows, offsets = some(20, 9, torch.bfloat16), torch.tensor([1, 5, 19, 2]), torch.tensor([0, 3, 4])
    eager, compiled = torch.zeros(2, 2, 2, 9, dtype=torch.float64)
    assert set(torch.library.opcheck(operation, (x, rows, offsets, eager.clone())).values()) == {"SUCCESS"}
    moments(x, rows, offsets, eager, engine=engine)
    torch.compile(moments, fullgraph=True, backend="aot_eager")(x, rows, offsets, compiled, engine=engine)
    assert torch.equal(compiled, eager)


@needs_library
def test_a_million_bfloat16_tokens() -> None:
    """Mean much larger than spread: the standard deviations keep four digits."""
    generator = torch.Generator().manual_seed(0)
    neurons, blocks, rows = 16, 16, 2**16
    sums = torch.zeros(1, 5, neurons, dtype=torch.float64)
    exact = torch.zeros(2, 3, neurons, dtype=torch.float64)
    index, offsets = torch.arange(rows), torch.tensor([0, rows])
    for _ in range(blocks):
        base, tuned = (torch.randn(rows, neurons, generator=generator) + 50 for _ in range(2))
        base, tuned = base.bfloat16(), tuned.bfloat16()
        contrast(base, tuned, index, offsets, sums, engine="cpp")
        for into, x in zip(exact, (base, tuned), strict=True):
            # About 50, so that the float64 sums themselves lose nothing.
            shifted = x.double() - 50
            into += torch.stack([torch.full((neurons,), float(rows)), shifted.sum(0), shifted.square().sum(0)])
    count = blocks * rows
    for first, square, (_, shifted, shifted_square) in zip(sums[0, :2], sums[0, 2:4], exact, strict=True):
        deviation = (shifted_square / count - (shifted / count) ** 2).sqrt()
        torch.testing.assert_close((square / count - (first / count) ** 2).sqrt(), deviation, rtol=1e-4, atol=0)


@needs_library
def test_instruction_sets_agree(tmp_path: Path) -> None:
    """Where products are exact, in all bits; the squared difference of bfloat16 is rounded once more without FMA."""
    script = """
import sys, torch
from pnlac_fast.ops import contrast
generator = torch.Generator().manual_seed(0)
found = []
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    base, tuned = (torch.randn(150, 101, generator=generator).to(dtype) for _ in range(2))
    sums = torch.zeros(1, 5, 101, dtype=torch.float64)
    contrast(base, tuned, torch.arange(150), torch.tensor([0, 150]), sums, engine="cpp")
    found.append(sums[0])
torch.save(found, sys.argv[1])
"""
    results = {}
    for isa in ("default", "avx2", "avx512"):
        path = tmp_path / isa
        environment = {**os.environ, "PNLAC_ISA": isa}
        run = subprocess.run(
            [sys.executable, "-c", script, str(path)], env=environment, capture_output=True, text=True, check=False
        )
        if "is not an instruction set of this processor" in run.stderr:
            continue
        assert run.returncode == 0, run.stderr
        results[isa] = torch.load(path, weights_only=True)
    for isa, (float32, float64, bfloat16, float16) in results.items():
        reference = results["default"]
        assert torch.equal(float32, reference[0])
        assert torch.equal(float16, reference[3])
        assert torch.equal(bfloat16[:4], reference[2][:4])
        torch.testing.assert_close(float64, reference[1], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(bfloat16[4], reference[2][4], rtol=1e-6, atol=0)
        if isa != "default":
            assert torch.equal(bfloat16, results["avx2"][2])
