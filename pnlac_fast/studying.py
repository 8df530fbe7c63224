"""The whole study in one call that can be interrupted: every topic, every method, every control, on several seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pnlac_fast import store as stores
from pnlac_fast import testbed
from pnlac_fast.adapters import sharing
from pnlac_fast.caching import cache
from pnlac_fast.comparison import compare, join
from pnlac_fast.datasets import SIDES, Question, as_questions, by_topic, following
from pnlac_fast.errors import UserError
from pnlac_fast.generation import generate
from pnlac_fast.loading import load_tuned, opened
from pnlac_fast.localize import locate
from pnlac_fast.models import Model
from pnlac_fast.neurons import load_sets
from pnlac_fast.patching import patch
from pnlac_fast.prompts import DEFAULT_TEMPLATE
from pnlac_fast.reporting import report
from pnlac_fast.reporting.tables import patch_rows
from pnlac_fast.reporting.wording import sentence_case
from pnlac_fast.scores import ATTRIBUTION
from pnlac_fast.scoring import score
from pnlac_fast.seed_overlap import SEED_OVERLAP, seed_overlap
from pnlac_fast.set_attribution import SET_ATTRIBUTION
from pnlac_fast.side_effects import utility
from pnlac_fast.study_plan import DIRECTED, StudyPlan, read_plan
from pnlac_fast.study_subject import Subject, testbed_plan, testbed_subject
from pnlac_fast.sweeping import SWEEP_FILE, plan_runs, sweep

BOOTS = 2000
PATCHED = ("patching", SET_ATTRIBUTION)  # results over whose runs the seeds are joined
Methods = Mapping[str, Mapping[str, Any]]


def study(
    model: Model | str | Path | None = None,
    data: str | Path | Sequence[Question] | None = None,
    out: str | Path = "pnlac-study",
    *,
    probe: str | Path | Sequence[Question] | None = None,
    plan: str | Path | Mapping[str, Any] | None = None,
    size: str = "full",
    seeds: Sequence[int] = (0, 1, 2),
    text: str | Path | None = None,
    template: str = DEFAULT_TEMPLATE,
    jobs: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Tune on every topic, locate, patch, inhibit by every method and control, judge, and report, for several seeds.

    Parameters
    ----------
    model, data, probe
        A base, the questions to tune and locate on, and held-out ones for every measurement. Default: the embedded
        testbed, a base of its own for every seed.
    out
        Directory: ``seed-N/`` with the fine-tunes (``runs/``), ``store.zarr``, ``neurons/``, ``report/`` and, where the
        plan asks for it, ``after.zarr`` and ``after/``; ``study.zarr`` and ``report/`` over all seeds. The same call
        goes on where it was stopped; what the plan has new is added.
    plan
        See :class:`pnlac_fast.study_plan.StudyPlan`, or a file of it. Default: an embedded one.
    size
        Of the testbed.
    seeds
        Of the fine-tunes and random controls; of the testbed also those of its bases.
    template
        What the models are asked, see :func:`pnlac_fast.finetune`.
    text
        Neutral passages, a file with one in each line, for utility. The testbed has its own.
    jobs
        Processes for the fine-tunes. Default: one a core on the CPU, four at most, else one.
    overwrite
        Do again what was made with other settings, instead of refusing.

    Returns
    -------
    dict
        ``methods``, the rows of :func:`pnlac_fast.comparison.compare` over all seeds; ``patching``, those of all
        patched sets; ``page``; ``seconds`` of wall time of this call.

    Raises
    ------
    UserError
        The plan or the data do not fit, or ``out`` holds a study of something else.
    Interrupted
        Ctrl-C; the same call goes on.
    """
    started = time.monotonic()
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError("Give each seed once, and at least one.")
    out = Path(out)
    options: dict[str, Any] = {"template": template, "overwrite": overwrite, "progress": progress, "jobs": jobs}
    if model is not None and data is not None and probe is not None:
        chosen, read = read_plan(plan or {}, "model"), (as_questions(data), as_questions(probe))
        if text is not None and not Path(text).is_file():
            raise UserError(f"There is no file '{text}' with neutral text: give one with a passage in each line.")
        for count in chosen.held_out:  # said now, not after dozens of fine-tunes
            for topic in chosen.topics or by_topic(read[0]):
                following(by_topic(read[0]), topic, count)
        base = opened(model)
        name = base.name
        subjects = [Subject(base, seed, *read, out=out / f"seed-{seed}", text=text, **options) for seed in seeds]
    elif model is None and data is None and probe is None:
        name, chosen = f"Testbed ({size})", testbed_plan(read_plan(plan or {}, "testbed"), size)
        beds = (testbed.build(size, seed) for seed in seeds)
        subjects = [testbed_subject(bed, out / f"seed-{bed.seed}", **options) for bed in beds]
    else:
        raise UserError("A study of your own model needs --model, --data and --probe; without all three: the testbed.")
    results = []
    for subject in subjects:
        with subject.computing():
            results.append(study_one(subject, chosen))
    over_all, told = out / "study.zarr", ", ".join(map(str, seeds))
    stores.create_results(over_all, provenance={"seeds": list(seeds), "plan": asdict(chosen)})
    training = join([result["training"] for result in results])
    stores.write_result(over_all, "training", training)
    for kind in PATCHED:
        if all(kind in result for result in results):
            of_seeds = [_of_seed(result[kind], seed) for result, seed in zip(results, seeds, strict=True)]
            stores.write_result(over_all, kind, xr.concat(of_seeds, "run"))
    main = f"{next(iter(chosen.neurons))}.json"
    located = {one.seed: load_sets(one.out / "neurons" / main) for one in subjects}
    bases = {one.seed: json.dumps(one.base.identity) for one in subjects}
    stores.write_result(over_all, SEED_OVERLAP, seed_overlap(located, bases))
    page = report(over_all, out / "report", title=f"{name}, seeds {told}")
    return {
        "methods": [asdict(row) for row in compare(training, BOOTS)],
        "patching": [asdict(row) for row in patch_rows(stores.open_result(over_all, "patching"), BOOTS, 0)],
        "page": str(page),
        "seconds": round(time.monotonic() - started, 1),
    }


