"""The Triton kernels in Triton's interpreter, on the CPU: the cases of tests/gpu/test_gpu_ops.py in small shapes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

CASES = Path(__file__).parents[1] / "gpu" / "test_gpu_ops.py"


def numpy_is_too_new() -> bool:
    """Triton 3.6 takes an array of one entry for a number, which numpy 2.4 refuses; Triton 3.9 does not."""
    numpy = Version(metadata.version("numpy"))
    return Version(metadata.version("triton")) < Version("3.9") and numpy >= Version("2.4")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_operation_in_the_interpreter() -> None:
    """In a process of its own, because Triton decides when a kernel is defined whether it is interpreted."""
    if numpy_is_too_new():
        pytest.skip("this Triton's interpreter does not run with this numpy")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CASES.parents[2], check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
