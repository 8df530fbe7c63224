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
    visits = _visits.get().get(id(module), ())
    if not visits:
        own = type(module).forward.__wrapped__
        usual = ALL_EXPERTS_FUNCTIONS.get(_usual.get()[id(module.config)], own)  # "eager" is none of its keys
        return usual(module, hidden, index, weights)
    count, width = module.num_experts, module.down_proj.shape[1 if module.is_transposed else 2]
    middle = hidden.new_zeros(len(hidden), count, width)
    routed: dict[int, Tensor] = {}
    for expert in index.unique().tolist():
        if expert < count:  # with experts spread over devices, those of others have no number here
            routed[expert], choice = (index == expert).nonzero(as_tuple=True)
            scale = weights[routed[expert], choice, None].to(hidden.dtype)
            middle[routed[expert], expert] = _into(module, hidden[routed[expert]], expert) * scale
    changed = False
    for visit in visits:
        if (new := visit(middle.flatten(1))) is not None:
            changed, middle = True, new.view(middle.shape)
    out = torch.zeros_like(hidden)
    for expert in range(count) if changed else routed:
        part = middle[:, expert]
        at = part.detach().any(1).nonzero()[:, 0] if changed else routed[expert]
        if len(at):
            out = out.index_add(0, at, _times(module, part[at], module.down_proj[expert]))
    if module.has_bias:
        for expert, at in routed.items():
            share = torch.where(index[at] == expert, weights[at], 0).sum(1, keepdim=True)
            out = out.index_add(0, at, (module.down_proj_bias[expert] * share).to(hidden.dtype))
    return out


def _into(module: Any, x: Tensor, expert: int) -> Tensor:
    """The activations of one expert, [token, width], without routing weight."""
    gated = getattr(module, "has_gate", True)  # before transformers 5.2 all were
    name = "gate_up_proj" if gated else "up_proj"
    wide = _times(module, x, getattr(module, name)[expert])
    if module.has_bias:
        wide = wide + getattr(module, f"{name}_bias")[expert]
    return module._apply_gate(wide) if gated else module.act_fn(wide)


def _times(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight if module.is_transposed else nn.functional.linear(x, weight)


ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