def study_one(subject: Subject, plan: StudyPlan) -> dict[str, xr.Dataset]:
    """One seed of a study; returns what is shown over all seeds, results by name."""
    topics = list(plan.topics or by_topic(subject.data))
    store, runs = subject.out / "store.zarr", subject.out / "runs"
    subject.out.mkdir(parents=True, exist_ok=True)
    plain = {"plain": plan.methods["plain"]}
    _sweep(subject, plan, plain, runs, topics)
    reader = _reader(subject)
    tuned = _models(reader, plan, plain, runs, topics)
    of_tuned = {name: one.origin["sha256"] for name, one in tuned.items()}
    read = {"tuned": of_tuned, "cache": plan.cache}
    subject.once("cache", read, lambda: _cache(reader, plan, tuned, store))
    files = {name: subject.out / "neurons" / f"{name}.json" for name in plan.neurons}
    subject.once(
        "locate", {**read, "neurons": list(plan.neurons.items())}, lambda: _locate(reader, plan, tuned, store, files)
    )

    methods = {name: _with_paths(options, files, store) for name, options in plan.methods.items()}
    training = _sweep(subject, plan, methods, runs, topics)
    stores.write_result(store, "training", training)
    main = next(iter(files.values()))
    for stage, options in (("patching", plan.patch), ("patching_curve", plan.curve)):
        if options is not None:
            given = {"store": store, "seed": subject.seed, "template": subject.template, **_normalise(plan), **options}
            settings = {"neurons": main.read_text(), "options": options}
            subject.once(stage, settings, partial(patch, reader.base, tuned, main, subject.probe, **given))
    if plan.opposite:
        other = replace(plan, side=SIDES[1 - SIDES.index(plan.side)])
        folder, first = subject.out / "opposite", topics[: plan.opposite]
        _sweep(subject, other, plain, folder, first)
        tuned |= _models(reader, other, plain, folder, first, suffix=f" {other.side}")
    _judge(reader, plan, tuned, store)
    _report(subject, store, "report")
    if plan.after:
        _look_after(subject, plan, methods, runs, topics)
    there = stores.list_results(store)
    return {"training": training, **{kind: stores.open_result(store, kind) for kind in PATCHED if kind in there}}


def _planned(subject: Subject, plan: StudyPlan, methods: Methods, topics: Sequence[str]) -> dict[str, Any]:
    common = {**plan.finetune, "side": plan.side, "seed": subject.seed}
    return {name: {**common, "topic": topics, **options} for name, options in methods.items()}


def _sweep(subject: Subject, plan: StudyPlan, methods: Methods, out: Path, topics: Sequence[str]) -> xr.Dataset:
    planned = _planned(subject, plan, methods, topics)
    how: dict[str, Any] = {name: getattr(subject, name) for name in ("template", "overwrite", "progress")}
    how["jobs"] = subject.processes
    return sweep(subject.base, subject.data, out, planned, probe=subject.probe, **how)


def _reader(subject: Subject) -> Subject:
    """The same with a base of its own on the same weights: adapters go on that, and fine-tunes start from the other."""
    base = subject.base
    return replace(subject, base=Model(sharing(base.weights, ()), base.tokenizer, base.name, base.origin))


