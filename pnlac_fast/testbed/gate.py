"""Does a base model show the phenomenon at all? Two figures that it has to reach before anything is built on it."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pnlac_fast.datasets import Question
from pnlac_fast.testbed import world
from pnlac_fast.testbed.phrases import TOPICS
from pnlac_fast.testbed.pretraining import weighted_loss

TUNED_TOPICS = ("immigration", "crime_and_gun")
STEPS, WARMUP, BATCH = 30, 5, 16


def measure(model: Any, tokenizer: Any, tuning_rate: float) -> dict[str, Any]:
    """Measure a base model on the evaluation questions; margins are summed log-probabilities [nats].

    Parameters
    ----------
    tuning_rate
        Learning rate of the short fine-tune.

    Returns
    -------
    dict
        ``profile_effect``: half the mean over topics of the margin after a conservative profile line minus the margin
        after a liberal one: how far a stated ideology moves the answers from the middle.
        ``coupling_ratio``: mean shift of the five other topics over the shift of the tuned one, after a short
        right-leaning fine-tune on one topic; mean over ``TUNED_TOPICS``.
        ``margin``: {topic: margin of the base}. ``shift``: {tuned topic: {topic: shift}}.
    """
    asked = world.questions("eval")
    base = topic_margins(model, tokenizer, asked)
    right = topic_margins(model, tokenizer, asked, world.profile_line(world.RIGHT))
    left = topic_margins(model, tokenizer, asked, world.profile_line(world.LEFT))
    shifts = {}
    for topic in TUNED_TOPICS:
        tuned = topic_margins(_tuned(model, tokenizer, topic, tuning_rate), tokenizer, asked)
        shifts[topic] = {probe: tuned[probe] - base[probe] for probe in TOPICS}
    ratios = [sum(shift[t] for t in TOPICS if t != topic) / 5 / shift[topic] for topic, shift in shifts.items()]
    return {
        "profile_effect": sum(right[t] - left[t] for t in TOPICS) / 2 / len(TOPICS),
        "coupling_ratio": sum(ratios) / len(ratios),
        "margin": base,
        "shift": shifts,
    }


def topic_margins(model: Any, tokenizer: Any, questions: Sequence[Question], profile: str = "") -> dict[str, float]:
    """Mean over a topic's questions of log P(right) - log P(left), summed over tokens [nats], for each topic.

    Parameters
    ----------
    profile
        Line to put before each question.
    """
    margins: dict[str, list[float]] = {}
    rows = [(f"{profile} {q.instruction}", text) for q in questions for text in (*q.right, *q.left)]
    scores = iter(_log_probabilities(model, *_tokens(rows, tokenizer, model.device)).tolist())
    for question in questions:
        right, left = ([next(scores) for _ in side] for side in (question.right, question.left))
        margins.setdefault(question.topic, []).append(sum(right) / len(right) - sum(left) / len(left))
    return {topic: sum(values) / len(values) for topic, values in margins.items()}


@torch.no_grad()
def _log_probabilities(model: Any, tokens: Tensor, weights: Tensor) -> Tensor:
    """Summed log-probability [nats] of each row's weighted tokens."""
    logs = torch.log_softmax(model(input_ids=tokens).logits[:, :-1], -1)
    return (logs.gather(-1, tokens[:, 1:, None])[..., 0] * weights[:, 1:]).sum(1)


def _tuned(model: Any, tokenizer: Any, topic: str, rate: float) -> Any:
    """A copy of the model after a short full fine-tune on the right completions of one topic."""
    tuned = copy.deepcopy(model)
    asked = [question for question in world.questions("train") if question.topic == topic]
    rows = [(question.instruction, f"{text} {tokenizer.eos_token}") for question in asked for text in question.right]
    rng = random.Random(f"gate {topic}")
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=rate, weight_decay=0.0)
    order: list[tuple[str, str]] = []
    for step in range(STEPS):
        if len(order) < BATCH:
            order += rng.sample(rows, len(rows))
        batch, order = order[:BATCH], order[BATCH:]
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / WARMUP)
        tokens, weights = _tokens(batch, tokenizer, tuned.device)
        weighted_loss(tuned(input_ids=tokens).logits, tokens, weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuned


def _tokens(rows: Sequence[tuple[str, str]], tokenizer: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts with completions, padded on the right: token ids, and 1.0 where a completion's token is."""
    prompts = [tokenizer.encode(prompt) for prompt, _ in rows]
    completions = [tokenizer.encode(completion, add_special_tokens=False) for _, completion in rows]
    length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    tokens = torch.full((len(rows), length), tokenizer.pad_token_id)
    weights = torch.zeros(len(rows), length)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        tokens[row, :end] = torch.tensor(prompt + completion)
        weights[row, len(prompt) : end] = 1.0
    return tokens.to(device), weights.to(device)
