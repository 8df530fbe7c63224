"""Activation patching: give one model another's activations at chosen neurons, and see how its stance moves."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pnlac_fast import prompts
from pnlac_fast import store as stores
from pnlac_fast.architecture import backbone
from pnlac_fast.cost import Meter
from pnlac_fast.datasets import Question, as_questions, by_topic, fingerprint, paired
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.generation import answers
from pnlac_fast.judges import train
from pnlac_fast.loading import open_models, topic_of
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet, load_sets
from pnlac_fast.patch_sets import ALL_SETS, choose_all
from pnlac_fast.patches import Patch, apply, patched, save_patch
from pnlac_fast.prompts import DEFAULT_TEMPLATE
from pnlac_fast.provenance import provenance
from pnlac_fast.recovery import recovered
from pnlac_fast.stance import log_probabilities, margins, scored_batches, table

KINDS = ("tuned", "mean", "shift", "zero", "scale")
DIRECTIONS = ("tuned_into_base", "base_into_tuned")
Plan = NeuronSet | Mapping[str, Patch]  # neurons that take another model's activations, or constant patches by topic
UNPATCHED, SOURCE = "none", "tuned"  # the two runs that every fraction is measured between


def patch(
    model: Model | str | Path,
    tuned: Mapping[str, Model | str | Path],
    neurons: str | Path | Mapping[str, NeuronSet],
    data: str | Path | Sequence[Question],
    *,
    store: str | Path | None = None,
    sets: Sequence[str] = (),
    shares: Sequence[float] = (),
    directions: Sequence[str] = ("tuned_into_base",),
    kinds: Sequence[str] = ("tuned",),
    scale: float = 2.0,
    draws: int = 5,
    seed: int = 0,
    boots: int = 2000,
    template: str = DEFAULT_TEMPLATE,
    normalise: str = "token",
    max_new_tokens: int = 0,
    training_data: str | Path | Sequence[Question] | None = None,
    batch_tokens: int = 4096,
    save: str | Path | None = None,
) -> xr.Dataset:
    """Patch the general, the specific and the top neurons of each tuned model, and random ones with the same counts.

    Teacher-forced, the source of the activations reads every batch once for all sets; while a patched model answers,
    the source reads along, with a key/value cache of its own, what the *patched* model chose.

    Parameters
    ----------
    model, tuned
        The base model, and tuned ones whose topic is known (tuned by ``pnlac-fast finetune``, or named by it).
    neurons
        Neuron sets by name, or the file that :func:`pnlac_fast.locate` wrote.
    data
        Questions with pairs of completions, none of those that were tuned or located on.
    store
        Where the mean and shift patches take their means from, and what ``shares`` rank neurons by; the result is
        written there, as ``/results/patching``, with ``shares`` as ``/results/patching_curve``.
    sets
        Kinds of sets: "general", "specific" and "top" (of the tuned topic), "mean", "off_minus_on", "on_minus_off" (no
        intersection; see :class:`pnlac_fast.localize.Localization`), "random" (layer-matched to the general set and
        outside of it), "random_top" (the same, from all top sets together;
        see :func:`pnlac_fast.neurons.random_from`). Default: general, specific, top and
        random; for a curve, general and random.
    shares
        Instead of the sets as they were located, sets of these shares of all neurons, for a curve: the general set
        grown, the others and the random ones at its size. There is no specific set of a chosen size.
    directions
        "tuned_into_base" (does the change of these neurons alone move base?), "base_into_tuned" (does taking it away
        move tuned back?).
    kinds
        What is written: the other model's activation on the same tokens ("tuned"), its "mean" over the topic's
        counted tokens in the store, the own activation and the "shift" between the models' means there, "zero", or the
        own activation times ``scale``. Those that need no second model are ours.
    draws
        Random sets of either kind.
    boots, seed
        Resamples of the questions behind the intervals, and the seed of these and of the random sets.
    template, normalise, batch_tokens
        As for :func:`pnlac_fast.stance.margins`.
    max_new_tokens
        Above 0: also let each patched model answer, its patched logits choosing every token (variable ``answer``).
    training_data
        Labelled completions: also label these answers with a classifier (variable ``label``).
    save
        Directory for files of the patches that need no second model (all kinds but "tuned"; see
        :func:`pnlac_fast.patches.save_patch`), one per tuned model, direction, kind and located set. Means are then
        averaged over topics, since a file does not know what it will be asked.

    Returns
    -------
    xarray.Dataset
        (run, question): ``margin`` in nats; (run, part, bound): ``recovered``, a fraction (see
        :func:`pnlac_fast.recovery.recovered`). Coordinates of run: ``tuned_topic``, ``model``, ``neurons`` ("none" and
        "tuned": the unpatched model that is patched, and the one the activations come from), ``direction``, ``kind``,
        ``draw`` (-1 where not random), ``count``, ``share``.

    Raises
    ------
    UserError
        A set is empty or of another model, a tuned topic is not known, questions lack pairs, or what is asked for needs
        a store, or answers, that are not there.
    RuntimeError
        A patched layer did not run in every pass, so that the result would not be what it says.

    Notes
    -----
    Activation patching as in arXiv 2508.02360, and beside it the random neurons that say what a number means.
    """
    questions = paired(as_questions(data))
    for what, given, known in (("patch", kinds, KINDS), ("direction", directions, DIRECTIONS), ("set", sets, ALL_SETS)):
        for name in given:
            if name not in known:
                raise unknown(what, name, known)
    from_means = {"mean", "shift"} & set(kinds)
    if from_means and store is None:
        raise UserError(f"The {sorted(from_means)[0]} patch takes its means from a store: give one.")
    if shares and store is None:
        raise UserError("A curve ranks neurons by the store that they were located in: give it with --store.")
    if save is not None and not set(kinds) - {"tuned"}:
        raise UserError("A patch with another model's activations fits in no file: give --kind mean, shift or another.")
    if training_data is not None and not max_new_tokens:
        raise UserError("Labels need answers: give --max-new-tokens with --training-data.")
    judge = train(as_questions(training_data)) if training_data is not None else None
    means = stores.open_contrast(store).load() if store is not None and from_means else None
    located = neurons if isinstance(neurons, Mapping) else load_sets(neurons)
    base, models = open_models(model, tuned)
    meter = Meter(base.device)
    groups = by_topic(questions)
    reading: dict[str, Any] = {"template": template, "batch_tokens": batch_tokens}
    rows: list[Run] = []
    margin: list[np.ndarray] = []
    texts: list[list[str]] = []
    for name, other in models.items():
        topic = topic_of(other, name, groups)
        if not topic:
            raise UserError(f"What '{name}' was tuned on is not known: name it by its topic, --tuned TOPIC=PATH.")
        options: dict[str, Any] = {"draws": draws, "seed": seed, "shares": shares, "store": store}
        chosen = choose_all(located, name, topic, sets, **options)
        for one in chosen:
            one.neurons.check(base)
        for direction in directions:
            into, source = (base, other) if direction == "tuned_into_base" else (other, base)
            plans: list[Plan] = []
            for label, subject in ((UNPATCHED, into), (SOURCE, source)):
                rows.append(Run(topic, name, label, direction))
                margin.append(margins(subject, questions, normalise=normalise, **reading)[None])
                if max_new_tokens:
                    texts.append(answers(subject, questions, max_new_tokens=max_new_tokens, **reading))
            for kind, one in itertools.product(kinds, chosen):
                members = one.neurons
                rows.append(Run(topic, name, one.kind, direction, kind, one.draw, len(members), members.share))
                if kind == "tuned":
                    plans.append(members)
                    continue
                constant = {probe: _constant(kind, members, direction, name, probe, means, scale) for probe in groups}
                plans.append(constant)
                if save is not None and one.draw < 0:
                    file = "-".join(part.replace("/", "-") for part in (name, one.kind, kind, direction))
                    save_patch(_average(constant.values()), Path(save) / f"{file}.safetensors", base=into.origin)
            margin.append(patched_margins(into, source, plans, questions, normalise=normalise, **reading))
            if max_new_tokens:
                texts += [_answers(into, source, plan, groups, questions, max_new_tokens, reading) for plan in plans]
    made = provenance(base=base.origin, data=fingerprint(questions), template=template, seed=seed)
    result = patched_runs(rows, np.concatenate(margin), questions, boots, seed, normalise=normalise, provenance=made)
    if max_new_tokens:
        result["answer"] = (("run", "question"), np.array(texts, dtype=object))
    if judge is not None:
        result["label"] = (("run", "question"), np.stack([np.asarray(judge.label(row)) for row in texts]))
        result.attrs["accuracy"] = judge.accuracy
    result.attrs["cost"] = meter.record()
    if store is not None:
        stores.write_result(store, "patching_curve" if shares else "patching", result)
    return result


@dataclass(frozen=True)
class Run:
    """One row of a patching result; its fields are the coordinates of :func:`patch`."""

    tuned_topic: str
    model: str
    neurons: str
    direction: str
    kind: str = ""
    draw: int = -1
    count: int = 0
    share: float = 0.0


def patched_runs(
    runs: Sequence[Run], margin: np.ndarray, questions: Sequence[Question], boots: int, seed: int, **attrs: Any
) -> xr.Dataset:
    """Margins [run, question] as a patching result, see :func:`patch`, with the recovered fractions."""
    columns = {field.name: [getattr(run, field.name) for run in runs] for field in fields(Run)}
    result = table("margin", margin, columns, questions, **attrs)
    return result.assign(recovered=recovered(result, boots=boots, seed=seed))


def patched_margins(
    model: Model,
    source: Model,
    plans: Sequence[Plan],
    questions: Sequence[Question],
    *,
    template: str = DEFAULT_TEMPLATE,
    normalise: str = "token",
    batch_tokens: int = 4096,
) -> np.ndarray:
    """Margins of a model under each of several patches, float64 [plan, question], nats; see :func:`patched`.

    Parameters
    ----------
    questions, template, normalise, batch_tokens
        See :func:`pnlac_fast.stance.margins`.
    source
        The model whose activations are written. It reads each batch once for all plans.
    plans
        Each either neurons that take the source's activations, or a patch for each topic.
    """
    margin = np.zeros((len(plans), len(questions)))
    sites = {plan.site for plan in plans if isinstance(plan, NeuronSet)}
    for topic, group in by_topic(questions).items():
        rows = np.array([i for i, question in enumerate(questions) if question.topic == topic])
        with torch.inference_mode():
            for batch in scored_batches(model, group, template, normalise, batch_tokens):
                seen = {site: _record(source, batch.read[0], site) for site in sites}
                for own, plan in zip(margin, plans, strict=True):
                    with (
                        patched(model, plan, recorded=seen[plan.site])
                        if isinstance(plan, NeuronSet)
                        else apply(model, plan[topic])
                    ):
                        found = log_probabilities(model, *batch.read).cpu().numpy()
                    np.add.at(own, rows[batch.owner], batch.weight * found)
    return margin


def _record(model: Model, batch: prompts.Batch, site: str) -> dict[int, Tensor]:
    """Activations of a site by layer, [sequence, position, neuron]."""
    seen: dict[int, Tensor] = {}
    with model.tapped(site, lambda layer, a: seen.__setitem__(layer, a.clone())), model.active() as hf:
        backbone(hf)(**batch.inputs(), use_cache=False)
    return seen


def _answers(
    model: Model,
    source: Model,
    plan: Plan,
    groups: Mapping[str, Sequence[Question]],
    questions: Sequence[Question],
    max_new_tokens: int,
    reading: Mapping[str, Any],
) -> list[str]:
    """Answers of a patched model, in the order of the questions."""
    written: dict[str, str] = {}
    for topic, group in groups.items():
        with patched(model, plan, source=source) if isinstance(plan, NeuronSet) else apply(model, plan[topic]):
            own = answers(model, group, max_new_tokens=max_new_tokens, **reading)
        written |= {q.key: text for q, text in zip(group, own, strict=True)}
    return [written[q.key] for q in questions]


def _constant(
    kind: str,
    neurons: NeuronSet,
    direction: str,
    model: str,
    topic: str,
    means: xr.Dataset | None,
    scale: float,
) -> Patch:
    """The patch of a kind that needs no second model, for the questions of one topic."""
    zeros = np.zeros(neurons.member.shape, np.float32)
    if kind in ("zero", "scale"):
        return Patch(neurons, 0.0 if kind == "zero" else scale, zeros)
    assert means is not None  # read where a kind needs them
    if topic not in means["topic"].values:
        raise UserError(f"The store has no means of the topic '{topic}': cache it, or patch other questions.")
    counted = str(neurons.found.get("tokens"))
    tokens = counted if counted in means["tokens"].values else str(means["tokens"].values[0])
    own = means.sel(topic=topic, site=neurons.site, tokens=tokens).isel(neuron=slice(0, neurons.member.shape[1]))
    base, tuned = own["mean_base"], own["mean_tuned"].sel(model=model)
    new, old = (tuned, base) if direction == "tuned_into_base" else (base, tuned)
    add = (new if kind == "mean" else new - old).values
    return Patch(neurons, 0.0 if kind == "mean" else 1.0, np.where(neurons.member, add, 0).astype(np.float32))


def _average(patches: Iterable[Patch]) -> Patch:
    """One patch for any topic: what is added is the mean over the topics."""
    first, *others = patches
    return replace(first, add=np.mean([first.add, *(p.add for p in others)], axis=0))
