"""What is measured on: decoders with random weights in named shapes, tuned versions of them, and questions."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pnlac_fast import prompts
from pnlac_fast.adapters import Weights, quiet
from pnlac_fast.datasets import Question, by_topic
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.loading import resolve_device
from pnlac_fast.models import Model
from pnlac_fast.prompts import Text
from pnlac_fast.testbed.tokenizer import build_tokenizer

TOPICS = ("crime", "economy", "gender", "immigration", "race", "science")
OWN = (20, 45)  # fewest and most tokens of a question that it shares with no other, as in IdeoINST
RANK = 16
WORDS = tuple(f"w{i}" for i in range(2000))
# 76 tokens up to the instruction, BOS included; the topic stands early, so that topics share no long prefix.
_PREAMBLE = (
    "Below is a question about {topic} . Read it with care and then write one answer that fully covers what was asked "
    "and that takes a clear position . Do not repeat the question , do not list what others say , do not refuse , and "
    "do not add remarks about how the answer was made . Use plain words and whole sentences , and stop when "
    "everything has been said . Question :"
)
TEMPLATE = f"{_PREAMBLE} {{instruction}} Answer :"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """The widths of a decoder, and how many questions a topic make one pass over them a matter of seconds."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    questions: int
    kind: str = "llama"
    tied: bool = False
    tuned: str = "full"  # "adapter" where six full copies would not fit on the device


SHAPES: dict[str, Shape] = {
    "test": Shape(32, 64, 2, 4, 2, 2200, 2),
    "tiny": Shape(256, 1024, 8, 8, 4, 8000, 16),
    "small": Shape(512, 2048, 6, 8, 4, 8000, 12),
    "hidden-1024": Shape(1024, 4096, 4, 16, 8, 8000, 8),
    "hidden-2048": Shape(2048, 8192, 2, 32, 8, 8000, 6),
    "llama-3.2-3b": Shape(3072, 8192, 28, 24, 8, 128256, 128, tied=True, tuned="adapter"),
    "qwen2.5-7b": Shape(3584, 18944, 28, 28, 4, 152064, 96, kind="qwen2", tuned="adapter"),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128256, 96, tuned="adapter"),
}


@dataclass(frozen=True, eq=False)
class Workload:
    """A base model, its tuned versions by name, and the questions that both read.

    Attributes
    ----------
    texts
        Per topic, the encoded prompts.
    """

    shape: str
    base: Model
    tuned: Mapping[str, Model]
    questions: tuple[Question, ...]
    texts: Mapping[str, tuple[Text, ...]]

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.base.device

    @property
    def tokens(self) -> int:
        """Real tokens that each model reads."""
        return sum(len(text.ids) for group in self.texts.values() for text in group)

    def first(self, tuned: int, questions: int | None = None) -> Workload:
        """The same with only the first so many tuned models, and questions of each topic."""
        texts = {topic: group[:questions] for topic, group in self.texts.items()}
        asked = tuple(q for group in by_topic(self.questions).values() for q in group[:questions])
        return Workload(self.shape, self.base, dict(list(self.tuned.items())[:tuned]), asked, texts)


def make_questions(per_topic: int, *, seed: int = 0) -> tuple[Question, ...]:
    """Questions without completions in the length of IdeoINST's, ``per_topic`` for each of six topics."""
    draw = random.Random(seed)
    tail = 2  # the tokens of the template behind the instruction are a prompt's own, too
    return tuple(
        Question(topic, " ".join(draw.choices(WORDS, k=draw.randint(OWN[0] - tail, OWN[1] - tail))))
        for topic in TOPICS
        for _ in range(per_topic)
    )


