"""From questions to token ids: templates, which positions count, and padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pnlac_fast.datasets import SIDES, Question
from pnlac_fast.errors import UserError, unknown

TOKENS = ("last", "completion", "prompt", "all")
DEFAULT_TEMPLATE = "{instruction}"
CHAT = "{chat}"  # in front of a template: what follows is what the user says in the tokenizer's chat template


@dataclass(frozen=True)
class Prompt:
    """Token ids of one prompt.

    Attributes
    ----------
    ids
        Token ids, special tokens in front included, none behind.
    counted
        Positions whose statistics count: those of the instruction, or of all but special tokens.
    """

    ids: tuple[int, ...]
    counted: tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """A prompt with at most one completion, as the model reads it.

    Attributes
    ----------
    question
        Index of its question.
    ids
        Token ids of prompt and completion.
    prompt
        How many of them are the prompt's.
    counted
        Counted prompt positions; empty where an earlier sequence of the same question has counted them.
    side, completion
        "right" or "left" and the number of the completion among those of its side; "" and -1 without one.
    """

    question: int
    ids: tuple[int, ...]
    prompt: int
    counted: tuple[int, ...]
    side: str = ""
    completion: int = -1

    @property
    def repeated(self) -> int:
        """How many leading positions an earlier sequence of the question has already read."""
        return 0 if self.counted else self.prompt

    def positions(self, tokens: str) -> list[int]:
        """The positions that a token selector counts; those of the prompt once per question."""
        completion = list(range(self.prompt, len(self.ids)))
        if tokens == "completion":
            return completion
        if tokens == "prompt":
            return list(self.counted)
        if tokens == "all":
            return [*self.counted, *completion]
        if tokens == "last":
            return [self.prompt - 1] if self.counted else []
        raise unknown("token selector", tokens, TOKENS)


@dataclass(frozen=True)
class Batch:
    """Sequences padded to one length: ``ids``, ``mask`` and ``positions`` are int64 [sequence, position].

    ``rows`` holds, for each sequence, the row of every token of its own when all positions are one long row.
    """

    index: tuple[int, ...]
    rows: tuple[Sequence[int], ...]
    ids: Tensor
    mask: Tensor
    positions: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a Hugging Face forward pass."""
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}


def load_template(path: str | Path | None, *, chat: bool = False) -> str:
    """Read a template file; None is the instruction alone. With ``chat`` it goes into the tokenizer's chat template."""
    if path is not None and not Path(path).is_file():
        raise UserError(f"There is no template file '{path}': check --template.")
    template = DEFAULT_TEMPLATE if path is None else Path(path).read_text()
    return CHAT + template if chat else template


def rendered(tokenizer: Any, template: str) -> str:
    """A template as text; one that begins with ``{chat}`` as the turn of a user, up to where the assistant answers.

    Raises
    ------
    UserError
        The tokenizer has no chat template, or it changes what the user says.
    """
    if not template.startswith(CHAT):
        return template
    if not tokenizer.chat_template:
        raise UserError("The tokenizer has no chat template: leave --chat-template out, or give the instruct model's.")
    said = [{"role": "user", "content": template.removeprefix(CHAT)}]
    text: str = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    if text.count("{instruction}") != 1:
        raise UserError(
            "The chat template does not keep {instruction} exactly once: write one with --template instead."
        )
    begin = tokenizer.bos_token
    if begin and text.startswith(begin) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        return text.removeprefix(begin)  # the tokenizer adds it once more
    return text


def encode_prompt(
    tokenizer: Any, question: Question, template: str = DEFAULT_TEMPLATE, *, count_template: bool = False
) -> Prompt:
    """Tokenise a question inside a template.

    Parameters
    ----------
    template
        Text with ``{instruction}`` once and, where wanted, ``{topic}``; with ``{chat}`` in front it is put into the
        tokenizer's chat template as what the user says.
    count_template
        Count template text too; special tokens never count.

    Raises
    ------
    UserError
        The template has not exactly one ``{instruction}``, or no token of the instruction is left.
    """
    template = rendered(tokenizer, template)
    if template.count("{instruction}") != 1:
        raise UserError("The template must contain {instruction} exactly once.")
    before, after = (part.replace("{topic}", question.topic) for part in template.split("{instruction}"))
    encoding = tokenizer(
        before + question.instruction + after, return_offsets_mapping=True, return_special_tokens_mask=True
    )
    ids, special = encoding["input_ids"], encoding["special_tokens_mask"]
    marks = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}  # a chat template writes them as text
    while special and special[-1]:  # some tokenizers append EOS, which would end the prompt before its answer
        ids, special = ids[:-1], special[:-1]
    start, stop = len(before), len(before) + len(question.instruction)
    counted = tuple(
        i
        for i, (first, last) in enumerate(encoding["offset_mapping"][: len(ids)])
        if not special[i]
        and ids[i] not in marks
        and last > first
        and (count_template or (last > start and first < stop))
    )
    if not counted:
        raise UserError(f"The question '{question.instruction[:60]}' has no tokens: remove it from the data.")
    return Prompt(tuple(ids), counted)


