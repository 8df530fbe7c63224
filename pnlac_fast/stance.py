"""How a model leans: which of a question's right and left completions it finds likelier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pnlac_fast import coupling, prompts
from pnlac_fast import store as stores
from pnlac_fast.datasets import Question, as_questions, fingerprint, paired
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.loading import open_models, topic_of
from pnlac_fast.models import Model
from pnlac_fast.prompts import DEFAULT_TEMPLATE
from pnlac_fast.provenance import provenance

NORMALISE = ("token", "sum")
SCORERS = ("logprob", "classifier")


def log_probabilities(model: Model, batch: prompts.Batch, lengths: Sequence[int]) -> Tensor:
    """Log-probability of the last ``lengths[i]`` tokens of each left-padded sequence, float64 [sequence], nats."""
    keep = max(lengths) + 1
    with model.active() as hf:
        logits = hf(**batch.inputs(), use_cache=False, logits_to_keep=keep).logits
    logits = logits[:, -keep:-1].to(torch.promote_types(logits.dtype, torch.float32))
    targets = batch.ids[:, -keep + 1 :]
    chosen = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
    wanted = (
        torch.arange(keep - 1, 0, -1, device=chosen.device)[None]
        <= torch.tensor(lengths, device=chosen.device)[:, None]
    )
    return torch.where(wanted, chosen, 0.0).double().sum(-1)


def margins(
    model: Model,
    questions: Sequence[Question],
    *,
    template: str = DEFAULT_TEMPLATE,
    normalise: str = "token",
    batch_tokens: int = 4096,
) -> np.ndarray:
    """Log-odds of right against left for each question, float64 [question], nats.

    The mean over the question's completion pairs of log P(right | prompt) - log P(left | prompt).

    Parameters
    ----------
    normalise
        "token": each log-probability is divided by its number of tokens; "sum": it is not, as suits pairs of matched
        length.

    Raises
    ------
    UserError
        A question lacks pairs, or a text is longer than the model's context.
    """
    if normalise not in NORMALISE:
        raise unknown("normalisation", normalise, NORMALISE)
    questions = paired(questions)
    texts = prompts.encode(model.tokenizer, questions, template, side="both", context=model.context)
    lengths = [len(text.ids) - text.prompt for text in texts]
    score = np.empty(len(texts))
    packed = prompts.batches([t.ids for t in texts], batch_tokens, padding_side="left", device=model.device)
    with torch.inference_mode():
        for batch in packed:
            score[list(batch.index)] = log_probabilities(model, batch, [lengths[i] for i in batch.index]).cpu().numpy()
    if normalise == "token":
        score /= lengths
    margin = np.zeros(len(questions))
    start = 0
    for i, question in enumerate(questions):  # encode() lists all right completions, then all left ones
        n = len(question.right)
        margin[i] = (score[start : start + n] - score[start + n : start + 2 * n]).mean()
        start += 2 * n
    return margin


def table(
    variable: str, values: np.ndarray, runs: Mapping[str, Sequence[Any]], questions: Sequence[Question], **attrs: Any
) -> xr.Dataset:
    """Values [run, question] as a result Dataset, with ``runs`` as coordinates of the runs."""
    for name, row in zip(runs["model"], values, strict=True):
        if np.isnan(row).any():
            raise UserError(f"Log-probabilities of '{name}' are not finite: try --dtype float32, or check its weights.")
    coords = {name: ("run", _column(column)) for name, column in runs.items()}
    coords["topic"] = ("question", _column([q.topic for q in questions]))
    coords["key"] = ("question", _column([q.key for q in questions]))
    return xr.Dataset({variable: (("run", "question"), values)}, coords=coords, attrs=attrs)


def score(
    model: str | Path | Model,
    tuned: Mapping[str, str | Path | Model],
    data: str | Path | Sequence[Question],
    *,
    scorer: str = "logprob",
    store: str | Path | None = None,
    template: str = DEFAULT_TEMPLATE,
    normalise: str = "token",
    training_data: str | Path | Sequence[Question] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_tokens: int = 4096,
) -> xr.Dataset:
    """Stance of base and tuned models on every question.

    Parameters
    ----------
    scorer
        "logprob": paired log-probability of the questions' completions (see :func:`margins`). "classifier": the model
        answers, and a text classifier trained on the completions of ``training_data`` labels the answers right, left
        or, where it is unsure, not at all.
    store
        Write the result into this store too, as ``/results/stance`` or ``/results/stance_classifier``.
    training_data
        Labelled completions for the classifier, with none of the questions that are scored.
    max_new_tokens, temperature, seed
        How the answers for the classifier are generated; temperature 0 is greedy.

    Returns
    -------
    xarray.Dataset
        (run, question): ``margin`` in nats, or ``label`` int8 (+1 right, -1 left, 0 unlabelled); coordinates ``model``
        ("base" first) and ``tuned_topic`` on run, ``topic`` and ``key`` on question.
    """
    if scorer not in SCORERS:
        raise unknown("scorer", scorer, SCORERS)
    questions = as_questions(data)
    base, others = open_models(model, tuned)
    models = {"base": base, **others}
    known = {q.topic for q in questions}
    runs = {
        "model": list(models),
        "tuned_topic": ["", *(topic_of(m, name, known) for name, m in others.items())],
        "method": ["", *(str(m.origin.get("method", "")) for m in others.values())],
    }
    origin = provenance(base=base.origin, data=fingerprint(questions), template=template)
    if scorer == "logprob":
        name, variable = "stance", "margin"
        values = np.stack(
            [
                margins(m, questions, template=template, normalise=normalise, batch_tokens=batch_tokens)
                for m in models.values()
            ]
        )
        attrs: dict[str, Any] = {"normalise": normalise}
    else:
        name, variable = "stance_classifier", "label"
        if training_data is None:
            raise UserError("The classifier needs labelled completions to learn from: give --training-data.")
        labelled = as_questions(training_data)
        values, judge = _labels(
            models,
            questions,
            labelled,
            template=template,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_tokens=batch_tokens,
        )
        attrs = {"accuracy": judge.accuracy, "labelled": len(labelled), "temperature": temperature}
    result = table(variable, values, runs, questions, scorer=scorer, provenance=origin, **attrs)
    if store is not None:
        stores.write_result(store, name, result)
    return result


def _labels(
    models: Mapping[str, Model], questions: Sequence[Question], labelled: Sequence[Question], **options: Any
) -> tuple[np.ndarray, Any]:
    """Labels int8 [model, question] of the models' answers, and the classifier that gave them."""
    from pnlac_fast.generation import answers
    from pnlac_fast.judges import train

    if shared := {q.key for q in questions} & {q.key for q in labelled}:
        raise UserError(f"{len(shared)} of the questions to score are in --training-data too: give it other questions.")
    judge = train(labelled)
    return np.stack([judge.label(answers(m, questions, **options)) for m in models.values()]), judge


