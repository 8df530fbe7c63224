"""``pnlac-fast bench``: the benchmarks that say something on a user's own machine, as one result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pnlac_fast.benchmarking import (
    contrast_kernel,
    localise,
    masked,
    memory,
    mixture_step,
    overhead,
    queries,
    stall,
    store,
    training_step,
)
from pnlac_fast.benchmarking.timing import CLOCKS, use_clock
from pnlac_fast.benchmarking.timing import threads as use_threads
from pnlac_fast.benchmarking.workloads import DTYPES, SHAPES, make_workload
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.loading import resolve_device
from pnlac_fast.provenance import provenance

PARTS = (
    "localise",
    "overhead",
    "contrast_kernel",
    "masked_step",
    "training_step",
    "mixture_step",
    "memory",
    "store",
    "queries",
    "stall",
)


def bench(
    *,
    shapes: Sequence[str] = ("tiny",),
    device: str = "auto",
    dtype: str = "auto",
    threads: int = 1,
    repeats: int = 5,
    clock: str = "wall",
    questions: int | None = None,
    parts: Sequence[str] = PARTS,
) -> dict[str, Any]:
    """Measure this package against others and against the machine; every result is checked before it is timed.

    Parameters
    ----------
    shapes
        Widths of the model to localise in, names in :data:`pnlac_fast.benchmarking.workloads.SHAPES`. Its weights are
        random, nothing is downloaded.
    device, dtype
        "auto" is CUDA where there is one; float32 on the CPU and for training, else bfloat16 on CUDA.
    threads
        Threads of torch on the CPU.
    repeats
        Rounds; every way is run once a round, and ratios are taken within a round.
    clock
        "wall", or "cpu": processor time of this process, for a CPU that others use too; waiting for disks is left out.
    questions
        Questions of each of the six topics. Default: as many as keep a pass over them within seconds.
    parts
        What to measure, names in ``PARTS``. "contrast_kernel" and "masked_step" are single operations;
        "store", "queries" and "stall" write to the working directory, and measure its disk.

    Returns
    -------
    dict
        A key for each part; ``localise`` and ``overhead`` are those of the first shape, ``by_shape`` has both for every
        one. Ratios are {"median", "min", "max", "repeats"}; other figures stand beside their ``unit``. Besides:
        ``machine``, ``device``, ``dtype``, ``threads``, ``clock``, ``provenance``.

    Raises
    ------
    UserError
        A shape, a part or a dtype is unknown, or the device cannot be used.
    RuntimeError
        Two ways of computing one thing disagree.
    """
    for kind, given, known in (("shape", shapes, SHAPES), ("part", parts, PARTS)):
        if not given:
            raise UserError(f"Name at least one {kind} to measure.")
        for name in given:
            if name not in known:
                raise unknown(kind, name, known)
    if dtype not in ("auto", *DTYPES):
        raise unknown("dtype", dtype, ("auto", *DTYPES))
    if clock not in CLOCKS:
        raise unknown("clock", clock, CLOCKS)
    if repeats < 1 or threads < 1:
        raise UserError("Nothing is measured in less than one repeat or thread: raise --repeats or --threads.")
    place = resolve_device(device)
    trained = "small" if place.type == "cpu" else "hidden-2048"  # on a GPU a step of the small one is all launching
    if clock == "cpu" and place.type != "cpu":
        raise UserError("Processor time says nothing about a GPU: leave out --clock, or give --device cpu.")
    result: dict[str, Any] = {
        "machine": processor(),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "dtype": dtype if dtype != "auto" else "bfloat16" if place.type == "cuda" else "float32",
        "threads": threads,
        "clock": clock,
    }
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "contrast_kernel": lambda: contrast_kernel.measure(repeats=repeats, device=device),
        "masked_step": lambda: masked.measure(repeats=repeats, device=device),
        "training_step": lambda: training_step.measure(shape=trained, repeats=repeats, device=device, dtype=dtype),
        "mixture_step": lambda: mixture_step.measure(shape=trained, repeats=repeats, device=device, dtype=dtype),
        "memory": lambda: memory.measure(device=device, dtype=dtype, threads=threads),
        "store": lambda: store.measure(repeats=repeats),
        "queries": lambda: queries.measure(repeats=repeats),
        "stall": lambda: stall.measure(repeats=repeats, device=device, dtype=dtype),
    }
    with use_threads(threads), use_clock(clock):
        for shape in dict.fromkeys(shapes):
            on_models = {"localise": localise.measure, "overhead": overhead.measure}
            if wanted := [name for name in on_models if name in parts]:
                workload = make_workload(shape, questions=questions, device=device, dtype=dtype)
                result.setdefault("by_shape", {})[shape] = {name: on_models[name](workload, repeats) for name in wanted}
                del workload  # before the next is made
        result |= result["by_shape"][shapes[0]] if "by_shape" in result else {}
        result |= {name: measures[name]() for name in PARTS if name in parts and name in measures}
    return result | {"provenance": provenance()}


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The result as lines of a table: what was measured, on what shape, its median and its extremes."""
    found = [
        row
        for shape, measured in result.get("by_shape", {}).items()
        for part, figures in measured.items()
        for row in _rows(part, shape, figures)
    ]
    for part in PARTS[2:]:
        found += _rows(part, "", result.get(part, {}))
    return found


def processor() -> str:
    """The name of the processor, as the operating system gives it."""
    import platform

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _rows(what: str, shape: str, figures: Any, unit: str = "") -> list[dict[str, Any]]:
    """A line for each ratio and each number with a unit, and none for what only describes the run."""
    if isinstance(figures, dict) and "median" in figures:
        return [{"what": what, "shape": shape, **{name: float(figures[name]) for name in ("median", "min", "max")}}]
    if isinstance(figures, dict):
        unit = f", {figures['unit']}" if "unit" in figures else unit
        named = {f"{what} {str(name).replace('_', ' ')}": value for name, value in figures.items()}
        return [row for name, value in named.items() for row in _rows(name, shape, value, unit)]
    if not isinstance(figures, float) or not (unit or " vs " in what):
        return []
    return [{"what": what + unit, "shape": shape, "median": figures}]
