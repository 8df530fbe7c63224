"""The whole method on the embedded testbed: spill-over, neurons, patching, InhibitFT against its controls, report."""

from __future__ import annotations

import json
import math
import shutil
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pnlac_fast import store as stores
from pnlac_fast import testbed
from pnlac_fast.datasets import by_topic
from pnlac_fast.errors import UserError
from pnlac_fast.reporting.rows import MethodRow
from pnlac_fast.reporting.style import controlled, is_control
from pnlac_fast.reporting.tables import method_rows, patch_rows, shift_rows
from pnlac_fast.study_plan import embedded_plan, read_plan
from pnlac_fast.study_subject import STAGES_FILE, testbed_plan, testbed_subject
from pnlac_fast.studying import BOOTS, study_one
from pnlac_fast.workplace import write_json

UNFINISHED = "unfinished.json"  # in the output directory until all is there
TUNED_FOR_INHIBITION = {"small": 1}  # how many of the six topics, else two; each costs sixteen fine-tunes


def demo(
    size: str = "full",
    seed: int = 0,
    out: str | Path = "pnlac-demo",
    *,
    overwrite: bool = False,
    jobs: int | None = None,
) -> dict[str, Any]:
    """Run everything on the testbed and write the result page.

    Parameters
    ----------
    size
        "full" (about 1 M parameters, a few minutes on two cores), "small", or "large" (53 M, on a CUDA GPU where there
        is one; without, it takes hours).
    seed
        Seed of the base model, of the fine-tunes and of the random controls.
    out
        Directory as that of one seed of :func:`pnlac_fast.study`: ``report/index.html``, ``after/index.html``,
        ``store.zarr``, ``neurons/``, and the tuned models in ``runs/``.
    overwrite
        Replace an earlier demo in ``out``. Without it, one that was stopped goes on where it was.
    jobs
        Processes for the fine-tunes; default one per core, four at most. The result does not depend on it. A script
        that calls this with more than one needs the usual ``if __name__ == "__main__":``.

    Returns
    -------
    dict
        ``profile_effect`` and ``coupling_ratio`` of the base's gate; ``shift`` {tuned: {probe: nats}}; ``patching``
        {general | random | specific: {on, off}}, fractions of the tuned shift; ``inhibit`` {method:
        {reduction_equal_steps, reduction_equal_shift, retention}}, ratios, None where no run reached the shift;
        ``page``; ``seconds`` of wall time.

    Raises
    ------
    UserError
        ``out`` exists, or the trained base does not show the phenomenon.
    """
    started = time.monotonic()
    out = _folder(Path(out), {"size": size, "seed": seed}, overwrite)
    bed = testbed.build(size, seed)
    subject = testbed_subject(bed, out, jobs=jobs)
    topics = list(by_topic(subject.data))
    chosen = [topics[(seed + i) % len(topics)] for i in range(TUNED_FOR_INHIBITION.get(size, 2))]
    given = tomllib.loads(embedded_plan("demo"))
    for name, options in given["methods"].items():
        options |= {} if name == "plain" else {"topic": chosen}
    with subject.computing():
        results = study_one(subject, testbed_plan(read_plan(given, "demo"), size))
    training, patching = results["training"], results["patching"]
    stance = stores.open_result(out / "store.zarr", "stance")
    (out / UNFINISHED).unlink()

    cells, _ = shift_rows(stance, BOOTS, seed)
    methods = _by_method(method_rows(training, BOOTS, seed)[0])
    recovered = {r.neurons: r for r in patch_rows(patching, BOOTS, seed) if r.direction == "tuned_into_base"}
    return {
        "size": size,
        "seed": seed,
        "profile_effect": bed.profile_effect,
        "coupling_ratio": bed.coupling_ratio,
        "shift": {t: {c.probe_topic: c.shift.value for c in cells if c.tuned_topic == t} for t in topics},
        "patching": {
            name: {"on": recovered[name].on_topic.value, "off": recovered[name].off_topic.value}
            for name in ("general", "random", "specific")
        },
        "inhibit": {
            name: {
                "reduction_equal_steps": _known(by["equal steps"].reduction.value),
                "reduction_equal_shift": _known(by["equal shift"].reduction.value),
                "retention": _known(by["equal steps"].retention.value),
            }
            for name, by in methods.items()
            if name != "plain"
        },
        "page": str(out / "report" / "index.html"),
        "seconds": round(time.monotonic() - started, 1),
    }


def tables(result: dict[str, Any]) -> list[list[dict[str, str]]]:
    """The main figures as three tables for a terminal: shift, patching, InhibitFT."""
    on = [shifts[topic] for topic, shifts in result["shift"].items()]
    off = [value for topic, shifts in result["shift"].items() for probe, value in shifts.items() if probe != topic]
    return [
        [
            {
                "tuning moves": name,
                "by, nats": f"{np.mean(values):+.2f}",
                "range": f"{min(values):+.2f} to {max(values):+.2f}",
            }
            for name, values in (("the tuned topic", on), ("the other topics", off))
        ],
        [
            {
                "patching into base": f"{name} neurons",
                "moves on-topic": _percent(v["on"]),
                "off-topic": _percent(v["off"]),
            }
            for name, v in result["patching"].items()
        ],
        [
            {
                "InhibitFT": _named(method),
                "less coupling at equal steps": _percent(v["reduction_equal_steps"]),
                "at equal shift": _percent(v["reduction_equal_shift"]),
                "on-topic shift kept": _percent(v["retention"]),
            }
            for method, v in result["inhibit"].items()
        ],
    ]


def _named(method: str) -> str:
    """Such as "freeze 5 %", or "freeze random 5 %" for its control; "specific + null space"."""
    name, *amount = controlled(method).removesuffix("_seen").split("_")
    name = name.replace("+", " + ").replace("nullspace", "null space")
    return " ".join([name, *(["random"] if is_control(method) else []), *(f"{number} %" for number in amount)])


def _folder(out: Path, settings: dict[str, Any], overwrite: bool) -> Path:
    """The output directory: a stopped demo's as it is, else made anew; only an earlier demo is ever removed."""
    if out.exists():
        begun = out / UNFINISHED
        if not overwrite and begun.is_file() and json.loads(begun.read_text()) == settings:
            return out
        if not overwrite:
            raise UserError(f"'{out}' exists already: give another --out, or --overwrite to replace it.")
        if not out.is_dir() or (any(out.iterdir()) and not (out / STAGES_FILE).is_file()):
            raise UserError(f"'{out}' is not an earlier demo: give another --out.")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    write_json(out / UNFINISHED, settings)
    write_json(out / STAGES_FILE, {})
    return out


def _by_method(rows: Sequence[MethodRow]) -> dict[str, dict[str, MethodRow]]:
    methods: dict[str, dict[str, MethodRow]] = {}
    for row in rows:
        methods.setdefault(row.method, {})[row.comparison] = row
    return methods


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _percent(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{round(100 * value)} %"
