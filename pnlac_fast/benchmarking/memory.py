"""Peak memory of localising and of the bare passes, each in a process of its own, for two sizes of input."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pnlac_fast.benchmarking import baselines
from pnlac_fast.benchmarking.workloads import WORDS, Workload, make_workload
from pnlac_fast.datasets import Question
from pnlac_fast.prompts import encode

PROMPTS = (256, 1024)
LENGTHS = (36, 128)  # evenly spread, so that 64 % of 32 x 128 are real tokens
SHARED = 20  # leading tokens that all prompts share, so that what is kept for them is measured too
MIB = 1 << 20


def measure(
    *, device: str = "auto", dtype: str = "auto", threads: int = 1, prompts: tuple[int, ...] = PROMPTS
) -> dict[str, Any]:
    """Peak memory above what the loaded models take, MiB, by number of prompts.

    Returns
    -------
    dict
        ``floor``: two bare passes over the fewest prompts; it does not depend on their number. ``ours`` by number of
        prompts. ``ours_above_floor``: at the largest number. ``ours_growth``: from the smallest number to the largest.
    """
    few, many = min(prompts), max(prompts)
    floor = _in_a_process("floor", few, device, dtype, threads)
    ours = {count: _in_a_process("ours", count, device, dtype, threads) for count in prompts}
    return {
        "unit": "MiB",
        "floor": round(floor, 1),
        "ours": {str(count): round(peak, 1) for count, peak in ours.items()},
        "ours_above_floor": round(ours[many] - floor, 1),
        "ours_growth": round(ours[many] - ours[few], 1),
    }


def _in_a_process(way: str, prompts: int, device: str, dtype: str, threads: int) -> float:
    command = [sys.executable, "-m", __name__, way, str(prompts), device, dtype, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of '{way}' failed: {done.stderr.strip()[-2000:]}")
    return float(json.loads(done.stdout))


def _workload(prompts: int, device: str, dtype: str) -> Workload:
    """One topic of prompts whose lengths are evenly spread, at the shape "tiny"."""
    models = make_workload("tiny", tuned=1, questions=1, device=device, dtype=dtype)
    draw = random.Random(0)
    shared = " ".join(draw.choices(WORDS, k=SHARED - 1))  # and BOS
    asked = tuple(
        Question("all", " ".join(draw.choices(WORDS, k=draw.randint(*LENGTHS) - SHARED))) for _ in range(prompts)
    )
    texts = encode(models.base.tokenizer, asked, f"{shared} {{instruction}}")
    return Workload("tiny", models.base, models.tuned, asked, {"all": tuple(texts)})


def _peak(way: str, prompts: int, device: str, dtype: str) -> float:
    """Peak memory while ``way`` runs, above what was held before, MiB."""
    from pnlac_fast.benchmarking.localise import ours

    workload = _workload(prompts, device, dtype)
    make = baselines.floor if way == "floor" else ours
    make(workload.first(1, 8))()  # what the first pass makes once, and keeps, is no matter of the input
    run = make(workload)
    if workload.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    held = _resident(reset=True)
    run()
    return (_resident() - held) / MIB


def _resident(*, reset: bool = False) -> float:
    """The process's peak of resident bytes so far; where Linux lets us, ``reset`` starts the count again from now."""
    status = Path("/proc/self/status")
    if reset and status.is_file():
        Path("/proc/self/clear_refs").write_text("5")
    if status.is_file():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return float(line.split()[1]) * 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    _way, _prompts, _device, _dtype, _threads = sys.argv[1:]
    torch.set_num_threads(int(_threads))
    print(json.dumps(_peak(_way, int(_prompts), _device, _dtype)))
