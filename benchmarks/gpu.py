"""All benchmarks of a GPU into benchmarks/results/DEVICE-DATE.json: ``make gpu`` runs this after the GPU's tests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from pnlac_fast.benchmarking import gpu
from pnlac_fast.benchmarking.suite import PARTS

SHAPES = ("llama-3.1-8b", "llama-3.2-3b")
OF_SHAPES = ("localise", "overhead")
TRAINING = ("training_step", "mixture_step")
QUESTIONS = "24"  # a topic: fewer than a shape has by itself, since the paper's way takes a second a prompt
SECONDS = 360  # leaves time for set-up and tests within eight minutes
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, write after every part, and end with exit code 1 where one has no result."""
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device here: run this on a machine that has one.")
    device, deadline = torch.cuda.get_device_name(), time.monotonic() + SECONDS
    name = re.sub(r"[^a-z0-9.]+", "-", device.lower()).strip("-")
    path = RESULTS / f"{name}-{date.today().isoformat()}.json"
    result: dict[str, object] = {"device": device}
    failed = []
    try:
        result["kernels"] = gpu.measure()
        path.write_text(json.dumps(result, indent=1) + "\n")
    except RuntimeError as error:  # what it finds wrong, or torch does, says nothing of the other parts
        failed.append(f"kernels: {error}")
    # A store says nothing of a GPU; of the rest first what nothing else here measures.
    others = [part for part in PARTS if part not in (*OF_SHAPES, "store", "queries")]
    others.sort(key=lambda part: part not in TRAINING)
    wanted = {
        SHAPES[0]: ["--shape", SHAPES[0], "--questions", QUESTIONS, "--only", ",".join(OF_SHAPES)],
        **{part: ["--only", part] for part in others},
        **{shape: ["--shape", shape, "--questions", QUESTIONS, "--only", ",".join(OF_SHAPES)] for shape in SHAPES[1:]},
    }
    command = [sys.executable, "-m", "pnlac_fast.cli", "bench", "--device", "cuda", "--repeats", "3", "--json"]
    for part, options in wanted.items():
        if (left := deadline - time.monotonic()) <= 0:
            failed.append(f"{part}: no time left")
            continue
        try:
            done = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, check=True, timeout=left)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            failed.append(f"{part}: {error}")
            continue
        result[part] = json.loads(done.stdout)
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
    if failed:
        sys.exit("\n".join(["Missing there:", *failed]))


if __name__ == "__main__":
    main()