def encode_completion(tokenizer: Any, text: str, template: str = DEFAULT_TEMPLATE, *, end: bool = False) -> list[int]:
    """Token ids of a completion as it follows the prompt; ``end`` appends the end-of-sequence token.

    Prompt and completion are tokenised apart, so that the prompt's ids never depend on what follows; a space joins
    them unless the template ends in white space.
    """
    joined = text if rendered(tokenizer, template)[-1:].isspace() else f" {text}"
    ids = list(tokenizer(joined, add_special_tokens=False)["input_ids"])
    if not ids:
        raise UserError("A completion is empty: remove it from the data.")
    if end:
        if tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no end-of-sequence token: set eos_token in its configuration.")
        ids.append(tokenizer.eos_token_id)
    return ids


def encode(
    tokenizer: Any,
    questions: Sequence[Question],
    template: str = DEFAULT_TEMPLATE,
    *,
    side: str = "none",
    count_template: bool = False,
    context: int | None = None,
) -> list[Text]:
    """Tokenise questions: each prompt alone (``side="none"``), or with its right, left or ``both`` completions.

    Raises
    ------
    UserError
        A question lacks completions of the side asked for, or a sequence is longer than ``context`` tokens.
    """
    if side not in ("none", "both", *SIDES):
        raise unknown("side", side, ("none", "both", *SIDES))
    sequences: list[Text] = []
    for index, question in enumerate(questions):
        prompt = encode_prompt(tokenizer, question, template, count_template=count_template)
        sides = SIDES if side == "both" else () if side == "none" else (side,)
        texts = [(s, number, text) for s in sides for number, text in enumerate(question.completions(s))]
        if sides and not texts:
            missing = "completion" if side == "both" else f"{side} completion"
            raise UserError(
                f"The question '{question.instruction[:60]}' ({question.topic}) has no {missing}: give data with "
                f"completions, or count prompt tokens only (--tokens last or prompt)."
            )
        for first, (which, number, text) in enumerate(texts or [("", -1, None)]):
            ids = [] if text is None else encode_completion(tokenizer, text, template)
            counted = prompt.counted if first == 0 else ()
            sequence = Text(index, (*prompt.ids, *ids), len(prompt.ids), counted, which, number)
            if context is not None and len(sequence.ids) > context:
                raise UserError(
                    f"The question '{question.instruction[:60]}' ({question.topic}) needs {len(sequence.ids)} tokens, "
                    f"the model's context is {context}: shorten or remove it."
                )
            sequences.append(sequence)
    return sequences


def batches(
    sequences: Iterable[Sequence[int]],
    budget: int,
    *,
    pad: int = 0,
    padding_side: str = "right",
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Token id lists in batches of at most ``budget`` padded tokens, longest first.

    The order is by length and then by index, so that the same sequences always make the same batches. Positions
    come from the mask, hence are right for either ``padding_side``.
    """
    ids = [list(s) for s in sequences]
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    while order:
        longest = len(ids[order[0]])
        index, order = order[: (size := max(1, budget // longest))], order[size:]
        padded = torch.full((len(index), longest), pad, dtype=torch.int64)
        mask = torch.zeros_like(padded)
        rows = []
        for row, i in enumerate(index):
            start = longest - len(ids[i]) if padding_side == "left" else 0
            span = slice(start, start + len(ids[i]))
            padded[row, span] = torch.tensor(ids[i])
            mask[row, span] = 1
            rows.append(range(row * longest + start, row * longest + span.stop))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        yield Batch(tuple(index), tuple(rows), padded.to(device), mask.to(device), positions.to(device))
