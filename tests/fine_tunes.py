"""Small fine-tunes: questions whose sides have words of their own, and what came of a run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pnlac_fast import run
from pnlac_fast.completions import collate
from pnlac_fast.datasets import Question
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.training import FineTune, finetune

LAYERS, WIDTH = 2, 24
WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def questions(seed: int = 0, n: int = 20, topics: tuple[str, ...] = ("race", "science")) -> tuple[Question, ...]:
    """Right completions are of words 0 to 9, left ones of words 10 to 19."""
    draw = random.Random(seed)

    def text(low: int, high: int, length: int) -> str:
        return " ".join(draw.choice(WORDS[low:high]) for _ in range(length))

    return tuple(
        Question(
            t, text(20, 40, draw.randint(4, 7)), (text(0, 10, 3), text(0, 10, 2)), (text(10, 20, 3), text(10, 20, 2))
        )
        for t in topics
        for _ in range(n)
    )


def tune(model: Model | Path, out: Path | None = None, **changes: Any) -> FineTune:
    settings: dict[str, Any] = {"method": "full", "steps": 8, "learning_rate": 3e-3, "warmup_steps": 2, "batch_size": 4}
    return finetune(model, questions(), "race", "right", out, **settings | changes)


def chosen() -> NeuronSet:
    member = np.zeros((LAYERS, WIDTH), bool)
    member[0, [0, 3]] = True
    member[1, 5] = True
    return NeuronSet("some", "general", member)


def weights(model: Model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.hf.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()]


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the batch of a step is made."""
    calls = [0]

    def stop(rows: Any) -> Any:
        calls[0] += 1
        if calls[0] == step:
            raise KeyboardInterrupt
        return collate(rows)

    monkeypatch.setattr(run, "collate", stop)
