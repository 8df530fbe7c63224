"""Training a Llama from scratch on the synthetic world: on the CPU, the large one on a GPU where there is one."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pnlac_fast.testbed import world

THREADS = 1  # two save a third of the time on an idle machine, and cost several times as much on a busy one
QUESTION_WEIGHT = 0.1  # nobody can tell what will be asked, so questions teach little and cost gradient noise


@dataclass(frozen=True)
class Recipe:
    """Shape of a base model and how it is trained.

    Attributes
    ----------
    documents
        Documents read, each once.
    batch_tokens
        Largest number of tokens in a batch, padding included.
    learning_rate
        Peak of the cosine schedule.
    initializer_range
        Standard deviation of the first weights.
    tuning_rate
        Learning rate of short full fine-tunes of all weights, the gate's and the demo's.
    device
        "cpu", where the same seed gives the same bits; or "auto", a CUDA GPU where there is one, and there they are the
        same only for the same GPU and libraries.
    minimum_profile_effect, minimum_coupling
        What the gate asks for (see :mod:`pnlac_fast.testbed.gate`).
    """

    hidden: int
    layers: int
    heads: int
    intermediate: int
    documents: int
    batch_tokens: int
    learning_rate: float
    warmup: int = 50
    initializer_range: float = 0.06
    tuning_rate: float = 3e-4
    device: str = "cpu"
    minimum_profile_effect: float = 0.4
    minimum_coupling: float = 0.1


RECIPES = {
    "full": Recipe(128, 4, 4, 384, documents=12000, batch_tokens=450, learning_rate=3e-3),
    "small": Recipe(96, 3, 4, 256, documents=9000, batch_tokens=450, learning_rate=4e-3),
    # 53 M parameters, for a GPU. Wider layers take smaller steps and first weights.
    "large": Recipe(
        768,
        8,
        12,
        2304,
        documents=100_000,
        batch_tokens=2048,
        learning_rate=6e-4,
        warmup=200,
        initializer_range=0.025,
        tuning_rate=5e-5,
        device="auto",
    ),
}


def device_of(recipe: Recipe) -> torch.device:
    """Where a recipe is trained on this machine."""
    return torch.device("cuda" if recipe.device == "auto" and torch.cuda.is_available() else "cpu")


@contextmanager
def reproducible(seed: int, device: torch.device) -> Iterator[None]:
    """Seeded float32 training, TF32 on a GPU, on a fixed number of threads; torch's settings come back afterwards."""
    threads, dtype, precision = torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        try:
            torch.manual_seed(seed)
            torch.set_float32_matmul_precision("high" if devices else "highest")
            torch.set_num_threads(THREADS)  # sums over other numbers of threads round differently
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(precision)


def pretrain(recipe: Recipe, tokenizer: Any, seed: int) -> Any:
    """Train a base model: one pass over the documents, AdamW, loss on every token, little on the questions.

    Returns
    -------
    transformers.LlamaForCausalLM
        In evaluation mode, float32, on the device of the recipe.
    """
    model = _new_model(recipe, tokenizer).to(device_of(recipe))
    encode = functools.cache(functools.partial(tokenizer.encode, add_special_tokens=False))  # the same texts recur
    encoded = [_encode(document, encode, tokenizer) for document in world.documents(recipe.documents, seed)]
    batches = _batches(encoded, recipe.batch_tokens, random.Random(f"batches {seed}"))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=0.02, betas=(0.9, 0.98), fused=True
    )
    model.train()
    for step, batch in enumerate(batches):
        rate = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * rate * min(1.0, (step + 1) / recipe.warmup)
        tokens, weights = (t.to(model.device) for t in _padded(batch, tokenizer.pad_token_id))
        loss = weighted_loss(model(input_ids=tokens).logits, tokens, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def weighted_loss(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """Mean next-token cross-entropy [nats] weighted by ``weights`` [batch, position] of the predicted tokens."""
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    return (losses * weight).sum() / weight.sum()


Encoded = tuple[list[int], list[float]]


def _new_model(recipe: Recipe, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=recipe.initializer_range,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def _encode(document: Sequence[world.Turn], encode: Callable[[str], list[int]], tokenizer: Any) -> Encoded:
    """Token ids of a document, BOS first and EOS after every answer, with the loss weight of each."""
    ids, weights = [tokenizer.bos_token_id], [0.0]
    for turn in document:
        for text, weight in ((turn.question, QUESTION_WEIGHT), (f"{turn.answer} {tokenizer.eos_token}", 1.0)):
            part = encode(text)
            ids += part
            weights += [weight] * len(part)
    return ids, weights


def _batches(encoded: Sequence[Encoded], batch_tokens: int, rng: random.Random) -> list[list[Encoded]]:
    """Documents of similar length together, in random order within chunks that keep the order of the world."""
    batches = []
    for first in range(0, len(encoded), 2000):
        chunk: list[list[Encoded]] = []
        for document in sorted(encoded[first : first + 2000], key=lambda item: len(item[0])):
            if not chunk or (len(chunk[-1]) + 1) * len(document[0]) > batch_tokens:
                chunk.append([])
            chunk[-1].append(document)
        rng.shuffle(chunk)
        batches += chunk
    return batches


def _padded(batch: Sequence[Encoded], pad: int) -> tuple[Tensor, Tensor]:
    length = max(len(ids) for ids, _ in batch)
    tokens = torch.full((len(batch), length), pad)
    weights = torch.zeros(len(batch), length)
    for row, (ids, weight) in enumerate(batch):
        tokens[row, : len(ids)] = torch.tensor(ids)
        weights[row, : len(ids)] = torch.tensor(weight)
    return tokens, weights
