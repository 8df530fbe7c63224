"""The kernels for CUDA compile for both architectures and keep everything in registers. Nothing runs here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")


def test_there_are_sources() -> None:
    assert SOURCES


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc on PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
@pytest.mark.parametrize("architecture", [80, 90])
def test_compiles_without_spills(source: Path, architecture: int, tmp_path: Path) -> None:
    options = ["-O3", "-std=c++17", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas", "-v"]
    done = subprocess.run(
        [str(NVCC), *options, "-cubin", str(source), "-o", str(tmp_path / "kernel.cubin")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills
    assert set(spills) == {("0", "0", "0")}, done.stderr
