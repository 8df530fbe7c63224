"""The world's tokenizer: one token a word, built in memory and saved like any other Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)


def build_tokenizer(words: Sequence[str]) -> Any:
    """A fast word-level tokenizer that lowercases, splits at white space and punctuation, and puts BOS first.

    Parameters
    ----------
    words
        The vocabulary in order; the special tokens come before it, so that word ``i`` has id ``i + 4``.

    Returns
    -------
    transformers.PreTrainedTokenizerFast
        With character offsets. EOS is left to whoever writes the text.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )
