"""All benchmarks of a GPU into benchmarks/results/DEVICE.json: ``make gpu`` runs this after the GPU's tests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from pnlac_fast.benchmarking import gpu
from pnlac_fast.benchmarking.suite import PARTS

SHAPES = ("llama-3.1-8b", "qwen2.5-7b", "llama-3.2-3b")
SECONDS = 300  # leaves time for set-up and tests within eight minutes
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, print nothing but where the result is, and end with exit code 1 where a part has none."""
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device here: run this on a machine that has one.")
    device = torch.cuda.get_device_name()
    path = RESULTS / (re.sub(r"[^a-z0-9.]+", "-", device.lower()).strip("-") + ".json")
    result: dict[str, object] = {"device": device, "kernels": gpu.measure()}
    # Written before the long part, which may be stopped.
    path.write_text(json.dumps(result, indent=1) + "\n")
    command = [sys.executable, "-m", "pnlac_fast.cli", "bench", "--device", "cuda", "--repeats", "3", "--json"]
    command += ["--only", ",".join(part for part in PARTS if part != "store")]  # which says nothing of a GPU
    command += [word for shape in SHAPES for word in ("--shape", shape)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        sys.exit(f"{path} holds the kernels only: {error}")
    path.write_text(json.dumps(result | json.loads(done.stdout), indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
