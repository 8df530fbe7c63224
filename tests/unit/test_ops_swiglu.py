"""The middle of a gated MLP, its gradients, and the contrast sums fused with it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pnlac_fast.errors import UserError
from pnlac_fast.ops import contrast, engines, swiglu, swiglu_backward, swiglu_contrast

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Two roundings to the dtype, of which each may fall on the other side.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
needs_library = pytest.mark.skipif(engines()["cpp"] != "available", reason=f"no compiled library: {engines()['cpp']}")
ENGINES = ["torch", pytest.param("cpp", marks=needs_library)]
ACTIVATIONS = {"silu": functional.silu, "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh")}
SHAPES = [(1, 1), (1, 257), (65, 33), (130, 70), (3, 14336), (0, 5), (4, 0)]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=ACTIVATIONS)
def activation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def some(rows: int, neurons: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (2 * torch.randn(rows, neurons, generator=torch.Generator().manual_seed(seed))).to(dtype)


def poisoned(x: Tensor, *, columns: int = 1, transposed: bool = False) -> Tensor:
    """The same values as part of a buffer that is NaN elsewhere."""
    shape = (2 * len(x), columns * x.shape[1] + 7)
    buffer = torch.full(shape[::-1] if transposed else shape, torch.nan, dtype=x.dtype)
    view = (buffer.T if transposed else buffer)[::2, 7::columns]
    view.copy_(x)
    return view


def exact(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](gate.double()) * up.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "neurons"), SHAPES)
def test_swiglu_matches_float64(engine: str, activation: str, dtype: torch.dtype, rows: int, neurons: int) -> None:
    gate, up = some(rows, neurons, dtype), some(rows, neurons, dtype, 1)
    found = swiglu(gate, up, activation, engine=engine)
    assert found.dtype == dtype
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), exact(gate, up, activation), rtol=TOLERANCE[dtype], atol=1e-6)
    for layout in ({}, {"columns": 3}, {"transposed": True}):
        view = swiglu(poisoned(gate, **layout), poisoned(up, **layout), activation, engine=engine)
        assert torch.equal(view, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_swiglu_rounds_as_torch_does_eagerly(engine: str, activation: str, dtype: torch.dtype) -> None:
    gate, up = some(200, 100, dtype), some(200, 100, dtype, 1)
    if activation == "gelu_tanh":
        gate = gate.abs()  # torch's own 1 + tanh cancels below 0
    eager = ACTIVATIONS[activation](gate) * up
    differ = swiglu(gate, up, activation, engine=engine) != eager
    # An activation so near the middle of two values that fp32 and fp64 round it differently.
    assert differ.float().mean() < 0.01


def test_swiglu_over_the_whole_range(engine: str, activation: str) -> None:
    """2 ulp in float32, and what the rounding of the exponent adds; zeros, infinities and NaN as they should be."""
    gate = torch.linspace(-86, 100, 100_001)[None]
    found = swiglu(gate, torch.ones_like(gate), activation, engine=engine)
    x = gate.double()
    exponent = x if activation == "silu" else (8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    wanted = x * torch.sigmoid(exponent)
    tolerance = 2.0**-24 * (4 + 3 * exponent.abs())
    worst = ((found - wanted).abs() - 1e-37) / wanted.abs().clamp_min(1e-300)
    assert (worst <= tolerance).all()
    special = torch.tensor([[0.0, torch.inf, torch.nan, 1e30, -1000.0]])
    found = swiglu(special, torch.ones_like(special), activation, engine=engine)[0]
    torch.testing.assert_close(found, torch.tensor([0.0, torch.inf, torch.nan, 1e30, 0.0]), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "neurons"), SHAPES)
def test_backward_matches_autograd(engine: str, activation: str, dtype: torch.dtype, rows: int, neurons: int) -> None:
    gate, up, grad = (some(rows, neurons, dtype, seed) for seed in range(3))
    leaves = [x.double().requires_grad_() for x in (gate, up)]
    wanted = torch.autograd.grad(exact(*leaves, activation), leaves, grad.double())
    found = swiglu_backward(poisoned(grad), poisoned(gate), poisoned(up, transposed=True), activation, engine=engine)
    own = [x.clone().requires_grad_() for x in (gate, up)]
    through = torch.autograd.grad(swiglu(*own, activation, engine=engine), own, grad)
    for x, by_autograd, y in zip(found, through, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=3 * TOLERANCE[dtype], atol=3 * TOLERANCE[dtype])
        assert torch.equal(x, by_autograd)


def counted(groups: int, rows: int) -> tuple[Tensor, Tensor]:
    """Counts, most of them 0, and which rows count anywhere."""
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(0, 6, (groups, rows), generator=generator).sub(2).clamp_min(0).float()
    counts[:, ::3] = 0
    return counts, counts.sum(0) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "neurons"), SHAPES)
@pytest.mark.parametrize("groups", [0, 1, 3])
@pytest.mark.usefixtures("restored_threads")
def test_fused_sums(engine: str, dtype: torch.dtype, rows: int, neurons: int, groups: int) -> None:
    """Those of swiglu and contrast apart; the result in all bits. Rows that do not count may be NaN."""
    gate, up = some(rows, neurons, dtype), some(rows, neurons, dtype, 1)
    counts, has = counted(groups, rows)
    gate[~has] = torch.nan
    base = some(int(has.sum()), neurons, dtype, 2)
    base_rows = torch.full((rows,), -1)
    base_rows[has] = torch.arange(len(base)).flip(0)

    mid = swiglu(gate, up, engine=engine)
    wanted = torch.zeros(groups, 5, neurons, dtype=torch.float64)
    repeated = [torch.arange(rows).repeat_interleave(c.long()) for c in counts]
    index = torch.cat([torch.arange(0), *repeated])
    offsets = torch.tensor([0, *map(len, repeated)]).cumsum(0)
    contrast(base, mid, index, offsets, wanted, base_rows=base_rows[index], engine="torch")
    magnitude = torch.zeros_like(wanted)
    contrast(base.abs(), mid.abs(), index, offsets, magnitude, base_rows=base_rows[index], engine="torch")
    magnitude[:, 4] = wanted[:, 4]

    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        buffer = torch.full((groups, 5, 2 * neurons), torch.nan, dtype=torch.float64)
        sums = buffer[:, :, ::2].zero_()
        views = (poisoned(x) for x in (gate, up, base))
        assert torch.equal(
            swiglu_contrast(*views, base_rows, counts, sums, engine=engine).nan_to_num(), mid.nan_to_num()
        )
        assert int(buffer.isnan().sum()) == buffer.numel() // 2
        results.append(sums)
    tolerance = 200 * 2.0**-24 if dtype == torch.bfloat16 else 1e-13
    assert ((results[0] - wanted).abs() <= tolerance * magnitude).all()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


GOOD: dict[str, Any] = {
    "gate": torch.ones(3, 4),
    "up": torch.ones(3, 4),
    "base": torch.ones(2, 4),
    "base_rows": torch.tensor([0, -1, 1]),
    "counts": torch.tensor([[1.0, 0, 2], [0, 0, 1]]),
    "sums": torch.zeros(2, 5, 4, dtype=torch.float64),
    "activation": "silu",
}
BAD = {
    "up narrower": ({"up": torch.ones(3, 3)}, "agree in shape and dtype"),
    "up in half": ({"up": torch.ones(3, 4).half()}, "agree in dtype"),
    "gate one row": ({"gate": torch.ones(4)}, r"gate must be \[row, neuron\]"),
    "integers": ({"gate": torch.ones(3, 4).int(), "up": torch.ones(3, 4).int()}, "not torch.int32"),
    "base wider": ({"base": torch.ones(2, 5)}, "must have the same neurons"),
    "base in half": ({"base": torch.ones(2, 4).half()}, "agree in dtype"),
    "base row too large": ({"base_rows": torch.tensor([0, -1, 2])}, r"base_rows\[2\] is 2, but there are 2 rows"),
    "unused base row": ({"base_rows": torch.tensor([0, 9, 1])}, r"base_rows\[1\] is 9, but there are 2 rows"),
    "base row -2": ({"base_rows": torch.tensor([0, -2, 1])}, r"base_rows\[1\] is -2"),
    "counted without base": (
        {"base_rows": torch.tensor([-1, -1, 1])},
        r"base_rows\[0\] is -1.* a group counts the row",
    ),
    "too few base rows": ({"base_rows": torch.tensor([0, -1])}, "an entry for each of the 3 rows|for each row"),
    "count a half": ({"counts": torch.tensor([[1.0, 0, 0.5], [0, 0, 1]])}, r"counts\[0, 2\] is 0.5, not a whole"),
    "count negative": ({"counts": torch.tensor([[1.0, 0, 1], [0, 0, -1]])}, r"counts\[1, 2\] is -1, not a whole"),
    "count NaN": ({"counts": torch.full((2, 3), torch.nan)}, r"counts\[0, 0\] is -?nan, not a whole"),
    "count infinite": ({"counts": torch.full((2, 3), torch.inf)}, r"counts\[0, 0\] is inf, not a whole"),
    "counts in float64": ({"counts": torch.ones(2, 3).double()}, r"counts must be float32 \[group, 3\]"),
    "counts of fewer rows": ({"counts": torch.ones(2, 2)}, r"counts must be float32 \[group, 3\]"),
    "sums of one group": ({"sums": torch.zeros(1, 5, 4).double()}, r"sums must be float64 \[2, 5, 4\]"),
    "another device": ({"base": torch.ones(2, 4, device="meta")}, "base must be on cpu"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(engine: str, change: dict[str, Tensor], message: str) -> None:
    """Also called past the checks in Python, the library must not read or write outside the tensors."""
    arguments = {**GOOD, **change}
    with pytest.raises(RuntimeError, match=f"^swiglu_contrast: .*({message})"):
        swiglu_contrast(**arguments, engine=engine)
    if engine == "cpp" and all(x.device.type == "cpu" for x in arguments.values() if isinstance(x, Tensor)):
        with pytest.raises(RuntimeError, match=r"^swiglu_contrast: "):
            torch.ops.pnlac_fast.swiglu_contrast_cpp(*arguments.values())
    assert not arguments["sums"].any()


@needs_library
@pytest.mark.parametrize("other", [torch.ones(3, 5), torch.ones(2, 4), torch.ones(3, 4).half(), torch.ones(4, 3).T])
def test_the_library_itself_refuses_what_does_not_fit(other: Tensor) -> None:
    good = torch.ones(3, 4)
    for arguments in ((good, other), (good[:, ::2], good)):
        with pytest.raises(RuntimeError, match=r"^swiglu: "):
            torch.ops.pnlac_fast.swiglu_cpp(*arguments, "silu")
    for arguments in ((other, good, good), (good, good, other)):
        with pytest.raises(RuntimeError, match=r"^swiglu_backward: "):
            torch.ops.pnlac_fast.swiglu_backward_cpp(*arguments, "silu")


def test_an_unknown_activation_names_the_nearest(engine: str) -> None:
    with pytest.raises(UserError, match="Did you mean 'silu'"):
        swiglu(torch.ones(1, 1), torch.ones(1, 1), "sillu", engine=engine)


def test_opcheck(engine: str, activation: str) -> None:
    def check(name: str, *arguments: Any) -> None:
        operation = getattr(torch.ops.pnlac_fast, f"{name}_{engine}").default
        assert set(torch.library.opcheck(operation, (*arguments, activation)).values()) == {"SUCCESS"}

    gate, up, grad = (some(5, 9, torch.float32, seed) for seed in range(3))
    check("swiglu", gate.clone().requires_grad_(), up.clone().requires_grad_())
    check("swiglu_backward", grad, gate, up)
    counts = torch.tensor([[1.0, 0, 1, 0, 2]])
    check("swiglu_contrast", gate, up, grad, torch.arange(5), counts, torch.zeros(1, 5, 9, dtype=torch.float64))


def test_compiles_into_one_graph(engine: str) -> None:
    def loss(gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate * 2, up, engine=engine).square().sum()

    def fused(gate: Tensor, up: Tensor, sums: Tensor) -> Tensor:
        return swiglu_contrast(gate, up, up, torch.arange(5), torch.ones(1, 5), sums, engine=engine) + 1

    compiled, compiled_fused = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (loss, fused))
    leaves = [some(5, 9, torch.float32, seed).requires_grad_() for seed in range(2)]
    for found, wanted in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        assert torch.equal(found, wanted)
    inputs, sums = [x.detach() for x in leaves], torch.zeros(2, 1, 5, 9, dtype=torch.float64)
    assert torch.equal(compiled_fused(*inputs, sums[0]), fused(*inputs, sums[1]))
    assert torch.equal(sums[0], sums[1])


@needs_library
def test_instruction_sets_give_the_same_bits(tmp_path: Path) -> None:
    script = """
import sys, torch
from pnlac_fast.ops import swiglu, swiglu_backward
generator = torch.Generator().manual_seed(0)
found = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for activation in ("silu", "gelu_tanh"):
        grad, gate, up = (4 * torch.randn(50, 101, generator=generator).to(dtype) for _ in range(3))
        found += [swiglu(gate, up, activation, engine="cpp")]
        found += swiglu_backward(grad, gate, up, activation, engine="cpp")
torch.save(found, sys.argv[1])
"""
    results = []
    for isa in ("default", "avx2", "avx512"):
        path = tmp_path / isa
        run = subprocess.run(
            [sys.executable, "-c", script, str(path)],
            env={**os.environ, "PNLAC_ISA": isa},
            capture_output=True,
            text=True,
            check=False,
        )
        if "is not an instruction set of this processor" not in run.stderr:
            assert run.returncode == 0, run.stderr
            results.append(torch.load(path, weights_only=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
