"""The contrast sums of two streams of activations."""

from __future__ import annotations

import torch
from torch import Tensor

from pnlac_fast.ops import reference
from pnlac_fast.ops.dispatch import define

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def contrast(base: Tensor, tuned: Tensor, rows: Tensor, offsets: Tensor, sums: Tensor, *, engine: str = "auto") -> None:
    """Add the sums that contrast two models' activations to ``sums``, in place.

    For each group g and neuron i, over the rows r of the group, ``sums[g, :, i]`` grows by the sums of
    ``base[r, i]``, ``tuned[r, i]``, ``base[r, i]**2``, ``tuned[r, i]**2`` and ``(tuned[r, i] - base[r, i])**2``.
    Mean, standard deviation and root mean square of the difference follow from these and the number of rows. The sums
    are additive: those of batches, files and processes are added to give the sums of all.

    Parameters
    ----------
    base, tuned
        [row, neuron], activations of the two models on the same tokens; float32, float64, bfloat16 or float16.
        Rows that are not selected are never read. No gradient flows.
    rows
        [selected] int64, indices of the rows to count, ordered by group. A row may be in several groups.
    offsets
        [group + 1] int64, where each group starts in ``rows``; the last entry is the length of ``rows``.
    sums
        [group, 5, neuron] float64, added to.
    engine
        "auto": the fastest on the device of the activations. "torch": plain torch in float64, on any device. "cpp":
        the compiled library, on the CPU; it adds bfloat16 in float32 within tiles of 64 rows and all else in float64.
        Its bits do not depend on the number of threads.

    Raises
    ------
    UserError
        The engine is unknown, not available, or does not run on the device of the activations.
    RuntimeError
        Shapes, dtypes or devices do not fit; a row does not exist; ``offsets`` decrease or do not cover ``rows``.

    Examples
    --------
    >>> base, tuned = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([[1.0], [4.0], [5.0]])
    >>> sums = torch.zeros(2, 5, 1, dtype=torch.float64)
    >>> contrast(base, tuned, torch.tensor([0, 1, 2]), torch.tensor([0, 2, 3]), sums)
    >>> sums[:, :, 0].tolist()
    [[3.0, 5.0, 5.0, 17.0, 4.0], [5.0, 5.0, 25.0, 25.0, 0.0]]
    """
    _check(base, tuned, rows, offsets, sums)
    total = sums.contiguous()
    _CONTRAST.on(base.device, engine)(dense(base), dense(tuned), rows.contiguous(), offsets.contiguous(), total)
    if not sums.is_contiguous():
        sums.copy_(total)


def dense(activations: Tensor) -> Tensor:
    """Activations whose neurons are contiguous; a free row stride is fine, so that a slice of a batch is not copied."""
    return activations if activations.stride(1) == 1 or activations.shape[1] <= 1 else activations.contiguous()


def _check(base: Tensor, tuned: Tensor, rows: Tensor, offsets: Tensor, sums: Tensor) -> None:
    if base.dim() != 2:
        raise RuntimeError(f"contrast: base must be [row, neuron], not {list(base.shape)}.")
    if base.shape != tuned.shape or base.dtype != tuned.dtype:
        raise RuntimeError(
            "contrast: base and tuned must agree in shape and dtype, not "
            f"{list(base.shape)} {base.dtype} and {list(tuned.shape)} {tuned.dtype}."
        )
    if base.dtype not in DTYPES:
        raise RuntimeError(f"contrast: activations must be float32, float64, bfloat16 or float16, not {base.dtype}.")
    for name, index in (("rows", rows), ("offsets", offsets)):
        if index.dim() != 1 or index.dtype != torch.int64:
            raise RuntimeError(f"contrast: {name} must be a vector of int64, not {list(index.shape)} {index.dtype}.")
    expected = (offsets.shape[0] - 1, 5, base.shape[1])
    if sums.dtype != torch.float64 or sums.shape != expected:
        raise RuntimeError(
            f"contrast: sums must be float64 {list(expected)} (one group less than offsets has entries), "
            f"not {sums.dtype} {list(sums.shape)}."
        )
    for name, tensor in (("tuned", tuned), ("rows", rows), ("offsets", offsets), ("sums", sums)):
        if tensor.device != base.device:
            raise RuntimeError(f"contrast: {name} must be on {base.device} like base, not on {tensor.device}.")


_CONTRAST = define(
    "contrast",
    "(Tensor base, Tensor tuned, Tensor rows, Tensor offsets, Tensor(a!) sums) -> ()",
    reference=reference.contrast,
    check=_check,
    cuda=True,
)
