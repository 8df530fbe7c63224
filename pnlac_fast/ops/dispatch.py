"""Who computes an operation: the engines there are, why one is not available, and the choice between them.

An operation NAME is one torch operator per engine, ``pnlac_fast::NAME_torch``, ``NAME_cpp`` and so on, all with one
schema and one fake kernel. So each can be traced by ``torch.compile`` and checked by ``torch.library.opcheck``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pnlac_fast.errors import UserError, unknown
from pnlac_fast.ops import native

# What "auto" tries, in this order, for tensors on a device. On an H100 the contrast in CUDA reads at 0.57 to 1.05 of
# the rate of a copy, that in Triton, which needs no nvcc, at 0.35 to 0.88 (benchmarks/results).
PREFERRED = {"cpu": ("cpp", "torch"), "cuda": ("cuda", "triton", "torch")}

_library = torch.library.Library("pnlac_fast", "DEF")
_warned = False


def _cuda_status(cpp: str) -> str:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here"
    if cpp != "available":
        return cpp
    if not torch._C._dispatch_has_kernel_for_dispatch_key("pnlac_fast::contrast_cuda", "CUDA"):
        return "the package was installed without nvcc; install it again where nvcc is found"
    return "available"


def _triton_status() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return "available"
    return "torch finds no CUDA device here (TRITON_INTERPRET=1 runs it on the CPU, for tests)"


def engines() -> dict[str, str]:
    """Return the name of each engine, with "available" or the reason why it is not."""
    return dict(_ENGINES)


@dataclass(frozen=True)
class Operation:
    """An operation, and the engines that can compute it."""

    name: str
    engines: tuple[str, ...]

    def on(self, device: torch.device, engine: str = "auto") -> Any:
        """The torch operator that computes it for tensors on a device.

        Raises
        ------
        UserError
            The engine is unknown, not available, lacks this operation, or does not run on the device.
        """
        chosen = self._fastest(device) if engine == "auto" else self._named(device, engine)
        return getattr(torch.ops.pnlac_fast, f"{self.name}_{chosen}")

    def _fastest(self, device: torch.device) -> str:
        preferred = [e for e in PREFERRED.get(device.type, ("torch",)) if e in self.engines]
        chosen = next(e for e in preferred if _ENGINES[e] == "available")
        if chosen == "torch" and preferred != ["torch"]:
            _warn_fallback(preferred[0])
        return chosen

    def _named(self, device: torch.device, engine: str) -> str:
        if engine not in _ENGINES:
            raise unknown("engine", engine, ["auto", *_ENGINES])
        if engine not in self.engines:
            raise UserError(f"Engine '{engine}' has no {self.name}: choose one of auto, {', '.join(self.engines)}.")
        if _ENGINES[engine] != "available":
            raise UserError(f"Engine '{engine}' is not available: {_ENGINES[engine]}, or choose engine 'torch'.")
        runs_on = {"cpp": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",) if torch.cuda.is_available() else ("cpu",)}
        if engine != "torch" and device.type not in runs_on[engine]:
            raise UserError(
                f"Engine '{engine}' runs on {runs_on[engine][0]}, the tensors are on {device}: choose engine 'auto'."
            )
        return engine


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    check: Callable[..., Any],
    cpp: bool = True,
    triton: bool = True,
    cuda: bool = False,
) -> Operation:
    """Define an operation with one operator per engine.

    Parameters
    ----------
    name, schema
        Such as "contrast" and "(Tensor base, ..., Tensor(a!) sums) -> ()".
    reference
        Its implementation in plain torch, for any device.
    check
        Its fake kernel: checks shapes and dtypes, and returns empty tensors of the right shape where it returns any.
    cpp, cuda
        Whether the compiled library implements it, as ``NAME_cpp`` for the CPU and ``NAME_cuda`` for CUDA.
    triton
        Whether ``pnlac_fast.ops.triton.NAME`` has a function NAME; it is imported when first called.
    """
    chosen = {"torch": True, "cpp": cpp, "triton": triton, "cuda": cuda}
    operation = Operation(name, tuple(engine for engine, has in chosen.items() if has))
    for engine in operation.engines:
        _library.define(f"{name}_{engine}{schema}")
        torch.library.register_fake(f"pnlac_fast::{name}_{engine}", check, lib=_library)
    _library.impl(f"{name}_torch", reference, "CompositeExplicitAutograd")
    if triton:

        def by_triton(*arguments: Any) -> Any:
            return getattr(importlib.import_module("pnlac_fast.ops.triton"), name)(*arguments)

        _library.impl(f"{name}_triton", by_triton, "CompositeExplicitAutograd")
    return operation


def differentiable(operation: Operation, save: Callable[..., None], gradients: Callable[..., Any]) -> None:
    """Let gradients flow through an operation, on every engine.

    Parameters
    ----------
    operation
        What :func:`define` returned.
    save
        Called with context, inputs and output in the forward pass: keeps what the gradients need in the context.
    gradients
        Called with the engine's name, the context and the gradients of the outputs; returns those of the inputs.
    """
    for engine in operation.engines:
        torch.library.register_autograd(
            f"pnlac_fast::{operation.name}_{engine}",
            partial(gradients, engine),
            setup_context=save,
            lib=_library,
        )


def _warn_fallback(missing: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"Using the slower torch engine: {_ENGINES[missing]}.", RuntimeWarning, stacklevel=5)


_ENGINES = {"torch": "available", "cpp": native.load()}
_ENGINES["triton"] = _triton_status()
_ENGINES["cuda"] = _cuda_status(_ENGINES["cpp"])
