"""Each operation in plain torch: float64, slow, obvious. The others are tested against these."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


@torch.no_grad()
def contrast(base: Tensor, tuned: Tensor, rows: Tensor, offsets: Tensor, sums: Tensor) -> None:
    """Add the contrast sums of the selected rows to ``sums``, on any device.

    See :func:`pnlac_fast.ops.contrast` for the arguments.
    """
    _check_values(rows, offsets, len(base))
    for group, (start, stop) in enumerate(pairwise(offsets.tolist())):
        a = base[rows[start:stop]].double()
        b = tuned[rows[start:stop]].double()
        d = b - a
        sums[group] += torch.stack([a.sum(0), b.sum(0), a.square().sum(0), b.square().sum(0), d.square().sum(0)])


def _check_values(rows: Tensor, offsets: Tensor, row_count: int) -> None:
    # A negative row would otherwise count from the end.
    outside = torch.nonzero((rows < 0) | (rows >= row_count))
    if len(outside):
        place = int(outside[0])
        raise RuntimeError(f"contrast: rows[{place}] is {int(rows[place])}, but there are {row_count} rows.")
    if offsets[0] != 0 or offsets[-1] != len(rows):
        raise RuntimeError(f"contrast: offsets must start at 0 and end at {len(rows)}, the length of rows.")
    falling = torch.nonzero(offsets.diff() < 0)
    if len(falling):
        raise RuntimeError(f"contrast: offsets must not decrease (group {int(falling[0])}).")
