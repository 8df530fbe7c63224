"""How fast memory can be read at all: the time below which no kernel over the same bytes can stay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from pnlac_fast.errors import UserError
from pnlac_fast.ops import engines

# Two arrays, four rows of one, four rows of each (what the contrast kernel reads side by side).
STREAMS = (2, 4, 8)
_UNIT = 256 * max(STREAMS)


def readers(size: int) -> dict[str, Callable[[], int]]:
    """Functions that read ``size`` bytes of memory, with torch's threads, each from another number of streams at once.

    Time them beside the kernel (:func:`pnlac_fast.benchmarking.timing.interleaved`); the fastest is the ceiling. Choose
    a size that no cache holds.

    Parameters
    ----------
    size
        Bytes, of which up to 2047 are left out so that the streams are equal.

    Returns
    -------
    dict of str to callable
        By name; each returns the sum of what it read as int64.

    Raises
    ------
    UserError
        The compiled library is not available.
    """
    if engines()["cpp"] != "available":
        raise UserError(f"The read ceiling needs the compiled library: {engines()['cpp']}.")
    data = torch.arange(size // _UNIT * _UNIT // 8)
    read = torch.ops.pnlac_fast.read_streams_cpp
    return {f"read, {streams} streams": partial(read, data, streams) for streams in STREAMS}
