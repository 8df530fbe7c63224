"""Sweeps: many fine-tunes of one base, each in a folder of its own, done once and compared at the end."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from pnlac_fast.comparison import as_run, compare, join
from pnlac_fast.datasets import Question, as_questions, by_topic, fingerprint, following
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.hub import local
from pnlac_fast.interventions import choose_sets
from pnlac_fast.loading import FINETUNE_FILE, load_model, opened
from pnlac_fast.models import Model
from pnlac_fast.neurons import NEURONS_FILE
from pnlac_fast.processes import pool
from pnlac_fast.prompts import DEFAULT_TEMPLATE
from pnlac_fast.reporting.rows import to_csv
from pnlac_fast.training import finetune
from pnlac_fast.trajectory import TRAJECTORY_FILE, load_trajectory
from pnlac_fast.workplace import write_json

SWEEP_FILE, COMPARISON_FILE = "sweep.json", "comparison.csv"
OWN = ("set", "control", "control_store", "hold_out")  # what a plan has beside the function
GIVEN = ("model", "data", "out", "probe", "template", "keep_base", "overwrite", "other_data")
KNOWN = (*(name for name in inspect.signature(finetune).parameters if name not in GIVEN), *OWN)
LISTS = ("other_topics", "rival_layers", "target_modules", "set")  # options whose values are lists themselves
PLACES = ("topic", "seed", "control")  # over which a method is averaged: they are no part of its name


@dataclass(frozen=True)
class Planned:
    """One fine-tune of a sweep.

    Attributes
    ----------
    name
        Its folder, such as "anchor/topic=race,seed=0,anchor_weight=3".
    options
        Of ``pnlac-fast finetune``.
    varied
        Those of them that differ within its method, except topic, seed and control.
    """

    name: str
    options: dict[str, Any]
    varied: dict[str, Any]


def plan_runs(plan: Mapping[str, Any]) -> list[Planned]:
    """The fine-tunes of a plan.

    A plan has options of ``pnlac-fast finetune``, by the names of its flags with underscores, and a table for each
    method with options of its own. Where the value of an option is a list, every value is combined with every other.
    ``control = [false, 0, 1]`` is the method itself and two of its random controls. ``hold_out = 2`` gives a KL or a
    null space the questions of all topics but the tuned one and the two that follow it in the data, the last followed
    by the first: over all tuned topics, every topic is judged without being seen as often as any other.

    Raises
    ------
    UserError
        An option is unknown, a method has no topic or side, or nothing is planned.
    """
    common = {name: value for name, value in plan.items() if not isinstance(value, Mapping)}
    methods = {name: value for name, value in plan.items() if isinstance(value, Mapping)}
    if not methods:
        raise UserError("The plan has no methods: give it a table for each, such as [plain].")
    runs = []
    for method, own in methods.items():
        options = {**common, **own}
        for name in options:
            if name not in KNOWN:
                raise unknown(f"option of method '{method}'", name, KNOWN)
        if missing := [name for name in ("topic", "side") if name not in options]:
            raise UserError(f"Method '{method}' has no {' and no '.join(missing)}: add it to the plan.")
        values = {name: _values(name, value) for name, value in options.items()}
        if empty := [name for name, several in values.items() if not several]:
            raise UserError(f"Method '{method}' has no values for {empty[0]}: an empty list plans nothing.")
        several = [name for name in values if len(values[name]) > 1]
        for combined in itertools.product(*values.values()):
            chosen = {name: v for name, v in zip(values, combined, strict=True) if v is not False or name != "control"}
            told = ",".join(f"{name}={_text(chosen.get(name, 'none'))}" for name in several)
            varied = {name: chosen[name] for name in several if name not in PLACES}
            runs.append(Planned(f"{method}/{told or 'only'}", chosen, varied))
    names = [run.name for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"The plan has '{twice[0]}' more than once: give each value of an option once.")
    return runs


def sweep(
    model: Model | str | Path,
    data: str | Path | Sequence[Question],
    out: str | Path,
    plan: str | Path | Mapping[str, Any],
    *,
    probe: str | Path | Sequence[Question],
    template: str = DEFAULT_TEMPLATE,
    jobs: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> xr.Dataset:
    """Run every fine-tune of a plan that is not there yet, and put them side by side.

    Parameters
    ----------
    model, data, probe, template
        As for :func:`pnlac_fast.finetune`; the questions of other topics in ``data`` are those of a KL or a null space.
    out
        Directory with a folder for each fine-tune, from which the same call goes on where it was stopped, and
        ``comparison.csv``, the rows of :func:`pnlac_fast.comparison.compare`.
    plan
        See :func:`plan_runs`; or a TOML or JSON file of it, whose relative paths start at the working directory.
    jobs
        Processes. More than one load the model afresh from where it came, on its device and in its dtype, and need
        the usual ``if __name__ == "__main__":`` in a script. The result does not depend on it.
    overwrite
        Do fine-tunes again that were made with other options, another model or other data, instead of refusing.

    Returns
    -------
    xarray.Dataset
        (run, point, question), margins in nats, see :func:`pnlac_fast.comparison.as_run`; but a method is called as in
        the plan, with "_random" or "_lowest" for a control, "_seen" where it has read all judged topics, and with
        what varies within it, except topic, seed and control: "anchor_random@anchor_weight=3". Without modes or rival
        it is "plain".

    Raises
    ------
    UserError
        The plan is no plan, or ``out`` holds fine-tunes with other settings.
    """
    runs, out = plan_runs(_read(plan)), Path(out)
    questions, probes = as_questions(data), as_questions(probe)
    base = opened(model)
    origin = {**base.identity, "data": fingerprint(questions), "probe": fingerprint(probes), "template": template}
    settings = {run.name: {**_plain(run.options), **_files(run.options), "origin": origin} for run in runs}
    done = _finished(out, settings, overwrite)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / SWEEP_FILE, _recorded(out))  # a sweep is stopped before its first run is recorded, too
    todo = [run for run in runs if run.name not in done]
    with tqdm(
        total=len(runs), initial=len(done), desc="fine-tunes", unit="run", disable=None if progress else True
    ) as bar:
        for run in _run_all(base, questions, probes, template, out, todo, jobs):
            done[run.name] = settings[run.name]
            write_json(out / SWEEP_FILE, {**_recorded(out), **done})
            bar.update()
    result = join([_result(out / run.name, run) for run in runs])
    (out / COMPARISON_FILE).write_text(to_csv(compare(result)))
    return result


def _run_all(
    base: Model, data: Any, probe: Any, template: str, out: Path, todo: Sequence[Planned], jobs: int
) -> Iterator[Planned]:
    """Do what is left to do; yields each run when it is there."""
    if jobs < 1:
        raise UserError(f"{jobs} processes do nothing: give --jobs 1 or more.")
    if jobs == 1 or len(todo) < 2:
        for run in todo:
            _run(base, data, probe, template, out, run)
            yield run
        return
    computing = max(1, (os.cpu_count() or 1) // jobs), torch.get_float32_matmul_precision()
    load = {"revision": base.origin.get("revision"), "dtype": base.origin.get("dtype"), "device": str(base.device)}
    worker = (str(base.origin["source"]), {**load, "name": base.name}, data, probe, template, out, *computing)
    with pool(jobs, _begin, worker) as shared:
        yield from shared(_continue, todo)


_worker: list[Any] = []  # what a process of a sweep has loaded


def _begin(
    source: str, load: dict[str, Any], data: Any, probe: Any, template: str, out: Path, threads: int, precision: str
) -> None:
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)  # as in the process that has started this one
    _worker[:] = [load_model(source, **load), data, probe, template, out]


def _continue(run: Planned) -> Planned:
    base, data, probe, template, out = _worker
    _run(base, data, probe, template, out, run)
    return run


def _run(base: Model, data: Any, probe: Any, template: str, out: Path, run: Planned) -> None:
    options = dict(run.options)
    names, control, store, hold_out = (options.pop(name, None) for name in OWN)
    path = options.pop("inhibit", None)
    if path is None and (names or control is not None or store):
        raise UserError(f"'{run.name}' has a set or a control, but no neurons: add inhibit to the plan.")
    if path is not None:
        modes = options.setdefault("inhibit_mode", "freeze").split(",")
        chosen = [names] if isinstance(names, str) else list(names or ())
        control = None if control is None else str(control)
        topic = options["topic"]
        options["inhibit"] = choose_sets(path, modes, topic, names=chosen, control=control, store=store)
    if hold_out is not None:
        options["other_topics"] = _seen(by_topic(data), options, hold_out)
    place = out / run.name
    place.parent.mkdir(parents=True, exist_ok=True)
    # What must not be done again is not among the runs to do.
    finetune(base, data, out=place, other_data=data, probe=probe, template=template, overwrite=True, **options)


def _seen(topics: Iterable[str], options: Mapping[str, Any], hold_out: int) -> list[str]:
    """The topics of a KL or a null space, all but the tuned one and the ``hold_out`` that follow it."""
    if options.get("other_topics") is not None:
        raise UserError("other_topics and hold_out both say which topics are seen: give one of them.")
    order = list(topics)
    unseen = {options["topic"], *following(order, options["topic"], hold_out)}
    return [topic for topic in order if topic not in unseen]


def _result(place: Path, run: Planned) -> xr.Dataset:
    """The trajectory of a run under the name of its method in the plan, so that all its topics and seeds are one."""
    record = json.loads((place / FINETUNE_FILE).read_text())
    found = as_run(load_trajectory(place / TRAJECTORY_FILE), record)
    method = str(found["method"].values[0])
    if method != "plain":
        kinds = {one.get("kind") for one in record["inhibit"].values()}
        control = "".join(f"_{kind}" for kind in ("random", "lowest") if kind in kinds)
        method = run.name.partition("/")[0] + control + ("_seen" if method.endswith("_seen") else "")
    if run.varied:
        method += f"@{','.join(f'{name}={_text(value)}' for name, value in run.varied.items())}"
    return found.assign_coords(method=("run", np.array([method], dtype=object)))


def _finished(out: Path, settings: Mapping[str, Any], overwrite: bool) -> dict[str, Any]:
    """What is there already with the same settings."""
    if not (out / SWEEP_FILE).is_file():
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"'{out}' exists and holds no sweep: give another --out.")
        return {}
    before = _recorded(out)
    done = {}
    for name, wanted in json.loads(json.dumps(settings)).items():
        if name not in before or not (out / name / FINETUNE_FILE).is_file():
            continue
        other = [key for key in {**before[name], **wanted} if not _same(key, before[name].get(key), wanted.get(key))]
        if not other:
            done[name] = before[name]
        elif not overwrite:
            raise UserError(
                f"'{out / name}' was made with another {' and '.join(other)}: give another --out, or --overwrite to do "
                f"it again."
            )
    return done


def _same(key: str, before: Any, wanted: Any) -> bool:
    """Whether a setting is the same. Of a base only its identity counts, not where it lay."""
    if key == "origin" and before is not None:
        optional = ("type", "dtype")  # the first sweeps did not record these
        return all(before.get(name, value if name in optional else None) == value for name, value in wanted.items())
    return bool(before == wanted)


def _recorded(out: Path) -> dict[str, Any]:
    """The settings of all runs that a folder has seen, those of other plans too."""
    file = out / SWEEP_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def _read(plan: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(plan, Mapping):
        return plan
    try:
        text = Path(plan).read_text()
        found = json.loads(text) if Path(plan).suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{plan}' is no plan of a sweep ({error}): write TOML with a table for each method."
        ) from error
    if not isinstance(found, Mapping):
        raise UserError(f"'{plan}' holds a {type(found).__name__}, not tables: write one for each method.")
    return found


def _values(name: str, value: Any) -> list[Any]:
    """The values of an option, one by one."""
    if not isinstance(value, list):
        return [value]
    return [value] if name in LISTS and not any(isinstance(v, list) for v in value) else value


def _text(value: Any) -> str:
    """A value as part of a folder's name."""
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(c if c.isalnum() or c in "+-._ " else "_" for c in text)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def _files(options: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of the neuron file, which may have been located anew."""
    if options.get("inhibit") is None:
        return {}
    path = local(options["inhibit"], NEURONS_FILE)
    if not path.is_file():
        raise UserError(f"There is no neuron file '{path}': make one with pnlac-fast locate STORE -o {path}.")
    return {"neurons": hashlib.sha256(path.read_bytes()).hexdigest()}
