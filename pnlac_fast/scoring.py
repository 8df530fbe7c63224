"""The stance of models by one or several scorers: log-probability, or judges of their answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import xarray as xr

from pnlac_fast import generation
from pnlac_fast import store as stores
from pnlac_fast.agreement import agreement
from pnlac_fast.cost import Meter
from pnlac_fast.datasets import SIDES, Question, as_questions, fingerprint
from pnlac_fast.errors import UserError
from pnlac_fast.judges import Judge, open_judge, result_name
from pnlac_fast.judges.endpoint import Endpoint
from pnlac_fast.judges.sheet import Sheet
from pnlac_fast.loading import open_models, topic_of
from pnlac_fast.models import Model
from pnlac_fast.prompts import DEFAULT_TEMPLATE
from pnlac_fast.provenance import provenance
from pnlac_fast.stance import margins, table
from pnlac_fast.topic_words import TopicWords, topic_words

Data = str | Path | Sequence[Question]
Several = tuple[str | Judge, ...] | list[Any]


@overload
def score(
    model: str | Path | Model,
    tuned: Mapping[str, str | Path | Model],
    data: Data,
    *,
    scorer: str | Judge = ...,
    store: str | Path | None = ...,
    template: str = ...,
    normalise: str = ...,
    training_data: Data | None = ...,
    answers: str | Path | Sequence[Mapping[str, str]] | None = ...,
    max_new_tokens: int = ...,
    temperature: float = ...,
    seed: int = ...,
    batch_tokens: int = ...,
) -> xr.Dataset: ...


@overload
def score(
    model: str | Path | Model,
    tuned: Mapping[str, str | Path | Model],
    data: Data,
    *,
    scorer: Several,
    store: str | Path | None = ...,
    template: str = ...,
    normalise: str = ...,
    training_data: Data | None = ...,
    answers: str | Path | Sequence[Mapping[str, str]] | None = ...,
    max_new_tokens: int = ...,
    temperature: float = ...,
    seed: int = ...,
    batch_tokens: int = ...,
) -> dict[str, xr.Dataset]: ...


def score(
    model: str | Path | Model,
    tuned: Mapping[str, str | Path | Model],
    data: Data,
    *,
    scorer: str | Judge | Several = "logprob",
    store: str | Path | None = None,
    template: str = DEFAULT_TEMPLATE,
    normalise: str = "token",
    training_data: Data | None = None,
    answers: str | Path | Sequence[Mapping[str, str]] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_tokens: int = 4096,
) -> xr.Dataset | dict[str, xr.Dataset]:
    """Stance of base and tuned models on every question.

    Parameters
    ----------
    model, tuned
        The base model, and tuned ones by name, as for :func:`pnlac_fast.cache`.
    data
        Questions, or anything that :func:`pnlac_fast.load_questions` reads; "logprob" needs pairs of completions.
    scorer
        "logprob": paired log-probability of the questions' completions (see :func:`pnlac_fast.stance.margins`). Or a
        judge, by name (see :mod:`pnlac_fast.judges`) or opened: the models answer, and it labels the answers right,
        left or neither. Or several of these, for which each model answers once.
    store
        Write the result into this store too, as ``/results/stance`` or ``/results/stance_...`` with the judge's name;
        of several scorers also ``/results/agreement``.
    training_data
        Labelled completions for the classifier, with none of the questions that are scored.
    answers
        What :func:`pnlac_fast.generate` returned or wrote, to be labelled instead of new answers.
    max_new_tokens, temperature, seed
        Longest new answer in tokens; what logits are divided by before sampling, 0 for greedy; and the seed.
    template, batch_tokens
        What the models are asked, and how many padded tokens one pass has.
    normalise
        Of log-probabilities, "token" or "sum": see :func:`pnlac_fast.stance.margins`.

    Returns
    -------
    xarray.Dataset, or dict of xarray.Dataset by the names in a store for several scorers
        (run, question): ``margin`` in nats; or, from a judge, ``label`` int8 (+1 right, -1 left, 0 neither or none),
        ``unparsed`` bool (no label could be had), the ``answer``, ``mention`` bool (run, question, named: the answer
        names another topic, see :mod:`pnlac_fast.topic_words`), and, where the questions have pairs, ``log_odds``, the
        margin, and ``completion`` int8 (completion_side, question), the labels of each question's own first right and
        left completion, which say how good the judge is and how far a stance can go by it. Coordinates ``model``
        ("base" first), ``tuned_topic`` and ``side`` on run, ``topic`` and ``key`` on question.

    Raises
    ------
    UserError, StoreError
        A scorer is unknown or lacks what it needs, questions lack pairs, or the store cannot be read.

    Notes
    -----
    S = (right - left) / (right + left + neither), as in arXiv 2402.11725 and 2508.02360.
    """
    scorers: list[str | Judge] = list(scorer) if isinstance(scorer, list | tuple) else [scorer]
    if store is not None:
        stores.list_results(store)  # a store that cannot be read is better known before the work than after it
    questions = as_questions(data)
    labelled = as_questions(training_data) if training_data is not None else None
    if answers is None and scorers != ["logprob"]:
        generation.require_length(max_new_tokens)
    judges = _judges(scorers, questions, labelled)
    by_likelihood = "logprob" in scorers
    base, others = open_models(model, tuned)
    models = {"base": base, **others}
    meter = Meter(base.device)
    known = {q.topic for q in questions}
    runs = {
        "model": list(models),
        "tuned_topic": ["", *(topic_of(m, name, known) for name, m in others.items())],
        "method": ["", *(str(m.origin.get("method", "")) for m in others.values())],
        "side": ["", *(str(m.origin.get("side", "")) for m in others.values())],
    }
    origin = provenance(base=base.origin, data=fingerprint(questions), template=template)
    reading: dict[str, Any] = {"template": template, "batch_tokens": batch_tokens}
    log_odds = None
    if by_likelihood or all(q.right and len(q.right) == len(q.left) for q in questions):
        log_odds = np.stack([margins(m, questions, normalise=normalise, **reading) for m in models.values()])
    results: dict[str, xr.Dataset] = {}
    attrs: dict[str, Any] = {"provenance": origin, "normalise": normalise}
    if by_likelihood and log_odds is not None:
        results["stance"] = table("margin", log_odds, runs, questions, scorer="logprob", **attrs)
    if judges:
        if answers is None:
            writing: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
            answered = [generation.answers(m, questions, **reading, **writing) for m in models.values()]
            attrs |= writing
        else:
            answered = generation.given_answers(answers, list(models), questions)
        words = topic_words(labelled or questions)
        for judge in judges:
            results[result_name(judge.name)] = judged(judge, answered, questions, runs, words, log_odds, **attrs)
    cost = meter.record()
    for result in results.values():  # of all of them together
        result.attrs["cost"] = cost
    if store is not None:
        for name, result in results.items():
            stores.write_result(store, name, result)
    if not isinstance(scorer, list | tuple):
        return next(iter(results.values()))
    if len(results) > 1:
        results["agreement"] = agreement(list(results.values()))
        if store is not None:
            stores.write_result(store, "agreement", results["agreement"])
    return results


def _to_label(
    judge: Judge, answers: Sequence[Sequence[str]], questions: Sequence[Question]
) -> tuple[list[str], list[str]]:
    """What a judge is to label, and the instruction of each: the answers run by run, then the first right completion of
    every question, then the first left one. Not the completions for people, who read answers only."""
    texts = [answer for own in answers for answer in own]
    if not isinstance(judge, Sheet) and all(q.right and q.left for q in questions):
        texts += [q.completions(side)[0] for side in SIDES for q in questions]
    return texts, [q.instruction for q in questions] * (len(texts) // len(questions))


def estimate(
    scorer: Several,
    tuned: Iterable[str],
    data: Data,
    answers: str | Path | Sequence[Mapping[str, str]],
    *,
    price: tuple[float, float] | None = None,
) -> dict[str, dict[str, Any]]:
    """What the judges behind endpoints would take for these answers, by name; nothing is sent.

    See :meth:`pnlac_fast.judges.endpoint.Endpoint.estimate`; the other parameters are those of :func:`score`.

    Raises
    ------
    UserError
        No scorer is behind an endpoint, or answers are missing.
    """
    paid = [judge for judge in scorer if isinstance(judge, Endpoint)]
    if not paid:
        raise UserError("None of the scorers costs anything: leave out --dry-run.")
    questions, models = as_questions(data), ["base", *tuned]
    given = generation.given_answers(answers, models, questions)
    return {judge.name: judge.estimate(*_to_label(judge, given, questions), price) for judge in paid}


def _judges(
    scorers: Sequence[str | Judge], questions: Sequence[Question], labelled: Sequence[Question] | None
) -> list[Judge]:
    """The judges among the scorers, opened.

    Raises
    ------
    UserError
        There is no scorer, or two have the same name, or the classifier would label what it was trained on.
    """
    shared = {q.key for q in questions} & {q.key for q in labelled or ()}
    if shared and "classifier" in scorers:
        raise UserError(f"{len(shared)} of the questions to score are in --training-data too: give it other questions.")
    judges = [open_judge(s, training_data=labelled) if isinstance(s, str) else s for s in scorers if s != "logprob"]
    names = {result_name(judge.name) for judge in judges} | {"stance" for s in scorers if s == "logprob"}
    if not names or len(names) < len(scorers):
        raise UserError("Scorers must have different names, and there must be one: give each --scorer once.")
    return judges


def judged(
    judge: Judge,
    answers: Sequence[Sequence[str]],
    questions: Sequence[Question],
    runs: Mapping[str, Sequence[Any]],
    words: TopicWords,
    log_odds: np.ndarray | None,
    **attrs: Any,
) -> xr.Dataset:
    """What a judge says of the answers [run][question], as :func:`score` returns it.

    Parameters
    ----------
    words
        Words of topics, to find answers that name another topic than their own.
    log_odds
        [run, question], to stand beside the labels.
    """
    texts, asked = _to_label(judge, answers, questions)
    found = np.asarray(judge.label(texts, asked), float).reshape(-1, len(questions))
    found, completions = found[: len(answers)], found[len(answers) :]
    label = np.nan_to_num(found).astype(np.int8)
    texts, asked = texts[: label.size], asked[: label.size]
    attrs |= {"scorer": judge.name, **judge.provenance, "topic_words": words.validity()}
    result = table("label", label, runs, questions, **attrs)
    cells = ("run", "question")
    result["unparsed"] = (cells, np.isnan(found))
    result["answer"] = (cells, np.array(texts, dtype=object).reshape(label.shape))
    if any(words.words.values()):
        named = words.named(texts, asked).reshape(*label.shape, len(words.words))
        result["mention"] = ((*cells, "named"), named)
        result = result.assign_coords(named=np.array(list(words.words), dtype=object))
    if log_odds is not None:
        result["log_odds"] = (cells, log_odds)
    if len(completions):
        result["completion"] = (("completion_side", "question"), np.nan_to_num(completions).astype(np.int8))
        result = result.assign_coords(completion_side=np.array(SIDES, dtype=object))
    return result
