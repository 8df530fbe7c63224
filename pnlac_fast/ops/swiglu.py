"""The middle of a gated MLP: the activated gate times up, in one pass, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pnlac_fast.errors import unknown
from pnlac_fast.ops import checks, reference
from pnlac_fast.ops.dispatch import define, differentiable

ACTIVATIONS = ("silu", "gelu_tanh")


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu", *, engine: str = "auto") -> Tensor:
    """``activation(gate) * up`` in one pass, rounded as torch rounds the two steps.

    SwiGLU and GEGLU are those of arXiv 2002.05202.

    Parameters
    ----------
    gate, up
        [row, neuron], float32, float64, bfloat16 or float16. Gradients flow to both.
    activation
        "silu" (Llama, Qwen) or "gelu_tanh" (Gemma): GELU with tanh in the place of the error function. The
        compiled library keeps the digits that torch's own ``1 + tanh`` cancels for negative ``gate``.
    engine
        "auto", or one of :func:`pnlac_fast.ops.engines`. All but "torch", which computes in float64, compute float16
        and bfloat16 in float32. Every engine rounds to the dtype after the activation and again after the product.

    Returns
    -------
    Tensor
        [row, neuron], the activations at ``mlp_mid``; dtype and device of ``gate``, contiguous.

    Raises
    ------
    UserError
        Activation or engine is unknown, or the engine is not available or does not run on the device.
    RuntimeError
        Shapes, dtypes or devices do not fit.

    Examples
    --------
    >>> import torch
    >>> swiglu(torch.tensor([[0.0, 100.0]]), torch.tensor([[5.0, 2.0]]))
    tensor([[  0., 200.]])
    """
    check_swiglu("swiglu", gate, up, activation)
    return _SWIGLU.on(gate.device, engine)(checks.dense(gate), checks.dense(up), activation)


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str = "silu", *, engine: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`swiglu` by ``gate`` and ``up``, given that of its result, in one pass.

    Parameters
    ----------
    grad
        [row, neuron], gradient of what :func:`swiglu` returned; dtype of ``gate``.
    gate, up, activation, engine
        As for :func:`swiglu`. Rounded where torch's own backward rounds: ``grad * up``, the activation, the results.

    Returns
    -------
    tuple of Tensor
        Gradients by ``gate`` and by ``up``, each like :func:`swiglu`'s result.

    Raises
    ------
    UserError, RuntimeError
        As for :func:`swiglu`.
    """
    _check_backward(grad, gate, up, activation)
    return _BACKWARD.on(gate.device, engine)(checks.dense(grad), checks.dense(gate), checks.dense(up), activation)


def check_swiglu(operation: str, gate: Tensor, up: Tensor, activation: str) -> None:
    """Gate and up fit, and there is such an activation."""
    checks.activations(operation, gate=gate, up=up)
    checks.alike(operation, gate=gate, up=up)
    checks.one_device(operation, gate=gate, up=up)
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, list(ACTIVATIONS))


def _fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    check_swiglu("swiglu", gate, up, activation)
    return gate.new_empty(gate.shape)


def _check_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    check_swiglu("swiglu_backward", gate, up, activation)
    checks.alike("swiglu_backward", grad=grad, gate=gate)
    checks.one_device("swiglu_backward", gate=gate, grad=grad)


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    _check_backward(grad, gate, up, activation)
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.activation = inputs[2]


def _gradients(engine: str, ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    backward = getattr(torch.ops.pnlac_fast, f"swiglu_backward_{engine}")
    return *backward(checks.dense(grad), *ctx.saved_tensors, ctx.activation), None


_BACKWARD = define(
    "swiglu_backward",
    "(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    reference=reference.swiglu_backward,
    check=_fake_backward,
)
_SWIGLU = define(
    "swiglu",
    "(Tensor gate, Tensor up, str activation) -> Tensor",
    reference=reference.swiglu,
    check=_fake,
)
differentiable(_SWIGLU, _save, _gradients)
