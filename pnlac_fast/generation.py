"""Free answers: the model writes on from each question."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pnlac_fast import prompts
from pnlac_fast.datasets import Question, as_questions
from pnlac_fast.errors import UserError
from pnlac_fast.loading import open_models
from pnlac_fast.models import Model
from pnlac_fast.prompts import DEFAULT_TEMPLATE


def answers(
    model: Model,
    questions: Sequence[Question],
    *,
    template: str = DEFAULT_TEMPLATE,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_tokens: int = 4096,
) -> list[str]:
    """One answer per question, in order, by the model's own ``generate``.

    Parameters
    ----------
    max_new_tokens
        Longest answer, in tokens; it ends earlier at the end-of-sequence token.
    temperature
        0 is greedy; else answers are sampled, the same ones for the same seed and batches.

    Raises
    ------
    UserError
        A prompt and its answer would not fit into the model's context.
    """
    if max_new_tokens < 1:
        raise UserError(f"An answer of {max_new_tokens} tokens is none: give --max-new-tokens 1 or more.")
    room = model.context - max_new_tokens
    texts = prompts.encode(model.tokenizer, questions, template, context=room)
    written: list[str] = [""] * len(questions)
    end = model.tokenizer.eos_token_id
    pad = model.tokenizer.pad_token_id if model.tokenizer.pad_token_id is not None else (end or 0)
    sampling: dict[str, Any] = (
        {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
    )
    if temperature > 0:
        sampling |= {"top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        for batch in prompts.batches(
            [t.ids for t in texts], batch_tokens, pad=pad, padding_side="left", device=model.device
        ):
            with model.active() as hf:
                ids = hf.generate(
                    input_ids=batch.ids,
                    attention_mask=batch.mask,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=pad,
                    eos_token_id=end,
                    **sampling,
                )
            new = model.tokenizer.batch_decode(ids[:, batch.ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(batch.index, new, strict=True):
                written[i] = text.strip()
    return written


def generate(
    model: str | Path | Model,
    data: str | Path | Sequence[Question],
    *,
    tuned: Mapping[str, str | Path | Model] | None = None,
    out: str | Path | None = None,
    template: str = DEFAULT_TEMPLATE,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_tokens: int = 4096,
) -> list[dict[str, str]]:
    """Answers of the base model and of tuned ones to every question.

    Returns
    -------
    list of dict
        ``model`` ("base" or the tuned model's name), ``topic``, ``key``, ``instruction``, ``answer``; also written to
        ``out`` as JSONL. See :func:`answers` for the rest.
    """
    questions = as_questions(data)
    base, others = open_models(model, tuned or {})
    models = {"base": base, **others}
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    records = [
        {"model": name, "topic": q.topic, "key": q.key, "instruction": q.instruction, "answer": answer}
        for name, m in models.items()
        for q, answer in zip(
            questions, answers(m, questions, template=template, batch_tokens=batch_tokens, **options), strict=True
        )
    ]
    if out is not None:
        Path(out).write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return records
