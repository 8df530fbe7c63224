"""Activation patching: give one model another's activations at chosen neurons, and see how its stance moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from pnlac_fast import store as stores
from pnlac_fast.datasets import Question, as_questions, by_topic, fingerprint
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.generation import answers
from pnlac_fast.judges import Classifier, train
from pnlac_fast.loading import open_models, topic_of
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet, choose, load_sets, random_like
from pnlac_fast.prompts import DEFAULT_TEMPLATE
from pnlac_fast.provenance import provenance
from pnlac_fast.stance import margins, table

KINDS = ("tuned", "mean", "zero", "scale")
DIRECTIONS = ("tuned_into_base", "base_into_tuned")
UNPATCHED, SOURCE = "none", "tuned"  # the two runs that every fraction is measured between


@contextmanager
def patched(
    model: Model,
    neurons: NeuronSet,
    *,
    source: Model | None = None,
    values: np.ndarray | None = None,
    scale: float | None = None,
) -> Iterator[None]:
    """Patch every forward pass of ``model`` inside the block, with or without a key/value cache.

    Give exactly one of the three:

    source
        Another model. Before each pass it reads the same tokens, with a key/value cache of its own, and its
        activations take the place of the model's. Under ``generate`` it hence reads what the *patched* model chose.
    values
        float [layer, neuron]: constants, such as means from a store, written at every position.
    scale
        Factor on the model's own activations; 0 ablates.

    Raises
    ------
    UserError
        The set is empty, or its shape is not the model's.
    RuntimeError
        On leaving: a patched layer did not run in every pass, so the result would not be what it says.
    """
    if sum(option is not None for option in (source, values, scale)) != 1:
        raise ValueError("give exactly one of source, values and scale")
    neurons.fits(model)
    layers = [layer for layer, count in enumerate(neurons.per_layer) if count]
    index = {layer: torch.tensor(neurons.layer(layer), device=model.device) for layer in layers}
    constant = (
        {} if values is None else {layer: torch.as_tensor(values[layer][neurons.layer(layer)]) for layer in layers}
    )
    seen: dict[int, Tensor] = {}
    recording, passes, writes = False, 0, 0
    cache: Any = None

    def record(layer: int, activation: Tensor) -> None:
        if recording:
            seen[layer] = activation.index_select(-1, index[layer].to(activation.device))

    def write(layer: int, activation: Tensor) -> Tensor | None:
        nonlocal writes
        if recording:
            return None
        writes += 1
        at = index[layer].to(activation.device)
        own = activation.index_select(-1, at)
        if source is not None:
            new = seen.pop(layer).to(own)
        elif values is not None:
            new = constant[layer].to(own).expand_as(own)
        else:
            new = own * (scale or 0.0)
        return activation.index_copy(-1, at, new)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal passes, recording, cache
        passes += 1
        if source is None:
            return
        if args:
            raise RuntimeError("a patched model must be called with keyword arguments")
        past = kwargs.get("past_key_values")
        if past is None:
            cache = None
        elif past.get_seq_length() == 0:
            from transformers import DynamicCache

            cache = DynamicCache(config=source.hf.config)
        elif cache is None or cache.get_seq_length() != past.get_seq_length():
            raise RuntimeError("the key/value cache of the patched model was not started inside the patch")
        recording = True
        try:
            with source.active() as hf:
                inputs = {name: kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids")}
                hf.get_decoder()(**inputs, past_key_values=cache, use_cache=cache is not None)
        finally:
            recording = False

    gate = model.hf.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with model.tapped(neurons.site, write, layers):
            if source is None:
                yield
            else:
                with source.tapped(neurons.site, record, layers):
                    yield
    finally:
        gate.remove()
    if passes == 0 or writes != passes * len(layers):
        raise RuntimeError(
            f"the patch of '{neurons.name}' was written {writes} times in {passes} passes over {len(layers)} layers: "
            f"it did not happen as asked"
        )


def patch(
    model: Model | str | Path,
    tuned: Mapping[str, Model | str | Path],
    neurons: str | Path | Mapping[str, NeuronSet],
    data: str | Path | Sequence[Question],
    *,
    store: str | Path | None = None,
    directions: Sequence[str] = ("tuned_into_base",),
    kinds: Sequence[str] = ("tuned",),
    scale: float = 2.0,
    draws: int = 5,
    seed: int = 0,
    template: str = DEFAULT_TEMPLATE,
    normalise: str = "token",
    max_new_tokens: int = 0,
    training_data: str | Path | Sequence[Question] | None = None,
    batch_tokens: int = 4096,
) -> xr.Dataset:
    """Patch the general, the specific and the top neurons of each tuned model, and random ones with the same counts.

    Parameters
    ----------
    model, tuned
        The base model, and tuned ones whose topic is known (tuned by ``pnlac-fast finetune``, or named by it).
    neurons
        Neuron sets by name, or the file that :func:`pnlac_fast.locate` wrote.
    store
        Where the mean patch takes its means from, and where the result is written, as ``/results/patching``.
    directions
        "tuned_into_base" (does the change of these neurons alone move base?), "base_into_tuned" (does taking it away
        move tuned back?).
    kinds
        What is written: the other model's activation on the same tokens ("tuned"), its "mean" over the topic's
        counted tokens in the store, "zero", or the own activation times ``scale``.
    draws
        Random sets, layer-matched to the general set and outside of it.
    max_new_tokens
        Above 0: also let each patched model answer, its patched logits choosing every token (variable ``answer``).
    training_data
        Labelled completions: also label these answers with a classifier (variable ``label``).

    Returns
    -------
    xarray.Dataset
        (run, question): ``margin`` in nats. Coordinates of run: ``tuned_topic``, ``model``, ``neurons`` ("none" and
        "tuned": the unpatched model that is patched, and the one the activations come from), ``direction``, ``kind``,
        ``draw`` (-1 where not random), ``count``, ``share``.
    """
    questions = as_questions(data)
    for kind, given, known in (("patch", kinds, KINDS), ("direction", directions, DIRECTIONS)):
        for name in given:
            if name not in known:
                raise unknown(kind, name, known)
    if "mean" in kinds and store is None:
        raise UserError("The mean patch takes its means from a store: give one.")
    if training_data is not None and not max_new_tokens:
        raise UserError("Labels need answers: give --max-new-tokens with --training-data.")
    judge = train(as_questions(training_data)) if training_data is not None else None
    means = stores.open_contrast(store).load() if store is not None and "mean" in kinds else None
    base, models = open_models(model, tuned)
    sets = neurons if isinstance(neurons, Mapping) else load_sets(neurons)
    groups = by_topic(questions)
    runs: dict[str, list[Any]] = {
        name: [] for name in ("tuned_topic", "model", "neurons", "direction", "kind", "draw", "count", "share")
    }
    measured: list[_Measured] = []
    options = (template, normalise, max_new_tokens, batch_tokens, judge)
    for name, other in models.items():
        topic = topic_of(other, name, groups)
        if not topic:
            raise UserError(f"What '{name}' was tuned on is not known: name it by its topic, --tuned TOPIC=PATH.")
        chosen = _sets_of(sets, name, topic, draws, seed)
        for _, _, members in chosen:
            members.check(base)
        for direction in directions:
            into, source = (base, other) if direction == "tuned_into_base" else (other, base)
            for label, subject in ((UNPATCHED, into), (SOURCE, source)):
                _note(runs, topic, name, label, direction, "", -1, None)
                measured.append(_measure(subject, questions, *options))
            for kind in kinds:
                for label, draw, members in chosen:
                    _note(runs, topic, name, label, direction, kind, draw, members)
                    parts = []
                    for probe, group in groups.items():
                        how: dict[str, Any] = {"source": source}
                        if kind in ("zero", "scale"):
                            how = {"scale": 0.0 if kind == "zero" else scale}
                        elif means is not None and kind == "mean":
                            how = {"values": _means(means, direction, name, probe, members)}
                        with patched(into, members, **how):
                            parts.append(_measure(into, group, *options))
                    measured.append(_join(parts, groups, questions))
    result = table(
        "margin",
        np.stack([m[0] for m in measured]),
        runs,
        questions,
        normalise=normalise,
        provenance=provenance(base=base.origin, data=fingerprint(questions), template=template, seed=seed),
    )
    if max_new_tokens:
        result["answer"] = (("run", "question"), np.array([m[1] for m in measured], dtype=object))
    if judge is not None:
        result["label"] = (("run", "question"), np.stack([np.asarray(m[2]) for m in measured]))
        result.attrs["accuracy"] = judge.accuracy
    if store is not None:
        stores.write_result(store, "patching", result)
    return result


_Measured = tuple[np.ndarray, list[str], np.ndarray | None]  # margins, answers, labels; each [question]


def _measure(
    model: Model,
    questions: Sequence[Question],
    template: str,
    normalise: str,
    max_new_tokens: int,
    batch_tokens: int,
    judge: Classifier | None,
) -> _Measured:
    margin = margins(model, questions, template=template, normalise=normalise, batch_tokens=batch_tokens)
    if not max_new_tokens:
        return margin, [], None
    texts = answers(model, questions, template=template, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens)
    return margin, texts, judge.label(texts) if judge is not None else None


def _join(
    parts: Sequence[_Measured], groups: Mapping[str, Sequence[Question]], questions: Sequence[Question]
) -> _Measured:
    """Bring what was measured topic by topic back into the order of the questions."""
    place = {key: i for i, key in enumerate(q.key for group in groups.values() for q in group)}
    order = [place[q.key] for q in questions]
    texts = [text for part in parts for text in part[1]]
    labels = [part[2] for part in parts if part[2] is not None]
    return (
        np.concatenate([part[0] for part in parts])[order],
        [texts[i] for i in order] if texts else [],
        np.concatenate(labels)[order] if labels else None,
    )


def _sets_of(
    sets: Mapping[str, NeuronSet], model: str, topic: str, draws: int, seed: int
) -> list[tuple[str, int, NeuronSet]]:
    """(label, draw, set) of everything that is patched for one tuned model."""
    general = choose(sets, "general", model=model)
    named = [(kind, -1, choose(sets, kind, model=model, topic=topic)) for kind in ("specific", "top")]
    random = [("random", i, random_like(general, seed + i, exclude=general.member)) for i in range(draws)]
    return [("general", -1, general), *named, *random]


def _means(contrast: xr.Dataset, direction: str, model: str, topic: str, neurons: NeuronSet) -> np.ndarray:
    """Means float64 [layer, neuron] of one probe topic at the set's site and the tokens it was located on."""
    if topic not in contrast["topic"].values:
        raise UserError(f"The store has no means of the topic '{topic}': cache it, or patch other questions.")
    at: dict[str, Any] = {"topic": topic, "site": neurons.site, "tokens": neurons.found["tokens"]}
    if direction == "base_into_tuned":
        return contrast["mean_base"].sel(at).values[:, : neurons.member.shape[1]].astype("f8")
    at["model"] = model
    return contrast["mean_tuned"].sel(at).values[:, : neurons.member.shape[1]].astype("f8")


def _note(
    runs: dict[str, list[Any]],
    topic: str,
    model: str,
    label: str,
    direction: str,
    kind: str,
    draw: int,
    members: NeuronSet | None,
) -> None:
    row = (
        topic,
        model,
        label,
        direction,
        kind,
        draw,
        len(members) if members else 0,
        members.share if members else 0.0,
    )
    for column, value in zip(runs.values(), row, strict=True):
        column.append(value)
