"""Without a GPU its benchmarks stop with one sentence."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def test_the_script_keeps_every_part_that_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a GPU that is made up: the kernels and one part fail, the time runs out after another."""
    script = runpy.run_path(str(SCRIPT))
    now, asked = [0.0], []

    def bench(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[command.index("--only") + 1])
        if asked[-1] == "masked_step":
            raise subprocess.CalledProcessError(4, command)
        now[0] += 200 if asked[-1] == "memory" else 50
        return subprocess.CompletedProcess(command, 0, json.dumps({"only": asked[-1]}))

    def wrong_kernels() -> None:
        raise RuntimeError("the sums differ")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Made-up 9")
    monkeypatch.setattr(gpu, "measure", wrong_kernels)
    monkeypatch.setattr(subprocess, "run", bench)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setitem(script["main"].__globals__, "RESULTS", tmp_path)
    with pytest.raises(SystemExit) as ended:
        script["main"]()
    assert str(ended.value).startswith("Missing there:\nkernels: the sums differ\nmasked_step: Command")
    assert str(ended.value).endswith("stall: no time left\nllama-3.2-3b: no time left")
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("nvidia-made-up-9-20")
    found = json.loads(file.read_text())
    assert found.pop("device") == "NVIDIA Made-up 9"
    assert {name: part["only"] for name, part in found.items()} == {
        "llama-3.1-8b": "localise,overhead",
        **{name: name for name in ("contrast_kernel", "training_step", "mixture_step", "memory")},
    }
    assert asked == ["localise,overhead", "training_step", "mixture_step", "contrast_kernel", "masked_step", "memory"]
