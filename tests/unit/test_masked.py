"""The masked optimizer steps: every engine against the float64 reference, and against torch's own optimizers."""

from __future__ import annotations

import doctest
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pnlac_fast.ops import engines, masked_adamw, masked_sgd
from pnlac_fast.ops import masked as module

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_library = pytest.mark.skipif(engines()["cpp"] != "available", reason=f"no compiled library: {engines()['cpp']}")
ENGINES = ["torch", pytest.param("cpp", marks=needs_library)]
ADAMW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1, "step": 3}
SGD = {"lr": 1e-2, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": True, "first": False}
RULES: dict[str, tuple[Callable[..., None], int, dict[str, Any]]] = {
    "adamw": (masked_adamw, 2, ADAMW),
    "adamw without decay": (masked_adamw, 2, ADAMW | {"weight_decay": 0.0, "step": 1}),
    "sgd": (masked_sgd, 0, SGD | {"momentum": 0.0, "nesterov": False}),
    "sgd with momentum": (masked_sgd, 1, SGD | {"dampening": 0.5, "nesterov": False}),
    "sgd with nesterov": (masked_sgd, 1, SGD),
    "sgd at first": (masked_sgd, 1, SGD | {"first": True}),
}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def keep_of(kind: str, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    drawn = torch.rand(length, generator=generator)
    return {
        "all": torch.ones(length),
        "none": torch.zeros(length),
        "some": (drawn > 0.3).float(),
        "shares": torch.where(drawn < 0.2, 0, torch.where(drawn < 0.5, 1, drawn)),
    }[kind]


def problem(
    shapes: list[tuple[int, ...]], dim: int, dtype: torch.dtype, moments: int, keep: str, half: bool = True
) -> list[Any]:
    """Params, grads, each list of moments, keeps and dims; the moments in the dtype, or in float32 without ``half``."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...], scale: float, kind: torch.dtype) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(kind)

    kind = dtype if half else torch.float32
    dims = [dim if len(shape) == 2 else 0 for shape in shapes]
    lists: list[Any] = [[draw(s, 1.0, dtype) for s in shapes], [draw(s, 0.5, dtype) for s in shapes]]
    lists += [[draw(s, 0.3, kind).abs() for s in shapes] for _ in range(moments)] or [[]]
    return [*lists, [keep_of(keep, s[d]) for s, d in zip(shapes, dims, strict=True)], dims]


def copied(arguments: list[Any]) -> list[Any]:
    return [[x.clone() if isinstance(x, Tensor) else x for x in part] for part in arguments]


def written(arguments: list[Any]) -> list[Tensor]:
    return [x for part in (arguments[0], *arguments[2:-2]) for x in part]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def spread(keep: Tensor, like: Tensor, dim: int) -> Tensor:
    return (keep[:, None] if like.dim() == 2 and dim == 0 else keep).expand_as(like)


SHAPES = [
    [(1, 1)],
    [(3, 17)],
    [(130, 33), (257,), (5, 1), (1, 64)],
    [(0, 4), (7, 0), (0,), (9, 8)],
    [(70, 300), (300, 70), (1000,)],
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("keep", ["all", "none", "some", "shares"])
@needs_library
def test_compiled_matches_the_reference(rule: str, dtype: torch.dtype, dim: int, keep: str) -> None:
    operation, moments, settings = RULES[rule]
    for shapes in SHAPES:
        for half in (True, False):
            exact = problem(shapes, dim, dtype, moments, keep, half)
            found = copied(exact)
            before = copied(exact)
            operation(*exact, **settings, engine="torch")
            operation(*found, **settings, engine="cpp")
            step = max((float((a - b).abs().max()) for a, b in zip(exact[0], before[0], strict=True) if a.numel()))
            for i, (a, b) in enumerate(zip(written(found), written(exact), strict=True)):
                # One rounding of the stored value, and float32's own over a handful of operations.
                eps = torch.finfo(a.dtype).eps if a.dtype != torch.float32 else 4 * torch.finfo(a.dtype).eps
                # Values are of size 1: parameters cancel to within their step, moments to within float32's own.
                torch.testing.assert_close(a, b, rtol=eps, atol=step * 1e-6 if i < len(shapes) else 1e-6)
            for a, b in zip(found[1], before[1], strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("keep", ["some", "shares"])
def test_frozen_entries_keep_their_bits_and_poison_stays_where_it_is(
    engine: str, rule: str, dtype: torch.dtype, dim: int, keep: str
) -> None:
    """NaN and infinity in the gradients of frozen entries, and NaN in what is frozen, reach nothing."""
    operation, moments, settings = RULES[rule]
    clean = problem([(40, 37), (50,)], dim, dtype, moments, keep)
    poisoned = copied(clean)
    frozen = [spread(k, p, d) == 0 for p, k, d in zip(clean[0], clean[-2], clean[-1], strict=True)]
    for i, mask in enumerate(frozen):
        assert mask.any()
        poisoned[1][i][mask] = torch.where(torch.arange(int(mask.sum())) % 2 == 0, torch.nan, torch.inf).to(dtype)
        for part in (poisoned[0], *poisoned[2 : 2 + moments]):
            half = mask & (torch.rand(mask.shape) < 0.5)
            part[i][half] = torch.nan
    before = copied(poisoned)
    operation(*clean, **settings, engine=engine)
    operation(*poisoned, **settings, engine=engine)
    for part in (0, *range(2, 2 + moments)):
        for i, mask in enumerate(frozen):
            assert torch.equal(bits(poisoned[part][i][mask]), bits(before[part][i][mask]))
            assert torch.equal(bits(poisoned[part][i][~mask]), bits(clean[part][i][~mask]))
            assert poisoned[part][i][~mask].isfinite().all()
            assert (poisoned[part][i][~mask] != before[part][i][~mask]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_live_gradient_shows(engine: str, dtype: torch.dtype) -> None:
    arguments = problem([(6, 40)], 1, dtype, 2, "all")
    arguments[1][0][2, 5] = torch.nan
    masked_adamw(*arguments, **ADAMW, engine=engine)
    for x in written(arguments):
        assert x.isnan().nonzero().tolist() == [[2, 5]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_live_entries_step_as_torch_fused(engine: str, dtype: torch.dtype, dim: int) -> None:
    """Within four units in the last place of the value, or of the step where that is larger."""
    arguments = problem([(120, 65)], dim, dtype, 2, "some")
    param, moments = arguments[0][0].clone().requires_grad_(), [part[0].clone() for part in arguments[2:4]]
    before, param.grad = param.detach().clone(), arguments[1][0].clone()
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([param], **settings, fused=True)
    optimizer.state[param] = {"step": torch.tensor(2.0), "exp_avg": moments[0], "exp_avg_sq": moments[1]}
    optimizer.step()
    masked_adamw(*arguments, **ADAMW, engine=engine)
    live = spread(arguments[-2][0], before, dim) == 1
    ulps = 4 if dtype == torch.float32 else 1
    for found, wanted in zip(written(arguments), [param.detach(), *moments], strict=True):
        atol = float((param.detach() - before).abs().max()) * torch.finfo(torch.float32).eps * ulps
        rtol = torch.finfo(dtype).eps * ulps
        torch.testing.assert_close(found[live], wanted[live], rtol=rtol, atol=atol)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dim", [0, 1])
@needs_library
@pytest.mark.usefixtures("threads")
def test_bits_do_not_depend_on_threads_or_neighbours(rule: str, dim: int) -> None:
    operation, moments, settings = RULES[rule]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        arguments = problem([(301, 211), (33,), (127, 301)], dim, torch.float32, moments, "shares")
        operation(*arguments, **settings, engine="cpp")
        results.append(written(arguments))
    apart = problem([(301, 211), (33,), (127, 301)], dim, torch.float32, moments, "shares")
    for i in range(3):
        operation(*(part[i : i + 1] for part in apart), **settings, engine="cpp")
    for other in (*results[1:], written(apart)):
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
def test_every_half_is_read_and_written_right() -> None:
    """With momentum 0, no decay and gradient 0 a step writes what it read, whatever the bits of a finite number."""
    every = torch.arange(2**16).to(torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        finite = every.view(dtype)[every.view(dtype).isfinite()]
        param = finite.clone()
        settings = SGD | {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
        masked_sgd([param], [torch.zeros_like(param)], [], [torch.ones(len(param))], [0], **settings, engine="cpp")
        assert torch.equal(bits(param), bits(finite))


@needs_library
def test_halves_are_rounded_as_torch_rounds() -> None:
    """Momentum 0 and first, lr 0: the buffer becomes gradient plus decay times the parameter, then is rounded."""
    generator = torch.Generator().manual_seed(0)
    exponent = torch.randint(-30, 18, (20000,), generator=generator)
    for dtype in (torch.float16, torch.bfloat16):
        grad = (torch.randn(20000, generator=generator) * 2.0**exponent).to(dtype)
        param = (torch.randn(20000, generator=generator) * 2.0**exponent).to(dtype)
        buffer = torch.zeros_like(param)
        settings = SGD | {"lr": 0.0, "nesterov": False, "first": True, "weight_decay": 0.25}
        wanted = (grad.float() + 0.25 * param.float()).to(dtype)
        masked_sgd([param], [grad], [buffer], [torch.ones(20000)], [0], **settings, engine="cpp")
        torch.testing.assert_close(buffer, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule", ["adamw", "sgd", "sgd with nesterov"])
def test_opcheck(engine: str, rule: str) -> None:
    operation, moments, settings = RULES[rule]
    arguments = problem([(6, 5), (4,)], 1, torch.float32, moments, "shares")
    opened = getattr(torch.ops.pnlac_fast, f"{operation.__name__}_{engine}").default
    results = torch.library.opcheck(opened, (*arguments, *settings.values()))
    assert set(results.values()) == {"SUCCESS"}


def test_compiles_into_one_graph(engine: str) -> None:
    def step(params: Any, grads: Any, *rest: Any) -> Tensor:
        masked_adamw(params, [2 * g for g in grads], *rest, **ADAMW, engine=engine)
        return params[0].sum()

    eager = problem([(6, 5), (4,)], 0, torch.float32, 2, "some")
    compiled = copied(eager)
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(out, step(*eager))
    assert all(torch.equal(a, b) for a, b in zip(written(eager), written(compiled), strict=True))


def test_nothing_to_step(engine: str) -> None:
    masked_adamw([], [], [], [], [], [], **ADAMW, engine=engine)


P, H = torch.ones(4, 3), torch.ones(4, 3, dtype=torch.float16)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "keep above one": ({"keeps": [torch.tensor([0, 1, 2, 1.0])]}, r"keeps\[0\]\[2\] is 2.*not in \[0, 1\]"),
    "keep not a number": ({"keeps": [torch.tensor([0, 1, torch.nan, 1])]}, r"keeps\[0\]\[2\] is nan"),
    "keep of the other dim": ({"keeps": [torch.ones(3)]}, r"keeps\[0\] must be"),
    "keep in float64": ({"keeps": [torch.ones(4).double()]}, r"keeps\[0\] must be"),
    "dim negative": ({"dims": [-1]}, r"dims\[0\] is -1"),
    "dim too large": ({"dims": [2]}, r"dims\[0\] is 2"),
    "gradient short": ({"grads": [P[:3]]}, r"grads\[0\] must"),
    "gradient in half": ({"grads": [H]}, r"grads\[0\] must"),
    "gradient transposed": ({"grads": [torch.ones(3, 4).T]}, r"grads\[0\] must be contiguous"),
    "moment of one row": ({"exp_avgs": [P[:1]]}, r"\[0\] must"),
    "moment in half": ({"exp_avgs": [H.clone()], "exp_avg_sqs": [H.clone()]}, r"\[0\] must"),
    "second moment short": ({"exp_avg_sqs": [P[:, :2]]}, r"exp_avg_sqs\[0\] must"),
    "a list too short": ({"grads": []}, "masked_adamw"),
    "no moments": ({"exp_avg_sqs": []}, "masked_adamw"),
    "param in float64": ({"params": [P.double()]}, r"params\[0\] must be"),
    "param of three dims": ({"params": [torch.ones(4, 3, 1)]}, r"params\[0\] must be"),
}


def given(change: dict[str, Any]) -> dict[str, Any]:
    tensors = {name: [P.clone()] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    return {**tensors, "keeps": [torch.ones(4)], "dims": [0]} | change


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(engine: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        masked_adamw(**given(change), **ADAMW, engine=engine)


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
@needs_library
def test_the_library_itself_refuses_bad_input(change: dict[str, Any], message: str) -> None:
    """Called past the checks in Python, it must not read or write outside the tensors."""
    with pytest.raises(RuntimeError, match=r"^masked_adamw: "):
        torch.ops.pnlac_fast.masked_adamw_cpp(*given(change).values(), *ADAMW.values())


def test_settings_out_of_range(engine: str) -> None:
    for change in ({"step": 0}, {"beta1": 1.0}, {"beta2": -0.1}):
        with pytest.raises(RuntimeError, match=r"^masked_adamw: "):
            masked_adamw(**given({}), **ADAMW | change, engine=engine)
    arguments = {k: v for k, v in given({}).items() if not k.startswith("exp")}
    with pytest.raises(RuntimeError, match="momenta must be empty"):
        masked_sgd(**arguments, momenta=[P.clone()], **SGD | {"momentum": 0.0}, engine=engine)


def test_the_example_in_the_documentation() -> None:
    assert doctest.testmod(module) == (0, 6)
