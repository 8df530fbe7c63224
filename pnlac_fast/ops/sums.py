"""Additive sums of streams of activations: of one stream, and of two that are contrasted."""

from __future__ import annotations

from torch import Tensor

from pnlac_fast.ops import checks, reference
from pnlac_fast.ops.dispatch import define


def contrast(
    base: Tensor,
    tuned: Tensor,
    rows: Tensor,
    offsets: Tensor,
    sums: Tensor,
    *,
    base_rows: Tensor | None = None,
    engine: str = "auto",
) -> None:
    """Add the sums that contrast two models' activations to ``sums``, in place.

    For each group g and neuron i, over the rows r of the group, ``sums[g, :, i]`` grows by the sums of ``base[r, i]``,
    ``tuned[r, i]``, ``base[r, i]**2``, ``tuned[r, i]**2`` and ``(tuned[r, i] - base[r, i])**2``. Mean, standard
    deviation and root mean square of the difference follow from these and the number of rows. The sums are additive:
    those of batches, files and processes are added to give the sums of all. PNLAC (arXiv 2508.02360) needs no more. It
    is the textbook algorithm of one pass (Chan, Golub and LeVeque 1983, doi 10.1080/00031305.1983.10483115), in float64
    because its subtractions cancel digits.

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
        [group, 5, neuron] float64, added to; two sums in units of the activation, three in their squares.
    base_rows
        [selected] int64, the row of ``base`` to contrast each selected row of ``tuned`` with, where these differ, as
        when only some rows of ``base`` were kept; ``base`` may then have another number of rows. Default: ``rows``.
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
    >>> import torch
    >>> base, tuned = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([[1.0], [4.0], [5.0]])
    >>> sums = torch.zeros(2, 5, 1, dtype=torch.float64)
    >>> contrast(base, tuned, torch.tensor([0, 1, 2]), torch.tensor([0, 2, 3]), sums)
    >>> sums[:, :, 0].tolist()
    [[3.0, 5.0, 5.0, 17.0, 4.0], [5.0, 5.0, 25.0, 25.0, 0.0]]
    """
    if base_rows is None:
        checks.alike("contrast", base=base, tuned=tuned)
        base_rows = rows
    _check_contrast(base, tuned, rows, base_rows, offsets, sums)
    total = sums.contiguous()
    _CONTRAST.on(base.device, engine)(
        checks.dense(base),
        checks.dense(tuned),
        rows.contiguous(),
        base_rows.contiguous(),
        offsets.contiguous(),
        total,
    )
    if not sums.is_contiguous():
        sums.copy_(total)


def moments(x: Tensor, rows: Tensor, offsets: Tensor, sums: Tensor, *, engine: str = "auto") -> None:
    """Add the sums of activations and of their squares to ``sums``, in place.

    For each group g and neuron i, over the rows r of the group, ``sums[g, :, i]`` grows by the sums of ``x[r, i]`` and
    ``x[r, i]**2``: the sums of :func:`contrast` for one stream alone, added by the same rules.

    Parameters
    ----------
    x
        [row, neuron], float32, float64, bfloat16 or float16. Rows that are not selected are never read.
    rows, offsets, engine
        As for :func:`contrast`.
    sums
        [group, 2, neuron] float64, added to; in units of the activation, and in their squares.

    Raises
    ------
    UserError, RuntimeError
        As for :func:`contrast`.

    Examples
    --------
    >>> import torch
    >>> sums = torch.zeros(1, 2, 1, dtype=torch.float64)
    >>> moments(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0, 2]), torch.tensor([0, 2]), sums)
    >>> sums[0, :, 0].tolist()
    [6.0, 26.0]
    """
    _check_moments(x, rows, offsets, sums)
    total = sums.contiguous()
    _MOMENTS.on(x.device, engine)(checks.dense(x), rows.contiguous(), offsets.contiguous(), total)
    if not sums.is_contiguous():
        sums.copy_(total)


def _check_contrast(
    base: Tensor, tuned: Tensor, rows: Tensor, base_rows: Tensor, offsets: Tensor, sums: Tensor
) -> None:
    checks.activations("contrast", base=base, tuned=tuned)
    checks.one_width("contrast", base=base, tuned=tuned)
    checks.indices("contrast", rows=rows, base_rows=base_rows, offsets=offsets)
    if rows.shape != base_rows.shape:
        raise RuntimeError(
            f"contrast: base_rows must have an entry for each of the {rows.shape[0]} rows, not {base_rows.shape[0]}."
        )
    checks.sums("contrast", sums, (offsets.shape[0] - 1, 5, base.shape[1]), "one group less than offsets has entries")
    checks.one_device("contrast", base=base, tuned=tuned, rows=rows, base_rows=base_rows, offsets=offsets, sums=sums)


def _check_moments(x: Tensor, rows: Tensor, offsets: Tensor, sums: Tensor) -> None:
    checks.activations("moments", x=x)
    checks.indices("moments", rows=rows, offsets=offsets)
    checks.sums("moments", sums, (offsets.shape[0] - 1, 2, x.shape[1]), "one group less than offsets has entries")
    checks.one_device("moments", x=x, rows=rows, offsets=offsets, sums=sums)


_CONTRAST = define(
    "contrast",
    "(Tensor base, Tensor tuned, Tensor rows, Tensor base_rows, Tensor offsets, Tensor(a!) sums) -> ()",
    reference=reference.contrast,
    check=_check_contrast,
    cuda=True,
)
_MOMENTS = define(
    "moments",
    "(Tensor x, Tensor rows, Tensor offsets, Tensor(a!) sums) -> ()",
    reference=reference.moments,
    check=_check_moments,
)