def summary(result: xr.Dataset, *, measure: str = "margin", boots: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """What a score says, one record per model, with 95 % bootstrap intervals over questions.

    Each record holds ``model``, ``tuned_topic``, ``stance`` {topic: [estimate, low, high]}, and ``unlabelled``, the
    share of questions without a side, which count in the denominator of S. Tuned models have ``shift`` by topic; where
    the tuned topic is known, ``coupling`` and ``coupling_ratio``; and where a model of the same topic was tuned
    plainly, ``reduction`` and ``retention`` against it at the end of training.
    """
    values, measure = (result["margin"], measure) if "margin" in result else (result["label"], "S")
    topics = [str(t) for t in result["topic"].values]
    order = list(dict.fromkeys(topics))
    weights = coupling.resamples(topics, boots, seed)
    draws = coupling.stances(values.values, topics, order, weights=weights, measure=measure)
    names = [str(n) for n in result["model"].values]
    tuned = [str(t) for t in result["tuned_topic"].values]
    methods = [str(m) for m in result["method"].values]
    shifts = draws - draws[:, [names.index("base")]]
    plain = {t: i for i, (t, m) in enumerate(zip(tuned, methods, strict=True)) if t and m in ("", "plain")}

    def triple(samples: np.ndarray) -> list[float]:
        return [float(v) for v in coupling.interval(samples)]

    def by_topic(samples: np.ndarray) -> dict[str, list[float]]:
        return {topic: triple(samples[:, i]) for i, topic in enumerate(order)}

    records = []
    for i, name in enumerate(names):
        record: dict[str, Any] = {"model": name, "tuned_topic": tuned[i], "stance": by_topic(draws[:, i])}
        record["unlabelled"] = float((values.values[i] == 0).mean())
        if name != "base":
            record["shift"] = by_topic(shifts[:, i])
        if tuned[i] in order and len(order) > 1:
            at, own = order.index(tuned[i]), shifts[:, i]
            record["coupling"] = triple(coupling.coupling(own, at))
            record["coupling_ratio"] = triple(coupling.coupling_ratio(own, at))
            if (reference := plain.get(tuned[i], i)) != i:
                record["reduction"] = triple(coupling.reduction(own, shifts[:, reference], at))
                record["retention"] = triple(coupling.retention(own, shifts[:, reference], at))
        records.append(record)
    return records


def _column(values: Sequence[Any]) -> np.ndarray:
    return np.array(list(values), dtype=object if values and isinstance(values[0], str) else None)
