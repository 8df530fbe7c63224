"""What the work took: time of a training step, wall time, peak memory, bytes stored."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from pnlac_fast.reporting import style, tables, wording
from pnlac_fast.reporting.contents import Contents
from pnlac_fast.reporting.rows import COST
from pnlac_fast.reporting.runs import per_run
from pnlac_fast.reporting.sections import Section, Table

WORK = {
    "stance": "scoring",
    "patching": "patching",
    "patching_curve": "patching, the curve",
    "attribution": "attribution",
    "set_attribution": "attribution of the sets",
    "utility": "utility",
}


@dataclass(frozen=True)
class TuningCost:
    """Fine-tunes of one method: seconds of a step, and of a run with its probes, medians; peak bytes, the most.

    `over_plain` is the median over runs of a step's time over that of the plain run of the same topic and seed.
    """

    method: str
    runs: int
    steps: float
    seconds_per_step: float
    over_plain: float
    seconds: float
    process_bytes: float
    device_bytes: float


@dataclass(frozen=True)
class WorkCost:
    """One command: wall time in seconds and peak bytes; what it did not measure is NaN."""

    work: str
    seconds: float
    process_bytes: float
    device_bytes: float
    stored_bytes: float


def costs(contents: Contents) -> Section:
    """Cost of every method's fine-tunes, of the other commands, and of the store; empty where none was recorded."""
    key, title = "cost", "What it took"
    tuning, work = tuning_costs(contents.results.get("training")), work_costs(contents)
    shown = []
    if tuning:
        shown.append(_tuning_table(tuning))
    if work:
        shown.append(_work_table(work))
    return Section(key, title, cost_sentences(tuning), tables=shown)


def tuning_costs(training: xr.Dataset | None) -> list[TuningCost]:
    """A row a method, in the order of the runs; empty where none was timed."""
    if training is None or not set(COST) <= set(training.coords):
        return []
    methods, topics, seeds = (tables.texts(training, n) for n in ("method", "tuned_topic", "seed"))
    known = {name: per_run(training, name, math.nan).astype(float) for name in COST}
    steps, step = training["step"].max("point").values, known["seconds_per_step"]
    plain = {(topics[i], seeds[i]): step[i] for i, m in enumerate(methods) if m == "plain"}
    rows = []
    for method in dict.fromkeys(methods):
        own = [i for i, m in enumerate(methods) if m == method]
        ratios = [step[i] / plain.get((topics[i], seeds[i]), math.nan) for i in own]
        rows.append(
            TuningCost(
                method=method,
                runs=len(own),
                steps=float(np.median(steps[own])),
                seconds_per_step=_median(step[own]),
                over_plain=_median(ratios),
                seconds=_median(known["seconds"][own]),
                process_bytes=_most(known["process_bytes"][own]),
                device_bytes=_most(known["device_bytes"][own]),
            )
        )
    return rows if any(math.isfinite(r.seconds) for r in rows) else []


def work_costs(contents: Contents) -> list[WorkCost]:
    """A row for every result that says what it took, and one for the store."""
    rows = []
    for name, found in _recorded(contents.results):
        seconds, process, device = (float(found.get(n, math.nan)) for n in ("seconds", "process_bytes", "device_bytes"))
        work = WORK.get(name, f"scoring, {name.removeprefix('stance_')}")
        rows.append(WorkCost(work, seconds, process, device, math.nan))
    if rows and "bytes" in contents.info:
        rows.append(WorkCost("the store", math.nan, math.nan, math.nan, float(contents.info["bytes"])))
    return rows


def _recorded(results: Mapping[str, xr.Dataset]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Results with their cost; of several scorers that worked together the first."""
    seen = []
    for name, result in results.items():
        found = result.attrs.get("cost")
        found = json.loads(found) if isinstance(found, str) else found
        if found and found not in seen:
            seen.append(found)
            yield name, found


def cost_sentences(rows: Sequence[TuningCost]) -> list[str]:
    """A step of every method over a step of plain tuning."""
    told = [r for r in rows if r.method != "plain" and not style.is_control(r.method) and math.isfinite(r.over_plain)]
    if not told:
        return []
    text = "; ".join(f"{r.over_plain:.2f} for {style.method_label(r.method)}" for r in told)
    return [
        f"Time of a training step over that of plain tuning, medians: {text}. Runs that share a machine slow each "
        "other, so small differences say nothing."
    ]


def _tuning_table(rows: Sequence[TuningCost]) -> Table:
    device = any(math.isfinite(r.device_bytes) for r in rows)
    header = ["Method", "Runs", "Steps", "Seconds a step", "over plain\u2019s", "Seconds a run", "Peak memory"]
    cells = [
        [
            wording.sentence_case(style.method_label(r.method)),
            str(r.runs),
            wording.number(r.steps, 0),
            wording.number(r.seconds_per_step, 3),
            wording.number(r.over_plain),
            wording.number(r.seconds, 1),
            wording.size(r.process_bytes),
        ]
        + ([wording.size(r.device_bytes)] if device else [])
        for r in rows
    ]
    caption = (
        "Medians over runs, which include the probes but for the time of a step. Peak memory is the most that a "
        "process held until its run was done."
    )
    return Table("cost_tuning", caption, header + (["on the GPU"] if device else []), cells, rows)


def _work_table(rows: Sequence[WorkCost]) -> Table:
    header = ["Work", "Seconds", "Peak memory", "Peak on the GPU", "Stored"]
    cells = [
        [wording.sentence_case(r.work), wording.number(r.seconds, 1)]
        + [wording.size(b) for b in (r.process_bytes, r.device_bytes, r.stored_bytes)]
        for r in rows
    ]
    return Table(
        "cost_work", "Wall time and memory of the other commands, and what the store takes.", header, cells, rows
    )


def _median(values: Sequence[float] | np.ndarray) -> float:
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    return float(np.median(known)) if len(known) else math.nan


def _most(values: np.ndarray) -> float:
    return float(np.nanmax(values)) if np.isfinite(values).any() else math.nan
