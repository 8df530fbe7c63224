"""What a fine-tune reads: the completions of one side as token ids, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pnlac_fast.datasets import Question, by_topic
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.models import Model
from pnlac_fast.prompts import encode_completion, encode_prompt

IGNORED = -100  # a label that the loss of Hugging Face models skips


def choose_questions(questions: Sequence[Question], topics: Sequence[str], side: str) -> tuple[Question, ...]:
    """The questions of the topics to tune on; refused where one of them has no completion of the side."""
    groups = by_topic(questions)
    for topic in topics:
        if topic not in groups:
            raise unknown("topic", topic, groups)
    chosen = tuple(q for topic in topics for q in groups[topic])
    if missing := [q for q in chosen if not q.completions(side)]:
        raise UserError(
            f"{len(missing)} of {len(chosen)} questions on {' and '.join(topics)} have no {side} completion, such as "
            f"'{missing[0].instruction[:60]}': add completions or remove these questions."
        )
    if not chosen:
        raise UserError("No topic is given to tune on: name one.")
    return chosen


def encode_rows(model: Model, questions: Sequence[Question], side: str, template: str) -> list[tuple[list[int], int]]:
    """Token ids with end-of-sequence token, and how many of them are the prompt's, for every completion."""
    rows = []
    for question in questions:
        prompt = encode_prompt(model.tokenizer, question, template).ids
        for text in question.completions(side):
            ids = [*prompt, *encode_completion(model.tokenizer, text, template, end=True)]
            if len(ids) > model.context:
                raise UserError(
                    f"The question '{question.instruction[:60]}' ({question.topic}) needs {len(ids)} tokens with its "
                    f"completion, the model's context is {model.context}: shorten or remove it."
                )
            rows.append((ids, len(prompt)))
    return rows


def collate(rows: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
    """Right-padded batch with labels on the completions only, each int64 [row, position]."""
    shape = (len(rows), max(len(ids) for ids, _ in rows))
    batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full(shape, IGNORED)
    for i, (ids, prompt) in enumerate(rows):
        batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][i, : len(ids)] = 1
        batch["labels"][i, prompt : len(ids)] = torch.tensor(ids[prompt:])
    return batch
