"""Small base models, and trainers that lose no time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fine_tunes import LAYERS, SPECIAL, WIDTH, WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pnlac_fast.loading import load_model
from pnlac_fast.models import Model


@pytest.fixture(autouse=True)
def _fast() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # each Trainer collects garbage, which otherwise takes longer than the training
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face directories of random models."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    shape: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 16,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    made = {}
    torch.manual_seed(0)
    for name, hf in (
        ("llama", LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))),
        ("qwen2", Qwen2ForCausalLM(Qwen2Config(**shape))),
        ("half", LlamaForCausalLM(LlamaConfig(**shape)).bfloat16()),
    ):
        made[name] = tmp_path_factory.mktemp(name) / name
        hf.save_pretrained(made[name])
        fast.save_pretrained(made[name])
    return made


@pytest.fixture
def base(directories: dict[str, Path]) -> Model:
    return load_model(directories["llama"])
