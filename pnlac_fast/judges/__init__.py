"""Who says which side an answer takes: a classifier trained here, Hugging Face models, an endpoint, or people.

Each judge is named by a word and, behind a colon, where it is:

========================  ==============================================================================================
``classifier``            trained on the labelled completions of ``training_data`` (:mod:`pnlac_fast.judges.classifier`)
``hf:PATH``               a Hugging Face text classifier (:mod:`pnlac_fast.judges.transformer`)
``nli:PATH``              a Hugging Face model of natural language inference, used zero-shot (the same module)
``openai:MODEL``          a model behind an OpenAI-compatible endpoint (:mod:`pnlac_fast.judges.endpoint`)
``csv:FILE``              labels that people wrote into a sheet (:mod:`pnlac_fast.judges.sheet`)
========================  ==============================================================================================

A judge never learns which model gave an answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pnlac_fast.datasets import Question, as_questions
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.judges.classifier import Classifier, train

__all__ = ["KINDS", "Classifier", "Judge", "open_judge", "open_scorers", "result_name", "train"]

KINDS = ("classifier", "hf:", "nli:", "openai:", "csv:")


class Judge(Protocol):
    """Anything that labels answers.

    Attributes
    ----------
    name
        What tables call it.
    provenance
        JSON values: all that decides the labels, and how well the judge is known to do. Never a key.
    """

    @property
    def name(self) -> str: ...

    @property
    def provenance(self) -> dict[str, Any]: ...

    def label(self, answers: Sequence[str], instructions: Sequence[str]) -> np.ndarray:
        """[answer]: +1 right, -1 left, 0 neither, NaN where no label could be had (integers where that cannot be)."""
        ...


def open_judge(
    scorer: str,
    *,
    training_data: str | Path | Sequence[Question] | None = None,
    labels: Mapping[str, str] | None = None,
    device: str = "auto",
    **endpoint: Any,
) -> Judge:
    """The judge that a word of :data:`KINDS` names.

    Parameters
    ----------
    training_data
        Labelled completions that the classifier learns from.
    labels
        What the labels of a Hugging Face model mean, such as ``{"LABEL_0": "left"}``, where its own names do not say.
    device
        Where Hugging Face models run, as in :func:`pnlac_fast.load_model`.
    endpoint
        Settings of :class:`pnlac_fast.judges.endpoint.Endpoint`; None is its default.

    Raises
    ------
    UserError
        There is no such judge, or what it needs is missing.
    """
    kind, colon, where = scorer.partition(":")
    if f"{kind}{colon}" not in KINDS:
        raise unknown("scorer", scorer, ("logprob", *KINDS))
    if colon and not where:
        raise UserError(f"The scorer '{scorer}' does not say which: write {scorer}NAME.")
    if kind == "classifier":
        if training_data is None:
            raise UserError("The classifier needs labelled completions to learn from: give --training-data.")
        return train(as_questions(training_data))
    if kind == "openai":
        from pnlac_fast.judges.endpoint import Endpoint

        return Endpoint(where, **{name: value for name, value in endpoint.items() if value is not None})
    if kind == "csv":
        from pnlac_fast.judges.sheet import Sheet

        return Sheet.read(where)
    from pnlac_fast.judges.transformer import Inference, TextClassifier

    return (TextClassifier if kind == "hf" else Inference).load(where, labels=labels, device=device)


def open_scorers(
    scorers: Sequence[str], *, labels: Mapping[str, str] | None = None, device: str = "auto", **endpoint: Any
) -> list[str | Judge]:
    """Open the judges among ``scorers`` that need no training data, to be given to :func:`pnlac_fast.score`.

    Parameters are those of :func:`open_judge`.
    """
    plain = ("logprob", "classifier")
    return [s if s in plain else open_judge(s, labels=labels, device=device, **endpoint) for s in scorers]


def result_name(scorer: str) -> str:
    """Name under which a store keeps the stances by a scorer: ``stance`` for log-probability, ``stance_...`` else."""
    return "stance" if scorer == "logprob" else f"stance_{re.sub(r'[^A-Za-z0-9]+', '_', scorer)}"[:64].rstrip("_")
