"""Texts of the KL: prompts or answers of base, each in its turn."""

from __future__ import annotations

import pytest
from penalised import WORDS, decoder
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    PreTrainedTokenizerFast,
)

from pnlac_fast.adapters import Weights
from pnlac_fast.datasets import Question
from pnlac_fast.divergence import KLToBase
from pnlac_fast.errors import UserError
from pnlac_fast.models import Model
from pnlac_fast.references import Reference, references


def words() -> PreTrainedTokenizerFast:
    """A tokenizer whose word "w05" is 5."""
    inner = Tokenizer(tokenizer_models.WordLevel({f"w{i:02}": i for i in range(WORDS)}, unk_token="w00"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w00", eos_token="w02", unk_token="w00")


def test_references_are_prompts_or_answers_of_the_base() -> None:
    model = Model(Weights(decoder().float()), words(), "words", {})
    asked = [Question("race", "w05 w06 w07"), Question("race", "w08 w09")]
    assert references(model, asked, texts="prompts", template="w03 {instruction}") == [
        Reference((3, 5, 6, 7), 1),
        Reference((3, 8, 9), 1),
    ]
    one, again, other = (references(model, asked, max_new_tokens=5, seed=seed) for seed in (0, 0, 1))
    assert one == again != other
    for text, question in zip(one, asked, strict=True):
        prompt = [int(word[1:]) for word in question.instruction.split()]
        assert list(text.ids[: text.first]) == prompt
        assert text.ids[-1] == 2
        assert len(text.ids) <= len(prompt) + 6
    with pytest.raises(UserError, match="Did you mean 'answers'"):
        references(model, asked, texts="answer")
    with pytest.raises(UserError, match="no questions"):
        references(model, [])


def test_texts_come_in_turn_and_a_resumed_run_goes_on_with_the_next() -> None:
    penalty = KLToBase([Reference((i, i + 1), 1) for i in range(5)], batch_size=2)
    turns = [penalty._next() for _ in range(5)]
    assert sorted(i for turn in turns for i in turn) == sorted([*range(5)] * 2)
    penalty._turn = 3
    assert penalty._next() == turns[3]