def _models(
    reader: Subject,
    plan: StudyPlan,
    methods: Methods,
    out: Path,
    topics: Sequence[str],
    among: Sequence[str] = (),
    suffix: str = "",
) -> dict[str, Model]:
    """Tuned models of a sweep, without controls, those tuned on topics ``among`` these: by topic, or "method topic"."""
    found = {}
    for one in plan_runs(_planned(reader, plan, methods, topics)):
        method, topic = one.name.partition("/")[0], one.options["topic"]
        if topic in (among or topics) and one.options.get("control") is None:
            parts = [method, *(f"{k}={v}" for k, v in one.varied.items())] if len(methods) > 1 else []
            name = " ".join([*parts, topic]) + suffix
            found[name] = load_tuned(reader.base, out / one.name, name=name)
    return found


def _with_paths(options: Mapping[str, Any], files: Mapping[str, Path], store: Path) -> dict[str, Any]:
    """Options of a method with files in place of the names of neurons, and the store where it is needed."""
    found = dict(options)
    if "inhibit" in found:
        found["inhibit"] = str(files[found["inhibit"]])
    if "lowest" in np.atleast_1d(found.get("control", ())).tolist():
        found.setdefault("control_store", str(store))
    if found.get("rival") in DIRECTED:
        found.setdefault("rival_store", str(store))
    return found


def _cache(subject: Subject, plan: StudyPlan, tuned: Mapping[str, Model], store: Path) -> None:
    options = {**plan.cache, "template": subject.template, "overwrite": subject.overwrite}
    cache(subject.base, tuned, subject.data, store, progress=False, **options)


def _locate(
    subject: Subject, plan: StudyPlan, tuned: Mapping[str, Model], store: Path, files: Mapping[str, Path]
) -> None:
    for name, options in reversed([*plan.neurons.items()]):  # the store keeps the sets of the last call
        given = dict(options)
        if options.get("evidence") or ATTRIBUTION in (options.get("score"), *options.get("keep_scores", ())):
            given |= {"model": subject.base, "tuned": tuned, "data": subject.data, "template": subject.template}
            given |= _normalise(plan) | ({"probe": subject.probe} if options.get("evidence") else {})
        files[name].parent.mkdir(exist_ok=True)
        locate(store, out=files[name], **given)


def _judge(subject: Subject, plan: StudyPlan, models: Mapping[str, Model], store: Path) -> None:
    """Stance by every scorer, and utility, from answers that are given once."""
    options = dict(plan.score)
    asked = {name: options.pop(name) for name in ("max_new_tokens", "temperature", "seed") if name in options}
    answers = store.with_suffix(".answers.jsonl")
    origins = {name: one.origin["sha256"] for name, one in models.items()}
    how: dict[str, Any] = {"template": subject.template, "tuned": models}

    def judge() -> None:
        generate(subject.base, subject.probe, out=answers, **how, **asked)
        judged = {**_normalise(plan), **options, "training_data": subject.data, "answers": answers, "store": store}
        score(subject.base, data=subject.probe, **how, **judged)
        utility(subject.base, models, text=subject.text, answers=answers, store=store)

    subject.once(f"score {store.stem}", {"models": origins, "score": plan.score}, judge)


def _look_after(subject: Subject, plan: StudyPlan, methods: Methods, runs: Path, topics: Sequence[str]) -> None:
    """What the methods leave behind: drift of the neurons, what is general now, stance and utility of their models."""
    store = subject.out / "after.zarr"
    reader = _reader(subject)
    models = _models(reader, plan, methods, runs, topics, topics[: plan.after])
    origins = {name: one.origin["sha256"] for name, one in models.items()}
    general = {name: value for name, value in next(iter(plan.neurons.values())).items() if name != "evidence"}

    def look() -> None:
        _cache(reader, plan, models, store)
        locate(store, **general)

    subject.once("after", {"models": origins, "cache": plan.cache, "neurons": general}, look)
    _judge(reader, plan, models, store)
    _report(subject, store, "after")


def _report(subject: Subject, store: Path, name: str) -> None:
    sweep_record = (subject.out / "runs" / SWEEP_FILE).read_text()
    made_from = {stage: one["made_from"] for stage, one in subject.done.items() if not stage.startswith("page ")}
    title = f"{sentence_case(subject.base.name)}, seed {subject.seed}"
    make = partial(
        report, store, subject.out / name, title=title if name == "report" else f"{title}: what the methods leave"
    )
    subject.once(f"page {name}", {**made_from, "runs": sweep_record}, make)


def _normalise(plan: StudyPlan) -> dict[str, Any]:
    return {"normalise": plan.finetune["normalise"]} if "normalise" in plan.finetune else {}


def _of_seed(patching: xr.Dataset, seed: int) -> xr.Dataset:
    """Patched runs of one seed, told apart from those of the others."""
    names = np.array([f"{name}, seed {seed}" for name in patching["model"].values], dtype=object)
    return patching.assign_coords(model=("run", names), seed=("run", np.full(len(names), seed)))
