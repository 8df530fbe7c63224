"""Masked steps of torch's optimizers: what is masked keeps its bits, the rest steps as torch steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pnlac_fast.errors import UserError
from pnlac_fast.optimizers import StepMask, mask_step, why_not_masked

ROWS, COLUMNS = 24, 17
MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
    "adamw fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2, weight_decay=0.1),
    "sgd with momentum": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "sgd with nesterov": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True),
    "sgd fused": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, fused=True),
}


def params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A weight masked by rows, one masked by columns, a bias masked by entries, and one that is not masked."""
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(s).to(dtype)) for s in ((ROWS, COLUMNS), (COLUMNS, ROWS), (ROWS,), (5, 7))]


def keep(value: float = 0.0) -> Tensor:
    kept = torch.ones(ROWS)
    kept[[0, 3, 4, 23]] = value
    return kept


def masks(ps: list[nn.Parameter], value: float = 0.0) -> list[StepMask]:
    return [StepMask(ps[0], 0, keep(value)), StepMask(ps[1], 1, keep(value)), StepMask(ps[2], 0, keep(value))]


def inhibited(ps: list[nn.Parameter], value: float = 0.0) -> list[Tensor]:
    mine = [torch.zeros(p.shape, dtype=torch.bool) for p in ps]
    chosen = keep(value) != 1
    mine[0][chosen], mine[1][:, chosen], mine[2][chosen] = True, True, True
    return mine


def gradients(ps: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# In bfloat16 torch's AdamW rounds every intermediate value unless fused, and torch 2.13's fused SGD on the CPU does not
# write the parameter.
TRAJECTORIES = [
    *((maker, torch.float32) for maker in MAKERS),
    *((maker, torch.bfloat16) for maker in MAKERS if maker not in ("adamw", "sgd fused")),
]


@pytest.mark.parametrize(("maker", "dtype"), TRAJECTORIES, ids=str)
def test_twenty_steps(maker: str, dtype: torch.dtype) -> None:
    masked, plain = params(dtype), params(dtype)
    one, other = MAKERS[maker](masked), MAKERS[maker](plain)
    before = copy.deepcopy(masked)
    handle = mask_step(one, masks(masked))
    rates = [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=10) for o in (one, other)]
    for step in range(20):
        gradients(masked, step)
        gradients(plain, step)
        given = [p.grad for p in masked]
        one.step()
        other.step()
        assert all(p.grad is g for p, g in zip(masked, given, strict=True))
        for rate in rates:
            rate.step()
    assert handle.counts == [20, 20, 20]
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(plain, before, strict=True))
    for a, b, old, mine in zip(masked, plain, before, inhibited(masked), strict=True):
        assert same(a[mine], old[mine])
        assert not (a[~mine] == old[~mine]).all()
        tolerance = (
            {"atol": 20 * 1e-6 * moved, "rtol": 4e-7} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.03}
        )
        torch.testing.assert_close(a[~mine], b[~mine], **tolerance)
    assert same(masked[3], plain[3])  # torch's own step on what is not masked
    for p, mine in zip(masked, inhibited(masked), strict=True):
        for name, value in one.state[p].items():
            assert name == "step" or not value[mine].any()


