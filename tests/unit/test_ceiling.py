"""The read probe reads everything, whatever the number of streams and threads."""

from __future__ import annotations

import pytest
import torch

from pnlac_fast.benchmarking.ceiling import readers
from pnlac_fast.benchmarking.timing import threads
from pnlac_fast.ops import engines

pytestmark = pytest.mark.skipif(engines()["cpp"] != "available", reason=f"no compiled library: {engines()['cpp']}")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_all_is_read(number: int) -> None:
    with threads(number):
        sums = {name: read() for name, read in readers(5 * 2**20 + 100).items()}
    count = 5 * 2**20 // 8
    assert set(sums.values()) == {count * (count - 1) // 2}
    assert len(sums) == 3


@pytest.mark.parametrize(
    ("data", "streams"),
    [
        (torch.zeros(100, dtype=torch.int64), 2),
        (torch.zeros(128, dtype=torch.int64), 3),
        (torch.zeros(128), 2),
        (torch.zeros(2, 64, dtype=torch.int64), 2),
        (torch.zeros(256, dtype=torch.int64)[::2], 2),
    ],
)
def test_refuses_what_it_could_not_read(data: torch.Tensor, streams: int) -> None:
    with pytest.raises(RuntimeError, match=r"^read_streams: "):
        torch.ops.pnlac_fast.read_streams_cpp(data, streams)
