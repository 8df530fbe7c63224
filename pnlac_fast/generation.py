"""Free answers: the model writes on from each question."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pnlac_fast import prompts
from pnlac_fast.datasets import Question, as_questions
from pnlac_fast.errors import UserError
from pnlac_fast.judges.sheet import write_sheet
from pnlac_fast.loading import open_models
from pnlac_fast.models import Model
from pnlac_fast.patches import load_patch, load_patched, made_for
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
        What logits are divided by before sampling, the same answers for the same seed and batches; 0 is greedy.

    Raises
    ------
    UserError
        A prompt and its answer would not fit into the model's context.
    """
    require_length(max_new_tokens)
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


def require_length(max_new_tokens: int) -> None:
    """Refuse answers without a token."""
    if max_new_tokens < 1:
        raise UserError(f"An answer of {max_new_tokens} tokens is none: give --max-new-tokens 1 or more.")


def generate(
    model: str | Path | Model,
    data: str | Path | Sequence[Question],
    *,
    tuned: Mapping[str, str | Path | Model] | None = None,
    patches: Mapping[str, str | Path] | None = None,
    out: str | Path | None = None,
    sheet: str | Path | None = None,
    sheet_rows: int | None = None,
    template: str = DEFAULT_TEMPLATE,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_tokens: int = 4096,
) -> list[dict[str, str]]:
    """Answers of the base model, of tuned ones and of patched ones to every question.

    Parameters
    ----------
    model, tuned
        The base model, and tuned ones by name, as for :func:`pnlac_fast.cache`.
    data
        Questions, or anything that :func:`pnlac_fast.load_questions` reads. Their completions are not read.
    patches
        Files that ``pnlac-fast patch --save`` wrote, by the names under which the patched models answer. Each is
        applied to the one of the models that it was made for.
    out
        Write the answers here, as JSONL.
    sheet, sheet_rows
        Write a CSV sheet of all, or so many, answers for people to label, without model names and in random order
        (see :func:`pnlac_fast.judges.sheet.write_sheet`).
    template, batch_tokens
        What the models are asked, and how many padded tokens one pass has.
    max_new_tokens, temperature, seed
        Longest answer in tokens; what logits are divided by before an answer is sampled from this seed, 0 for greedy.

    Returns
    -------
    list of dict
        ``model`` ("base", or the name of the tuned or patched model), ``topic``, ``key``, ``instruction``, ``answer``.

    Raises
    ------
    UserError
        Two models have one name, or a patch was made for none of them.
    """
    require_length(max_new_tokens)
    questions = as_questions(data)
    read = {name: load_patch(path) for name, path in (patches or {}).items()}
    base, others = open_models(model, tuned or {})
    models = {"base": base, **others}
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    options |= {"template": template, "batch_tokens": batch_tokens}
    found = {name: answers(m, questions, **options) for name, m in models.items()}
    for name, path in (patches or {}).items():
        if name in found:
            raise UserError(f"Two models are called '{name}': name the patch with --patch NAME=PATH.")
        subject = made_for(read[name], models)
        with load_patched(subject, path):
            found[name] = answers(subject, questions, **options)
    records = [
        {"model": name, "topic": q.topic, "key": q.key, "instruction": q.instruction, "answer": answer}
        for name, given in found.items()
        for q, answer in zip(questions, given, strict=True)
    ]
    if out is not None:
        Path(out).write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    if sheet is not None:
        write_sheet(records, sheet, rows=sheet_rows, seed=seed)
    return records


def given_answers(
    source: str | Path | Iterable[Mapping[str, str]],
    models: Sequence[str],
    questions: Sequence[Question] | None = None,
) -> list[list[str]]:
    """Answers [model][question] from the records of :func:`generate`, or from the JSONL file that it wrote.

    Parameters
    ----------
    questions
        Whose answers, in which order. Default: all that the first model has answered.

    Raises
    ------
    UserError
        The file cannot be read, or lacks an answer of a model to a question.
    """
    where = "The answers"
    if isinstance(source, str | Path):
        where = f"'{source}'"
        try:
            source = [json.loads(line) for line in Path(source).read_text().splitlines() if line.strip()]
        except ValueError as error:
            raise UserError(f"{where} is not JSONL ({error}): write it with pnlac-fast generate --out.") from error
    try:
        known = {(record["model"], record["key"]): str(record["answer"]) for record in source}
    except (KeyError, TypeError) as error:
        raise UserError(f"{where} lacks model, key or answer in a row: write it with pnlac-fast generate.") from error
    keys = [key for model, key in known if model == models[0]] if questions is None else [q.key for q in questions]
    if missing := [(model, key) for model in models for key in keys or [""] if (model, key) not in known]:
        raise UserError(
            f"{where} lacks {len(missing)} answers, such as one of '{missing[0][0]}': generate them with the same "
            f"--data and --tuned names."
        )
    return [[known[model, key] for key in keys] for model in models]
