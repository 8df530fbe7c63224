"""Make an optimizer of torch skip chosen rows and columns of its parameters, or move them less.

    handle = mask_step(optimizer, [StepMask(linear.weight, 0, keep)])

Row i of the weight then takes the share ``keep[i]`` of every step. Those that freeze neurons of a model are
``[mask.on_step(0.0) for mask in find_masks(model, neurons).entries]``, see :mod:`pnlac_fast.masks`. The optimizer stays
what it is: schedulers, gradient accumulation, clipping, accelerate and checkpoints see the same object, and its
``state_dict`` is an ordinary one.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pnlac_fast.errors import UserError
from pnlac_fast.ops import masked_adamw, masked_sgd
from pnlac_fast.ops.masked import DTYPES
from pnlac_fast.profiling import staged

Layout = tuple[int, torch.dtype, torch.dtype, torch.Size, bool]  # address, dtypes, shape, whether contiguous
# Settings that the masked step does not know.
UNSUPPORTED = ("amsgrad", "maximize", "capturable", "differentiable")


class StepMask(NamedTuple):
    """The share of each step that the rows (``dim`` 0) or columns (1) of a parameter take.

    ``keep`` has one entry for each of them, in [0, 1]: 0 leaves parameter and moments untouched, 1 is the plain step,
    in between the moments are plain and the parameter's change is scaled.
    """

    parameter: nn.Parameter
    dim: int
    keep: Tensor


def why_not_masked(optimizer: Any, parameters: Iterable[Tensor] = ()) -> str | None:
    """Why an optimizer's step cannot be masked on such parameters, in a clause; None where it can."""
    for known in (torch.optim.AdamW, torch.optim.SGD):
        if isinstance(optimizer, known) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(known.step):
            break
    else:
        return f"{type(optimizer).__name__} is neither torch.optim.AdamW nor torch.optim.SGD"
    for group in optimizer.param_groups:
        if given := [name for name in UNSUPPORTED if group.get(name)]:
            return f"{type(optimizer).__name__} with {given[0]}=True has another step"
    for p in parameters:
        if p.dtype not in DTYPES or p.dim() not in (1, 2) or not p.is_contiguous():
            return f"{list(p.shape)} {p.dtype} is no contiguous weight in float32, bfloat16 or float16"
    return None


def mask_step(optimizer: torch.optim.Optimizer, masks: Iterable[StepMask]) -> MaskedStep:
    """Mask every further step of an optimizer.

    Masked parameters are stepped by :func:`pnlac_fast.ops.masked_adamw` or :func:`pnlac_fast.ops.masked_sgd`, which
    skip what is masked; all others by the optimizer itself, fused or not. Float64 and other dtypes that these
    operations do not know cannot be masked.

    Parameters
    ----------
    optimizer
        ``torch.optim.AdamW`` or ``torch.optim.SGD`` without amsgrad, maximize, capturable and differentiable.
    masks
        At most one for each parameter. Parameters must be contiguous [row, column] or [row], float32, bfloat16 or
        float16.

    Returns
    -------
    MaskedStep
        Whose ``remove()`` gives the optimizer its own step back.

    Raises
    ------
    UserError
        The optimizer's step cannot be masked; a parameter is not its own, is masked twice, or does not fit its mask.
        At a step: it was given a closure, or its settings have changed to such that cannot be masked.
    """
    return MaskedStep(optimizer, list(masks))


