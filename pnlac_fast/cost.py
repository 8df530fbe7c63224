"""What a piece of work takes: wall time, peak memory, and the time of an optimizer step."""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import psutil
import torch
from transformers import TrainerCallback


class Meter:
    """Starts to measure when it is made.

    Parameters
    ----------
    device
        Where the work is done. On CUDA torch's own count of its peak memory starts anew.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._started = time.perf_counter()

    def record(self) -> dict[str, Any]:
        """What the work has taken until now.

        Returns
        -------
        dict
            ``seconds``, wall time; ``process_bytes``, the most that the process has held in its life so far, which no
            program can ask of a part of it; and, on CUDA, ``device_bytes``, the most that torch held there.
        """
        record: dict[str, Any] = {
            "seconds": round(time.perf_counter() - self._started, 3),
            "process_bytes": _high_water(),
        }
        if self.device.type == "cuda":
            record["device_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return record


def _high_water() -> int:
    """Peak resident memory of this process in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


class StepClock(TrainerCallback):
    """The time of every optimizer step of a fine-tune, without what is measured between steps.

    A GPU works on after a step's last call, so that a single step may be told wrongly; the median of many is not.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step starts."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step ends."""
        self.seconds.append(time.perf_counter() - self._started)

    def median(self) -> float | None:
        """Seconds of a step; None where none was taken, since all had been taken before an interruption."""
        return round(statistics.median(self.seconds), 6) if self.seconds else None
