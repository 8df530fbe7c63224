"""How long ``cache`` waits for what it writes, raw activations of the last prompt token included."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from pnlac_fast import cache, caching
from pnlac_fast import store as stores
from pnlac_fast.benchmarking.timing import ratio
from pnlac_fast.benchmarking.workloads import TEMPLATE, Workload, make_workload

SHAPE, UNIT_TOKENS = "tiny", 4096
RAW = "last"


def measure(
    *,
    repeats: int = 5,
    device: str = "auto",
    dtype: str = "auto",
    shape: str = SHAPE,
    questions: int | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Run ``cache`` with and without writing in the background, check that both write the same, and time the waiting.

    Parameters
    ----------
    repeats
        Rounds, each with both ways.
    shape, questions
        Of the model, one of :data:`pnlac_fast.benchmarking.workloads.SHAPES`, and how many of each topic.
    folder
        Where to write. Default: the working directory.

    Returns
    -------
    dict
        ``overlapped_vs_run`` and ``waiting_vs_run``: time between units that goes into handing over and waiting, over
        that of the whole run, written in the background and not. ``units``, ``prompts``.

    Raises
    ------
    RuntimeError
        The two write different stores.
    """
    workload = make_workload(shape, tuned=1, questions=questions, device=device, dtype=dtype)
    ways = {"overlapped": (), "waiting": ("overlap",)}
    waited: dict[str, list[float]] = {name: [] for name in ways}
    whole: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(prefix="pnlac-bench-", dir=folder or Path.cwd()) as made:
        for number in range(-1, repeats):
            for name, without in ways.items():
                spent, taken = _run(workload, Path(made) / f"{name}.zarr", without)
                if number >= 0:
                    waited[name].append(spent)
                    whole[name].append(taken)
        stored = [_content(Path(made) / f"{name}.zarr") for name in ways]
        if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*stored, strict=True)):
            raise RuntimeError("Writing in the background writes something else: no timing")
        units = stores.info(Path(made) / "overlapped.zarr")["units_total"]
    found = {f"{name}_vs_run": ratio(waited[name], whole[name]) for name in ways}
    return found | {"units": units, "prompts": sum(map(len, workload.texts.values()))}


def _run(workload: Workload, out: Path, without: tuple[str, ...]) -> tuple[float, float]:
    """Seconds spent between units, and seconds of the whole command."""
    spent = 0.0
    original = caching._commits

    @contextmanager
    def timed(*arguments: Any, **options: Any) -> Iterator[Callable[[int, Any], None]]:
        with original(*arguments, **options) as commit:

            def commit_timed(number: int, sums: Any) -> None:
                nonlocal spent
                start = time.perf_counter()
                commit(number, sums)
                spent += time.perf_counter() - start

            yield commit_timed

    options: dict[str, Any] = {"raw": RAW, "template": TEMPLATE, "unit_tokens": UNIT_TOKENS, "without": without}
    with mock.patch.object(caching, "_commits", timed):
        start = time.perf_counter()
        cache(workload.base, workload.tuned, workload.questions, out, overwrite=True, progress=False, **options)
        return spent, time.perf_counter() - start


def _content(path: Path) -> list[np.ndarray]:
    """Everything that a store holds in numbers: statistics and rows."""
    known, contrast = stores.info(path), stores.open_contrast(path)
    rows = [stores.open_activations(path, model, known["sites"][0]) for model in ("base", *known["models"])]
    return [*(contrast[name].values for name in contrast.data_vars), *(of["activation"].values for of in rows)]
