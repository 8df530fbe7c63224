"""Where the entries of neurons are in the tensors of an MLP: rows, columns, or those of single experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from pnlac_fast.architecture import Projection


@dataclass(frozen=True, eq=False)
class Place:
    """Entries of a tensor: ``tensor.index_select(dim, index)``, or of experts, of which not all have the same.

    Attributes
    ----------
    index
        int64 [entry].
    first
        int64 [entry]: where each entry stands in the first dimension; None where all of that dimension is meant.
    """

    dim: int
    index: Tensor
    first: Tensor | None = None

    def take(self, tensor: Tensor) -> Tensor:
        """A copy of the entries, as ``index_select`` gives it; with ``first``, [entry, ...]."""
        if self.first is not None:
            return tensor[self._pairs(tensor)]
        return tensor.index_select(self.dim, self.index.to(tensor.device))

    def put(self, tensor: Tensor, values: Tensor | float) -> None:
        """Overwrite the entries in place, with values as :meth:`take` gives them or with one number."""
        if self.first is not None:
            tensor[self._pairs(tensor)] = values
        elif isinstance(values, Tensor):
            tensor.index_copy_(self.dim, self.index.to(tensor.device), values)
        else:
            tensor.index_fill_(self.dim, self.index.to(tensor.device), values)

    @property
    def along(self) -> int:
        """In which dimension of :meth:`take` the entries are."""
        return self.dim if self.first is None else 0

    def split(self, values: Tensor, count: int) -> Sequence[Tensor]:
        """Values as :meth:`take` gives them, by where they stand in the first dimension, of ``count``."""
        if self.first is None:
            return values.unbind(0)
        order, sizes = self._grouped
        return values.index_select(0, order.to(values.device)).split(sizes + [0] * (count - len(sizes)))

    def indices(self, count: int) -> Sequence[Tensor]:
        """Of each number in the first dimension, of ``count``, its entries' ``index``."""
        return [self.index] * count if self.first is None else self.split(self.index, count)

    @cached_property
    def _grouped(self) -> tuple[Tensor, list[int]]:
        """The entries in the order of where they stand in the first dimension, and how many stand at each place."""
        assert self.first is not None
        return self.first.argsort(stable=True), self.first.bincount().tolist()

    def _pairs(self, tensor: Tensor) -> tuple[Any, ...]:
        assert self.first is not None
        first, index = self.first.to(tensor.device), self.index.to(tensor.device)
        return (first, *(index if d == self.dim else slice(None) for d in range(1, tensor.dim())))


def places(module: Any, projection: Projection, neurons: Tensor, width: int) -> dict[str, tuple[str, Place]]:
    """Names of the tensors of a projection that hold weights of neurons, and where they are in each.

    Parameters
    ----------
    module
        A linear layer, transformers' Conv1D, or a module of experts; without adapters.
    neurons
        int64 [chosen], ascending.
    width
        Of the MLP, or of one expert.

    Returns
    -------
    dict
        By "weight" and, where the neurons are what the projection gives and it has one, "bias".
    """
    index, expert = projection.place(neurons, width)
    if hasattr(module, "is_transposed"):
        rows = projection.inward != module.is_transposed
        found = {"weight": (projection.name, Place(1 if rows else 2, index, expert))}
        bias = f"{projection.name}_bias"
        if projection.inward and getattr(module, bias, None) is not None:
            found["bias"] = (bias, Place(1, index, expert))
        return found
    rows = projection.inward != isinstance(module, Conv1D)  # whose weight is [input, output]
    found = {"weight": ("weight", Place(0 if rows else 1, index))}
    if projection.inward and getattr(module, "bias", None) is not None:
        found["bias"] = ("bias", Place(0, index))
    return found
