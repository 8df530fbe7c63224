"""The numerical operations of the package, and the only place that chooses who computes them.

Each operation has a schema, defined here; a reference in plain torch for every device (``reference``); and, where one
exists, a compiled implementation (``native``). Torch's dispatcher takes the compiled one for tensors on the CPU.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pnlac_fast.errors import UserError, unknown
from pnlac_fast.ops import native, reference

__all__ = ["contrast", "engines"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SCHEMA = "(Tensor base, Tensor tuned, Tensor rows, Tensor offsets, Tensor(a!) sums) -> ()"

# `contrast` is the fastest there is on the device of its tensors, `contrast_reference` always the reference.
_library = torch.library.Library("pnlac_fast", "DEF")
for _name in ("contrast", "contrast_reference"):
    _library.define(f"{_name}{_SCHEMA}")
    _library.impl(_name, reference.contrast, "CompositeExplicitAutograd")

_ENGINES = {"torch": "available", "cpp": native.load()}
_warned = False


def engines() -> dict[str, str]:
    """Name of each engine, with "available" or the reason why it is not."""
    return dict(_ENGINES)


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
    _check_shapes(base, tuned, rows, offsets, sums)
    _check_engine(engine, base.device)
    operations = torch.ops.pnlac_fast
    operation = operations.contrast_reference if engine == "torch" else operations.contrast
    total = sums.contiguous()
    operation(_dense(base), _dense(tuned), rows.contiguous(), offsets.contiguous(), total)
    if not sums.is_contiguous():
        sums.copy_(total)


def _check_engine(engine: str, device: torch.device) -> None:
    if engine == "auto":
        if device.type == "cpu" and _ENGINES["cpp"] != "available":
            _warn_fallback()
        return
    if engine not in _ENGINES:
        raise unknown("engine", engine, ["auto", *_ENGINES])
    if _ENGINES[engine] != "available":
        raise UserError(f"Engine '{engine}' is not available: {_ENGINES[engine]}, or choose engine 'torch'.")
    if engine == "cpp" and device.type != "cpu":
        raise UserError(f"Engine 'cpp' runs on the CPU, but the activations are on {device}; choose engine 'auto'.")


def _warn_fallback() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"Using the slower torch engine: {_ENGINES['cpp']}.", RuntimeWarning, stacklevel=4)


def _dense(activations: Tensor) -> Tensor:
    # A free row stride is fine, so that a slice of a longer batch is never copied.
    return activations if activations.stride(1) == 1 or activations.shape[1] <= 1 else activations.contiguous()


@torch.library.register_fake("pnlac_fast::contrast", lib=_library)
@torch.library.register_fake("pnlac_fast::contrast_reference", lib=_library)
def _check_shapes(base: Tensor, tuned: Tensor, rows: Tensor, offsets: Tensor, sums: Tensor) -> None:
    if base.dim() != 2:
        raise RuntimeError(f"contrast: base must be [row, neuron], not {list(base.shape)}.")
    if base.shape != tuned.shape or base.dtype != tuned.dtype:
        raise RuntimeError(
            "contrast: base and tuned must agree in shape and dtype, not "
            f"{list(base.shape)} {base.dtype} and {list(tuned.shape)} {tuned.dtype}."
        )
    if base.dtype not in _DTYPES:
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
