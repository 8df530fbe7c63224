"""Timing side by side: every way once a round, ratios within a round, the median and the extremes of these."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from statistics import median
from typing import Any

import torch

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_clock: ContextVar[Callable[[], float]] = ContextVar("clock", default=time.perf_counter)


def interleaved(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device | str = "cpu",
    *,
    warm: bool = True,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each way in each round.

    A round runs every way once, and each round begins with another one, so that whatever else the machine does meets
    all of them. ``warm`` runs every way once before, untimed; leave it out where that has been done.
    ``before`` is called before each, untimed.
    """
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-int(warm), rounds):
        start = max(number, 0) % len(names)
        for name in names[start:] + names[:start]:
            before()
            took = _seconds(ways[name], torch.device(device))
            if number >= 0:
                seconds[name].append(took)
    return seconds


def ratio(over: Sequence[float], under: Sequence[float], *, factor: float = 1.0) -> dict[str, float]:
    """``factor * over / under`` by round: median, smallest and largest of the ratios, and their number."""
    ratios = [factor * a / b for a, b in zip(over, under, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios), "repeats": len(ratios)}


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def use_clock(name: str) -> Iterator[None]:
    """Time by one of ``CLOCKS`` inside the block."""
    token = _clock.set(CLOCKS[name])
    try:
        yield
    finally:
        _clock.reset(token)


def _seconds(way: Callable[[], Any], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    synchronize(device)
    now = _clock.get()
    start = now()
    way()
    synchronize(device)
    return now() - start
