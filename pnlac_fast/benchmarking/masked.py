"""One optimizer step that leaves some neurons alone: masked, against torch's unmasked and against two ways around."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pnlac_fast.benchmarking.timing import interleaved, ratio
from pnlac_fast.loading import resolve_device
from pnlac_fast.ops import masked_adamw
from pnlac_fast.optimizers import StepMask, mask_step

SHAPES = ((2048, 4096), (2048, 4096), (4096, 2048), (4096, 2048))  # 33.6 M parameters
SHARE = 0.05
SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, eq=False)
class Weights:
    """Parameters with gradients, torch's fused AdamW on them, and which rows or columns of each are inhibited."""

    parameters: list[nn.Parameter]
    optimizer: torch.optim.AdamW
    dim: int
    still: list[Tensor]

    def moments(self, parameter: nn.Parameter) -> list[Tensor]:
        """Of a parameter that has been stepped."""
        return [self.optimizer.state[parameter][name] for name in MOMENTS]

    def tensors(self, number: int) -> list[Tensor]:
        """What a step of one parameter changes: itself and its moments."""
        return [self.parameters[number].detach(), *self.moments(self.parameters[number])]


def make_weights(
    dim: int, shapes: tuple[tuple[int, int], ...] = SHAPES, share: float = SHARE, device: torch.device | str = "cpu"
) -> Weights:
    """Random weights and gradients, stepped once; of each weight a random ``share`` of rows (0) or columns (1)."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = (0.1 * torch.randn(parameter.shape, generator=generator)).to(device)
    still = [torch.randperm(s[dim], generator=generator)[: max(1, int(share * s[dim]))].to(device) for s in shapes]
    weights = Weights(parameters, torch.optim.AdamW(parameters, **SETTINGS, fused=True), dim, still)
    weights.optimizer.step()
    return weights


def beside(weights: Weights, dim: int, still: list[Tensor]) -> Weights:
    """The same tensors with an optimizer of their own, so that every way does without a copy of all moments."""
    optimizer = torch.optim.AdamW(weights.parameters, **SETTINGS, fused=True)
    for parameter, state in weights.optimizer.state.items():
        optimizer.state[parameter] = {**state, "step": state["step"].clone()}
    return Weights(weights.parameters, optimizer, dim, still)


def unmasked(weights: Weights) -> Callable[[], Any]:
    """torch's fused step on everything."""
    return weights.optimizer.step


def masked(weights: Weights) -> Callable[[], Any]:
    """The same optimizer, masked."""
    masks = []
    for parameter, still in zip(weights.parameters, weights.still, strict=True):
        keep = torch.ones(parameter.shape[weights.dim], device=parameter.device).index_fill_(0, still, 0)
        masks.append(StepMask(parameter, weights.dim, keep))
    mask_step(weights.optimizer, masks)
    return weights.optimizer.step


def zeroed(weights: Weights) -> Callable[[], Any]:
    """Zeroed gradients, and torch's step: weight decay and old moments still move the neurons."""

    def step() -> None:
        for parameter, still in zip(weights.parameters, weights.still, strict=True):
            assert parameter.grad is not None
            parameter.grad.index_fill_(weights.dim, still, 0)
        weights.optimizer.step()

    return step


def restored(weights: Weights) -> Callable[[], Any]:
    """Parameters and moments saved, torch's step, and all put back."""

    @torch.no_grad()
    def step() -> None:
        tensors = [(t, still) for p, still in _pairs(weights) for t in (p.detach(), *weights.moments(p))]
        saved = [tensor.index_select(weights.dim, still) for tensor, still in tensors]
        weights.optimizer.step()
        for (tensor, still), values in zip(tensors, saved, strict=True):
            tensor.index_copy_(weights.dim, still, values)

    return step


WAYS: dict[str, Callable[[Weights], Callable[[], Any]]] = {
    "torch": unmasked,
    "masked": masked,
    "zeroed": zeroed,
    "restored": restored,
}
DIMS = {"rows": 0, "columns": 1}


def check(device: torch.device | str = "cpu") -> None:
    """Step small weights, and compare masked with the float64 reference, restored with torch's own step.

    Raises
    ------
    RuntimeError
        An inhibited entry has other bits than before, or another differs from the reference by more than rounding.
    """
    shapes = ((70, 130), (130, 70))
    for dim in DIMS.values():
        for way in (masked, restored):
            weights, exact, before = (make_weights(dim, shapes, device=device) for _ in range(3))
            way(weights)()
            # On a GPU torch's step rounds more than the masked one.
            _reference(exact) if way is masked else exact.optimizer.step()
            for i, still in enumerate(weights.still):
                others = torch.ones(shapes[i][dim], device=device).index_fill_(0, still, 0).nonzero()[:, 0]
                for found, wanted, old in zip(*(one.tensors(i) for one in (weights, exact, before)), strict=True):
                    if not torch.equal(found.index_select(dim, still), old.index_select(dim, still)):
                        raise RuntimeError(f"Inhibited entries of weight {i} moved in the way '{way.__name__}'.")
                    mine, theirs = (one.index_select(dim, others) for one in (found, wanted))
                    if not torch.allclose(mine, theirs, rtol=1e-6, atol=1e-9):
                        raise RuntimeError(f"The way '{way.__name__}' differs from the reference in weight {i}.")


def masked_step(
    repeats: int = 7, *, device: torch.device | str = "cpu", shapes: tuple[tuple[int, int], ...] = SHAPES
) -> dict[str, list[float]]:
    """Seconds of each way and round: "torch", and "masked rows", "zeroed columns" and so on; not checked."""
    weights = make_weights(0, shapes, device=device)
    ways: dict[str, Callable[[], Any]] = {"torch": unmasked(weights)}
    for name, dim in DIMS.items():
        still = weights.still if dim == 0 else make_weights(dim, shapes, device=device).still
        for way in ("masked", "zeroed", "restored"):
            ways[f"{way} {name}"] = WAYS[way](beside(weights, dim, still))
    return interleaved(ways, repeats, device)


def measure(*, repeats: int = 7, device: str = "auto") -> dict[str, Any]:
    """Check, then time every way over torch's unmasked step, side by side, on float32.

    Returns
    -------
    dict
        ``rows``, ``columns``: the masked step; ``zeroed_rows`` and so on: the ways around it; ``parameters`` and
        ``share`` say of how many parameters and inhibited rows or columns.
    """
    place = resolve_device(device)
    check(place)
    seconds = masked_step(repeats, device=place)
    named = {name.removeprefix("masked ").replace(" ", "_"): times for name, times in seconds.items()}
    ratios = {name: ratio(times, seconds["torch"]) for name, times in named.items() if name != "torch"}
    return {"parameters": sum(a * b for a, b in SHAPES), "share": SHARE, **ratios}


def _reference(weights: Weights) -> None:
    beta1, beta2 = SETTINGS["betas"]
    for p, still in _pairs(weights):
        keep = torch.ones(p.shape[weights.dim], device=p.device).index_fill_(0, still, 0)
        first, second = weights.moments(p)
        assert p.grad is not None
        masked_adamw(
            [p.detach()],
            [p.grad],
            [first],
            [second],
            [keep],
            [weights.dim],
            lr=SETTINGS["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=SETTINGS["eps"],
            weight_decay=SETTINGS["weight_decay"],
            step=2,
            engine="torch",
        )


def _pairs(weights: Weights) -> list[tuple[nn.Parameter, Tensor]]:
    return list(zip(weights.parameters, weights.still, strict=True))
