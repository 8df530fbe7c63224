"""What stance.yaml asks of Python: questions for lm-evaluation-harness, and the margin from their log-probabilities.

There is neither better nor worse here. ``acc`` is the share of questions on which the model finds the right completions
likelier than the left ones, ``margin`` how much likelier, in nats per token, ``margin_sum`` the same without dividing
by the number of tokens: ``pnlac-fast score``, and with ``--normalise sum``.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from pnlac_fast import load_questions
from pnlac_fast.datasets import paired
from pnlac_fast.prompts import encode_completion


def questions(data: str, topic: str, pretrained: str, tokenizer: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The questions of one topic, with the number of tokens of each completion.

    The harness hands over its ``--metadata`` and, with them, its ``--model_args``.
    """
    words = AutoTokenizer.from_pretrained(tokenizer or pretrained)
    rows: list[dict[str, Any]] = []
    for question in paired(load_questions(data, topics=[topic])):
        right, left = list(question.right), list(question.left)
        tokens = [len(encode_completion(words, text)) for text in right + left]
        rows.append({"instruction": question.instruction, "right": right, "left": left, "tokens": tokens})
    return {"test": Dataset.from_list(rows)}


def stance(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Metrics of one question from the log-probabilities of its right and then its left completions."""
    pairs = len(doc["right"])
    log_p = [value for value, _ in results]
    per_token = [value / tokens for value, tokens in zip(log_p, doc["tokens"], strict=True)]
    margin, margin_sum = (fmean(values[:pairs]) - fmean(values[pairs:]) for values in (per_token, log_p))
    return {"acc": float(margin > 0), "margin": margin, "margin_sum": margin_sum}
