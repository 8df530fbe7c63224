"""Without a GPU its benchmarks stop with one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pnlac_fast.benchmarking import gpu
from pnlac_fast.errors import UserError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def test_the_kernels_are_not_measured() -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        gpu.measure()


def test_the_script_writes_nothing() -> None:
    before = sorted(SCRIPT.with_name("results").iterdir())
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "torch finds no CUDA device here: run this on a machine that has one.\n"
    assert sorted(SCRIPT.with_name("results").iterdir()) == before