@pytest.mark.parametrize("maker", MAKERS)
def test_a_share_scales_the_change_and_nothing_else(maker: str) -> None:
    masked, plain = params(), params()
    one, other = MAKERS[maker](masked), MAKERS[maker](plain)
    mask_step(one, masks(masked, 0.25))
    before = copy.deepcopy(masked)
    gradients(masked, 0)
    gradients(plain, 0)
    one.step()
    other.step()
    for a, b, old, mine in zip(masked, plain, before, inhibited(masked, 0.25), strict=True):
        torch.testing.assert_close((a - old)[mine], 0.25 * (b - old)[mine], rtol=0, atol=1e-6)
        torch.testing.assert_close(a[~mine], b[~mine], rtol=4e-7, atol=1e-8)
    for p, q in zip(masked, plain, strict=True):
        for name, value in one.state[p].items():
            torch.testing.assert_close(value, other.state[q][name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("maker", MAKERS)
def test_state_dicts_are_exchanged_with_torch_in_both_directions(maker: str) -> None:
    """Five steps with masks of ones, five without, five with: as fifteen steps of torch's own."""
    first, plain = params(), params()
    optimizer, reference = MAKERS[maker](first), MAKERS[maker](plain)
    for part in range(3):
        ps = copy.deepcopy(first)
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = MAKERS[maker](ps)
        optimizer.load_state_dict(state)
        if part != 1:
            mask_step(optimizer, masks(ps, 1.0))
        for step in range(5):
            gradients(ps, 5 * part + step)
            gradients(plain, 5 * part + step)
            optimizer.step()
            reference.step()
        first = ps
    for a, b in zip(first, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    one, other = optimizer.state_dict(), reference.state_dict()
    assert one["param_groups"] == other["param_groups"]
    for key, state in other["state"].items():
        assert one["state"][key].keys() == state.keys()
        for name, value in state.items():
            if value is not None:
                assert one["state"][key][name].dtype == value.dtype
                torch.testing.assert_close(one["state"][key][name], value, rtol=1e-6, atol=1e-6)


def test_loading_a_state_in_the_middle_is_noticed() -> None:
    ps, plain = params(), params()
    one, other = MAKERS["adamw"](ps), MAKERS["adamw"](plain)
    mask_step(one, masks(ps, 1.0))
    for step in range(4):
        gradients(ps, step)
        gradients(plain, step)
        one.step()
        other.step()
        if step == 1:
            saved = copy.deepcopy((one.state_dict(), other.state_dict()))
        if step == 2:
            one.load_state_dict(saved[0])
            other.load_state_dict(saved[1])
    assert [s["step"].item() for s in one.state_dict()["state"].values()] == [3.0] * 4
    for a, b in zip(ps, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, state: state.update(exp_avg=torch.zeros(3)), r"exp_avgs\[0\] must be"),
        (lambda p, state: state.update(exp_avg_sq=torch.zeros_like(p).t().contiguous().t()), "must be contiguous"),
        (lambda p, state: setattr(p, "data", p.data.t().contiguous().t()), "must be contiguous"),
    ],
)
def test_what_no_longer_fits_after_some_steps_is_refused(change: Any, message: str) -> None:
    ps = params()
    optimizer = MAKERS["adamw"](ps)
    mask_step(optimizer, masks(ps))
    for step in range(3):
        gradients(ps, step)
        optimizer.step()
    before = [p.detach().clone() for p in ps]
    change(ps[0], optimizer.state[ps[0]])
    for _ in range(2):  # what was refused once is no better the second time
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(ps, before, strict=True))


def test_parameters_without_a_gradient_are_passed_over() -> None:
    ps = params()
    optimizer = MAKERS["adamw"](ps)
    handle = mask_step(optimizer, masks(ps))
    before = copy.deepcopy(ps)
    gradients(ps, 0)
    ps[1].grad = ps[3].grad = None
    optimizer.step()
    assert [same(a, b) for a, b in zip(ps, before, strict=True)] == [False, True, False, True]
    assert handle.counts == [1, 0, 1]
    assert ps[1] not in optimizer.state
    gradients(ps, 1)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in ps] == [2, 1, 2, 1]