class MaskedStep:
    """A mask on an optimizer's steps, made by :func:`mask_step`.

    Attributes
    ----------
    masks
        With ``keep`` in float32 on the parameter's device.
    counts
        For each mask, in how many steps its parameter had a gradient and was stepped.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, masks: list[StepMask]) -> None:
        _require_maskable(optimizer, [mask.parameter for mask in masks])
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for parameter, dim, keep in masks:
            if id(parameter) not in own:
                raise UserError(
                    f"A masked parameter {list(parameter.shape)} is not the optimizer's: give it to it first."
                )
            if not 0 <= dim < parameter.dim():
                raise UserError(
                    f"A mask of dimension {dim} does not fit {list(parameter.shape)}: choose rows (0) or columns (1)."
                )
            if keep.shape != (parameter.shape[dim],) or not bool(((keep >= 0) & (keep <= 1)).all()):
                raise UserError(
                    f"A keep of {list(keep.shape)} does not fit dimension {dim} of {list(parameter.shape)}: give one "
                    f"value in [0, 1] for each row or column."
                )
        self._index = {id(mask.parameter): i for i, mask in enumerate(masks)}
        if len(self._index) < len(masks):
            raise UserError("A parameter is masked twice: multiply the two keeps, or choose one dimension.")
        self.masks = [StepMask(p, d, k.to(p.device, torch.float32).contiguous()) for p, d, k in masks]
        self.counts = [0] * len(masks)
        self._hidden: list[tuple[nn.Parameter, Tensor]] = []
        # Layouts and moments that a step has taken, by the first parameter of their group.
        self._fitting: dict[int, tuple[list[Layout], list[Tensor]]] = {}
        self._steps: dict[int, tuple[Tensor, int, int]] = {}
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Give the optimizer its own step back."""
        for hook in self._hooks:
            hook.remove()

    @staged("masked_step")
    @torch.no_grad()
    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise UserError("A masked step takes no closure: call loss.backward() before optimizer.step().")
        _require_maskable(optimizer)
        step = self._adamw if isinstance(optimizer, torch.optim.AdamW) else self._sgd
        self._hidden = []
        skipped = _overflowed(optimizer)
        for group in optimizer.param_groups:
            chosen = [p for p in group["params"] if p.grad is not None and id(p) in self._index]
            if chosen and not skipped:
                _unscale(optimizer, chosen)
                step(optimizer, {**group, "params": chosen})
                for parameter in chosen:
                    self.counts[self._index[id(parameter)]] += 1
            # The optimizer passes over parameters without a gradient.
            self._hidden += [(p, p.grad) for p in chosen]
            for parameter in chosen:
                parameter.grad = None

    def _after(self, *_: Any) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden = []

    def _adamw(self, optimizer: Any, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        steps: list[Tensor] = []
        optimizer._init_group(group, params, grads, exp_avgs, exp_avg_sqs, [], steps)  # makes the state as torch does
        layouts, moments = [*map(_layout, params, grads)], [*exp_avgs, *exp_avg_sqs]
        known, state = self._fitting.get(id(params[0]), ([], []))
        # Shape and device of gradients are their parameters', as autograd sees to.
        checked = layouts == known and len(moments) == len(state) and all(map(operator.is_, moments, state))
        counted = [self._step_of(id(p), step) for p, step in zip(params, steps, strict=True)]
        torch._foreach_add_(steps, 1)
        for p, tensor, count in zip(params, steps, counted, strict=True):
            self._steps[id(p)] = (tensor, tensor._version, count + 1)
        beta1, beta2 = map(float, group["betas"])
        for (_, count), at in _alike([(p.device, n) for p, n in zip(params, counted, strict=True)]).items():
            masked_adamw(
                _chosen(params, at),
                [grads[i].contiguous() for i in at],
                _chosen(exp_avgs, at),
                _chosen(exp_avg_sqs, at),
                *self._masks(_chosen(params, at)),
                lr=float(group["lr"]),
                beta1=beta1,
                beta2=beta2,
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
                step=count + 1,
                checked=checked,
            )
        self._fitting[id(params[0])] = layouts, moments  # now that none was refused

    def _sgd(self, optimizer: Any, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        found: list[Tensor | None] = []
        optimizer._init_group(group, params, grads, found)
        new = [buffer is None for buffer in found] or [False] * len(params)  # without momentum there are no buffers
        for p, buffer in zip(params, found, strict=False):
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p) if buffer is None else buffer
        momenta = [optimizer.state[p]["momentum_buffer"] for p in params] if found else []
        for (_, first), at in _alike([(p.device, n) for p, n in zip(params, new, strict=True)]).items():
            masked_sgd(
                _chosen(params, at),
                [grads[i].contiguous() for i in at],
                _chosen(momenta, at) if momenta else [],
                *self._masks(_chosen(params, at)),
                lr=float(group["lr"]),
                momentum=float(group["momentum"]),
                dampening=float(group["dampening"]),
                weight_decay=float(group["weight_decay"]),
                nesterov=bool(group["nesterov"]),
                first=first,
            )

    def _masks(self, params: list[Tensor]) -> tuple[list[Tensor], list[int]]:
        masks = [self.masks[self._index[id(p)]] for p in params]
        return [mask.keep for mask in masks], [mask.dim for mask in masks]

    def _step_of(self, key: int, step: Tensor) -> int:
        """The value of a step counter, read from its device only where something else has changed it."""
        tensor, version, value = self._steps.get(key, (None, 0, 0))
        return value if tensor is step and version == step._version else int(step.item())


def _require_maskable(optimizer: Any, parameters: Iterable[Tensor] = ()) -> None:
    if reason := why_not_masked(optimizer, parameters):
        raise UserError(
            f"The step cannot be masked, {reason}: use torch.optim.AdamW or SGD with plain settings and weights."
        )


def _overflowed(optimizer: Any) -> bool:
    """Whether torch's GradScaler, which leaves this to fused optimizers, has found an infinite gradient."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def _unscale(optimizer: Any, params: list[Any]) -> None:
    if (scale := getattr(optimizer, "grad_scale", None)) is not None:
        torch._foreach_div_([p.grad for p in params], scale)


def _layout(parameter: Tensor, gradient: Tensor) -> Layout:
    shape, whole = parameter.shape, parameter.is_contiguous()
    return parameter.data_ptr(), parameter.dtype, gradient.dtype, shape, whole


def _alike(keys: list[tuple[Any, Any]]) -> dict[tuple[Any, Any], list[int]]:
    """Indices of equal keys."""
    found: dict[tuple[Any, Any], list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return found


def _chosen(tensors: list[Tensor], at: list[int]) -> list[Tensor]:
    return [tensors[i] for i in at]
