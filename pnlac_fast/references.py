"""Texts of other topics on which a fine-tune is held to its base: prompts, and what the base answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pnlac_fast.datasets import Question
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.generation import answers
from pnlac_fast.models import Model
from pnlac_fast.prompts import DEFAULT_TEMPLATE, encode_completion, encode_prompt

KINDS = ("answers", "prompts")


class Reference(NamedTuple):
    """A text on which base and tuned model are compared: its token ids, and the first one whose prediction counts."""

    ids: tuple[int, ...]
    first: int


def references(
    model: Model,
    questions: Sequence[Question],
    *,
    texts: str = "answers",
    template: str = DEFAULT_TEMPLATE,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> list[Reference]:
    """The texts for :class:`pnlac_fast.divergence.KLToBase` and :class:`pnlac_fast.null_space.NullSpace`.

    Parameters
    ----------
    model
        The base, before anything is trained.
    questions
        Of other topics than the tuned one; their completions are not read.
    texts
        "answers": one answer to each question, sampled from the base at temperature 1, with the end of sequence.
        "prompts": the tokens of the question itself, which needs no sampling.
    template
        What the model is asked, see :func:`pnlac_fast.finetune`.
    max_new_tokens, seed
        Of the answers.

    Returns
    -------
    list of Reference
        One for each question, in their order.

    Raises
    ------
    UserError
        There are no questions, or a text is longer than the model's context.
    """
    if texts not in KINDS:
        raise unknown("texts of other topics", texts, KINDS)
    if not questions:
        raise UserError("There are no questions to hold the model to its base on: give questions of other topics.")
    encoded = [encode_prompt(model.tokenizer, question, template) for question in questions]
    if texts == "prompts":
        return [Reference(prompt.ids, max(1, prompt.counted[0])) for prompt in encoded]
    written = answers(model, questions, template=template, max_new_tokens=max_new_tokens, temperature=1.0, seed=seed)
    end = (model.tokenizer.eos_token_id,)
    return [
        Reference(
            (*prompt.ids, *(encode_completion(model.tokenizer, text, template) if text else ()), *end), len(prompt.ids)
        )
        for prompt, text in zip(encoded, written, strict=True)
    ]


def predict(model: Model, texts: Sequence[Reference]) -> tuple[Tensor, Tensor]:
    """Run texts through a model, together.

    Returns
    -------
    logits
        [token, vocabulary], those that predict the counted tokens, one text after another.
    counted
        bool [text, position]: at which positions of the padded batch they were predicted.
    """
    longest = max(len(text.ids) for text in texts)
    kept = max(len(text.ids) - text.first for text in texts)
    ids, mask = (torch.zeros(len(texts), longest, dtype=torch.int64) for _ in range(2))
    counted = torch.zeros(len(texts), longest, dtype=torch.bool)
    for i, text in enumerate(texts):
        ids[i, longest - len(text.ids) :] = torch.tensor(text.ids)
        mask[i, longest - len(text.ids) :] = 1
        counted[i, longest - (len(text.ids) - text.first) - 1 : -1] = True
    ids, mask, counted = (x.to(model.device) for x in (ids, mask, counted))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model.hf(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=kept + 1
    )
    return output.logits[:, :-1][counted[:, -(kept + 1) : -1]], counted
