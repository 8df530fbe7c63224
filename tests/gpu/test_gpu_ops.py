"""Every operation by the GPU's engines against the float64 reference.

With TRITON_INTERPRET=1 the same cases run through Triton's interpreter on the CPU, in smaller shapes
(tests/unit/test_triton_interpreter.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from pnlac_fast.ops import (
    contrast,
    engines,
    masked_adamw,
    masked_sgd,
    moments,
    swiglu,
    swiglu_backward,
    swiglu_contrast,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("torch finds no CUDA device here", allow_module_level=True)

# numpy, by which the interpreter computes, warns where a GPU gives infinity; NaN is compared on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALVES = (torch.bfloat16, torch.float16)
# One value, and over the edges of tiles and chunks; on a GPU also narrower than a tile and as wide as an 8B model.
SHAPES = [(1, 1), (66, 140)] if INTERPRETED else [(1, 1), (70, 33), (1000, 1025), (4096, 14336)]
ACTIVATIONS = ["silu", "gelu_tanh"]


def engine_params(names: Sequence[str]) -> list[object]:
    return [
        pytest.param(name, marks=pytest.mark.skipif(engines()[name] != "available", reason=engines()[name]))
        for name in names
    ]


both = pytest.mark.parametrize("engine", engine_params(["triton", "cuda"]))
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype).to(DEVICE)


def streams(rows: int, neurons: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    base = random(rows, neurons, dtype=dtype, seed=0)
    return base, (base.double() + random(rows, neurons, dtype=torch.float64, seed=1, scale=0.1)).to(dtype)


def index(values: Sequence[int] | Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int64).to(DEVICE)


def groups_of(rows: int) -> tuple[Tensor, Tensor]:
    """Rows in random order and more than once, in groups of very different sizes, of which some are empty."""
    rows_of = torch.randint(0, rows, (2 * rows,), generator=torch.Generator().manual_seed(2))
    return index(rows_of), index([0, 0, 2 * rows // 3, 2 * rows // 3, 2 * rows // 3 + 1, 2 * rows, 2 * rows])


def sums(groups: int, kinds: int, neurons: int) -> Tensor:
    return torch.ones(groups, kinds, neurons, dtype=torch.float64, device=DEVICE)


def agree(found: Tensor, expected: Tensor, magnitude: Tensor, dtype: torch.dtype) -> None:
    """Within what rounding can do: bfloat16 is added in float32 over at most 64 rows, all else in float64."""
    bound = (64 * 2.0**-24 if dtype == torch.bfloat16 else 1e-13) * magnitude
    assert bool(((found - expected).abs() <= bound).all())


@both
@shapes
@dtypes
def test_contrast(engine: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, neurons = shape
    base, tuned = streams(rows, neurons, dtype)
    chosen, offsets = groups_of(rows)
    found, again, expected, magnitude = (sums(6, 5, neurons) for _ in range(4))
    contrast(base, tuned, chosen, offsets, found, engine=engine)
    contrast(base, tuned, chosen, offsets, again, engine=engine)
    contrast(base, tuned, chosen, offsets, expected, engine="torch")
    contrast(base.abs(), tuned.abs(), chosen, offsets, magnitude, engine="torch")
    magnitude[:, 4] = expected[:, 4]
    agree(found, expected, magnitude, dtype)
    assert torch.equal(found, again)


@both
def test_contrast_of_long_groups_in_bfloat16(engine: str) -> None:
    """More rows than one float32 sum may take, with a mean that is large against the spread."""
    rows, neurons = (700, 16) if INTERPRETED else (100_000, 512)
    base = (random(rows, neurons, dtype=torch.float32, seed=3) + 8).bfloat16()
    tuned = (base.float() + random(rows, neurons, dtype=torch.float32, seed=4, scale=0.1)).bfloat16()
    found, expected = sums(1, 5, neurons), sums(1, 5, neurons)
    contrast(base, tuned, index(range(rows)), index([0, rows]), found, engine=engine)
    contrast(base, tuned, index(range(rows)), index([0, rows]), expected, engine="torch")
    agree(found, expected, expected, torch.bfloat16)


@both
@pytest.mark.parametrize(("rows", "neurons", "groups"), [(0, 5, 1), (4, 0, 1), (4, 5, 0), (4, 5, 3)])
def test_nothing_selected_changes_nothing(engine: str, rows: int, neurons: int, groups: int) -> None:
    base, tuned = streams(rows, neurons, torch.float32)
    found = sums(groups, 5, neurons)
    contrast(base, tuned, index([]), index([0] * (groups + 1)), found, engine=engine)
    assert torch.equal(found, sums(groups, 5, neurons))


@both
@dtypes
def test_contrast_reads_only_the_rows_of_any_layout(engine: str, dtype: torch.dtype) -> None:
    """Base holds only some rows, in another order, and both are slices of buffers full of NaN."""
    base, tuned = streams(90, 40, dtype)
    kept = torch.arange(0, 90, 2, device=DEVICE).flip(0)
    buffers = [torch.full((100, 55), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    views = [buffers[0][3:48, 8:48], buffers[1][5:95, 7:47]]
    views[0].copy_(base[kept])
    views[1][::2] = tuned[::2]
    rows = index(range(0, 90, 2))
    base_rows = index(range(45)).flip(0)
    found, expected = sums(2, 5, 40), sums(2, 5, 40)
    contrast(views[0], views[1], rows, index([0, 20, 45]), found, base_rows=base_rows, engine=engine)
    contrast(base, tuned, rows, index([0, 20, 45]), expected, engine="torch")
    agree(found, expected, expected.abs() + 90, dtype)


@both
def test_rows_and_offsets_that_do_not_fit_are_not_read_and_show(engine: str) -> None:
    base, tuned = streams(6, 4, torch.float32)
    found, expected = sums(3, 5, 4), sums(3, 5, 4)
    contrast(base, tuned, index([0, 5, 2**62, 3, -1]), index([0, 2, 4, 5]), found, engine=engine)
    contrast(base, tuned, index([0, 5]), index([0, 2, 2, 2]), expected, engine="torch")
    assert torch.equal(found[0], expected[0])
    assert bool(found[1:].isnan().all())
    for offsets in ([1, 2, 3], [0, 2, 2], [0, 9, 3], [-5, 2, 3]):
        found = sums(2, 5, 4)
        contrast(base, tuned, index([0, 5, 2]), index(offsets), found, engine=engine)
        assert bool(found.isnan().any())


@pytest.mark.parametrize("engine", engine_params(["triton"]))
@dtypes
def test_moments(engine: str, dtype: torch.dtype) -> None:
    rows, neurons = SHAPES[-1]
    x, _ = streams(rows, neurons, dtype)
    chosen, offsets = groups_of(rows)
    found, expected, magnitude = (sums(6, 2, neurons) for _ in range(3))
    moments(x, chosen, offsets, found, engine=engine)
    moments(x, chosen, offsets, expected, engine="torch")
    moments(x.abs(), chosen, offsets, magnitude, engine="torch")
    agree(found, expected, magnitude, dtype)


def rounded(found: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of a step or two of the computation.

    A half type is computed in float32, so that few roundings differ from those of float64; the interpreter, however,
    cuts bfloat16 off instead of rounding it.
    """
    step = torch.finfo(found.dtype).eps
    if found.dtype in HALVES:
        torch.testing.assert_close(found, expected, rtol=2 * step, atol=1e-6)
        if not (INTERPRETED and found.dtype == torch.bfloat16):
            assert float((found != expected).float().mean()) < 0.02
    else:
        torch.testing.assert_close(found, expected, rtol=16 * step, atol=max(16 * step, 1e-12))


