"""The whole method on the embedded testbed: spill-over, neurons, patching, InhibitFT against its controls, report."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from pnlac_fast import store as stores
from pnlac_fast import testbed
from pnlac_fast.caching import cache
from pnlac_fast.comparison import as_run, join
from pnlac_fast.datasets import load_questions
from pnlac_fast.errors import UserError
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.localize import locate
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet, random_like
from pnlac_fast.patching import patch
from pnlac_fast.processes import pool
from pnlac_fast.reporting import report
from pnlac_fast.reporting.rows import MethodRow
from pnlac_fast.reporting.tables import method_rows, patch_rows, shift_rows
from pnlac_fast.scoring import score
from pnlac_fast.top_sets import find
from pnlac_fast.training import finetune

SIDE = "right"
STEPS = 30
# Few weights need more and larger steps to move as far; the comparison at equal on-topic shift takes that out.
STEPS_SPECIFIC, RATE_SPECIFIC = 80, {"small": 4e-3, "full": 4e-3, "large": 1e-3}
PATCH_TOP = 0.30  # gives general sets of about 5 % of all neurons at the last prompt token
FREEZE = (0.01, 0.05, 0.30)
SPECIFIC_TOP = (0.05, 0.10)
TUNED_FOR_INHIBITION = {"small": 1, "full": 2, "large": 2}  # how many of the six topics; each costs twenty fine-tunes
DRAWS = {"small": 2, "full": 3, "large": 3}
BOOTS = 2000


@dataclass(frozen=True)
class Job:
    """One fine-tune of the demo, plain where there are no neurons."""

    bed: testbed.Testbed
    topic: str
    neurons: NeuronSet | None = None
    mode: str | None = None
    out: Path | None = None


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
        "full" (about 1 M parameters, a few minutes on two cores), "small", or "large" (55 M, on a CUDA GPU where there
        is one; without, it takes hours). "large" has not been tried yet: the gate says whether its base is of use.
    seed
        Seed of the base model, of the fine-tunes and of the random controls.
    out
        Directory for tuned models, ``store.zarr``, ``neurons.json`` and ``report/index.html``.
    overwrite
        Replace an earlier demo in ``out``.
    jobs
        Processes for the fine-tunes; default one per core, four at most. The result does not depend on it. A script
        that calls this with more than one needs the usual ``if __name__ == "__main__":``.

    Returns
    -------
    dict
        ``profile_effect`` and ``coupling_ratio`` of the base's gate; ``shift`` {tuned: {probe: nats}}; ``patching``
        {general | random | specific: {on, off}}, fractions of the tuned shift; ``inhibit`` {method:
        {reduction_equal_steps, reduction_equal_shift, retention}}, None where no run reached the shift; ``page``;
        ``seconds``.

    Raises
    ------
    UserError
        ``out`` exists, or the trained base does not show the phenomenon.
    """
    started = time.monotonic()
    out = _empty(Path(out), overwrite)
    jobs = jobs or min(4, os.cpu_count() or 1)
    bed = testbed.build(size, seed)
    train, held_out = load_questions(bed.train), load_questions(bed.eval)
    topics = list(dict.fromkeys(q.topic for q in held_out))
    chosen = [topics[(seed + i) % len(topics)] for i in range(TUNED_FOR_INHIBITION[size])]
    total = len(topics) + len(chosen) * (len(FREEZE) + len(SPECIFIC_TOP)) * (1 + DRAWS[size])
    with (
        _one_thread(),
        pool(jobs, torch.set_num_threads, (1,)) as shared,
        tqdm(total=total, desc="fine-tunes", unit="run", disable=None) as bar,
    ):

        def run(planned: Sequence[Job]) -> Iterator[xr.Dataset]:
            for row in shared(tune, planned):
                bar.update()
                yield row

        runs = list(run([Job(bed, topic, out=out / "tuned" / topic) for topic in topics]))
        base = load_model(bed.model, name="testbed", dtype="float32", device=_device(bed))
        tuned = {topic: load_tuned(base, out / "tuned" / topic) for topic in topics}
        store = out / "store.zarr"
        cache(base, tuned, train, store, tokens=("last", "prompt"), progress=False)
        contrast = stores.open_contrast(store)
        inhibited = run([job for topic in chosen for job in _inhibited(bed, contrast, topic, base, seed)])

        locate(store, top=PATCH_TOP, tokens="last", out=out / "neurons.json")
        both = ("tuned_into_base", "base_into_tuned")
        options: dict[str, Any] = {"store": store, "draws": DRAWS[size], "seed": seed, "normalise": "sum"}
        patching = patch(base, tuned, out / "neurons.json", held_out, directions=both, **options)
        asked: dict[str, Any] = {"training_data": train, "max_new_tokens": 24, "normalise": "sum", "store": store}
        stance = score(base, tuned, held_out, scorer=["logprob", "classifier"], **asked)["stance"]
        training = join([*runs, *inhibited])
    stores.write_result(store, "training", training)
    page = report(store, out / "report", title=f"pnlac-fast demo, {size} testbed, seed {seed}")

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
        "page": str(page),
        "seconds": round(time.monotonic() - started, 1),
    }


