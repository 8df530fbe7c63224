"""How a model leans: which of a question's right and left completions it finds likelier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pnlac_fast import prompts
from pnlac_fast.datasets import Question, paired
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.models import Model
from pnlac_fast.prompts import DEFAULT_TEMPLATE

NORMALISE = ("token", "sum")


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

    The mean over the question's completion pairs of log P(right | prompt) - log P(left | prompt): what
    lm-evaluation-harness (doi 10.5281/zenodo.5371628) ranks choices by. Its ``acc_norm`` divides by bytes; dividing by
    tokens is ours.

    Parameters
    ----------
    model, questions
        Who is asked, and what; every question needs pairs.
    template, batch_tokens
        What stands around the instruction, and how many padded tokens one pass has.
    normalise
        "token": each log-probability is divided by its number of tokens, so that margins are nats per token; "sum": it
        is not, as suits pairs of matched length.

    Returns
    -------
    numpy.ndarray
        float64 [question], in nats, or nats per token.

    Raises
    ------
    UserError
        A question lacks pairs, or a text is longer than the model's context.
    """
    if normalise not in NORMALISE:
        raise unknown("normalisation", normalise, NORMALISE)
    questions = paired(questions)
    margin = np.zeros(len(questions))
    with torch.inference_mode():
        for batch in scored_batches(model, questions, template, normalise, batch_tokens):
            np.add.at(margin, batch.owner, batch.weight * log_probabilities(model, *batch.read).cpu().numpy())
    return margin


class ScoredBatch(NamedTuple):
    """Texts of several questions, and what their log-probabilities are to the margins of :func:`margins`.

    Attributes
    ----------
    read
        A left-padded batch, and how many tokens of each sequence are its completion: see :func:`log_probabilities`.
    weight
        float64 [sequence]; a question's margin is the sum of its texts' weighted log-probabilities.
    owner
        int64 [sequence]: which question.
    """

    read: tuple[prompts.Batch, list[int]]
    weight: np.ndarray
    owner: np.ndarray


def scored_batches(
    model: Model, questions: Sequence[Question], template: str, normalise: str, batch_tokens: int
) -> Iterator[ScoredBatch]:
    """The right and left texts of questions in batches; parameters and errors are those of :func:`margins`."""
    texts = prompts.encode(model.tokenizer, questions, template, side="both", context=model.context)
    weight = paired_weights(questions, texts, normalise)
    owner = np.array([text.question for text in texts])
    ids = [text.ids for text in texts]
    for batch in prompts.batches(ids, batch_tokens, padding_side="left", device=model.device):
        index = list(batch.index)
        lengths = [len(texts[i].ids) - texts[i].prompt for i in index]
        yield ScoredBatch((batch, lengths), weight[index], owner[index])


def paired_weights(questions: Sequence[Question], texts: Sequence[prompts.Text], normalise: str) -> np.ndarray:
    """What the log-probability of each text weighs in the margin of its question, float64 [text].

    ``texts`` are the right and left completions of the questions, as :func:`pnlac_fast.prompts.encode` lists them.
    """
    weight = np.empty(len(texts))
    start = 0
    for question in questions:  # all right completions, then all left ones
        n = len(question.right)
        weight[start : start + n], weight[start + n : start + 2 * n] = 1 / n, -1 / n
        start += 2 * n
    if normalise == "token":
        weight /= [len(text.ids) - text.prompt for text in texts]
    return weight


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


def _column(values: Sequence[Any]) -> np.ndarray:
    return np.array(list(values), dtype=object if values and isinstance(values[0], str) else None)