def test_parameter_groups_keep_their_settings() -> None:
    ps, plain = params(), params()

    def make(own: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": own[:1], "weight_decay": 0.5}, {"params": own[1:], "lr": 1e-1, "betas": (0.5, 0.9)}]
        return torch.optim.AdamW(groups, lr=1e-2)

    one, other = make(ps), make(plain)
    mask_step(one, masks(ps, 1.0))
    for step in range(3):
        gradients(ps, step)
        gradients(plain, step)
        one.step()
        other.step()
    for a, b in zip(ps, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_removed_the_optimizer_is_torchs_own_again() -> None:
    ps, plain = params(), params()
    one, other = MAKERS["adamw"](ps), MAKERS["adamw"](plain)
    mask_step(one, masks(ps)).remove()
    gradients(ps, 0)
    gradients(plain, 0)
    one.step()
    other.step()
    assert all(same(a, b) for a, b in zip(ps, plain, strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("infinite", [False, True])
def test_a_scaled_loss(fused: bool, infinite: bool) -> None:
    """torch's GradScaler unscales before the step, or lets a fused optimizer do so; an infinity skips the step."""
    ps, plain = params(), params()
    for p, q in zip(ps, plain, strict=True):
        q.data.copy_(p.data)
    one = torch.optim.AdamW(ps, lr=1e-2, fused=fused)
    other = torch.optim.AdamW(plain, lr=1e-2)
    mask_step(one, masks(ps, 1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    gradients(ps, 0)
    gradients(plain, 0)
    if infinite:
        ps[0].grad[0, 0] = torch.inf
    scaler.scale(torch.zeros(()))
    for p in ps:
        p.grad *= 8.0
    scaler.step(one)
    scaler.update()
    if not infinite:
        other.step()
    for a, b in zip(ps, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_accelerate_accumulation_and_clipping() -> None:
    """Four batches in steps of two, clipped: as plain torch with the inhibited rows put back after each step."""
    found = []
    for masked in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(COLUMNS, ROWS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        start = model.weight.detach().clone()
        frozen = keep() == 0
        if masked:
            mask_step(optimizer, [StepMask(model.weight, 0, keep())])
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        ready, stepper = accelerator.prepare(model, optimizer)
        for x in torch.randn(4, 8, COLUMNS):
            with accelerator.accumulate(ready):
                accelerator.backward(ready(x).square().sum())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                stepper.step()
                stepper.zero_grad()
            if not masked:
                model.weight.data[frozen] = start[frozen]
        assert same(model.weight[frozen], start[frozen])
        found.append(model.weight.detach().clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


def own_step() -> torch.optim.Optimizer:
    class Mine(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise AssertionError

    return Mine(params())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.optim.Adam(params()), "Adam is neither"),
        (own_step, "Mine is neither"),
        (lambda: torch.optim.AdamW(params(), amsgrad=True), "amsgrad=True"),
        (lambda: torch.optim.SGD(params(), maximize=True), "maximize=True"),
        (lambda: torch.optim.AdamW(params(), capturable=True), "capturable=True"),
    ],
)
def test_other_optimizers_are_refused(make: Any, message: str) -> None:
    optimizer = make()
    with pytest.raises(UserError, match=message):
        mask_step(optimizer, [StepMask(optimizer.param_groups[0]["params"][0], 0, keep())])
    assert message in (why_not_masked(optimizer) or "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ps: [StepMask(nn.Parameter(torch.ones(ROWS, 2)), 0, keep())], "not the optimizer's"),
        (lambda ps: masks(ps)[:1] * 2, "masked twice"),
        (lambda ps: [StepMask(ps[0], 1, keep())], "does not fit dimension 1"),
        (lambda ps: [StepMask(ps[0], 2, keep())], "dimension 2 does not fit"),
        (lambda ps: [StepMask(ps[2], 1, keep())], "dimension 1 does not fit"),
        (lambda ps: [StepMask(ps[0], 0, keep(-0.5))], "in \\[0, 1\\]"),
        (lambda ps: [StepMask(ps[0], 0, keep(torch.nan))], "in \\[0, 1\\]"),
    ],
)
def test_masks_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    ps = params()
    optimizer = torch.optim.AdamW(ps)
    with pytest.raises(UserError, match=message):
        mask_step(optimizer, change(ps))
    assert not optimizer._optimizer_step_pre_hooks


def test_float64_is_refused() -> None:
    ps = params(torch.float64)
    with pytest.raises(UserError, match="float32, bfloat16 or float16"):
        mask_step(torch.optim.AdamW(ps), masks(ps))


def test_a_closure_is_refused() -> None:
    ps = params()
    optimizer = torch.optim.SGD(ps)
    mask_step(optimizer, masks(ps))
    for call in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        with pytest.raises(UserError, match="takes no closure"):
            call()
    optimizer.step(None)


def test_settings_that_change_later_are_refused() -> None:
    ps = params()
    optimizer = torch.optim.AdamW(ps)
    mask_step(optimizer, masks(ps))
    gradients(ps, 0)
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(UserError, match="maximize=True"):
        optimizer.step()