def tune(job: Job) -> xr.Dataset:
    """Run one fine-tune and return its trajectory, (run, point, question) with one run."""
    steps, rate = STEPS, testbed.RECIPES[job.bed.size].tuning_rate
    if job.mode == "specific":
        steps, rate = STEPS_SPECIFIC, RATE_SPECIFIC[job.bed.size]
    run = finetune(
        load_model(job.bed.model, name="testbed", dtype="float32", device=_device(job.bed)),
        load_questions(job.bed.train),
        job.topic,
        SIDE,
        job.out,
        seed=job.bed.seed,
        probe=load_questions(job.bed.eval),
        normalise="sum",
        inhibit=job.neurons,
        inhibit_mode=job.mode,
        method="full",
        steps=steps,
        learning_rate=rate,
    )
    assert run.trajectory is not None  # probe questions were given
    return as_run(run.trajectory, run.record)


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
                "InhibitFT": method.replace("_", " ") + " %",
                "less coupling at equal steps": _percent(v["reduction_equal_steps"]),
                "at equal shift": _percent(v["reduction_equal_shift"]),
                "on-topic shift kept": _percent(v["retention"]),
            }
            for method, v in result["inhibit"].items()
        ],
    ]


def _inhibited(bed: testbed.Testbed, contrast: xr.Dataset, topic: str, base: Model, seed: int) -> Iterator[Job]:
    """Every inhibited fine-tune on one topic, each followed by its random controls."""
    where: dict[str, Any] = {"site": "mlp_mid", "tokens": "last", "base": base.origin}
    sets = [("freeze", find(contrast, topic, top=PATCH_TOP, general_share=share, **where).general) for share in FREEZE]
    sets += [("specific", find(contrast, topic, top=top, **where).specific[topic]) for top in SPECIFIC_TOP]
    for mode, neurons in sets:
        yield Job(bed, topic, neurons, mode)
        for draw in range(DRAWS[bed.size]):
            yield Job(bed, topic, random_like(neurons, seed + draw, exclude=neurons.member), mode)


def _device(bed: testbed.Testbed) -> str:
    """Fine-tunes run where the base was trained; on the CPU the bits are the same on every machine of a kind."""
    return testbed.device_of(testbed.RECIPES[bed.size]).type


def _empty(out: Path, overwrite: bool) -> Path:
    """The output directory, made anew; only an earlier demo is ever removed."""
    if out.exists():
        if not overwrite:
            raise UserError(f"'{out}' exists already: give another --out, or --overwrite to replace it.")
        if not out.is_dir() or (any(out.iterdir()) and not (out / "tuned").is_dir()):
            raise UserError(f"'{out}' is not an earlier demo: give another --out.")
        shutil.rmtree(out)
    (out / "tuned").mkdir(parents=True)
    return out


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small lose by threads, and other processes use the other cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _by_method(rows: Sequence[MethodRow]) -> dict[str, dict[str, MethodRow]]:
    methods: dict[str, dict[str, MethodRow]] = {}
    for row in rows:
        methods.setdefault(row.method, {})[row.comparison] = row
    return methods


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _percent(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{round(100 * value)} %"
