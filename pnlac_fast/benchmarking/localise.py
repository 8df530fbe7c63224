"""Localising, timed against two bare forward passes, the paper's way, and other packages."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pnlac_fast import cache, capture, passes
from pnlac_fast.benchmarking import baselines, peers
from pnlac_fast.benchmarking.agreement import TOKENS, TOLERANCE, Statistics, distance, of_captures, read_store
from pnlac_fast.benchmarking.timing import interleaved, ratio
from pnlac_fast.benchmarking.workloads import TEMPLATE, Workload
from pnlac_fast.capture import Sums

SAMPLE = 2  # questions of each topic that the paper's way is timed on; it takes prompts one by one, so its time scales


def ours(workload: Workload) -> Callable[[], list[Sums]]:
    """This package's capture: base and every tuned model, topic by topic."""
    longest = max(len(text.ids) for group in workload.texts.values() for text in group)
    taken = passes.usable(workload.base, passes.SHORTCUTS, longest=longest)

    def run() -> list[Sums]:
        groups = workload.texts.values()
        return [capture.accumulate(workload.base, workload.tuned, g, tokens=TOKENS, shortcuts=taken) for g in groups]

    return run


def command(workload: Workload, folder: Path) -> Callable[[], Path]:
    """All of ``pnlac-fast cache``: tokenising, capture, and writing a complete store into ``folder``."""

    def run() -> Path:
        out = folder / "run.zarr"
        cache(
            workload.base,
            workload.tuned,
            workload.questions,
            out,
            tokens=TOKENS,
            template=TEMPLATE,
            overwrite=True,
            progress=False,
        )
        return out

    return run


def check(workload: Workload, ways: dict[str, Callable[[], Any]], *, against: Statistics | None = None) -> None:
    """Run every way and compare what it finds, as :class:`Statistics` or one :class:`pnlac_fast.capture.Sums` a topic.

    With ``against``; default: with what the first way finds.

    Raises
    ------
    RuntimeError
        Two ways differ by more than rounding explains, so that their times would not compare.
    """
    for name, way in ways.items():
        result = way()
        found = result if isinstance(result, Statistics) else of_captures(result)
        against = found if against is None else against
        _agree(workload, name, distance(against.figures(), found.figures()))


def check_store(workload: Workload, path: Path, *, against: Statistics) -> None:
    """As :func:`check`, for what a store holds."""
    _agree(workload, "cache", distance(against.figures(), read_store(path, workload)))


def measure(workload: Workload, repeats: int = 5) -> dict[str, Any]:
    """Check that all ways find the same, then time them side by side.

    Each figure is a ratio within a round (:func:`pnlac_fast.benchmarking.timing.ratio`). The floor of several tuned
    models is two passes for each of them, so a multiple of the floor of one.

    Returns
    -------
    dict
        ``one_tuned_vs_floor`` and, where the workload has more, ``six_tuned_vs_floor``: capture over floor;
        ``command``: the same with all of ``cache``; ``released_way_vs_ours``: how many times slower the paper's way is,
        for all tuned models; ``peers``: over the floor, or why one did not run; ``prompts``, ``tokens``.
    """
    one, sample, count = workload.first(1), workload.first(1, SAMPLE), len(workload.tuned)
    scale = sum(map(len, workload.texts.values())) / sum(map(len, sample.texts.values()))
    exact = of_captures(ours(one)())
    installed, absent = peers.prepare(one)
    others, failed = peers.usable(installed, lambda name, way: check(one, {name: way}, against=exact))
    with tempfile.TemporaryDirectory() as folder:
        check(sample, {"ours": ours(sample), "released": baselines.released(sample)})
        ways: dict[str, Callable[[], Any]] = {
            "floor": baselines.floor(one),
            "one": ours(one),
            "one_command": command(one, Path(folder)),
            "released": baselines.released(sample),
            **others,
        }
        if count > 1:
            ways |= {"all": ours(workload), "all_command": command(workload, Path(folder))}
        check_store(workload, command(workload, Path(folder))(), against=of_captures(ours(workload)()))
        seconds = interleaved(ways, repeats, workload.device)
    all_of = "all" if count > 1 else "one"
    result: dict[str, Any] = {
        "shape": workload.shape,
        "prompts": sum(map(len, workload.texts.values())),
        "tokens": workload.tokens,
        "one_tuned_vs_floor": ratio(seconds["one"], seconds["floor"]),
    }
    several = {1: "one", 6: "six"}.get(count, str(count))
    if count > 1:
        result[f"{several}_tuned_vs_floor"] = ratio(seconds["all"], seconds["floor"], factor=1 / count)
    result["command"] = {"one_tuned_vs_floor": ratio(seconds["one_command"], seconds["floor"])}
    if count > 1:
        result["command"][f"{several}_tuned_vs_floor"] = ratio(
            seconds["all_command"], seconds["floor"], factor=1 / count
        )
    result["released_way_vs_ours"] = ratio(seconds["released"], seconds[all_of], factor=scale * count)
    result["peers"] = {name: ratio(seconds[name], seconds["floor"]) for name in others} | absent | failed
    return result


def _agree(workload: Workload, name: str, apart: float) -> None:
    allowed = TOLERANCE[workload.base.hf.dtype]
    if not apart <= allowed:
        raise RuntimeError(
            f"'{name}' differs by {apart:.1e} of what activations typically are, {allowed:.0e} is allowed: no timing"
        )