def gated(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gates on both sides of where the exponential overflows, ups and gradients."""
    gate = random(*shape, dtype=dtype, seed=5, scale=4.0)
    gate[::7] *= 30
    return gate, random(*shape, dtype=dtype, seed=6), random(*shape, dtype=dtype, seed=7)


@pytest.mark.parametrize("engine", engine_params(["triton"]))
@shapes
@pytest.mark.parametrize(("dtype", "activation"), [*product(DTYPES, ACTIVATIONS)], ids=str)
def test_swiglu_and_its_gradients(engine: str, shape: tuple[int, int], dtype: torch.dtype, activation: str) -> None:
    gate, up, grad = gated(shape, dtype)
    rounded(swiglu(gate, up, activation, engine=engine), swiglu(gate, up, activation, engine="torch"))
    found = swiglu_backward(grad, gate, up, activation, engine=engine)
    for one, other in zip(found, swiglu_backward(grad, gate, up, activation, engine="torch"), strict=True):
        rounded(one, other)


@pytest.mark.parametrize("engine", engine_params(["triton"]))
@shapes
@dtypes
def test_swiglu_contrast(engine: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Bits of the result as swiglu's; sums as the reference has them of this result."""
    rows, neurons = shape
    gate, up, _ = gated(shape, dtype)
    base = random(rows, neurons, dtype=dtype, seed=8)
    counts = torch.randint(0, 3, (4, rows), generator=torch.Generator().manual_seed(9)).float()
    counts[1] = 0
    counts[2, : rows // 2] = 0
    unused = torch.arange(rows) % 3 == 1
    counts[:, unused] = 0
    base_rows = torch.randperm(rows, generator=torch.Generator().manual_seed(10))
    base_rows[unused] = -1
    gate[unused.to(DEVICE)] = torch.nan
    base_rows, counts = index(base_rows), counts.to(DEVICE)
    found, again, expected, magnitude = (sums(4, 5, neurons) for _ in range(4))
    mid = swiglu_contrast(gate, up, base, base_rows, counts, found, engine=engine)
    assert torch.equal(mid.nan_to_num(), swiglu(gate, up, engine=engine).nan_to_num())
    swiglu_contrast(gate, up, base, base_rows, counts, again, engine=engine)
    assert torch.equal(found, again)
    for group, weights in enumerate(counts.long()):
        rows_of = torch.repeat_interleave(weights)
        pair = base, mid, rows_of, index([0, len(rows_of)])
        contrast(*pair, expected[group : group + 1], base_rows=base_rows[rows_of], engine="torch")
        pair = base.abs(), mid.abs(), rows_of, index([0, len(rows_of)])
        contrast(*pair, magnitude[group : group + 1], base_rows=base_rows[rows_of], engine="torch")
    magnitude[:, 4] = expected[:, 4]
    agree(found, expected, magnitude, dtype)


MATRICES = [((40, 64), 0), ((3, 7), 0), ((33,), 0), ((64, 40), 1), ((1, 1), 1), ((5, 1500), 1), ((3, 1000), 0)]
if not INTERPRETED:
    MATRICES += [((14336, 512), 0), ((512, 14336), 1), ((4096, 16), 0), ((16, 4097), 0)]
KINDS = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
KINDS += [] if INTERPRETED else [(torch.float16, torch.float32)]


def parameters(dtype: torch.dtype, moment: torch.dtype) -> list[list[Tensor]]:
    """Parameters, gradients, two moments and shares; NaN gradients where the share is 0."""
    made: list[list[Tensor]] = [[], [], [], [], []]
    for seed, (shape, dim) in enumerate(MATRICES):
        keep = random(shape[dim], dtype=torch.float32, seed=seed).abs().clamp(0, 1)
        keep[::3] = 0
        keep[1::3] = 1
        grad = random(*shape, dtype=dtype, seed=seed + 100)
        (grad if dim == 0 else grad.T)[keep == 0] = torch.nan
        values = [random(*shape, dtype=kind, seed=seed + 200) for kind in (dtype, moment, moment)]
        for tensors, tensor in zip(made, [values[0], grad, values[1], values[2].abs(), keep], strict=True):
            tensors.append(tensor)
    return made


def stepped(
    found: list[list[Tensor]], expected: list[list[Tensor]], before: list[list[Tensor]], what: list[int]
) -> None:
    keeps = found[4]
    for which in what:
        for i, (shape, dim) in enumerate(MATRICES):
            one, other, old = (state[which][i] for state in (found, expected, before))
            # One step of the type, as the result is rounded once, and twice that where the interpreter cuts it off.
            step = 2 * torch.finfo(one.dtype).eps
            torch.testing.assert_close(one, other, rtol=max(step, 2e-6), atol=2e-6)
            still = keeps[i] == 0
            after, at_first = (x if dim == 0 else x.T for x in (one, old))
            assert torch.equal(after[still], at_first[still]), (shape, dim)


@pytest.mark.parametrize("engine", engine_params(["triton"]))
@pytest.mark.parametrize(("dtype", "moment"), KINDS, ids=str)
def test_masked_adamw(engine: str, dtype: torch.dtype, moment: torch.dtype) -> None:
    settings = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
    found, expected, before = (parameters(dtype, moment) for _ in range(3))
    dims = [dim for _, dim in MATRICES]
    masked_adamw(*found, dims, **settings, engine=engine)
    masked_adamw(*expected, dims, **settings, engine="torch")
    stepped(found, expected, before, [0, 2, 3])


@pytest.mark.parametrize("engine", engine_params(["triton"]))
@pytest.mark.parametrize(("dtype", "moment"), KINDS, ids=str)
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov", "first"),
    [(0.0, 0.0, False, False), (0.9, 0.1, False, False), (0.9, 0.0, True, False), (0.9, 0.1, False, True)],
)
def test_masked_sgd(
    engine: str,
    dtype: torch.dtype,
    moment: torch.dtype,
    momentum: float,
    dampening: float,
    nesterov: bool,
    first: bool,
) -> None:
    settings = {"lr": 1e-2, "momentum": momentum, "dampening": dampening, "weight_decay": 0.1}
    settings |= {"nesterov": nesterov, "first": first}
    found, expected, before = (parameters(dtype, moment) for _ in range(3))
    dims = [dim for _, dim in MATRICES]
    for state, chosen in ((found, engine), (expected, "torch")):
        params, grads, momenta, _, keeps = state
        masked_sgd(params, grads, momenta if momentum else [], keeps, dims, **settings, engine=chosen)
    stepped(found, expected, before, [0, 2] if momentum else [0])


@pytest.mark.parametrize("engine", engine_params(["triton"]))
def test_a_second_step_sees_gradients_that_have_moved(engine: str) -> None:
    """The table of addresses is kept from step to step, but not beyond what it was made for."""
    settings = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "first": False}
    weight, keep = torch.zeros(4, 8, device=DEVICE), torch.ones(4, device=DEVICE)
    for value in (1.0, 2.0, 3.0):
        gradient = torch.full((4, 8), value, device=DEVICE)
        masked_sgd([weight], [gradient], [], [keep], [0], **settings, engine=engine)
    torch.testing.assert_close(weight, torch.full_like(weight, -0.6))
