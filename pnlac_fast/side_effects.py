"""What a fine-tune costs elsewhere: perplexity on neutral text, and length and refusals of free answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from pnlac_fast import coupling, prompts
from pnlac_fast import store as stores
from pnlac_fast.cost import Meter
from pnlac_fast.errors import UserError
from pnlac_fast.generation import given_answers
from pnlac_fast.loading import open_models
from pnlac_fast.models import Model
from pnlac_fast.provenance import provenance
from pnlac_fast.stance import log_probabilities

BOOTS = 2000
OPENING = 200  # characters of an answer in which a refusal is looked for: later on it is a figure of speech
REFUSALS = (
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b",
    r"\bi(?:'m| am) (?:just |only )?an? (?:ai|artificial intelligence|(?:large )?language model)\b",
    r"\bi(?:'m| am) (?:sorry|unable|not able|not comfortable)\b",
    r"\bi (?:can(?:no|')t|can not|won't|will not|must decline|do not feel comfortable)\b"
    r"(?: \w+)? (?:to )?(?:help|assist|answer|provide|offer|give|take|share|express|discuss|comment|engage|do that)\b",
    r"\bi (?:don't|do not) (?:have|hold) (?:any )?(?:personal )?(?:opinions?|views?|beliefs?|feelings)\b",
)
_REFUSAL = re.compile("|".join(REFUSALS))


def refuses(answer: str) -> bool:
    """Whether an answer refuses to answer: one of :data:`REFUSALS` (ours) is among its first 200 characters."""
    return bool(_REFUSAL.search(" ".join(answer[:OPENING].lower().replace("’", "'").split())))


def surprise(model: Model, texts: Sequence[str], batch_tokens: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood of each text, float64 [text] in nats, and how many tokens it is the sum over.

    The exponential of one over the other is the perplexity (Jelinek et al. 1977, doi 10.1121/1.2016299).

    A text is read by itself behind the tokenizer's own special tokens; its first token is only read where there is
    nothing in front of it. Texts longer than the model's context are read in pieces.
    """
    pieces: list[tuple[int, list[int]]] = []
    for i, text in enumerate(texts):
        ids = model.tokenizer(text)["input_ids"]
        spans = [ids[start : start + model.context] for start in range(0, len(ids), model.context)]
        pieces += [(i, span) for span in spans if len(span) > 1]
    loss, tokens = np.zeros(len(texts)), np.zeros(len(texts), np.int64)
    batches = prompts.batches([ids for _, ids in pieces], batch_tokens, padding_side="left", device=model.device)
    with torch.inference_mode():
        for batch in batches:
            lengths = [len(pieces[i][1]) - 1 for i in batch.index]
            found = log_probabilities(model, batch, lengths).cpu().numpy()
            for i, length, value in zip(batch.index, lengths, found, strict=True):
                loss[pieces[i][0]] -= value
                tokens[pieces[i][0]] += length
    return loss, tokens


def utility(
    model: str | Path | Model,
    tuned: Mapping[str, str | Path | Model],
    *,
    text: str | Path | Sequence[str] | None = None,
    answers: str | Path | Sequence[Mapping[str, str]] | None = None,
    store: str | Path | None = None,
    batch_tokens: int = 4096,
) -> xr.Dataset:
    """Perplexity, and length and refusals of answers, of base and tuned models; see :func:`surprise`, :func:`refuses`.

    Parameters
    ----------
    model, tuned
        The base model, and tuned ones by name, as for :func:`pnlac_fast.cache`.
    text
        Neutral passages, or a file with one in each line.
    answers
        What :func:`pnlac_fast.generate` returned or wrote, of the same models.
    store
        Write the result into this store too, as ``/results/utility``.
    batch_tokens
        Padded tokens of one forward pass.

    Returns
    -------
    xarray.Dataset
        ``loss`` float64 (run, passage), nats, summed over the ``tokens`` int64 (passage) of each; ``words`` int64 and
        ``refusal`` bool (run, question), an answer without words being empty. Those that were asked for; ``model``
        ("base" first) on run.

    Raises
    ------
    UserError
        There is neither text nor answers, or no passage has two tokens.
    """
    if text is None and answers is None:
        raise UserError("There is nothing to measure utility on: give --text, --answers, or both.")
    passages = _passages(text) if text is not None else ()
    base, others = open_models(model, tuned)
    models = {"base": base, **others}
    meter = Meter(base.device)
    variables: dict[str, Any] = {}
    if passages:
        found = [surprise(m, passages, batch_tokens) for m in models.values()]
        variables["loss"] = (("run", "passage"), np.stack([loss for loss, _ in found]))
        variables["tokens"] = ("passage", found[0][1])
        if not found[0][1].any():
            raise UserError("No passage of the neutral text has two tokens: give longer ones.")
    if answers is not None:
        given = given_answers(answers, list(models))
        variables["words"] = (("run", "question"), np.array([[len(a.split()) for a in own] for own in given]))
        variables["refusal"] = (("run", "question"), np.array([[refuses(a) for a in own] for own in given]))
    origin = provenance(base=base.origin, refusals=list(REFUSALS))
    result = xr.Dataset(variables, {"model": ("run", np.array(list(models), dtype=object))}, {"provenance": origin})
    result.attrs["cost"] = meter.record()
    if store is not None:
        stores.write_result(store, "utility", result)
    return result


def utility_rows(result: xr.Dataset, *, boots: int = BOOTS, seed: int = 0) -> list[dict[str, Any]]:
    """One record per model, with 95 % intervals that resample passages, or questions; see :func:`utility`.

    ``perplexity``, ``over_base`` (its ratio to the base model's, paired), ``words`` per answer, ``empty`` and
    ``refusals``, shares of answers.
    """
    names = [str(name) for name in result["model"].values]
    rows: list[dict[str, Any]] = [{"model": name} for name in names]

    def add(name: str, draws: np.ndarray) -> None:
        for row, value in zip(rows, coupling.interval(draws).T, strict=True):
            row[name] = [float(v) for v in value]

    if "loss" in result:
        loss = result["loss"].transpose("run", "passage").values
        weights = coupling.resamples(["text"] * loss.shape[1], boots, seed)
        mean = (weights @ loss.T) / (weights @ result["tokens"].values)[:, None]
        add("perplexity", np.exp(mean))
        add("over_base", np.exp(mean - mean[:, [names.index("base")]]))
    if "words" in result:
        words = result["words"].transpose("run", "question").values
        weights = coupling.resamples(["answer"] * words.shape[1], boots, seed) / words.shape[1]
        add("words", weights @ words.T)
        add("empty", weights @ (words == 0).T)
        add("refusals", weights @ result["refusal"].transpose("run", "question").values.T)
    return rows


def _passages(text: str | Path | Sequence[str]) -> tuple[str, ...]:
    if isinstance(text, str | Path):
        if not Path(text).exists():
            raise UserError(f"There is no neutral text '{text}': give a file with a passage in each line.")
        text = Path(text).read_text(encoding="utf-8").splitlines()
    passages = tuple(line.strip() for line in text if line.strip())
    if not passages:
        raise UserError("The neutral text holds no passage: give one in each line.")
    return passages