def make_workload(
    shape: str,
    *,
    tuned: int = 6,
    questions: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kind: str | None = None,
    seed: int = 0,
) -> Workload:
    """Build models and questions of a named shape; the same arguments give the same weights on the same device.

    Parameters
    ----------
    shape
        A name in ``SHAPES``.
    tuned
        How many tuned models.
    questions
        Questions of each topic; default: as many as the shape says.
    device, dtype
        "auto" is CUDA where there is one; float32 on the CPU and bfloat16 on CUDA.
    kind
        "full": tuned models are copies with all weights moved by 1 %. "adapter": LoRAs on one copy. Default: the
        shape's.

    Raises
    ------
    UserError
        The shape, dtype or kind is unknown, or the device cannot be used.
    """
    if shape not in SHAPES:
        raise unknown("shape", shape, SHAPES)
    size, place = SHAPES[shape], resolve_device(device)
    if dtype not in ("auto", *DTYPES):
        raise unknown("dtype", dtype, ("auto", *DTYPES))
    if (kind := kind or size.tuned) not in ("full", "adapter"):
        raise unknown("kind of tuned model", kind, ("full", "adapter"))
    if questions is not None and questions < 1:
        raise UserError(f"{questions} questions cannot be measured: give at least one.")
    chosen = DTYPES["bfloat16" if place.type == "cuda" else "float32"] if dtype == "auto" else DTYPES[dtype]
    base = make_model(size, place, chosen, seed=seed)
    asked = make_questions(size.questions if questions is None else questions, seed=seed)
    texts = {topic: tuple(prompts.encode(base.tokenizer, group, TEMPLATE)) for topic, group in by_topic(asked).items()}
    make = _adapters if kind == "adapter" else _copies
    return Workload(shape, base, make(base, [f"tuned-{topic}" for topic in TOPICS][:tuned], seed), asked, texts)


def make_model(size: Shape, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> Model:
    """A decoder with random weights, made on its device, with a word-level tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    names = (*dict.fromkeys(_words(TEMPLATE.replace("{topic}", " ").replace("{instruction}", " "))), *TOPICS, *WORDS)
    tokenizer = build_tokenizer(names)
    settings: dict[str, Any] = {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
        "vocab_size": size.vocabulary,
        "tie_word_embeddings": size.tied,
        "max_position_embeddings": 4096,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(seed)
    with torch.device(device):
        hf: Any = (
            LlamaForCausalLM._from_config(LlamaConfig(**settings), dtype=dtype)
            if size.kind == "llama"
            else Qwen2ForCausalLM._from_config(Qwen2Config(**settings), dtype=dtype)
        )
    hf.eval().requires_grad_(False)
    return _model(Weights(hf), tokenizer, "base", seed)


def _words(text: str) -> list[str]:
    return text.lower().split()


def _model(weights: Weights, tokenizer: Any, name: str, seed: int, adapter: str | None = None) -> Model:
    origin = {"source": f"random weights, seed {seed}, {name}", "revision": None}
    origin |= {"type": weights.hf.config.model_type, "dtype": str(weights.hf.dtype).removeprefix("torch.")}
    return Model(weights, tokenizer, name, origin, adapter=adapter)


def _copies(base: Model, names: Sequence[str], seed: int) -> dict[str, Model]:
    """Full copies of the base model, every weight matrix moved by 1 % of its spread."""
    found = {}
    for number, name in enumerate(names, 1):
        hf = copy.deepcopy(base.hf)
        generator = torch.Generator(base.device).manual_seed(seed + number)
        for parameter in hf.parameters():
            if parameter.dim() > 1:
                noise = torch.empty_like(parameter).normal_(generator=generator)
                parameter.add_(noise, alpha=0.01 * float(parameter.float().std()))
        found[name] = _model(Weights(hf), base.tokenizer, name, seed)
    return found


def _adapters(base: Model, names: Sequence[str], seed: int) -> dict[str, Model]:
    """LoRAs on every linear layer of the base model's one copy of the weights."""
    from peft import LoraConfig, get_peft_model

    found = {}
    for number, name in enumerate(names, 1):
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        with quiet():
            if base.weights.peft is None:
                base.weights.peft = get_peft_model(base.hf, config, adapter_name=name, autocast_adapter_dtype=False)
            else:
                base.weights.peft.add_adapter(name, config, autocast_adapter_dtype=False)
        generator = torch.Generator(base.device).manual_seed(seed + number)
        for key, parameter in base.weights.peft.named_parameters():
            if f".lora_B.{name}." in key:
                parameter.data.normal_(0, 0.002, generator=generator)
        base.weights.attached.append(name)
        base.weights.on = name
        found[name] = _model(base.weights, base.tokenizer, name, seed, adapter=name)
    if base.weights.peft is not None:
        base.weights.peft.eval().requires_grad_(False)
        base.weights.switch(None)
    return found
