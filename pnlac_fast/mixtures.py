"""Mixtures of experts as one wide MLP: the activations of all experts side by side, read and written as one site.

The output of a mixture is sum_e w_e down_e(a_e), with a token's routing weights w_e, zero for experts that it is not
sent to. So it is the last projection of one wide MLP whose neuron i of expert e has the activation w_e a_e[i]. That is
what is read here: the zeros of experts that a token does not take are what these neurons add to the stream, not gaps.
A value that is written to such a neuron takes effect like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "pnlac_visited"
Visit = Callable[[Tensor], Tensor | None]
Product = Callable[[Any, str, int, Tensor], Tensor]
_visits: ContextVar[dict[int, tuple[Visit, ...]]] = ContextVar("visits")  # by the id of a module
_usual: ContextVar[dict[int, Any]] = ContextVar("usual")  # implementation by the id of a configuration


@contextmanager
def visited(experts: Sequence[nn.Module], visits: Sequence[Visit]) -> Iterator[None]:
    """Show each experts module's activations to its visit, [token, expert * width]; what it returns takes their place.

    The routing weight is part of the activation. Modules without a visit run as they do else.
    """
    known, usual = _visits.get({}), _usual.get({})
    added = {id(module): (*known.get(id(module), ()), visit) for module, visit in zip(experts, visits, strict=True)}
    configs: dict[int, Any] = {id(module.config): module.config for module in experts}
    before = {key: config._experts_implementation for key, config in configs.items()}
    tokens = _visits.set({**known, **added}), _usual.set({**before, **usual})
    try:
        for config in configs.values():
            config._experts_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
        _visits.reset(tokens[0])
        _usual.reset(tokens[1])


def _forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute experts as transformers asks: hidden [token, width], index and weights [token, choice]."""
    if id(module) in _visits.get():
        return compute(module, hidden, index, weights, product, getattr(module, "down_proj_bias", None))
    own = type(module).forward.__wrapped__
    usual = ALL_EXPERTS_FUNCTIONS.get(_usual.get()[id(module.config)], own)  # "eager" is none of its keys
    return usual(module, hidden, index, weights)


def product(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    """A projection of one expert, of x [token, input]; what leads to the neurons with its bias."""
    weight, bias = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
    out = x @ weight if module.is_transposed else nn.functional.linear(x, weight)
    return out if bias is None or name == "down_proj" else out + bias[expert]


def compute(
    module: Any,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    product: Product,
    bias: Tensor | None,
) -> Tensor:
    """Compute experts one after another, and show their activations to the visits that there are.

    ``product`` computes projections, as :func:`product` does; ``bias`` is that of the last ones, [expert, output].
    """
    count, width = module.num_experts, module.down_proj.shape[1 if module.is_transposed else 2]
    routed: dict[int, Tensor] = {}
    active: dict[int, Tensor] = {}
    order, scales, done = index.flatten().argsort(stable=True), weights.flatten(), 0
    # With experts spread over devices, those of others have higher numbers, and none here.
    for expert, taken in enumerate(index.flatten().bincount(minlength=count)[:count].tolist()):
        if taken:
            chosen = order[done : done + taken]
            at, scale = chosen // index.shape[1], scales[chosen, None].to(hidden.dtype)
            routed[expert], active[expert] = at, _into(module, hidden[at], expert, product) * scale
            done += taken
    rows = routed
    if visits := _visits.get({}).get(id(module), ()):
        changed, middle = False, hidden.new_zeros(len(hidden), count, width)
        for expert, at in routed.items():
            middle[at, expert] = active[expert]
        for visit in visits:
            if (new := visit(middle.flatten(1))) is not None:
                changed, middle = True, new.view(middle.shape)
        if changed:
            rows = {expert: middle[:, expert].detach().any(1).nonzero()[:, 0] for expert in range(count)}
        active = {expert: middle[at, expert] for expert, at in rows.items()}
    out = torch.zeros_like(hidden)
    for expert, at in rows.items():
        if len(at):
            out = out.index_add(0, at, product(module, "down_proj", expert, active[expert]))
    if bias is not None:
        for expert, at in routed.items():
            share = torch.where(index[at] == expert, weights[at], 0).sum(1, keepdim=True)
            out = out.index_add(0, at, (bias[expert] * share).to(hidden.dtype))
    return out


def _into(module: Any, x: Tensor, expert: int, product: Product) -> Tensor:
    """The activations of one expert, [token, width], without routing weight."""
    if getattr(module, "has_gate", True):  # before transformers 5.2 all had one
        return module._apply_gate(product(module, "gate_up_proj", expert, x))
    return module.act_fn(product(module, "up_proj", expert, x))


ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
