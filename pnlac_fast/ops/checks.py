"""What the operations check of their tensors, whoever computes; also when a graph is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dense(activations: Tensor) -> Tensor:
    """Activations whose neurons are contiguous; a free row stride is fine, so that a slice of a batch is not copied."""
    return activations if activations.stride(1) == 1 or activations.shape[1] <= 1 else activations.contiguous()


def activations(operation: str, **tensors: Tensor) -> None:
    """Each is [row, neuron], of one dtype that the kernels know."""
    for name, tensor in tensors.items():
        if tensor.dim() != 2:
            raise RuntimeError(f"{operation}: {name} must be [row, neuron], not {list(tensor.shape)}.")
    if _differ([tensor.dtype for tensor in tensors.values()]):
        raise RuntimeError(f"{operation}: {_names(tensors)} must agree in dtype, not {_kinds(tensors)}.")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise RuntimeError(
                f"{operation}: {name} must be float32, float64, bfloat16 or float16, not {tensor.dtype}."
            )


def alike(operation: str, **tensors: Tensor) -> None:
    """All of one shape and dtype."""
    if _differ([(tensor.shape, tensor.dtype) for tensor in tensors.values()]):
        raise RuntimeError(f"{operation}: {_names(tensors)} must agree in shape and dtype, not {_kinds(tensors)}.")


def one_width(operation: str, **tensors: Tensor) -> None:
    """All of one number of neurons."""
    if _differ([tensor.shape[1] for tensor in tensors.values()]):
        raise RuntimeError(f"{operation}: {_names(tensors)} must have the same neurons, not {_kinds(tensors)}.")


def indices(operation: str, **tensors: Tensor) -> None:
    """Each is a vector of int64."""
    for name, tensor in tensors.items():
        if tensor.dim() != 1 or tensor.dtype != torch.int64:
            raise RuntimeError(
                f"{operation}: {name} must be a vector of int64, not {list(tensor.shape)} {tensor.dtype}."
            )


def sums(operation: str, tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
    """float64 of one shape."""
    if tensor.dtype != torch.float64 or tensor.shape != shape:
        raise RuntimeError(
            f"{operation}: sums must be float64 {list(shape)} ({why}), not {tensor.dtype} {list(tensor.shape)}."
        )


def one_device(operation: str, **tensors: Tensor) -> None:
    """All on the device of the first."""
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        if tensor.device != tensors[first].device:
            raise RuntimeError(
                f"{operation}: {name} must be on {tensors[first].device} like {first}, not on {tensor.device}."
            )


def _differ(values: list[Any]) -> bool:
    # Not by a set: the sizes of a traced graph cannot be hashed.
    return any(value != values[0] for value in values[1:])


def _names(tensors: dict[str, Tensor]) -> str:
    *most, last = tensors
    return f"{', '.join(most)} and {last}"


def _kinds(tensors: dict[str, Tensor]) -> str:
    return " and ".join(f"{list(tensor.shape)} {tensor.dtype}" for tensor in tensors.values())
